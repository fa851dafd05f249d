"""What must be there before trl is imported, and the precision of a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Its experimental trainers warn on import; here they are only compared with.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The type of all scores, and torch's default type, in which TRL makes constants such as log(epsilon)."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)
