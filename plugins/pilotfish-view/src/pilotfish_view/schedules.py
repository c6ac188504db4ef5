"""A scheduler's noise levels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from pilotfish import NoiseLevel, PilotfishError, noise_level

from .layout import Shown


@dataclass(frozen=True)
class Schedule(Shown):
    """The noise level of each step: `latents = alpha * x0 + sigma * eps`.

    `str()` gives a table, `picture()` a plot.

    Attributes:
        name: of the scheduler's class.
        timesteps: what the network is told, 999 is the most noise for Stable Diffusion.
        alphas, sigmas: as the latents have them when the step begins.
    """

    name: str
    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def __str__(self) -> str:
        head = f"{'step':>4} {'timestep':>9} {'alpha':>8} {'sigma':>9}"
        rows = zip(self.timesteps, self.alphas, self.sigmas, strict=True)
        lines = (f"{i:4} {t:9.6g} {a:8.4f} {s:9.4f}" for i, (t, a, s) in enumerate(rows))
        return "\n".join([head, *lines])

    def picture(self) -> Image.Image:
        """Alpha, sigma and timestep over the steps.

        Raises:
            PilotfishError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise PilotfishError(
                "a plot needs matplotlib: pip install 'pilotfish-view[plot]'"
            ) from error
        figure = Figure(figsize=(8, 6), layout="constrained")
        levels, timesteps = figure.subplots(2, 1, sharex=True)
        levels.plot(self.sigmas, marker=".", label="sigma: how much noise")
        levels.plot(self.alphas, marker=".", label="alpha: how much picture")
        levels.set_ylabel("part of the latents")
        levels.legend()
        timesteps.plot(self.timesteps, marker=".", color="gray")
        timesteps.set(ylabel="timestep", xlabel="step", ylim=(0, None))
        figure.suptitle(f"{self.name}, {len(self)} steps")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return Image.open(file)


def schedule(scheduler: Any, steps: int = 50) -> Schedule:
    """The noise levels of a diffusers scheduler, which stays as it is.

    Args:
        scheduler: any; `sampler.model.new_scheduler("euler")` makes one to the model's measure.
        steps: asked for; two-stage schedulers make nearly twice as many.

    Raises:
        ModelError: the scheduler's noise levels are of no known kind.
    """
    timesteps, levels = _levels(scheduler, steps)
    return Schedule(
        type(scheduler).__name__,
        timesteps,
        tuple(level.alpha for level in levels),
        tuple(level.sigma for level in levels),
    )


def _levels(scheduler: Any, steps: int) -> tuple[tuple[float, ...], list[NoiseLevel]]:
    """Timesteps and noise levels, from a copy that takes all steps, on one number.

    Schedulers of two stages know the level of a step only when it is next.
    """
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(steps)
    levels, number = [], torch.zeros(1, 1, 1, 1)
    for index, timestep in enumerate(copy.timesteps):
        levels.append(noise_level(copy, index))
        copy.scale_model_input(number, timestep)  # without it some schedulers warn
        copy.step(number, timestep, number)
    return tuple(copy.timesteps.tolist()), levels
