"""Reward models that can be trained: CLIP's two towers and a head that says how much a picture is liked for a prompt.

Four heads. "cosine" is PickScore's: exp(logit_scale) times the cosine of the two embeddings, and nothing else, so what is
trained is a plain CLIP. "aspects" has a score for each of several aspects (VisionPrefer's and VP-Score's prompt following,
aesthetics, fidelity, harmlessness; arXiv 2404.15100): the cosine's and a linear function of both embeddings. "general" has
an embedding whose pairs are compared (arXiv 2410.02197), for preferences that go round in circles. "experts" has scores for
several criteria as "aspects" has, and gates that read the prompt say how much each counts in the one score (MJ-VIDEO, arXiv
2502.01719; code aiming-lab/MJ-Video): s_a = sum over the criteria c of an aspect a of g_c(prompt) u_c s_c, score = sum over
aspects of h_a(prompt) s_a, with g and h softmaxes of three-layer perceptrons, and u learnt scales.

Where MJ-VIDEO and "experts" differ: it judges clips by a vision-language model, whose criteria are linear in the last
token's state and whose gates read the prompt's tokens; here both come from CLIP's embeddings, the criteria begin as the
cosine, and one score can be trained from the beginning instead of in three stages. Its labels of whole aspects, its
regression to ratings and its focal loss are not here. The perceptrons' activation (ReLU) and temperature (1) are UNVERIFIED.

A model is an ordinary transformers CLIP folder with `judge.json` beside the weights and the head's tensors among them.

Shapes: B pictures, P prompts, D projection width, A aspects or criteria, 2k dimensions of a general preference.
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
Head = Literal["cosine", "aspects", "general", "experts"]


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What a judge is beside its towers; the content of `judge.json`.

    Attributes:
        head: see the module.
        outputs: of the head: aspects, criteria, or dimensions of a general preference; 1 for the cosine.
        aspect_weights: of the aspects in the one score, adding up to 1.
        temperature: of the loss: differences of scores divided by it are logits.
        opponents: mean embedding of the pictures that a general preference was measured on: a picture's score is how much
            it is preferred to them, on average.
        criteria: of experts, how many each aspect has; empty: all are of one aspect.
        gate_width: of their perceptrons' hidden layers.
        gate_temperature: divides the gates' logits.
        facts: what is known from the training (accuracy, calibration), for people.
    """

    head: Head = "cosine"
    outputs: int = 1
    aspect_weights: tuple[float, ...] = ()
    temperature: float = 1.0
    opponents: tuple[float, ...] = ()
    criteria: tuple[int, ...] = ()
    gate_width: int = 1024
    gate_temperature: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Criteria of each aspect, adding up to `outputs`."""
        return self.criteria or (self.outputs,)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the head's tensors depend on."""
        gates = (self.sizes, self.gate_width) if self.head == "experts" else ()
        return self.head, self.outputs, *gates

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
            lists["criteria"] = tuple(tree.get("criteria", ()))  # files of before there were experts
            return JudgeSettings(**(tree | lists))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is not readable ({error}); expected what a reward training run writes"
            ) from error


class Judgement(NamedTuple):
    """What a judge says of pictures.

    Attributes:
        scores: (B, A); one column but for aspects and criteria. Of a general preference, how much they are preferred to the
            opponents.
        weights: of the scores in the one score, (B, A); of experts they depend on the prompt.
        embedding: (B, 2k), of unit length, of a general preference; else (B, 0).
    """

    scores: Tensor
    weights: Tensor
    embedding: Tensor

    @property
    def overall(self) -> Tensor:
        """One score of each picture, (B,)."""
        return (self.scores * self.weights).sum(1)


def shares(criteria: Tensor, aspects: Tensor, sizes: Sequence[int], temperature: float) -> Tensor:
    """How much each criterion counts: its softmax within its aspect times the aspect's, (B, A); rows add up to 1.

    Args:
        criteria: logits of the criteria, those of an aspect together, (B, A).
        aspects: logits of the aspects, (B, len(sizes)).
        sizes: criteria of each aspect, adding up to A.
        temperature: divides the logits, > 0.
    """
    within = torch.cat([(part / temperature).softmax(1) for part in criteria.split(list(sizes), 1)], 1)
    between = (aspects / temperature).softmax(1)
    return within * between.repeat_interleave(torch.tensor(sizes, device=between.device), 1)


