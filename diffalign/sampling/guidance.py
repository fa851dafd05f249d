"""Guidance whose negative branch has weights of its own, in stock diffusers pipelines.

    from diffalign.sampling.guidance import NegativeGuidance

    with NegativeGuidance(pipe, "negative.safetensors", alpha=1.0, beta=1.0):
        image = pipe("a lighthouse", guidance_scale=5).images[0]

Diffusion-NPO (arXiv 2505.11245) and Self-NPO (2505.11777). With theta the base's weights, eta the adapters that act in the
pipeline, delta the negative adapter and w the guidance scale as diffusers counts it:

    positive branch   theta + eta
    negative branch   theta + alpha eta + beta delta
    prediction        negative + w (positive - negative)

The published loaders mix with alpha = 1 - merge_weight and beta = 1. The prompt of the negative branch, scheduler and seeds
are the pipeline's. alpha keeps both predictions correlated: independent ones would amplify noise.

A pipeline that puts both branches into one batch (Stable Diffusion, SDXL, SD3, PixArt, Sana, CogVideoX) stays with one call
of the network, in which rows have different adapters; one that calls twice (FLUX with true guidance, Qwen-Image, Wan) is
given the branch's adapters call by call. The first batch is checked against two calls: where a layer cannot tell rows apart,
two calls are made from then on.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor, nn

from diffalign.adapters import adapter_names
from diffalign.branches import Branches, Mix, RowsUnknownError
from diffalign.errors import ConfigError

logger = logging.getLogger(__name__)
NAME = "diffalign_negative"
Scale: TypeAlias = Callable[[int, int], float]  # (step from 0, number of steps) -> guidance scale
# Of the largest entry of a prediction: what one batch and two calls may differ by through the order of sums.
ALIKE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def falling(scale: float) -> Scale:
    """EchoMimicV3's guidance (arXiv 2507.03905): from `scale` down to half of it in the first third of the steps."""

    def at(step: int, steps: int) -> float:
        return scale / 2 + scale / 2 * (1 - math.cos(math.pi * ((steps - step) / steps) ** 5)) / 2

    return at


def interval(scale: float, start: float, end: float) -> Scale:
    """Guidance in a part of the steps only (arXiv 2404.07724), from `start` to `end` as shares of the run; 1 outside."""
    if not 0 <= start < end <= 1:
        raise ConfigError(f"interval: got {start} to {end}; expected 0 <= start < end <= 1")
    return lambda step, steps: scale if start <= step / steps < end else 1.0


@dataclass
class _Run:
    """Where a pipeline's run has got to."""

    step: int = -1
    time: float = math.inf
    positive: Tensor | None = None  # of the step under way, where branches are called apart
    prompt: dict[str, Tensor] = field(default_factory=dict)  # what the positive branch was told, then
    branches: set[str] = field(default_factory=set)


