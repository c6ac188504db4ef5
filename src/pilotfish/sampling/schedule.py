"""The noise schedule of one run, and how the latents go along it: the scheduler's step."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..guidance import moves as rules
from ..guidance.gradients import rms
from ..guidance.noise import CLEAN, NoiseLevel, noise_level
from ..guidance.presets import find_preset
from .generators import copied, draw, seeded

if TYPE_CHECKING:
    from .step import Moment

TURN = "host turn"  # a name that no plugin can have


class Schedule:
    """A run's scheduler and the noise levels of its steps.

    Args:
        scheduler: a diffusers scheduler of this run's own.
        steps: as the user counts them.
    """

    def __init__(self, scheduler: Any, steps: int, device: torch.device) -> None:
        scheduler.set_timesteps(steps, device=device)
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.num_steps = len(self.timesteps)
        self.name = type(scheduler).__name__
        self._two_stages = self.num_steps != steps
        # What `step` takes beside the rest; eta = 0 as in StableDiffusionPipeline.
        accepted = inspect.signature(scheduler.step).parameters
        self._options = {k: v for k, v in (("eta", 0.0), ("generator", None)) if k in accepted}

    def level(self, index: int) -> NoiseLevel:
        """The noise level of step `index`."""
        return noise_level(self.scheduler, index)

    def following(self, index: int) -> NoiseLevel:
        """The noise level after step `index`."""
        return CLEAN if index + 1 == self.num_steps else self.level(index + 1)

    def can_repeat(self) -> bool:
        """Whether `scheduler.step` starts from the latents that it is given, at every step."""
        keeps = any(hasattr(self.scheduler, n) for n in ("sample", "last_sample", "cur_sample"))
        return not (self._two_stages or keeps)

    def strengths(self, kind: str) -> list[float]:
        """What a preset's strengths are multiplied by at each step."""
        if kind == "constant":
            return [1.0] * self.num_steps
        return rules.schedule([self.level(index) for index in range(self.num_steps)], kind)

    def begin_at(self, index: int) -> None:
        """Take step `index` first."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)

    def pass_over(self, index: int) -> None:
        """Let the scheduler know that step `index` was taken without it.

        `scale_model_input` counts on `step` to move its index; there is no public way to do so.
        """
        if getattr(self.scheduler, "step_index", None) is not None:
            self.scheduler._step_index = index + 1

    def step(self, moment: Moment, generators: list[torch.Generator]) -> Tensor:
        """The next latents: `scheduler.step`."""
        return self._step(self.scheduler, moment, generators)

    def _step(self, scheduler: Any, moment: Moment, generators: list[torch.Generator]) -> Tensor:
        options: dict[str, Any] = dict(self._options)
        if "generator" in options:
            options["generator"] = generators if len(generators) > 1 else generators[0]
        latents: Tensor = scheduler.step(
            moment.output, moment.timestep, moment.latents, **options, return_dict=False
        )[0]
        return latents

    def turned_step(
        self, moment: Moment, generators: list[torch.Generator], direction: Tensor
    ) -> Tensor:
        """The scheduler's step with its noise turned towards a direction: the rule "sphere".

        Which part of a step is noise no scheduler tells, but two steps with different noise do: a
        copy of the scheduler takes the second.

        Raises:
            InputError: the scheduler draws no noise, or draws it otherwise.
        """
        draws = [[copied(g) for g in generators], seeded(moment.run, TURN)]
        noises = [draw(moment.latents.shape, d, moment.latents.dtype).to(direction) for d in draws]
        other = self._step(copy.deepcopy(self.scheduler), moment, seeded(moment.run, TURN))
        latents, other = self.step(moment, generators), other.to(direction)
        deviation = rms(latents - other) / rms(noises[0] - noises[1])
        noise = deviation * noises[0]
        mean, same = latents - noise, other - deviation * noises[1]
        if moment.index + 1 < self.num_steps and not _is_all(noise, mean, same):
            raise InputError(
                f"preset {find_preset(moment.run.preset).name!r} turns the noise that each step "
                f"adds, and {self.name} adds none that can be told from its step; use "
                "scheduler='euler-ancestral' or 'ddpm'"
            )
        return rules.turned(mean, noise, deviation, direction).to(latents.dtype)


def _is_all(noise: Tensor, mean: Tensor, same: Tensor) -> bool:
    """Whether two steps differ by their noise alone: they have one mean, and noise there is."""
    size = float(mean.abs().max())
    drawn = float(noise.abs().max()) > 1e-6 * size
    return drawn and float((mean - same).abs().max()) < 1e-3 * size
