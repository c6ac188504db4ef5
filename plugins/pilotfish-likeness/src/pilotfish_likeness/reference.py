"""The guide `reference`: a picture with the colours or the structure of a given one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import field_validator
from torch import Tensor

from pilotfish import Guide, Setting, SettingsError, pixels, read_picture

if TYPE_CHECKING:
    from pilotfish import Run, Step

Box = tuple[float, float, float, float]


class Reference(Guide):
    """Make the picture look like a given one, in all that is coarser than the cutoff.

    The loss is the mean squared difference of both pictures' low-passed latents or pixels, inside
    the region: latents have about variance one, pixels go from 0 to 1, and neither the size of the
    picture nor that of the region counts.

    After ILVR (Choi et al. 2021, arXiv 2108.02938), which replaces the low frequencies. We differ:
    a loss on the predicted clean picture, beside which other guides and the prompt have a say.
    """

    class Settings(Guide.Settings):
        image: Path = Setting(description="a picture file to look like", examples=["picture.png"])
        space: Literal["latent", "image"] = Setting(
            "latent", description="compare the predicted clean latents, or their decoded pixels"
        )
        cutoff: float = Setting(
            1.0,
            ge=0,
            description="waves across the picture's shorter side, of which half is kept; more "
            "waves are finer structure, 0 is the mean colour",
        )
        region: Box | Path | None = Setting(
            None,
            description="where to look: [left, top, right, bottom] as fractions of the picture, or "
            "a picture file, white where it counts",
        )

        @field_validator("region", mode="before")
        @classmethod
        def _inside(cls, region: Any) -> Any:
            if region is None or isinstance(region, str | Path):
                return region
            try:
                left, top, right, bottom = map(float, region)
            except (TypeError, ValueError):
                left = top = right = bottom = math.nan
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    "[left, top, right, bottom] with 0 <= left < right <= 1 and "
                    "0 <= top < bottom <= 1, or a picture file"
                )
            return left, top, right, bottom

    def setup(self, run: Run) -> Target:
        settings, model = self.settings, run.model
        size = cast("tuple[int, int]", (run.height, run.width))  # known once a run is set up
        picture = read_picture(settings.image, "Reference: image", size=size)
        content = pixels(picture).to(model.device)
        if settings.space == "latent":
            content = model.encode(content).float()
        weights = region_weights(settings.region, size, (content.shape[2], content.shape[3]))
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


def region_weights(
    region: Box | Path | None, size: tuple[int, int], cells: tuple[int, int]
) -> Tensor:
    """How much of each cell lies inside, (1, 1, *cells) in [0, 1].

    Args:
        size: of the picture in pixels, (height, width).

    Raises:
        SettingsError: nothing lies inside.
    """
    if isinstance(region, Path):
        mask = pixels(read_picture(region, "Reference: region", mode="L", size=size))
        weights = torch.nn.functional.adaptive_avg_pool2d(mask, cells)
    else:
        left, top, right, bottom = region or (0, 0, 1, 1)
        rows, columns = covered(top, bottom, cells[0]), covered(left, right, cells[1])
        weights = torch.outer(rows, columns)[None, None]
    if not weights.any():
        raise SettingsError(f"Reference: region must be white somewhere; {region} is all black")
    return weights


def covered(start: float, end: float, cells: int) -> Tensor:
    """How much of each of `cells` lies between two fractions of a line."""
    edges = torch.arange(cells + 1, dtype=torch.float64).clamp(start * cells, end * cells)
    return edges.diff()
