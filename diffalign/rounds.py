"""Rounds of sampled training data in checkpoints: nested dataclasses as dictionaries, lists and tensors, and back.

Checkpoints are read without running code, so only classes named by the caller are made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries with their class's name."""
    if hasattr(value, "__dataclass_fields__"):
        return {"class": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {"map": {name: plain(entry) for name, entry in value.items()}}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    # A slice would take the whole tensor along.
    return value.cpu().clone() if isinstance(value, Tensor) else value


def rebuilt(value: Any, classes: Mapping[str, Any]) -> Any:
    """The inverse of `plain`, for these classes by name."""
    if isinstance(value, Mapping):
        if "map" in value:
            return {name: rebuilt(entry, classes) for name, entry in value["map"].items()}
        made = {name: rebuilt(entry, classes) for name, entry in value.items() if name != "class"}
        return classes[value["class"]](**made)
    return [rebuilt(entry, classes) for entry in value] if isinstance(value, list) else value
