"""The reward contracts, how rewards are found and called, and the few functions that pixel rewards share.

A reward judges pictures (`Reward`) or texts (`TextReward`). It lives in one file of `reward_models/` (or in a user's own
`.py` file) and imports nothing of ours but this module; for texts a plain function will do. Layout, range and type of its
inputs are checked here, at the border, so that no reward guesses them again.

Shapes: B images or texts, H x W pixels, D embedding width.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffalign import __version__, plugins
from diffalign.errors import ConfigError, UserError

WEIGHTS_VARIABLE = "DIFFALIGN_WEIGHTS"
RANGE_SLACK = 1e-3  # resampling and 16-bit decoding overshoot [0, 1] by less; [-1, 1] and [0, 255] by far more


class RewardError(UserError):
    """A reward got something it cannot score, or returned something that is not a score."""


class RewardModel(ABC):
    """What rewards of pictures and of texts state about themselves, and how they are loaded.

    Loading happens in `__init__`; packages that take long to import are imported there and not at the top of the file.

    Attributes:
        range: lowest and highest possible score; infinite where there is no bound.
        unit: what one unit of the score means, and typical values.
        differentiable: whether gradient reaches the pixels; never the case for texts.
        weights: `id@revision` of everything downloaded, None if there is nothing to download.
        licence: of the weights (of the code, where there are none).
        gap: the known difference to the original implementation.
        argument: what may follow the colon in `name:argument`; None if nothing may.
        waits: most of its time it waits for another process or machine; sampling goes on meanwhile.
    """

    range: ClassVar[tuple[float, float]]
    unit: ClassVar[str]
    differentiable: ClassVar[bool]
    weights: ClassVar[str | None]
    licence: ClassVar[str]
    gap: ClassVar[str]
    argument: ClassVar[str | None] = None
    waits: bool = False

    @abstractmethod
    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load the weights. A third parameter, where `argument` is not None, takes the text after the colon.

        Args:
            device: where the reward computes.
            dtype: of its towers; scores are float32 whatever it is.
        """

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        """Refuse an argument that cannot work, before anything is loaded. By default: any, if the reward takes none.

        Raises:
            ConfigError: what was got and what is possible.
        """
        if argument is not None and cls.argument is None:
            name = plugins.name_of(cls)
            raise ConfigError(f"reward '{name}:{argument}': {name!r} takes nothing after a colon; write {name!r}")

    def identity(self) -> str:
        """What changes its scores beside name, argument, code and `weights`, as a text; by default nothing."""
        return ""

    def parts(self) -> dict[str, Tensor]:
        """What the scores of the last call were made of, by name, (B,) each; by default nothing is told."""
        return {}

    def networks(self) -> list[nn.Module]:
        """Its networks, each once, for whoever moves them to another device and back (`rollout.offload_rewards`).

        By default every module among its attributes, those in lists and dictionaries included, and those of helper objects
        whose class is ours or stands in the reward's own file. A reward that holds networks elsewhere says so here.
        """
        return _modules_of(self, {type(self).__module__.partition(".")[0], "diffalign", "reward_models"}, set())


class Reward(RewardModel):
    """A reward of pictures: pictures and prompts in, one number per picture out, higher is better.

    It keeps the gradient from its output to the pixels if it says `differentiable`; whether one is wanted is the
    caller's choice, so it contains no `no_grad` on the way from pixels to score. Its own weights are frozen.

    Attributes:
        clips: it judges clips (B, 3, F, H, W), too; otherwise it is shown their middle frame.
        grouped: a picture's score depends on the others of its prompt, which therefore all come in one call.
        sets: a picture's score depends on all others of the call, so that calls should be as large as possible.
    """

    clips: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    sets: ClassVar[bool] = False

    @classmethod
    def groups(cls, argument: str | None) -> bool:
        """Whether it is `grouped` with this argument, as far as that can be told before it is loaded."""
        return cls.grouped

    @classmethod
    def of_sets(cls, argument: str | None) -> bool:
        """The same of `sets`."""
        return cls.sets

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        """Score pictures.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W), on the reward's device.
            prompts: B texts.
            metadata: B dictionaries, for rewards that need more than the prompt.

        Returns:
            float32 scores, shape (B,).
        """


