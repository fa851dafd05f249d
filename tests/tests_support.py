"""Small builders shared by tests."""

from __future__ import annotations

import torch

from diffalign.data.batch import PairBatch


def random_batch(n: int, *, same_images: bool = False, t: int | None = None, only: slice = slice(None)) -> PairBatch:
    """A batch of random pairs in the shapes of the tiny SDXL base (latents 20 x 8 x 8)."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(n, *shape, generator=g)

    chosen, rejected, noise = randn(20, 8, 8), randn(20, 8, 8), randn(20, 8, 8)
    hidden, pooled = randn(20, 64), randn(32)
    times = torch.randint(0, 900, (n,), generator=g) if t is None else torch.full((n,), t)
    time_ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).expand(n, -1)
    return PairBatch(
        ids=tuple(f"pair{i}" for i in range(n))[only],
        chosen=chosen[only],
        rejected=(chosen if same_images else rejected)[only],
        text={"encoder_hidden_states": hidden[only], "text_embeds": pooled[only]},
        chosen_image={"time_ids": time_ids[only]},
        rejected_image={"time_ids": time_ids[only]},
        p=torch.ones(n)[only],
        weight=torch.ones(n)[only],
        t=times[only],
        noise=noise[only],
    )
