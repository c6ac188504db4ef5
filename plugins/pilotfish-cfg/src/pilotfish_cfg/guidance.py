"""Classifier-free guidance, tamed: the plugins `cfg-rescale` and `cfg-interval`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import ValidationInfo, field_validator

from pilotfish import Plugin, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from pilotfish import Step


class CfgRescale(Plugin):
    """Give the guided prediction back the contrast of the prompt's own: no burnt colours.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv
    2305.08891, section 3.4; `guidance_rescale` of diffusers, to the bit. Made for models that
    predict v; where one predicts the noise, less of it is taken away, and that stays as speckle.
    """

    heading = "classifier-free guidance"

    class Settings(Plugin.Settings):
        rescale: float = Setting(
            0.7,
            ge=0,
            le=1,
            description="how much of the way to the prompt's own contrast: 0 is off, 1 looks plain",
        )

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None
    ) -> Tensor | None:
        if uncond is None:
            return None
        contrast, own = (t.std(dim=(1, 2, 3), keepdim=True) for t in (cond, prediction))
        rescaled = prediction * (contrast / own)
        factor: float = self.settings.rescale
        return factor * rescaled + (1 - factor) * prediction


class CfgInterval(Plugin):
    """Guide by the prompt in a window of noise levels only; outside, take its prediction as it is.

    Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and
    Distribution Quality in Diffusion Models", arXiv 2404.07724: guidance does harm at high noise,
    where it takes variety away, and next to nothing at low noise. A noise level is sigma / alpha,
    so that a window means the same with every scheduler. The defaults are the paper's for Stable
    Diffusion XL. Outside the window it also drops what plugins before it made of the prediction.
    We differ: the negative prompt's prediction is computed outside the window too.
    """

    heading = "classifier-free guidance"

    class Settings(Plugin.Settings):
        low: float = Setting(
            0.28, ge=0, description="the noise level at and below which guidance is off"
        )
        high: float = Setting(5.42, gt=0, description="the noise level above which guidance is off")

        @field_validator("high")
        @classmethod
        def _above_low(cls, high: float, info: ValidationInfo) -> float:
            if high <= info.data.get("low", -math.inf):
                raise ValueError(f"above low, {info.data['low']}")
            return high

    def combine_predictions(self, cond: Tensor, uncond: Tensor | None, step: Step) -> Tensor | None:
        low, high = self.settings.low * step.alpha, self.settings.high * step.alpha
        return None if uncond is None or low < step.sigma <= high else cond