class TextReward(RewardModel):
    """A reward of texts: prompts and completions in, one number per completion out, higher is better."""

    differentiable: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """How messages call this reward."""
        return plugins.name_of(type(self))

    @abstractmethod
    def __call__(
        self, prompts: list[str], completions: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> Tensor:
        """Score completions.

        Args:
            prompts: B texts, without chat markers; of a conversation, the last user's message.
            completions: B texts, without chat markers.
            metadata: B dictionaries of the data set's other columns, for rewards that need more than the prompt.

        Returns:
            float32 scores, shape (B,); NaN where the reward has no opinion.
        """


def _modules_of(value: object, own: set[str], seen: set[int]) -> list[nn.Module]:
    """Modules that a value holds, see `RewardModel.networks`.

    Args:
        value: a module, a list, a dictionary, an object; anything else holds none.
        own: packages whose objects are looked into.
        seen: ids of what was looked at.
    """
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return [value]
    inner: Iterable[object] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] in own:
        inner = vars(value).values()
    return [module for one in inner for module in _modules_of(one, own, seen)]


_FACTS = ("range", "unit", "differentiable", "weights", "licence", "gap")


# ---------------------------------------------------------------- finding and loading


@dataclass(frozen=True)
class Description:
    """What a reward says about itself, for lists and model cards."""

    name: str
    summary: str
    range: tuple[float, float]
    unit: str
    differentiable: bool
    weights: str | None
    licence: str
    gap: str
    argument: str | None


def split_name(name: str) -> tuple[str, str | None]:
    """`name:argument` in two; the name may be a path to a `.py` file."""
    if name.endswith(".py"):
        return name, None
    if ".py:" in name:
        path, _, argument = name.partition(".py:")
        return path + ".py", argument
    plugin, colon, argument = name.partition(":")
    return plugin, argument if colon else None


def find(name: str) -> tuple[type[RewardModel], str | None]:
    """The class of a reward and its argument, checked without loading any weights.

    Args:
        name: a file of `reward_models/` or a path to a `.py` file, then perhaps `:argument`.

    Raises:
        ConfigError: no such reward, a file that breaks the contract, or an argument it does not take.
    """
    plugin, argument = split_name(name)
    cls = _find_class(plugin)
    cls.check_argument(argument)
    return cls, argument


def _find_class(plugin: str) -> type[RewardModel]:
    if not plugin.endswith(".py"):
        check_siblings()
    cls = cast("type[RewardModel]", plugins.find("rewards", plugin))
    if missing := [fact for fact in _FACTS if not any(fact in vars(base) for base in cls.__mro__)]:
        raise ConfigError(
            f"reward {plugin!r} does not state its {', '.join(missing)}; see diffalign.rewards.RewardModel"
        )
    return cls


