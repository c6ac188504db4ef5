"""The guide `reference`: a picture with the colours or the structure of a given one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from pilotfish import Area, Guide, Setting, area_weights, pixels, read_picture

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Reference(Guide):
    """Make the picture look like a given one, in all that is coarser than the cutoff.

    The loss is the mean squared difference of both pictures' low-passed latents or pixels, inside
    the region: latents have about variance one, pixels go from 0 to 1, and neither the size of the
    picture nor that of the region counts.

    After ILVR (Choi et al. 2021, arXiv 2108.02938), which replaces the low frequencies. We differ:
    a loss on the predicted clean picture, beside which other guides and the prompt have a say.
    """

    class Settings(Guide.Settings):
        image: Path = Setting(
            title="a path to a picture", description="what to look like", examples=["picture.png"]
        )
        space: Literal["latent", "image"] = Setting(
            "latent", description="compare the predicted clean latents, or their decoded pixels"
        )
        cutoff: float = Setting(
            1.0,
            ge=0,
            description="waves across the picture's shorter side, of which half is kept; more "
            "waves are finer structure, 0 is the mean colour",
        )
        region: Area | None = Setting(
            None,
            description="where to look: [left, top, right, bottom] as fractions of the picture, or "
            "a picture file, white where it counts",
        )

    def setup(self, run: Run) -> Target:
        settings, model = self.settings, run.model
        size = cast("tuple[int, int]", (run.height, run.width))  # known once a run is set up
        picture = read_picture(settings.image, "Reference: image", size=size)
        content = pixels(picture).to(model.device)
        if settings.space == "latent":
            content = model.encode(content).float()
        cells = content.shape[2], content.shape[3]
        region = (0, 0, 1, 1) if settings.region is None else settings.region
        weights = area_weights(region, cells, what="Reference: region")
        return Target(content, weights.to(content), settings.cutoff)

    def loss_guidance(self, step: Step, state: Target) -> Tensor:
        seen = step.x0 if self.settings.space == "latent" else step.image
        return state.distance(seen)


@dataclass(frozen=True)
class Target:
    """What a picture is compared with.

    Attributes:
        content: latents or pixels (1, C, H, W).
        weights: (1, 1, H, W) in [0, 1], not all 0: the region.
    """

    content: Tensor
    weights: Tensor
    cutoff: float

    def distance(self, seen: Tensor) -> Tensor:
        """Mean squared difference (B,) of the low-passed from `seen` (B, C, H, W), in the region.

        Only differences inside the region are averaged by the filter, so that nothing outside of it
        has a gradient.
        """
        height, width = seen.shape[2:]
        rows, columns = (
            lowpass(side, min(height, width), self.cutoff).to(seen) for side in (height, width)
        )
        weights = self.weights.to(seen)
        difference = rows @ (weights * (seen - self.content.to(seen))) @ columns.T
        reach = rows @ weights @ columns.T
        coarse = difference / torch.where(weights > 0, reach, 1)
        squares = (weights * coarse.square()).sum(dim=(2, 3)) / weights.sum()
        return squares.mean(dim=1)


def lowpass(side: int, shorter: int, cutoff: float) -> Tensor:
    """A matrix (side, side) that blurs a line; each row adds up to 1.

    A Gaussian whose response to `cutoff` waves across the shorter side is one half: of standard
    deviation sqrt(ln 2 / 2) / (pi * cutoff) shorter sides. At the border it is cut and scaled up.

    Args:
        cutoff: 0 gives the mean; far above side / 2 it gives the line itself.
    """
    places = torch.arange(side, dtype=torch.float64) / shorter
    distance = places[:, None] - places
    weights = torch.exp(-((math.pi * cutoff * distance) ** 2) / math.log(2))
    return weights / weights.sum(dim=1, keepdim=True)
