"""Plain functions as rewards of texts, with the signature of TRL's reward functions.

Shapes: B texts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rewards import TextReward

RewardFunction = Callable[..., "list[float] | Tensor"]


class FunctionReward(TextReward):
    """A function with the signature of TRL's reward functions.

    It gets the prompts and completions as texts and the other columns of the data set as lists, all as keywords. Where
    it returns None it has no opinion, which becomes NaN.
    """

    range = (-math.inf, math.inf)
    unit = "what the function returns"
    weights = None
    licence = "the function's own"
    gap = "none: this is the original"
    argument = "the name of the function"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        source: str = "function",
        *,
        function: RewardFunction,
    ) -> None:
        """Take a function; `source` is how messages call it.

        Raises:
            ConfigError: its signature cannot take what it will be given.
        """
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
        if not ({"prompts", "completions"} <= named and takes_all) or inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"reward {source!r} has the signature {inspect.signature(function)}; expected a plain function "
                "(prompts, completions, **columns) -> list of floats, as in TRL"
            )
        self.source, self.function = source, function

    @property
    def name(self) -> str:
        return self.source

    def __call__(
        self, prompts: list[str], completions: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> Tensor:
        rows = metadata or []
        names = {name: None for row in rows for name in row}  # in the order of their first appearance
        columns = {name: [row.get(name) for row in rows] for name in names}
        values = self.function(prompts=prompts, completions=completions, **columns)
        if isinstance(values, Tensor):
            return values.detach().float()
        return torch.tensor([math.nan if value is None else float(value) for value in values])