def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Load a reward of pictures by name, such as "pickscore", "world_taste:outlined" or "my_reward.py".

    Raises:
        ConfigError: see `find`; or a reward of texts, which `load_text` loads.
        RewardError: its weights cannot be read.
    """
    check_images(name)
    cls, argument = find(name)
    if argument is None:
        return cast("Callable[..., Reward]", cls)(device, dtype)
    return cast("Callable[..., Reward]", cls)(device, dtype, argument)


def load_text(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TextReward:
    """Load a reward of texts by name, such as "text_world:correct", "my_reward.py" or "my_rewards.py:function".

    Such a function has the signature of TRL's reward functions: `f(prompts, completions, **columns) -> list[float]`.

    Raises:
        ConfigError: no such reward or function, a reward of pictures, or a signature that does not fit.
        RewardError: its weights cannot be read.
    """
    source, argument = split_name(name)
    if source.endswith(".py") and argument is not None and not plugins.has_class("rewards", source):
        from diffalign.reward_functions import FunctionReward

        return FunctionReward(device, dtype, name, function=plugins.find_function("rewards", source, argument))
    cls, argument = find(name)
    if not issubclass(cls, TextReward):
        raise ConfigError(f"reward {name!r} judges pictures, one that judges texts is needed; choose another")
    if argument is None:
        return cls(device, dtype)
    return cast("Callable[..., TextReward]", cls)(device, dtype, argument)


def check_images(name: str) -> None:
    """Refuse, without loading any weights, a name that `load` could not load.

    Raises:
        ConfigError: see `load`.
    """
    cls, _ = find(name)
    if not issubclass(cls, Reward):
        raise ConfigError(f"reward {name!r} judges texts, one that judges pictures is needed; choose another")


def groups(name: str) -> bool:
    """Whether the scores of a reward of pictures depend on the others of their prompt, as far as that is known unloaded."""
    cls, argument = find(name)
    return issubclass(cls, Reward) and cls.groups(argument)


def of_sets(name: str) -> bool:
    """Whether they depend on all pictures of a call, which therefore have no scores of their own."""
    cls, argument = find(name)
    return issubclass(cls, Reward) and cls.of_sets(argument)


def compares(model: Reward) -> bool:
    """Whether a loaded reward compares pictures with one another."""
    return model.grouped or model.sets


def check_judge(name: str) -> None:
    """Refuse what cannot judge single pictures of an evaluation, before anything is loaded.

    Raises:
        ConfigError: no reward of pictures, or one of whole sets.
    """
    check_images(name)
    refuse_sets(name, of_sets(name))


def refuse_sets(name: str, sets: bool) -> None:
    """Refuse a reward of sets where pictures are compared by their own scores.

    Raises:
        ConfigError: it is one.
    """
    if sets:
        raise ConfigError(
            f"evaluation: reward {name!r} is one number of a whole set of pictures, shared out among them; gains and win "
            "rates by caption, and their intervals, would be wrong: take it in rollout.rewards, and others to judge"
        )


def refuse_groups(name: str, grouped: bool, what: str) -> None:
    """Refuse a reward that compares pictures with one another, where they do not come together.

    Args:
        name: of the reward.
        grouped: `groups(name) or of_sets(name)`, or `compares` of the loaded reward.
        what: the command that scores pictures as they come.

    Raises:
        ConfigError: it is grouped.
    """
    if grouped:
        raise ConfigError(
            f"{what}: reward {name!r} compares pictures with one another, and {what} scores them as they come; take it in "
            "rollout.rewards, where they stay together"
        )


def check_text(name: str) -> None:
    """Refuse, without loading any weights, a name that `load_text` could not load.

    Raises:
        ConfigError: see `load_text`.
    """
    source, argument = split_name(name)
    if source.endswith(".py") and argument is not None and not plugins.has_class("rewards", source):
        load_text(name)
        return
    cls, _ = find(name)
    if not issubclass(cls, TextReward):
        raise ConfigError(f"reward {name!r} judges pictures, one that judges texts is needed; choose another")


def describe(name: str) -> Description:
    """What a reward states about itself, without loading its weights; the argument is not looked at."""
    cls = _find_class(split_name(name)[0])
    summary = (cls.__doc__ or "").strip().splitlines()
    return Description(
        name=split_name(name)[0],
        summary=summary[0] if summary else "",
        argument=cls.argument,
        **{fact: getattr(cls, fact) for fact in _FACTS},
    )


def identity(name: str, reward: RewardModel) -> str:
    """A hash that changes with all that is known to change a reward's scores: name, argument, weights, code, version.

    A file or folder in the argument counts with its size and time of change. The device does not count.
    """
    plugin, argument = split_name(name)
    sources = {inspect.getfile(cls) for cls in type(reward).__mro__ if issubclass(cls, RewardModel)}
    if plugin.endswith(".py"):
        sources.add(plugin)
    given = Path(argument) if argument else None
    try:
        stat = given.stat() if given else None
    except (OSError, ValueError):  # not a path
        stat = None
    facts = [
        __version__,
        Path(plugin).stem,
        argument,
        [stat.st_size, stat.st_mtime_ns] if stat else None,
        reward.weights,
        os.environ.get(WEIGHTS_VARIABLE),
        sorted(hashlib.sha256(Path(source).read_bytes()).hexdigest() for source in sources),
        reward.identity(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_siblings() -> None:
    """Make sure that `reward_models` is the one installed beside `diffalign`.

    A folder of that name in the working directory comes first on the import path under `python -m` and
    `accelerate launch -m`, and would silently replace ours.

    Raises:
        ConfigError: with both paths.
    """
    ours = Path(__file__).resolve().parent.parent / "reward_models"
    spec = importlib.util.find_spec("reward_models")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if found != ours:
        raise ConfigError(
            f"the package 'reward_models' is {found or 'not importable'}, but the one of this installation is {ours}; "
            "rename the other folder or start from another directory"
        )


# ---------------------------------------------------------------- calling


def stills(images: Tensor) -> Tensor:
    """The middle frame of clips (N, 3, F, H, W), as rewards of pictures see them; images (N, 3, H, W) as they are."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images


