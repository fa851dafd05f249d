"""A reward model that `diffalign train` has trained: CLIP's towers with a head.

    trained:runs/demo_reward                 the run's folder, or its reward/ inside

Heads are those of `diffalign.judges`: PickScore's cosine, several aspects, criteria with gates that read the prompt, or a
general preference, whose score is how much a picture is preferred to those it was trained on, on average, as a logit. With
the cosine the folder is a plain CLIP, which `pickscore:FOLDER` reads, too.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.judges import JUDGE_FILE, judge_folder, load_judge
from diffalign.rewards import Reward, RewardError, preprocess


class Trained(Reward):
    """What a reward model says that you trained yourself."""

    range = (-math.inf, math.inf)
    unit = "that of its training: a difference divided by the loss's temperature is a logit"
    differentiable = True
    weights = None
    licence = "yours"
    gap = "none: this is the original; towers are merged with their adapter"
    argument = "folder of a finished reward training run, or reward/ in it"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, folder: str | None = None
    ) -> None:
        from transformers import CLIPTokenizer

        self.check_argument(folder)
        assert folder is not None, "checked"
        self.folder = judge_folder(folder)
        try:
            network = load_judge(self.folder, dtype=dtype)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise RewardError(f"trained: {self.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        config: Any = network.config
        self.size = int(config.vision_config.image_size)
        self.max_length = int(config.text_config.max_position_embeddings)
        self.eight_bit = True  # see `preprocess`
        self._parts: dict[str, Tensor] = {}

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is None:
            raise ConfigError("reward 'trained' needs a folder: trained:runs/my_reward")
        judge_folder(argument)

    def identity(self) -> str:
        """The folder's own words, and when its weights were written."""
        files = sorted(self.folder.glob("*.safetensors"))
        stamps = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return json.dumps([(self.folder / JUDGE_FILE).read_text(encoding="utf-8"), stamps])

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        pixels = preprocess(images, self.size, eight_bit=self.eight_bit).to(self.device)
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        place = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        judged = self.network.judge(pixels, tokens.input_ids, tokens.attention_mask, place)
        settings = self.network.settings
        self._parts = {}
        if settings.head in ("aspects", "experts"):
            self._parts |= {f"aspect_{a}": score.detach() for a, score in enumerate(judged.scores.T)}
        if settings.head == "experts":
            self._parts |= {f"weight_{a}": weight.detach() for a, weight in enumerate(judged.weights.T)}
        return judged.overall / settings.temperature if settings.head == "general" else judged.overall
