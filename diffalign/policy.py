"""The policy and its reference: one network, adapters on or off, turned into denoising errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign import user_branches
from diffalign.adapters import adapters_off
from diffalign.config import DenoisingConfig
from diffalign.data.batch import PairBatch, RowBatch, Rows
from diffalign.families import Conditioning, DenoisingFamily
from diffalign.losses import Cap, Kind, Layout, Objective, Scores
from diffalign.prediction import add_noise, append_dims, convert, error_factor, mean_squared_error, target
from diffalign.references import Lagged, Reference
from diffalign.text_encoders import TextConditioned


class Policy:
    """Scores samples under the policy and under the reference.

    The reference is the same network with the adapters off and without gradient, so that both passes run the very same
    kernels in the same types: with a fresh adapter they agree bitwise.

    Args:
        family: how the network is called.
        network: the network, or a `TextConditioned`, as prepared for training (possibly wrapped for several processes).
        bare: the same network unwrapped.
        autocast: makes the mixed-precision context, entered for policy and reference alike.
        denoising: where and how errors are measured.
        reference: what the policy is compared with; None: the network with its adapters off.
        lagged: the behaviour policy, for objectives that compare with it.
        negative_only: adapters act in the negative branch of guidance alone; the other one is the base, without gradient.

    Attributes:
        forwards: images that went through the network so far, of policy, reference and sampler, with or without gradient.
    """

    def __init__(
        self,
        family: DenoisingFamily,
        network: nn.Module,
        bare: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        denoising: DenoisingConfig | None = None,
        reference: Reference | None = None,
        lagged: Lagged | None = None,
        *,
        negative_only: bool = False,
    ) -> None:
        self.family = family
        self.network = network
        self.bare = network if bare is None else bare
        self.autocast = autocast
        self.denoising = DenoisingConfig() if denoising is None else denoising
        self.reference = reference
        self.lagged = lagged
        self.negative_only = negative_only
        self.forwards = 0

    def against_base(self) -> Policy:
        """The same policy compared with the base, whatever its own reference is; for measurements, without gradient.

        Only this process's copy of the network is called: others may have finished.
        """
        return Policy(self.family, self.bare, autocast=self.autocast, denoising=self.denoising)

    @property
    def num_timesteps(self) -> int:
        return self.family.schedule.num_timesteps

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The policy's native prediction, with gradient."""
        with self.autocast():
            return self._call(self.network, x_t, t, conditioning)

    @torch.no_grad()
    def predict_reference(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The reference's native prediction."""
        with adapters_off(self.bare), self.autocast():
            return self._call(self.bare, x_t, t, conditioning)

    def _call(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.forwards += len(x_t)
        return self.output(network, x_t, self.family.schedule.time(t), conditioning)

    def output(self, network: nn.Module, x: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's native prediction, as `DenoisingFamily.predict`; trained text encoders are called in its forward.

        Args:
            network: bare or wrapped.
            x: noisy latents (N, ...).
            times: what the network is told (N,).
            conditioning: batch N, encoded or not.
        """
        x = x.to(self.family.dtype)
        if isinstance(self.bare, TextConditioned):
            return network(x, times, conditioning)  # type: ignore[no-any-return]
        if (branch := user_branches.of(self.bare)) is not None:
            # Stays until the next call: checkpointed blocks read it again in the backward pass.
            branch.seat(conditioning.get("user"))
        return self.family.predict(network, x, times, conditioning)

    def errors(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        reference: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Denoising errors of policy and reference at the same (x0, noise, t).

        Args:
            x0: scaled latents (N, C, ..., h, w).
            noise: of the same shape.
            t: int64 timesteps (N,).
            conditioning: with a batch axis of N.
            reference: False leaves the second result out (None).

        Returns:
            (policy errors with gradient, reference errors without), float32, shape (N,).
        """
        scores = self.measure(Rows(x0=x0, noise=noise, t=t, conditioning=conditioning), reference=reference)
        return scores.need_error(), None if scores.ref is None else -2 * scores.ref

    def measure(
        self,
        rows: Rows,
        *,
        reference: bool = True,
        old: bool = False,
        residual: bool = False,
        noising: str = "forward",
    ) -> Scores:
        """Scores of rows under policy and reference, at the same noisy latents.

        Args:
            rows: N of them.
            reference: False leaves the reference out.
            old: supply scores of the behaviour policy, too.
            residual: supply errors element by element, too.
            noising: how x_t is made of x0; see `DenoisingConfig.noising`.
        """
        schedule, reduction = self.family.schedule, self.denoising.error_reduction
        alpha, sigma = schedule.alpha_sigma(rows.t)
        x_t, wanted = self._noised(rows, alpha, sigma, noising)
        native = schedule.prediction_type
        space = native if self.denoising.error_space == "native" else self.denoising.error_space
        factor = error_factor(native, space, alpha, sigma)

        def miss(output: Tensor) -> Tensor:
            return output.float() - wanted.float()

        def error(missed: Tensor) -> Tensor:
            return factor * mean_squared_error(missed, torch.zeros_like(missed), reduction)

        def scaled(missed: Tensor) -> Tensor:
            return append_dims(factor.sqrt(), missed) * missed

        reference_error, reference_miss = None, None
        # The reference goes first: adapters must not be switched between the policy's forward and its backward.
        if reference:
            with without_dropout(self.bare):
                reference_error, reference_miss = self._reference(x_t, rows, miss, error)
        more: dict[str, Tensor | None] = {}
        if old:
            assert self.lagged is not None, "runs with a behaviour policy have one"
            with torch.no_grad(), without_dropout(self.bare), self.lagged.active(), self.autocast():
                old_miss = miss(self._call(self.bare, x_t, rows.t, rows.conditioning))
            more["old"] = -0.5 * error(old_miss)
            if residual:
                more["old_residual"] = scaled(old_miss)
        missed = miss(self.predict(x_t, rows.t, rows.conditioning))
        if residual:
            more["residual"] = scaled(missed)
            more["ref_residual"] = None if reference_miss is None else scaled(reference_miss)
        return Scores.denoising(error(missed), reference_error, **more)

    def _reference(
        self, x_t: Tensor, rows: Rows, miss: Callable[[Tensor], Tensor], error: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Errors of the reference, and by how much its prediction misses, element by element."""
        if self.reference is None:
            missed = miss(self.predict_reference(x_t, rows.t, rows.conditioning))
            return error(missed), missed
        parts = self.reference.parts()
        total = torch.zeros((), device=x_t.device)
        for weight, weights in parts:
            with torch.no_grad(), self.reference.active(weights):
                missed = miss(self._call_reference(x_t, rows, self.reference.config.guidance_scale))
            total = total + weight * error(missed)
        return total, missed if len(parts) == 1 else None  # a mixture of scores has no prediction of its own

    def _call_reference(self, x_t: Tensor, rows: Rows, scale: float) -> Tensor:
        """The native prediction with the weights in place, guided if the reference is."""
        if scale == 1:
            with self.autocast():
                return self._call(self.bare, x_t, rows.t, rows.conditioning)
        assert rows.negative is not None, "rows for a guided reference have it"
        times = self.family.schedule.time(rows.t)
        return guided(self, self.bare, x_t, times, rows.conditioning, rows.negative, scale)

    def _noised(self, rows: Rows, alpha: Tensor, sigma: Tensor, noising: str) -> tuple[Tensor, Tensor]:
        """Noisy latents and the network's target there."""
        prediction_type = self.family.schedule.prediction_type
        if noising == "forward":
            x_t = add_noise(rows.x0, rows.noise, alpha, sigma)
            wanted = target(prediction_type, rows.x0, rows.noise, alpha, sigma)
        else:
            renoise = noising == "renoise_inversion"
            noise = rows.noise if self.denoising.inversion_noise else None
            with without_dropout(self.bare):
                x_t, implied = self.invert(rows.x0, rows.t, rows.conditioning, renoise=renoise, noise=noise)
            wanted = target(prediction_type, rows.x0, implied, alpha, sigma)
        if rows.given is not None and rows.x_t is not None and rows.target is not None:
            given = append_dims(rows.given, x_t)
            x_t, wanted = torch.where(given, rows.x_t, x_t), torch.where(given, rows.target, wanted)
        return x_t, wanted

    @torch.no_grad()
    def invert(
        self,
        x0: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        renoise: bool = False,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """DDIM inversion by the policy (no guidance): the x_t from which its sampler would come back to x0.

        Levels are those of the grid of `denoising.inversion_steps` that lie below t, and then t itself, which the released
        InPO code leaves out (`inversion_level: "grid"`): there the latent is that of the last grid level below t, though
        network and implied noise are taken at t.

        Args:
            x0: scaled latents (N, C, ..., h, w).
            t: int64 timesteps (N,).
            conditioning: with a batch axis of N.
            renoise: at every level predict twice, the second time at the level reached with the first, and take the mean
                (ReNoise, arXiv 2403.14602).
            noise: standard normal noise of x0's shape, of which `denoising.inversion_noise` times the deviation of the DDIM
                step is added after every step; every step sees it shifted, so that steps differ.

        Returns:
            x_t, and the noise it implies, (x_t - alpha_t x0) / sigma_t.
        """
        schedule = self.family.schedule
        total, steps = schedule.num_timesteps, self.denoising.inversion_steps
        grid = [1 + k * (total // steps) for k in range(steps)]
        x = x0.clone()
        level = torch.full_like(t, -1)  # -1: clean
        for number, upper in enumerate([*grid, total]):
            exact = self.denoising.inversion_level == "exact"
            goal = torch.full_like(t, upper).clamp(max=total - 1)
            if exact:
                goal = torch.minimum(goal, t)
            moving = (level < goal) & (goal <= t) if exact else (goal < t) & (number < steps)
            index = moving.nonzero().squeeze(1)
            if not len(index):
                continue
            part = {name: value[index] for name, value in conditioning.items()}
            moved = self._inverse_step(x[index], level[index], goal[index], part, renoise)
            if noise is not None:
                if exact:
                    deviation = self._deviation(goal[index], level[index])
                else:  # as released; its table ends before the last step's, which is taken at the end here
                    above = (goal[index] + total // steps).clamp(max=total - 1)
                    deviation = self._deviation(above, goal[index])
                deviation = self.denoising.inversion_noise * deviation
                fresh = noise[index].flatten(1).roll(number, 1).view_as(moved)
                moved = moved + append_dims(deviation, moved) * fresh
            x[index] = moved
            level[index] = goal[index]
        alpha, sigma = schedule.alpha_sigma(t)
        implied = (x - append_dims(alpha, x) * x0) / append_dims(sigma.clamp(min=1e-4), x)
        return x, implied

    def _deviation(self, upper: Tensor, lower: Tensor) -> Tensor:
        """What a fully stochastic DDIM step from one level down to another would add, (N,); level -1 is clean: 0."""
        alpha, sigma = self.family.schedule.alpha_sigma(upper)
        alpha_low, sigma_low = self.family.schedule.alpha_sigma(lower.clamp(min=0))
        inside = 1 - (sigma_low * alpha / (sigma * alpha_low)).square()
        return torch.where(lower < 0, 0.0, sigma_low * inside.clamp(min=0).sqrt())

    def _inverse_step(
        self, x: Tensor, level: Tensor, goal: Tensor, conditioning: Conditioning, renoise: bool
    ) -> Tensor:
        """From one level to a noisier one, with the noise predicted at the goal's time; level -1 is clean."""
        schedule = self.family.schedule
        clean = level < 0
        alpha, sigma = schedule.alpha_sigma(level.clamp(min=0))
        alpha, sigma = torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)
        alpha_goal, sigma_goal = schedule.alpha_sigma(goal)

        def noise_at(where: Tensor) -> Tensor:
            with self.autocast():
                output = self._call(self.bare, where, goal, conditioning).float()
            return convert(output, where, alpha_goal, sigma_goal, schedule.prediction_type, "epsilon")

        def moved(noise: Tensor) -> Tensor:
            x0 = (x - append_dims(sigma, x) * noise) / append_dims(alpha, x)
            return append_dims(alpha_goal, x) * x0 + append_dims(sigma_goal, x) * noise

        noise = noise_at(x)
        if renoise:
            noise = (noise + noise_at(moved(noise))) / 2
        return moved(noise)

    def to_sample(self, t: Tensor) -> Tensor:
        """How many times larger an error of the clean latents is than a measured one, (N,)."""
        schedule, space = self.family.schedule, self.denoising.error_space
        alpha, sigma = schedule.alpha_sigma(t)
        measured = schedule.prediction_type if space == "native" else space
        return error_factor(measured, "sample", alpha, sigma).sqrt()

    def scores(self, batch: PairBatch | RowBatch, objective: Objective) -> tuple[Scores, Layout]:
        """Scores of a batch and who is compared with whom: minus one half of the denoising errors.

        Objectives on pairs get chosen rows first, in one concatenated forward; a pair shares its timestep and its noise.
        Objectives on single items get the chosen images with label 1 and the rejected ones with label 0.
        """
        rows, layout = batch.rows(objective.needs)
        scores = self.measure(
            rows,
            reference=objective.reads_reference(),
            old=objective.needs.old,
            residual=Cap.RESIDUAL in objective.required_caps(Kind.BOUND),
            noising=self.denoising.noising or objective.noising,
        )
        if objective.needs.log_snr:
            scores = replace(scores, log_snr=self.family.schedule.log_snr(rows.t))
        if objective.needs.to_sample:
            scores = replace(scores, to_sample=self.to_sample(rows.t))
        if objective.needs.patch_weight:
            scores = replace(scores, patch_weight=rows.patch_weight)
        return scores, layout


def recomputed(policy: Policy, call: Callable[[], Tensor]) -> Tensor:
    """`call()` without its graph, which is made again, uncounted, when a gradient reaches it.

    Args:
        policy: counts forwards.
        call: the adapter's weights must be the same in the backward pass; draws of dropout are repeated.
    """

    def second() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), uncounted(policy)

    output: Tensor = checkpoint(call, use_reentrant=False, context_fn=second)  # type: ignore[no-untyped-call]
    return output


@contextmanager
def uncounted(policy: Policy) -> Iterator[None]:
    """Inside, forwards do not count."""
    before = policy.forwards
    try:
        yield
    finally:
        policy.forwards = before


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped; for passes without gradient beside the one that is trained."""
    active = [part for part in network.modules() if isinstance(part, nn.Dropout) and part.training and part.p > 0]
    for part in active:
        part.eval()
    try:
        yield
    finally:
        for part in active:
            part.train()


def guided(
    policy: Policy,
    network: torch.nn.Module,
    x: Tensor,
    times: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    scale: float,
    *,
    detach_negative: bool = False,
) -> Tensor:
    """The native prediction with classifier-free guidance, float32: both branches in one forward.

    Where the policy's adapters are for the negative branch alone, each branch has a forward of its own.

    Args:
        policy: for its family and precision.
        network: bare or wrapped.
        x: noisy latents (N, ...).
        times: what the network is told (N,).
        conditioning, negative: with and without the prompt, batch N.
        scale: 1 is no guidance, and the negative branch is not computed. A model that is told its scale needs no branch.
        detach_negative: no gradient through the negative branch, which then has a forward of its own.
    """
    conditioning, scale = policy.family.guide(conditioning, scale)
    policy.forwards += len(x) * (1 if scale == 1 else 2)
    with policy.autocast():
        if scale == 1:
            return policy.output(network, x, times, conditioning).float()
        empty = {name: negative[name].to(value) for name, value in conditioning.items()}
        if policy.negative_only:
            # First, since adapters must not be switched between the trained branch's forward and its backward.
            with torch.no_grad(), without_dropout(policy.bare), adapters_off(policy.bare):
                with_prompt = policy.output(policy.bare, x, times, conditioning).float()
            without = policy.output(network, x, times, empty).float()
        elif detach_negative:
            with torch.no_grad():
                without = policy.output(network, x, times, empty).float()
            with_prompt = policy.output(network, x, times, conditioning).float()
        else:
            both = {name: torch.cat([value, empty[name]]) for name, value in conditioning.items()}
            pair = policy.output(network, torch.cat([x, x]), torch.cat([times, times]), both)
            with_prompt, without = pair.float().chunk(2)
    return without + scale * (with_prompt - without)
