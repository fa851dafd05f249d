"""Asking rewards about sampled images, while sampling goes on where the rewards only wait for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from diffalign import rewards


class Scoring:
    """Asks rewards about one batch after the other; if some of them only wait for an answer, in a thread.

    Args:
        models: the rewards.
        sign: -1 for what they do not like.
    """

    def __init__(self, models: Sequence[rewards.Reward], sign: float = 1.0) -> None:
        self.models, self.sign = models, sign
        self.thread = ThreadPoolExecutor(1) if any(model.waits for model in models) else None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def submit(self, images: Tensor, prompts: list[str]) -> Future[Tensor]:
        """Rewards (N, R) of images, on the CPU, when they are there."""
        if self.thread is not None:
            return self.thread.submit(self._score, images, prompts)
        done: Future[Tensor] = Future()
        done.set_result(self._score(images, prompts))
        return done

    @torch.no_grad()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        if not self.models:
            return torch.zeros(len(images), 0)
        return self.sign * torch.stack([rewards.score(model, images, prompts).cpu() for model in self.models], 1)
