"""The noise schedule of one run, and how the latents go along it: all that touches a scheduler."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ModelError, PilotfishError
from ..guidance import moves
from ..guidance.gradients import rms
from ..guidance.noise import CLEAN, NoiseLevel, draw
from .generators import copied

if TYPE_CHECKING:
    from .step import StepState

Draws = list[torch.Generator]  # one for each image


class Schedule:
    """A run's scheduler and the noise levels of its steps.

    Args:
        scheduler: a diffusers scheduler of its own.
        steps: as the user counts them.
        set_timesteps: lets the scheduler choose its steps as a model's family does; None is the
            scheduler's own way.

    Attributes:
        name: the scheduler's class.
        timesteps: (num_steps,), the network's own index at each step.
        levels: the noise level at which each step finds the latents.
        order: steps of the loop for each of the user's: 2 for Heun, mostly 1.

    Raises:
        InputError: the scheduler cannot take so many steps, or x0 cannot be told at one of them.
        ModelError: pilotfish cannot tell its noise levels.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        set_timesteps: Callable[[Any, int], None] = lambda s, n: s.set_timesteps(n),
    ) -> None:
        self._scheduler, self.name = scheduler, type(scheduler).__name__
        self._config = _own_config(scheduler)
        self.order = int(getattr(scheduler, "order", 1))
        try:
            set_timesteps(scheduler, steps)
            self.timesteps: Tensor = scheduler.timesteps
            self.num_steps = len(self.timesteps)
            keeps = any(hasattr(scheduler, n) for n in ("sample", "last_sample", "cur_sample"))
            # Only what is taken once may be taken again: those keep latents from the step before.
            self.can_repeat = self.num_steps == steps and not keeps
            if self.num_steps > 1 and self.timesteps[0] == self.timesteps[1]:
                self.begin_at(0)  # where it looks for its first timestep, it would find the second
            self._check_range()
            self.levels = self._levels()
        except PilotfishError:
            raise
        except Exception as error:  # whatever a scheduler makes of a number that it cannot take
            raise InputError(f"{self.name} cannot take {steps} steps: {error}") from error

    def _levels(self) -> tuple[NoiseLevel, ...]:
        """A table of all levels, so that one that is asked for ahead of time is the one that comes.

        A scheduler of two stages knows the second one's when it is there, and solvers may divide by
        the distance of two levels that are one: then a copy goes ahead.
        """
        if self.can_repeat and len(set(self.timesteps.tolist())) == self.num_steps > 0:
            return tuple(noise_level(self._scheduler, i) for i in range(self.num_steps))
        ahead, levels = copy.deepcopy(self._scheduler), []
        latents = torch.zeros(1, 1, 1, 1, device=self.timesteps.device)
        generators, finite = [torch.Generator().manual_seed(0)], self.num_steps > 0
        for index, timestep in enumerate(self.timesteps):
            if hasattr(ahead, "scale_model_input"):
                ahead.scale_model_input(latents, timestep)
            levels.append(noise_level(ahead, index))
            after = _step(ahead, generators, latents, timestep, latents)
            finite = finite and bool(after.isfinite().all())
        if not finite:
            raise ValueError(
                "as it is configured, it divides by zero there. Take fewer steps, or another "
                "configuration"
            )
        return tuple(levels)

    def _check_range(self) -> None:
        known = len(getattr(self._scheduler, "alphas_cumprod", ()))
        most = float(self.timesteps.max()) if self.num_steps else 0.0
        if known and not hasattr(self._scheduler, "sigmas") and most >= known:
            raise ValueError(
                f"it asks for timestep {most:.0f}, and the model knows 0 to {known - 1}. Take "
                "fewer steps, or timestep_spacing = 'trailing'"
            )

    @property
    def initial_scale(self) -> float | Tensor:
        """What pure noise is multiplied by."""
        scale: float | Tensor = getattr(self._scheduler, "init_noise_sigma", 1.0)
        return scale

    def following(self, index: int) -> NoiseLevel:
        """The noise level after step `index`."""
        return CLEAN if index + 1 == self.num_steps else self.levels[index + 1]

    def scaled(self, latents: Tensor, timestep: Any) -> Tensor:
        """Latents as the network takes them."""
        if hasattr(self._scheduler, "scale_model_input"):
            latents = self._scheduler.scale_model_input(latents, timestep)
        return latents

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents (B, C, H, W) with noise of the level of step `index`, as in diffusers."""
        self.begin_at(index)  # it looks there for the level
        timesteps = self.timesteps[index].repeat(len(x0))
        if hasattr(self._scheduler, "add_noise"):
            x0 = self._scheduler.add_noise(x0, noise, timesteps)
        else:
            x0 = self._scheduler.scale_noise(x0, timesteps, noise)
        return x0

    def as_used(self, x0: Tensor) -> Tensor:
        """Predicted clean latents as the scheduler uses them: clipped where it clips."""
        config = self._config
        if config.get("thresholding"):
            x0 = self._scheduler._threshold_sample(x0)
        elif config.get("clip_sample"):
            limit = config.get("clip_sample_range", 1.0)
            x0 = x0.clamp(-limit, limit)
        return x0

    def strengths(self, kind: str) -> list[float]:
        """What a preset's strengths are multiplied by at each step."""
        return [1.0] * self.num_steps if kind == "constant" else moves.schedule(self.levels, kind)

    def begin_at(self, index: int) -> None:
        """Take step `index` first."""
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(index)

    def skip(self, index: int) -> None:
        """Let the scheduler know that step `index` was taken without it.

        `scale_model_input` counts on `step` to move its index; there is no public way to do so.
        """
        if getattr(self._scheduler, "step_index", None) is not None:
            self._scheduler._step_index = index + 1

    def resample(self, indices: Tensor, like: Tensor) -> None:
        """Let the scheduler's history follow images that take others' places.

        Args:
            indices: see `resample` of the hooks.
            like: latents (B, C, H, W), by whose shape the history is known.
        """

        def followed(value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape == like.shape:
                return value[indices.to(value.device)]
            if isinstance(value, list | tuple):
                return type(value)(map(followed, value))
            return value

        for name, value in vars(self._scheduler).items():
            if name != "_internal_dict":
                vars(self._scheduler)[name] = followed(value)

    def step(self, state: StepState, generators: Draws) -> Tensor:
        """The next latents: `scheduler.step`."""
        return _step(self._scheduler, generators, state.output, state.timestep, state.latents)

    def spherical_step(
        self, state: StepState, generators: Draws, others: Callable[[], Draws], direction: Tensor
    ) -> Tensor:
        """The scheduler's step with its noise turned towards a direction: the rule "sphere".

        Which part of a step is noise no scheduler tells, but two steps with different noise do: a
        copy of the scheduler takes the second.

        Args:
            others: generators for the second, new ones at each call.

        Raises:
            InputError: the scheduler draws no noise, or draws it otherwise.
        """
        before = [copied(g) for g in generators]
        ahead = copy.deepcopy(self._scheduler)
        other = _step(ahead, others(), state.output, state.timestep, state.latents)
        latents, other = self.step(state, generators), other.to(direction)
        for dtype in (state.latents.dtype, torch.float32):  # which flows draw in, whatever comes
            draws = ([copied(g) for g in before], others())
            noises = [draw(state.latents.shape, d, dtype).to(direction) for d in draws]
            deviation = rms(latents - other) / rms(noises[0] - noises[1])
            noise = deviation * noises[0]
            mean, same = latents - noise, other - deviation * noises[1]
            if found := _is_all(noise, mean, same):
                break
        if state.index + 1 < self.num_steps and not found:
            raise InputError(
                f"the rule 'sphere' turns the noise that each step adds, and {self.name} adds none "
                "that can be told from its step; use scheduler='euler-ancestral' or 'ddpm', a flow "
                "with stochastic_sampling, or another preset"
            )
        return moves.spherical(mean, noise, deviation, direction).to(latents.dtype)


def _step(scheduler: Any, generators: Draws, *inputs: Any) -> Tensor:
    """`scheduler.step` of output, timestep and latents; eta = 0 as in StableDiffusionPipeline."""
    options = {"eta": 0.0, "generator": generators if len(generators) > 1 else generators[0]}
    takes = _arguments(scheduler.__class__.step)
    taken = {name: value for name, value in options.items() if name in takes}
    after: Tensor = scheduler.step(*inputs, **taken, return_dict=False)[0]
    return after


def _is_all(noise: Tensor, mean: Tensor, same: Tensor) -> bool:
    """Whether two steps differ by their noise alone: they have one mean, and noise there is."""
    size = float((mean + noise).abs().max())  # a mean of 0 is one too, as of a flow's first step
    drawn = float(noise.abs().max()) > 1e-6 * size
    return drawn and float((mean - same).abs().max()) < 1e-3 * size


@dataclass(frozen=True)
class Start:
    """What `start_latents` needs to begin a run elsewhere than at pure noise.

    Attributes:
        order: steps of the loop for each of the user's: 2 for Heun, mostly 1.
        generator: one CPU generator per image, the run's own. The starting noise is drawn from it,
            and after it what the scheduler draws.
    """

    order: int
    generator: Draws
    _schedule: Schedule = field(repr=False)

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents (B, C, H, W) with noise, at the level of step `index`, as diffusers has it.

        Args:
            index: where the run will start.
        """
        return self._schedule.noised(x0, noise, index)


def noise_level(scheduler: Any, index: int) -> NoiseLevel:
    """The noise level at which `scheduler` expects the latents of step `index`.

    Nothing here calls `scheduler.step`, which would change the scheduler's state and, in most of
    diffusers' schedulers, not tell x0.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`. Two-stage schedulers are asked for
            their present stage, so the level of a step is known only when that step is next.
        index: position in `scheduler.timesteps`.

    Raises:
        InputError, ModelError: see `Schedule`.
    """
    alpha, sigma = _alpha_sigma(scheduler, index)
    prediction_type = "flow" if _is_flow(scheduler) else scheduler.config.prediction_type
    if not hasattr(scheduler, "precondition_outputs"):
        return NoiseLevel.of(alpha, sigma, prediction_type)
    # Karras et al. 2022, arXiv 2206.00364, table 1.
    data = scheduler.config.sigma_data
    variance = sigma**2 + data**2
    out = sigma * data / variance**0.5
    signed = -out if prediction_type == "v_prediction" else out
    return NoiseLevel(alpha, sigma, data**2 / variance, signed, prediction_type)


def _alpha_sigma(scheduler: Any, index: int) -> tuple[float, float]:
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver, UniPC, DEIS, SA-Solver
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        return float(alpha), float(sigma)
    if hasattr(scheduler, "sigmas"):
        sigma = _stage_sigma(scheduler, index)
        return (1 - sigma if _is_flow(scheduler) else 1.0), sigma
    if hasattr(scheduler, "alphas_cumprod"):  # DDIM, DDPM, PNDM, LCM, TCD
        at = int(scheduler.timesteps[index])
        if hasattr(scheduler, "initial_alpha_cumprod"):  # DDIMInverse tells where its steps lead
            at -= len(scheduler.alphas_cumprod) // scheduler.num_inference_steps
        known = scheduler.alphas_cumprod[at] if at >= 0 else scheduler.initial_alpha_cumprod
        abar = float(known)
        return abar**0.5, (1 - abar) ** 0.5
    raise ModelError(
        f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod; "
        "pilotfish cannot tell its noise levels. Use another scheduler."
    )


def _stage_sigma(scheduler: Any, index: int) -> float:
    """Sigma of the current stage: KDPM2 and DPM-Solver-SDE have their second stage in between."""
    second = not getattr(scheduler, "state_in_first_order", True)
    if second and hasattr(scheduler, "mid_point_sigma"):
        return float(scheduler.mid_point_sigma)
    if second and hasattr(scheduler, "sigmas_interpol"):
        ancestral = hasattr(scheduler, "sigmas_up")  # there the list starts one earlier
        return float(scheduler.sigmas_interpol[index - 1 if ancestral else index])
    return float(scheduler.sigmas[index])


def _is_flow(scheduler: Any) -> bool:
    """Whether the latents are a straight line from x0 to noise."""
    config = _own_config(scheduler)
    of_flows = "shift" in config and not hasattr(scheduler, "alphas_cumprod")
    return of_flows or bool(config.get("use_flow_sigmas"))


def _own_config(scheduler: Any) -> dict[str, Any]:
    """What the scheduler itself goes by: diffusers also keeps what its model's own one takes."""
    takes = _arguments(scheduler.__class__)
    return {key: value for key, value in scheduler.config.items() if key in takes}


@functools.cache  # each step asks, and finding out takes longer than a scheduler's step
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