def score(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]] | None = None,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    missing: bool = False,
) -> Tensor:
    """Score any number of pictures, with everything checked on the way in and out.

    Args:
        reward: a loaded reward.
        images: float RGB in [0, 1], shape (B, 3, H, W), or clips (B, 3, F, H, W), of which a reward of pictures sees
            the middle frame. Gradient flows if the reward is differentiable.
        prompts: B texts.
        metadata: B dictionaries or None.
        batch_size: pictures per call of the reward, unless it compares them with one another (`grouped`, `sets`).
        device: where the reward was loaded, if it is not where the pictures are.
        missing: let NaN through, which says that the reward has no opinion.

    Returns:
        float32 scores, shape (B,), on the device that the reward answers on.

    Raises:
        RewardError: wrong layout, type or range; a count that does not match; gradient wanted from a reward that has
            none; an answer of the wrong shape or not finite, with the prompts it belongs to.
    """
    name = plugins.name_of(type(reward))
    if not reward.clips:
        images = stills(images)
    _check_input(name, reward, images, prompts, metadata)
    scores = []
    if compares(reward):
        batch_size = max(1, len(prompts))
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        batch, texts = images[part].to(device).float().clamp(0, 1), list(prompts[part])
        answer = reward(batch, texts, list(metadata[part]) if metadata is not None else None)
        _check_output(name, answer, texts, missing=missing)
        scores.append(answer.float())
    return torch.cat(scores) if scores else torch.zeros(0)


def score_texts(
    reward: TextReward,
    prompts: Sequence[str],
    completions: Sequence[str],
    metadata: Sequence[dict[str, Any]] | None = None,
    *,
    batch_size: int = 256,
    missing: bool = False,
) -> Tensor:
    """Score any number of texts, with everything checked on the way in and out.

    Args:
        reward: a loaded reward.
        prompts: B texts.
        completions: B texts.
        metadata: B dictionaries or None.
        batch_size: texts per call of the reward.
        missing: let NaN through, which says that the reward has no opinion (TRL's None).

    Returns:
        float32 scores, shape (B,), without gradient, on the CPU.

    Raises:
        RewardError: a count that does not match; an answer of the wrong shape or not finite, with the prompts it
            belongs to.
    """
    for what, given in (("prompts", prompts), ("completions", completions), ("metadata entries", metadata)):
        if isinstance(given, str):
            raise RewardError(f"reward {reward.name!r}: got one text as {what}; a list with one each expected")
        if given is not None and len(given) != len(completions):
            raise RewardError(f"reward {reward.name!r}: got {len(given)} {what} for {len(completions)} completions")
    scores = []
    for start in range(0, len(completions), batch_size):
        part = slice(start, start + batch_size)
        asked = list(prompts[part])
        answer = reward(asked, list(completions[part]), list(metadata[part]) if metadata is not None else None)
        _check_output(reward.name, answer, asked, missing=missing)
        scores.append(answer.detach().float().cpu())
    return torch.cat(scores) if scores else torch.zeros(0)