class Experts(nn.Module):
    """Criteria, their scales, and the gates over them.

    Args:
        width: D.
        settings: of the judge.
    """

    def __init__(self, width: int, settings: JudgeSettings) -> None:
        super().__init__()
        self.sizes, self.temperature = settings.sizes, settings.gate_temperature
        self.criteria = nn.Linear(3 * width, settings.outputs, bias=False)
        self.scale = nn.Parameter(torch.ones(settings.outputs))
        self.gate = _perceptron(width, settings.gate_width, settings.outputs)
        # A softmax over one aspect is 1 whatever it reads.
        self.aspect_gate = _perceptron(width, settings.gate_width, len(self.sizes)) if len(self.sizes) > 1 else None

    def reset(self, generator: torch.Generator) -> None:
        """Criteria that add nothing to the cosine, and gates that already tell prompts (and so criteria) apart."""
        self.criteria.weight.zero_()
        self.scale.fill_(1)
        for layer in (*self.gate, *(self.aspect_gate or ())):
            std = math.sqrt(2 / layer.weight.shape[1])  # He et al. 2015, for ReLU
            layer.weight.copy_(std * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()

    def forward(self, joint: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What criteria add to the cosine, and their weights in the one score, (B, A) each.

        Args:
            joint: of picture and prompt, (B, 3D).
            text: embeddings of the prompts, of unit length, (B, D).
        """
        text = math.sqrt(text.shape[1]) * text  # elements of about 1
        criteria = _through(self.gate, text)
        aspects = criteria[:, :1] if self.aspect_gate is None else _through(self.aspect_gate, text)
        share = shares(criteria, aspects, self.sizes, self.temperature)
        return _linear(self.criteria, joint), share * self.scale.float()


def _perceptron(width: int, hidden: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)])


def _through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers[:-1]:
        x = _linear(layer, x).relu()
    return _linear(layers[-1], x)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """In float32, whatever the type of the weights."""
    assert isinstance(layer, nn.Linear), "heads are made of them"
    return nn.functional.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


class JudgeCLIP(CLIPModel):  # type: ignore[misc]
    """CLIP with a head; `forward` judges pictures."""

    # A plain CLIP has no head, which is made in `reset_head`.
    _keys_to_ignore_on_load_missing = [rf"{HEAD}\..*"]  # noqa: RUF012 - transformers' own attribute

    def __init__(self, config: CLIPConfig, settings: JudgeSettings | None = None) -> None:
        super().__init__(config)
        self.settings = settings or JudgeSettings()
        width: int = config.projection_dim  # type: ignore[assignment]
        self.judge_head: nn.Linear | Experts | None = None
        if self.settings.head == "experts":
            self.judge_head = Experts(width, self.settings)
        elif self.settings.head != "cosine":
            self.judge_head = nn.Linear(3 * width, self.settings.outputs)

    def reset_head(self, seed: int) -> None:
        """A new head: aspects and experts begin as the cosine, embeddings are N(0, 1 / (inputs + 1)) (GPM's code)."""
        if self.judge_head is None:
            return
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            if isinstance(self.judge_head, Experts):
                self.judge_head.reset(generator)
                return
            weight, bias = self.judge_head.weight, self.judge_head.bias
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
        one = torch.ones_like(logit)
        if self.judge_head is None:
            return Judgement(logit, one, logit[:, :0])
        joint = torch.cat([image, text, math.sqrt(image.shape[1]) * image * text], 1)
        with torch.autocast(joint.device.type, enabled=False):
            if isinstance(self.judge_head, Experts):
                out, weights = self.judge_head(joint, text)
                return Judgement(logit + out, weights, logit[:, :0])
            out = _linear(self.judge_head, joint)
        if self.settings.head == "aspects":
            weights = torch.tensor(normalised_weights(self.settings.aspect_weights, out.shape[1]), device=out.device)
            return Judgement(logit + out, weights.expand_as(out), logit[:, :0])
        embedding = _unit(out)
        opponents = torch.tensor(self.settings.opponents or [0.0] * self.settings.outputs, device=embedding.device)
        return Judgement(general_preference(embedding, opponents.expand_as(embedding))[:, None], one, embedding)


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
    kept = own is not None and own.shape == wanted.shape
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
