"""Runs whose micro-batches are looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign import checkpoint
from diffalign.jobs.image import ImageJob


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ImageJob, Any, Any]]:
    """(job, batch, loss) of every micro-batch of the runs of a test."""
    found: list[tuple[ImageJob, Any, Any]] = []
    original = ImageJob.loss

    def loss(self: ImageJob, batch: Any) -> Any:
        out = original(self, batch)
        found.append((self, batch, out))
        return out

    monkeypatch.setattr(ImageJob, "loss", loss)
    return found


@pytest.fixture
def adapter_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The adapter in a run's last checkpoint."""
    return lambda folder: load_file(list(checkpoint.steps_of(folder).values())[-1] / "adapter.safetensors")
