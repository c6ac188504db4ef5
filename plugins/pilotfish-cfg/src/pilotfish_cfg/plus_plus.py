"""The plugin `cfg-plus-plus`: guided x0, with the noise of the negative prompt's prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pilotfish import Setting

from .predictions import Predictions, Windowed

if TYPE_CHECKING:
    from pilotfish import Step


@dataclass
class Renoising:
    """What a step leaves for its end.

    Attributes:
        latents: those that were predicted from, before any guide moved them.
        noise: by the negative prompt's prediction; None where the plugin does not act.
    """

    latents: Tensor | None = None
    noise: Tensor | None = None


class CfgPlusPlus(Windowed):
    """Mix both predictions, and add noise of the negative prompt's alone: CFG++.

    Chung et al. 2024, "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models",
    arXiv 2406.08070, algorithm 2: x0 = x0(u) + scale (x0(c) - x0(u)) with a scale of at most 1, and
    the next latents are x0 with the noise of u, as in DDIM. That step stands in place of the
    scheduler's, whichever it is; the run's own guidance scale only switches guidance on.
    """

    class Settings(Windowed.Settings):
        scale: float = Setting(
            0.6,
            gt=0,
            le=1,
            description="how much of the prompt's prediction x0 has; 0.6 is about guidance 7.5",
        )

    def setup(self) -> Renoising:
        return Renoising()

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: Step, state: Renoising
    ) -> Tensor | None:
        if uncond is None or not self._inside(step):
            state.noise = None
            return None
        both = Predictions.of(prediction, cond, uncond, step)
        x0 = step.to_x0(both.uncond).detach()
        state.latents = step.latents
        state.noise = (step.latents.to(x0.dtype) - step.alpha * x0) / step.sigma
        scale: float = self.settings.scale
        return (both.uncond + scale * both.direction).to(prediction.dtype)

    def advance(self, step: Step, state: Renoising) -> Tensor | None:
        if state.noise is None or state.latents is None:
            return None
        latents = step.next_alpha * step.x0 + step.next_sigma * state.noise
        if step.alpha:  # what guides moved the latents by belongs to x0: the noise is known
            moved = (step.latents - state.latents).to(latents.dtype)
            latents = latents + step.next_alpha / step.alpha * moved
        return latents.to(step.latents.dtype)
