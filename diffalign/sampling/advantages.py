"""Advantages of the images of a round, over all of it before it is cut; with `rollout.history` by rewards of past rounds.

A history is a baseline that needs no groups. DDPO's code (kvablack/ddpo-pytorch:ddpo_pytorch/stat_tracking.py) compares a
reward with the last rewards of the same prompt, the round's own among them, and with the whole round while it knows too few
of them. That works where prompts come back often; with a list that is longer than what a run samples, hardly any prompt is
ever known (PRDP, arXiv 2402.08714, reports that DDPO fails then), and groups (`samples_per_prompt`, `objective.center:
mean`) do the same within a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.config import RunConfig
from diffalign.losses import Groups, Objective
from diffalign.losses.group_objective import GroupObjective
from diffalign.sampling.rules import reward_weights


class RoundAdvantages:
    """What the objective, or the history of every prompt, makes of the rewards of a round.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.objective: Objective = config.objective
        self.weights = reward_weights(config)
        size = config.rollout.history
        self.history = None if size is None else RewardHistory(size, config.rollout.history_min)

    def __call__(self, number: int, texts: Sequence[str], rewards: Sequence[tuple[int, Tensor]]) -> dict[int, Tensor]:
        """Advantages of every prompt's images (K,), by place; nothing if the objective makes none before it sees scores.

        Args:
            number: of the round.
            texts: prompts of all places of the round.
            rewards: place and rewards (K, R) of every prompt of the round, over all processes.
        """
        group = torch.tensor([place for place, reward in rewards for _ in reward])
        reward = torch.cat([reward for _, reward in rewards]) * self.weights
        groups = Groups(index=torch.arange(len(reward)), group=group, reward=reward)
        if self.history is None:
            advantage = self.objective.round_advantage(groups)
        else:
            assert isinstance(self.objective, GroupObjective), "checked before anything is loaded"
            total = self.objective.total(groups)
            advantage = self.history.advantages(number, [texts[place] for place in group.tolist()], total)
        return {} if advantage is None else {place: advantage[group == place] for place, _ in rewards}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.history is None else {"history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.history is not None and "history" in state:
            self.history.load_state_dict(state["history"])


class RewardHistory:
    """The last rewards of every prompt, and advantages by them.

    Args:
        size: rewards of a prompt that are kept (kvablack/ddpo-pytorch: 16; jannerm/ddpo: 32).
        minimum: with fewer rewards of its prompt, the round's own one included, a reward is compared with the round.
        eps: added to the standard deviation, NumPy's.
    """

    def __init__(self, size: int, minimum: int, eps: float = 1e-6) -> None:
        self.size, self.minimum, self.eps = size, minimum, eps
        self._kept: dict[str, list[tuple[int, float]]] = {}  # (round, reward)

    def advantages(self, number: int, prompts: Sequence[str], reward: Tensor) -> Tensor:
        """(reward - mean) / (std + eps) by the prompt's history or by the round, (M,); remembers the rewards.

        A round that comes a second time, as after a resumed run that makes it anew, takes the place of its first coming.

        Args:
            number: of the round.
            prompts: of every reward.
            reward: (M,); NaN is a missing one: its advantage is 0 and it is not remembered.
        """
        here = reward[~reward.isnan()]
        for text in prompts:
            self._kept[text] = [entry for entry in self._kept.get(text, []) if entry[0] < number]
        for text, value in zip(prompts, reward.tolist(), strict=True):
            if value == value:
                self._kept[text] = [*self._kept[text], (number, value)][-self.size :]
        found = torch.empty_like(reward)
        for place, text in enumerate(prompts):
            known = torch.tensor([value for _, value in self._kept[text]], dtype=reward.dtype, device=reward.device)
            against = known if len(known) >= self.minimum else here
            found[place] = (reward[place] - against.mean()) / (against.std(correction=0) + self.eps)
        return found.nan_to_num(0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": list(self._kept),
            "rounds": [[number for number, _ in entries] for entries in self._kept.values()],
            "rewards": [[value for _, value in entries] for entries in self._kept.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = {
            text: list(zip(numbers, values, strict=True))
            for text, numbers, values in zip(state["prompts"], state["rounds"], state["rewards"], strict=True)
        }