class NegativeGuidance:
    """A context within which a pipeline's negative branch has other adapters than its positive one.

    Args:
        pipe: a stock diffusers pipeline.
        negative: a LoRA file or repository, as `pipe.load_lora_weights` takes it; the name of an adapter that the pipeline
            has; a dictionary of adapters and weights; or a whole network that takes the place of the pipeline's in the
            negative branch.
        alpha: share of the positive adapters in the negative branch.
        beta: weight of the negative adapter.
        scale: guidance scale by step, in place of the pipeline's number; see `falling` and `interval`.
        rescale: diffusers' `guidance_rescale` (arXiv 2305.08891), for any pipeline; leave the pipeline's own at 0.
        prompt_scale, prompt_steps: the negative prompt's embedding is multiplied by `prompt_scale` in the first
            `prompt_steps` steps (EchoMimicV3: 1.5 in 3, whose code multiplies anew in every step, up to 3.375). Without
            effect where the network normalises its text (Qwen-Image).
        prompt_share: a: embeddings of the negative branch become (1 + a) negative - a positive, pooled ones, too (CHATS,
            arXiv 2502.12579: 0.5).
        calls: "one" batch, "two" calls, or "auto": one batch if it gives the same as two.

    Raises:
        ConfigError: a pipeline without classifier-free guidance; adapters whose rows cannot be told apart; on entering, or
            when the pipeline runs without a negative branch.
    """

    def __init__(
        self,
        pipe: Any,
        negative: str | Path | Mapping[str, float] | nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        scale: Scale | None = None,
        rescale: float = 0.0,
        prompt_scale: float = 1.0,
        prompt_steps: int = 0,
        prompt_share: float = 0.0,
        calls: Literal["auto", "one", "two"] = "auto",
    ) -> None:
        self.pipe, self.negative, self.alpha, self.beta = pipe, negative, alpha, beta
        self.scale, self.rescale = scale, rescale
        self.prompt_scale, self.prompt_steps, self.prompt_share = prompt_scale, prompt_steps, prompt_share
        self.calls = "two" if isinstance(negative, nn.Module) else calls
        self.networks = [n for n in (getattr(pipe, part, None) for part in PARTS) if isinstance(n, nn.Module)]
        self._stack = ExitStack()
        self._run = _Run()
        self._branch: str | None = None  # of the call under way, where the pipeline says so
        self._checked = False
        check_pipeline(pipe)

    def __enter__(self) -> NegativeGuidance:
        with ExitStack() as stack:
            mixes = self._load(stack)
            for network in self.networks:
                branches = None
                if mixes is not None:
                    branches = stack.enter_context(Branches(network).installed())
                positive, negative = ({}, {}) if branches is None else _branch_mixes(branches, mixes or {}, self.alpha)
                stack.enter_context(self._wrapped(network, branches, positive, negative))
            self._run = _Run()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if kind is None and self._run.branches == {"cond"}:
            raise ConfigError(NO_BRANCH)

    def _load(self, stack: ExitStack) -> Mix | None:
        """The negative adapters with their weights; None where the negative is a network."""
        if isinstance(self.negative, nn.Module):
            return None
        if isinstance(self.negative, Mapping):
            return {name: self.beta * weight for name, weight in self.negative.items()}
        attached = {name for network in self.networks for name in adapter_names(network)}
        if str(self.negative) in attached:
            return {str(self.negative): self.beta}
        if not hasattr(self.pipe, "load_lora_weights"):
            raise ConfigError(
                f"{type(self.pipe).__name__} cannot load LoRA files; attach it with diffalign.export.load_lora("
                "pipe.transformer, path, family=..., name='negative') and give the name; attached are "
                f"{', '.join(sorted(attached)) or 'none'}"
            )
        active = self.pipe.get_active_adapters()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Already found a `peft_config`"
            )  # another adapter beside it: that is wanted
            self.pipe.load_lora_weights(str(self.negative), adapter_name=NAME)
        stack.callback(self.pipe.delete_adapters, NAME)
        for network in self.networks:
            if active:
                network.set_adapter(active)  # type: ignore[operator]
            elif NAME in getattr(network, "peft_config", {}):
                network.disable_adapters()  # type: ignore[operator]
                stack.callback(network.enable_adapters)  # type: ignore[arg-type]
        return {NAME: self.beta}

    # -- the network's calls --------------------------------------------------------------------------------------------

    @contextmanager
    def _wrapped(self, network: nn.Module, branches: Branches | None, positive: Mix, negative: Mix) -> Iterator[None]:
        other = self.negative if isinstance(self.negative, nn.Module) else None
        plain, own = network.forward, network.__dict__.get("forward")

        def one(branch: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """A call for a batch of one branch."""
            if other is not None:
                return (other if branch == "uncond" else plain)(*args, **kwargs)
            assert branches is not None
            with branches.use(negative if branch == "uncond" else positive):
                return plain(*args, **kwargs)

        def two(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
            """Two calls for a batch of both."""
            halves = [_cut((args, kwargs), rows, half) for half in (0, 1)]
            return _joined(*(one(b, *half) for b, half in zip(("uncond", "cond"), halves, strict=True)))

        def both(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
            if self.calls == "two":
                return two(args, kwargs, rows)
            assert branches is not None
            try:
                with branches.use(negative, positive):
                    out = plain(*args, **kwargs)
            except RowsUnknownError as error:
                if self.calls == "one":
                    raise ConfigError(f"{error}; set calls to 'two'") from None
                logger.info("guidance: %s; two calls a step from here on", error)
                self.calls = "two"
                return two(args, kwargs, rows)
            if self.calls == "auto" and not self._checked:
                self._checked = True
                apart = two(args, kwargs, rows)
                if not _alike(_tensor(out), _tensor(apart)):
                    logger.warning("guidance: one batch does not give what two calls do; two calls a step from here on")
                    self.calls = "two"
                    return apart
            return out

        def forward(*args: Any, **kwargs: Any) -> Any:
            x, time = _inputs(network, args, kwargs)
            if self._branch in ("cond", "uncond"):
                return self._apart(self._branch, args, kwargs, time, one)
            if not _is_doubled(x):
                if self._run.step >= 0 and "uncond" in self._run.branches:  # a further call of the positive branch
                    return one("cond", args, kwargs)
                raise ConfigError(NO_BRANCH)
            self._next(time)
            self._run.branches |= {"cond", "uncond"}
            kwargs = self._with_prompt(kwargs, len(x) // 2)
            out = both(args, kwargs, len(x))
            if self.scale is None and not self.rescale:
                return out
            below, above = _tensor(out).chunk(2)
            return _replaced(out, torch.cat([self._in_place_of(below, above), above]))

        network.forward = forward  # type: ignore[method-assign]
        context = network.__dict__.get("cache_context")
        inner = getattr(network, "cache_context", None)
        if inner is not None:
            network.cache_context = self._named(inner)  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, value in (("forward", own), ("cache_context", context)):
                if value is not None:
                    setattr(network, name, value)
                else:
                    network.__dict__.pop(name, None)

    def _named(self, inner: Callable[..., AbstractContextManager[None]]) -> Callable[..., AbstractContextManager[None]]:
        """A network's `cache_context`, which says whose call it is."""

        @contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            before, self._branch = self._branch, name
            try:
                with inner(name, *args, **kwargs):
                    yield
            finally:
                self._branch = before

        return named

    def _apart(self, branch: str, args: Any, kwargs: Any, time: float, one: Callable[..., Any]) -> Any:
        """A call for one branch of a pipeline that makes two; the positive branch comes first."""
        if branch == "cond":
            if self._run.step >= 0 and self._run.branches == {"cond"}:
                raise ConfigError(NO_BRANCH)
            self._next(time)
            self._run.branches.add("cond")
            out = one("cond", args, kwargs)
            self._run.positive, self._run.prompt = _tensor(out), _prompt_of(kwargs)
            return out
        self._run.branches.add("uncond")
        kwargs = self._with_prompt(kwargs)
        out = one("uncond", args, kwargs)
        if self.scale is None and not self.rescale:
            return out
        assert self._run.positive is not None, "the positive branch is called first"
        return _replaced(out, self._in_place_of(_tensor(out), self._run.positive))

    def _next(self, time: float) -> None:
        """One step on, or the first one of a new run: times fall within a run."""
        if time > self._run.time:
            self._run = _Run(branches=self._run.branches)
        self._run.step, self._run.time = self._run.step + 1, time

    def _in_place_of(self, negative: Tensor, positive: Tensor) -> Tensor:
        """The negative prediction from which the pipeline's formula comes to the guidance that is wanted."""
        w = _scale_of(self.pipe)
        steps = len(self.pipe.scheduler.timesteps)
        wanted = w if self.scale is None else self.scale(self._run.step, steps)
        below, above = negative.float(), positive.float()
        guided = below + wanted * (above - below)
        if self.rescale:
            guided = rescale_noise_cfg(guided, above, self.rescale)
        return ((guided - w * above) / (1 - w)).to(negative.dtype)

    def _with_prompt(self, kwargs: dict[str, Any], count: int | None = None) -> dict[str, Any]:
        """Arguments of a call in which the negative branch has the prompt that is wanted.

        Args:
            kwargs: of the network.
            count: negative rows, which come first; None: all are negative, and the positive branch was called before.
        """
        scale = self.prompt_scale if self._run.step < self.prompt_steps else 1.0
        if scale == 1 and not self.prompt_share:
            return kwargs
        found = _prompt_of(kwargs)
        if "encoder_hidden_states" not in found:
            raise ConfigError(
                f"prompt_scale and prompt_share: {type(self.pipe).__name__} does not hand the prompt over by name; leave "
                "them out"
            )
        changed = {}
        for name, told in found.items():
            negative = told if count is None else told[:count]
            if self.prompt_share:
                positive = self._run.prompt[name] if count is None else told[count:]
                if positive.shape != negative.shape:
                    raise ConfigError(
                        f"prompt_share: prompts of {positive.shape[1]} and {negative.shape[1]} tokens cannot be mixed; "
                        f"{type(self.pipe).__name__} does not fill them up to one length. Set it to 0"
                    )
                if name in MASKS:  # tokens of either prompt are read
                    negative = torch.maximum(negative, positive)
                else:
                    negative = (1 + self.prompt_share) * negative - self.prompt_share * positive
            if name == "encoder_hidden_states":
                negative = negative * scale
            changed[name] = negative if count is None else torch.cat([negative, told[count:]])
        return _with(kwargs, changed)


PARTS = ("unet", "transformer", "transformer_2")
NO_BRANCH = (
    "the pipeline ran without a negative branch, so a negative adapter has no effect. Set guidance_scale above 1; for "
    "guidance-distilled models (FLUX.1 [dev], Turbo, LCM) true_cfg_scale above 1 and a negative_prompt, at twice the cost "
    "a step, or take a model that was not distilled"
)


def check_pipeline(pipe: Any) -> None:
    """Refuse pipelines that have no negative branch.

    Raises:
        ConfigError: no denoising network where diffusers has it, or a call without guidance.
    """
    if not any(isinstance(getattr(pipe, part, None), nn.Module) for part in PARTS):
        raise ConfigError(
            f"{type(pipe).__name__} has no {', '.join(PARTS)}; expected a diffusers text-to-image or video pipeline"
        )
    if not {"negative_prompt", "negative_prompt_embeds"} & inspect.signature(type(pipe).__call__).parameters.keys():
        raise ConfigError(
            f"{type(pipe).__name__} has no negative branch (its model is guidance-distilled); expected a pipeline with real "
            "classifier-free guidance, such as that of SDXL, SD3.5, Qwen-Image or Wan"
        )


def _branch_mixes(branches: Branches, negative: Mix, alpha: float) -> tuple[Mix, Mix]:
    """(positive, negative) mixtures of a network: eta, and alpha eta + beta delta."""
    positive = {name: weight for name, weight in branches.active().items() if name not in negative}
    mixed = {name: alpha * weight for name, weight in positive.items() if alpha}
    return positive, mixed | {name: weight for name, weight in negative.items() if name in branches.names()}


def _scale_of(pipe: Any) -> float:
    w = getattr(pipe, "guidance_scale", None)
    if w is None:
        raise ConfigError(
            f"{type(pipe).__name__} does not tell its guidance scale, which schedules and rescaling need; "
            "give the scale to the pipeline and leave scale and rescale out"
        )
    if w == 1:
        raise ConfigError(NO_BRANCH)
    return float(w)


def _inputs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Noisy latents and the time of a call."""
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    bound = dict(zip(names, args, strict=False)) | dict(kwargs)
    x = bound["sample"] if "sample" in bound else bound["hidden_states"]
    return x, float(torch.as_tensor(bound["timestep"]).flatten()[0])


POOLED = "text_embeds"  # of SDXL, inside `added_cond_kwargs`
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


def _prompt_of(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Embeddings of the prompt, and masks of its tokens, among the arguments of a network, by name."""
    found = {name: kwargs.get(name) for name in ("encoder_hidden_states", "pooled_projections", *MASKS)}
    found[POOLED] = (kwargs.get("added_cond_kwargs") or {}).get(POOLED)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _with(kwargs: dict[str, Any], prompt: dict[str, Tensor]) -> dict[str, Any]:
    """The same arguments with other embeddings of the prompt."""
    pooled = {name: value for name, value in prompt.items() if name == POOLED}
    more = {"added_cond_kwargs": kwargs["added_cond_kwargs"] | pooled} if pooled else {}
    return kwargs | {name: value for name, value in prompt.items() if name != POOLED} | more


def _is_doubled(x: Tensor) -> bool:
    """Whether a batch holds the same latents twice, as pipelines make it for guidance."""
    below, above = x[: len(x) // 2], x[len(x) // 2 :]
    return len(below) == len(above) and torch.equal(below, above)


def _cut(value: Any, rows: int, half: int) -> Any:
    """The lower or upper half of every tensor with as many rows as the batch."""
    if isinstance(value, Tensor):
        return value.chunk(2)[half] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _cut(part, rows, half) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(part, rows, half) for part in value)
    return value


def _tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample  # type: ignore[no-any-return]


def _replaced(out: Any, tensor: Tensor) -> Any:
    return (tensor, *out[1:]) if isinstance(out, tuple) else type(out)(sample=tensor)


def _joined(below: Any, above: Any) -> Any:
    return _replaced(below, torch.cat([_tensor(below), _tensor(above)]))


def _alike(one: Tensor, other: Tensor) -> bool:
    limit = ALIKE.get(one.dtype, 1e-1) * float(other.abs().max())
    return float((one.float() - other.float()).abs().max()) <= limit
