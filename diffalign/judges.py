"""Reward models that can be trained: CLIP's two towers and a head that says how much a picture is liked for a prompt.

Three heads. "cosine" is PickScore's: exp(logit_scale) times the cosine of the two embeddings, and nothing else, so what is
trained is a plain CLIP. "aspects" has a score for each of several aspects (VisionPrefer's and VP-Score's prompt following,
aesthetics, fidelity, harmlessness; arXiv 2404.15100): the cosine's and a linear function of both embeddings. "general" has
an embedding whose pairs are compared (arXiv 2410.02197), for preferences that go round in circles.

A model is an ordinary transformers CLIP folder with `judge.json` beside the weights and the head's tensors among them.

Shapes: B pictures, P prompts, D projection width, A aspects, 2k dimensions of a general preference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from diffalign.errors import ConfigError
from diffalign.files import atomic_write_text
from diffalign.losses.judging import general_preference
from diffalign.rewards import CLIP_MEAN, CLIP_STD, normalise, pooled

JUDGE_FILE = "judge.json"
FOLDER = "reward"  # in a run folder
HEAD = "judge_head"  # the network's submodule
Head = Literal["cosine", "aspects", "general"]


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What a judge is beside its towers; the content of `judge.json`.

    Attributes:
        head: see the module.
        outputs: of the head: aspects, or dimensions of a general preference; 1 for the cosine.
        aspect_weights: of the aspects in the one score, adding up to 1.
        temperature: of the loss: differences of scores divided by it are logits.
        opponents: mean embedding of the pictures that a general preference was measured on: a picture's score is how much
            it is preferred to them, on average.
        facts: what is known from the training (accuracy, calibration), for people.
    """

    head: Head = "cosine"
    outputs: int = 1
    aspect_weights: tuple[float, ...] = ()
    temperature: float = 1.0
    opponents: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        atomic_write_text(folder / JUDGE_FILE, json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> JudgeSettings | None:
        """Of a folder; None if it is a plain CLIP's.

        Raises:
            ConfigError: the file is not one of ours.
        """
        path = folder / JUDGE_FILE
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            lists = {name: tuple(tree[name]) for name in ("aspect_weights", "opponents")}
            return JudgeSettings(**(tree | lists))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is not readable ({error}); expected what a reward training run writes"
            ) from error


class Judgement(NamedTuple):
    """What a judge says of pictures.

    Attributes:
        scores: (B, A); one column but for aspects. Of a general preference, how much they are preferred to the opponents.
        embedding: (B, 2k), of unit length, of a general preference; else (B, 0).
    """

    scores: Tensor
    embedding: Tensor


class JudgeCLIP(CLIPModel):  # type: ignore[misc]
    """CLIP with a head; `forward` judges pictures."""

    # A plain CLIP has no head, which is made in `reset_head`.
    _keys_to_ignore_on_load_missing = [rf"{HEAD}\..*"]  # noqa: RUF012 - transformers' own attribute

    def __init__(self, config: CLIPConfig, settings: JudgeSettings | None = None) -> None:
        super().__init__(config)
        self.settings = settings or JudgeSettings()
        width: int = config.projection_dim  # type: ignore[assignment]
        self.judge_head = None if self.settings.head == "cosine" else nn.Linear(3 * width, self.settings.outputs)

    def reset_head(self, seed: int) -> None:
        """A new head: aspects begin as the cosine, embeddings as N(0, 1 / (inputs + 1)) makes them (GPM's code)."""
        if self.judge_head is None:
            return
        weight, bias = self.judge_head.weight, self.judge_head.bias
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            bias.zero_()
            if self.settings.head == "aspects":
                weight.zero_()
            else:
                std = 1 / math.sqrt(weight.shape[1] + 1)
                weight.copy_(std * torch.randn(weight.shape, generator=generator))

    def forward(  # type: ignore[override]
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, prompt: Tensor
    ) -> Judgement:
        """`judge` of pictures in [0, 1] at the tower's size, (B, 3, H, W)."""
        return self.judge(normalise(pixels.float(), CLIP_MEAN, CLIP_STD), input_ids, attention_mask, prompt)

    def judge(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, prompt: Tensor) -> Judgement:
        """Judge preprocessed pictures.

        Args:
            pixels: as `diffalign.rewards.preprocess` makes them, (B, 3, H, W).
            input_ids, attention_mask: of the prompts, (P, L).
            prompt: which prompt each picture is for, int64 (B,).
        """
        image = _unit(pooled(self.get_image_features(pixel_values=pixels.to(self.dtype))))
        text = _unit(pooled(self.get_text_features(input_ids=input_ids, attention_mask=attention_mask)))[prompt]
        # Elementwise, so that autocast leaves it in float32.
        logit = self.logit_scale.float().exp() * (image * text).sum(-1, keepdim=True)
        if self.judge_head is None:
            return Judgement(logit, logit[:, :0])
        joint = torch.cat([image, text, math.sqrt(image.shape[1]) * image * text], 1)
        with torch.autocast(joint.device.type, enabled=False):
            out = nn.functional.linear(joint, self.judge_head.weight.float(), self.judge_head.bias.float())
        if self.settings.head == "aspects":
            return Judgement(logit + out, logit[:, :0])
        embedding = _unit(out)
        opponents = torch.tensor(self.settings.opponents or [0.0] * self.settings.outputs, device=embedding.device)
        return Judgement(general_preference(embedding, opponents.expand_as(embedding))[:, None], embedding)

    def overall(self, scores: Tensor) -> Tensor:
        """One score of each picture, (B,), of its scores (B, A)."""
        if scores.shape[1] == 1:
            return scores[:, 0]
        weights = self.settings.aspect_weights or (1 / scores.shape[1],) * scores.shape[1]
        return (scores * torch.tensor(weights, device=scores.device)).sum(1)


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def load_judge(
    folder: str | Path,
    settings: JudgeSettings | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> JudgeCLIP:
    """A judge from a CLIP folder or hub id, or from an earlier judge's folder.

    Args:
        folder: where the weights are.
        settings: head; None takes the folder's own. A head of the same shape is kept, another one begins anew.
        revision: on the hub.
        dtype: of the towers.
        seed: of a new head.

    Raises:
        OSError, ValueError: the files cannot be read.
    """
    own = JudgeSettings.load(Path(folder))
    wanted = settings or own or JudgeSettings()
    kept = own is not None and (own.head, own.outputs) == (wanted.head, wanted.outputs)
    loaded = JudgeCLIP.from_pretrained(
        folder, own if kept else wanted, revision=revision or "main", dtype=dtype, ignore_mismatched_sizes=not kept
    )
    network: JudgeCLIP = loaded
    if not kept:
        network.reset_head(seed)
    network.settings = wanted
    return network


def judge_folder(path: str | Path) -> Path:
    """The folder of a judge: itself, or `reward` in a run folder.

    Raises:
        ConfigError: there is none.
    """
    given = Path(path).expanduser()
    for folder in (given / FOLDER, given):
        if (folder / JUDGE_FILE).is_file() and (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"{str(path)!r} holds no trained reward ({JUDGE_FILE} and config.json, there or in {FOLDER}/); expected the folder "
        "of a finished run of a reward_* config"
    )


def normalised_weights(weights: Sequence[float], outputs: int) -> tuple[float, ...]:
    """Weights of aspects that add up to 1; equal ones where none are given."""
    given = tuple(weights) or (1.0,) * outputs
    return tuple(weight / sum(given) for weight in given)
