"""A scheduler's noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pilotfish

from .layout import Shown
from .plots import new_figure, rendered

if TYPE_CHECKING:
    from PIL import Image


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
        figure = new_figure(height=6)
        levels, timesteps = figure.subplots(2, 1, sharex=True)
        levels.plot(self.sigmas, marker=".", label="sigma: how much noise")
        levels.plot(self.alphas, marker=".", label="alpha: how much picture")
        levels.set_ylabel("part of the latents")
        levels.legend()
        timesteps.plot(self.timesteps, marker=".", color="gray")
        timesteps.set(ylabel="timestep", xlabel="step", ylim=(0, None))
        figure.suptitle(f"{self.name}, {len(self)} steps")
        return rendered(figure)


def schedule(scheduler: Any, steps: int = 50, model: Any = None) -> Schedule:
    """The noise levels of a diffusers scheduler, which stays as it is.

    Args:
        scheduler: any; `sampler.model.new_scheduler("euler")` makes one to the model's measure.
        steps: asked for; two-stage schedulers make nearly twice as many.
        model: `sampler.model`, which chooses them as in a run of its usual size: many flows take
            more noise for larger pictures. None is the scheduler's own choice.

    Raises:
        InputError: the scheduler cannot take so many steps.
        ModelError: the scheduler's noise levels are of no known kind.
    """
    own = type(scheduler).from_config(scheduler.config)
    if model is None:
        found = pilotfish.Schedule(own, steps)
    else:
        shape = model.latent_shape(model.defaults.height, model.defaults.width)
        found = pilotfish.Schedule(own, steps, partial(model.set_timesteps, shape=shape))
    return Schedule(
        found.name,
        tuple(found.timesteps.tolist()),
        tuple(level.alpha for level in found.levels),
        tuple(level.sigma for level in found.levels),
    )