def _check_input(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]] | None,
) -> None:
    if images.ndim != 4 + (reward.clips and images.ndim == 5) or images.shape[1] != 3:
        raise RewardError(f"reward {name!r}: images have shape {tuple(images.shape)}; RGB (B, 3, H, W) expected")
    if not images.is_floating_point():
        raise RewardError(f"reward {name!r}: images are {images.dtype}; floats in [0, 1] expected: divide by 255")
    if isinstance(prompts, str) or len(prompts) != len(images):
        got = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(f"reward {name!r}: got {got} for {len(images)} images; a list with one prompt each expected")
    if metadata is not None and len(metadata) != len(images):
        raise RewardError(f"reward {name!r}: got {len(metadata)} metadata entries for {len(images)} images")
    if images.requires_grad and torch.is_grad_enabled() and not reward.differentiable:
        raise RewardError(f"reward {name!r} is not differentiable, but the images ask for a gradient; detach them")
    if len(images):
        low, high = (float(v) for v in images.detach().aminmax())
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):  # also true for NaN
            raise RewardError(
                f"reward {name!r}: images lie in [{low:.3g}, {high:.3g}]; [0, 1] expected "
                "(a VAE's output x maps by x / 2 + 1 / 2, clamped)"
            )


def _check_output(name: str, answer: Tensor, prompts: list[str], *, missing: bool = False) -> None:
    if tuple(answer.shape) != (len(prompts),):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(answer.shape)} instead of ({len(prompts)},) for the prompts "
            f"{_shown(prompts)}"
        )
    fine = answer.detach().isfinite() | (answer.isnan() & missing)
    bad = [prompt for prompt, good in zip(prompts, fine.tolist(), strict=True) if not good]
    if bad:
        raise RewardError(f"reward {name!r} returned NaN or infinity for the prompts {_shown(bad)}")


def _shown(prompts: list[str], most: int = 3) -> str:
    rest = f" and {len(prompts) - most} more" if len(prompts) > most else ""
    return ", ".join(repr(prompt[:80]) for prompt in prompts[:most]) + rest


