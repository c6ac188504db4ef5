"""The plugin `fdg`: a guidance scale for each band of frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from pilotfish import Setting

from .predictions import Predictions, Windowed

if TYPE_CHECKING:
    from pilotfish import Step

Scale = Annotated[float, Setting(ge=0)]

# Burt & Adelson 1983, "The Laplacian Pyramid as a Compact Image Code", w(0) = 3/8.
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


class Fdg(Windowed):
    """Give fine detail and coarse layout a guidance scale each: frequency-decoupled guidance.

    Sadat et al. 2025, "Guidance in the Frequency Domain Enables High-Fidelity Sampling at Low CFG
    Scales", arXiv 2506.19713: u plus the bands of d = c - u in a Laplacian pyramid, each times its
    scale. The run's own guidance scale does no more than switch guidance on.
    """

    class Settings(Windowed.Settings):
        scales: list[Scale] = Setting(
            [10.0, 5.0],
            min_length=1,
            description="the guidance scale of each band, the finest first; each is twice as "
            "coarse as the one before it, and the last has all that is left",
        )

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: Step
    ) -> Tensor | None:
        if uncond is None or not self._inside(step):
            return None
        both, scales = Predictions.of(prediction, cond, uncond, step), self.settings.scales
        return weighted(both.direction, scales).add(both.uncond).to(prediction.dtype)


def weighted(images: Tensor, weights: list[float]) -> Tensor:
    """The bands of a Laplacian pyramid of images (B, C, H, W), each times its weight, in a sum."""
    weight, *others = weights
    if not others:
        return weight * images
    coarse = avg_pool2d(blurred(images), 2, ceil_mode=True)

    def enlarged(coarse: Tensor) -> Tensor:
        return blurred(interpolate(coarse, size=images.shape[2:], mode="bilinear"))

    return weight * (images - enlarged(coarse)) + enlarged(weighted(coarse, others))


def blurred(images: Tensor) -> Tensor:
    """Blurred by `TAPS` along both sides; at the edges the nearest cell goes on."""
    channels = images.shape[1]
    taps = torch.tensor(TAPS).to(images).expand(channels, 1, 1, -1)  # (C, 1, 1, 5)
    wide = conv2d(pad(images, (2, 2, 0, 0), mode="replicate"), taps, groups=channels)
    return conv2d(pad(wide, (0, 0, 2, 2), mode="replicate"), taps.mT, groups=channels)