# ---------------------------------------------------------------- shared by pixel rewards

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_eight_bit(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to multiples of 1/255; the gradient passes as if there were no rounding.

    The clamp does stop the gradient of saturated pixels, as in the official back-propagation codes.
    """
    images = images.clamp(0, 1)
    return images + ((images * 255).round() / 255 - images).detach()


def preprocess(
    images: Tensor,
    size: int = 224,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    *,
    eight_bit: bool = True,
    crop_offset: Callable[[float], int] = math.floor,
) -> Tensor:
    """CLIP's transform on tensors: shorter side to `size` (bicubic, antialiased), centre crop, normalise.

    Imitates Pillow, which the originals use: across first, then down, rounding to 8 bits after each pass. Within
    1/255 of it but for one value in several thousand, which is 2/255 away (`tests/test_rewards.py`,
    `tests/reward_models/test_hpsv3.py`); one float pass without rounding is up to 8/255 away. Keeps the gradient.

    Args:
        images: float RGB in [0, 1], shape (B, 3, H, W).
        size: side of the square that the tower reads, in pixels.
        mean: subtracted per channel.
        std: divided by per channel.
        eight_bit: round (gradient straight through). Off makes the score smooth in the pixels.
        crop_offset: how the crop's half-pixel offset is rounded: `math.floor` in transformers, `round` in torchvision.

    Returns:
        float32, shape (B, 3, size, size).
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = tuple(size if side == short else int(size * side / short) for side in (height, width))
    images = pillow_resize(images, (shape[0], shape[1]), eight_bit=eight_bit)
    top, left = (crop_offset((side - size) / 2) for side in shape)
    return normalise(images[..., top : top + size, left : left + size], mean, std)


def pillow_resize(images: Tensor, shape: tuple[int, int], *, mode: str = "bicubic", eight_bit: bool = True) -> Tensor:
    """Resize to (height, width) as Pillow does: across first, then down, rounding to 8 bits before and after each pass.

    Args:
        images: float RGB in [0, 1], shape (B, 3, H, W).
        shape: height and width of the answer.
        mode: "bicubic" or "bilinear", both antialiased.
        eight_bit: see `preprocess`.
    """
    on_grid = to_eight_bit if eight_bit else functools.partial(torch.clamp, min=0, max=1)
    images = on_grid(images.float())
    for step in ((images.shape[-2], shape[1]), shape):
        if step != tuple(images.shape[-2:]):
            images = on_grid(interpolate(images, step, mode=mode, antialias=True, align_corners=False))
    return images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel."""
    mean_111, std_111 = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images - mean_111) / std_111


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of rows, float32 (B,): a product and a sum, which autocast leaves in float32, unlike a matrix product."""
    a, b = a.float(), b.float()
    return (a / a.norm(dim=-1, keepdim=True) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)


def local_weights(source: str | Path) -> str:
    """A hub id or path; the copy under the folder `DIFFALIGN_WEIGHTS` (as `<owner>/<name>`) where there is one."""
    root = os.environ.get(WEIGHTS_VARIABLE)
    if root and (Path(root) / source).exists():
        return str(Path(root) / source)
    return str(source)


class ClipTowers:
    """Frozen transformers CLIP towers whose image side keeps the gradient to the pixels.

    Args:
        model: hub id, or a folder with the hub's layout.
        tokenizer: the same; None takes the model's own.
        revision: of `model` on the hub, and `tokenizer_revision` of `tokenizer`.
        device: where the towers compute.
        dtype: of the towers.

    Raises:
        RewardError: the files cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        text_source = model if tokenizer is None else tokenizer
        text_revision = revision if tokenizer is None else tokenizer_revision
        try:
            towers = CLIPModel.from_pretrained(local_weights(model), revision=revision or "main", dtype=dtype)
            words = CLIPTokenizer.from_pretrained(local_weights(text_source), revision=text_revision or "main")
        except (OSError, ValueError) as error:
            raise RewardError(
                f"CLIP weights {str(model)!r} (tokenizer {str(text_source)!r}) cannot be loaded: "
                f"{str(error).splitlines()[0]} Give a local folder after a colon, or put <owner>/<name> under "
                f"${WEIGHTS_VARIABLE}"
            ) from error
        self.model, self.tokenizer = cast(Any, towers), cast(Any, words)
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.dtype = torch.device(device), dtype
        self.image_size: int = self.model.config.vision_config.image_size
        self.max_length: int = self.model.config.text_config.max_position_embeddings

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Preprocessed pictures (B, 3, size, size) to projected embeddings, float32 (B, D), not normalised."""
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype)))

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Texts to projected embeddings, float32 (B, D), not normalised; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        features = pooled(
            self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        )
        return features[[distinct.index(prompt) for prompt in prompts]]

    @property
    def logit_scale(self) -> Tensor:
        """The learnt factor of the cosine (about 100), float32 scalar."""
        scale: Tensor = self.model.logit_scale
        return scale.float().exp()


def pooled(output: Any) -> Tensor:
    """transformers 5 returns an object that holds the projected vector, transformers 4 the vector itself."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()
