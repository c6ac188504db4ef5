"""Two guides for colours: `blue`, the classic first loss, and `palette`."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from PIL import Image, ImageColor
from pydantic import ValidationInfo, field_validator, model_validator

from pilotfish import Guide, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from pilotfish import Step

__all__ = ["Blue", "Palette"]

SIDE = 32  # cells a side at most; a cell is the mean of its pixels
SOFTNESS = 0.005  # squared Oklab distance over which a cell divides itself among colours
ROUNDS = 30  # fixed, so that an image does not depend on its neighbours; shares are met to 2 %
LEAST = 0.5  # of an even share, for each colour where no weights are given


class Blue(Guide):
    """Pull the picture towards blue: mean distance of the blue channel to a target."""

    class Settings(Guide.Settings):
        target: float = Setting(
            0.9, ge=0, le=1, description="the blue that every pixel should have"
        )

    def loss_guidance(self, step: Step) -> Tensor:
        loss: Tensor = (step.image[:, 2] - self.settings.target).abs().mean(dim=(1, 2))  # (B,)
        return loss


class Palette(Guide):
    """Pull the picture into given colours, so that each of them is used.

    The loss is the cost of moving the picture's colours onto the palette's: mean squared distance
    in Oklab, where black to white is about 1 and 0.0004 is just noticeable. With `weights` each
    colour takes its share of the picture; without, at least half of an even share, and the rest of
    the picture goes where it is nearest. Colours taken from a picture are written into the
    settings, so that a run can be repeated without the file.
    """

    class Settings(Guide.Settings):
        colors: list[str] | None = Setting(
            None,
            title="a list of colours",
            description="hex colours such as '#fa0', a list or one string",
            examples=[["#035", "#fa0"]],
        )
        count: int = Setting(5, ge=1, le=16, description="how many colours to take from `image`")
        image: Path | None = Setting(
            None,
            title="a path to a picture",
            description="instead of colors: where to take them from",
        )
        weights: list[float] | None = Setting(
            None, description="each colour's part of the picture, in any unit"
        )
        space: Literal["image", "latent"] = Setting(
            "image", description="look at the decoded image, or at its estimate from the latents"
        )

        @field_validator("colors", mode="before")
        @classmethod
        def _split(cls, colors: Any) -> Any:
            return re.split(r"[\s,]+", colors.strip()) if isinstance(colors, str) else colors

        @field_validator("colors")
        @classmethod
        def _hex(cls, colors: list[str] | None) -> list[str] | None:
            wrong = [c for c in colors or () if not re.fullmatch(r"#(?:[\da-fA-F]{3}){1,2}", c)]
            if wrong or colors == []:
                hint = f" ({wrong[0]!r} is none)" if wrong else ""
                raise ValueError(f"one or more hex colours such as '#fa0' or '#ffaa00'{hint}")
            return colors

        @field_validator("weights")
        @classmethod
        def _shares(cls, weights: list[float] | None, info: ValidationInfo) -> list[float] | None:
            colors = info.data.get("colors")
            if weights is None:
                return None
            if min(weights, default=-1) < 0 or not any(weights):
                raise ValueError("numbers >= 0, not all of them 0")
            if colors and len(weights) != len(colors):
                raise ValueError(f"one number for each colour ({len(colors)})")
            return weights

        @model_validator(mode="after")
        def _either(self) -> Self:
            if (self.image is None) == (self.colors is None):
                raise ValueError(
                    "give colors, such as ['#035', '#fa0'], or image, a picture file to take them "
                    f"from; got {'both' if self.image else 'neither'}"
                )
            return self

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        given = self.settings
        if given.image is not None:
            colors, weights = colors_of(given.image, given.count)
            taken = {"image": None, "colors": colors, "weights": given.weights or weights}
            super().__init__(**{**settings, **taken})

    def loss_guidance(self, step: Step) -> Tensor:
        from torch.nn.functional import avg_pool2d  # here, so that a dry run loads no torch

        settings = self.settings
        exact = settings.weights is not None
        weights = settings.weights if exact else [1.0] * len(settings.colors)
        used = [pair for pair in zip(settings.colors, weights, strict=True) if pair[1] > 0]
        picture = step.rgb if settings.space == "latent" else step.image
        colors = picture.new_tensor([ImageColor.getrgb(color) for color, _ in used]) / 255
        shares = picture.new_tensor([weight for _, weight in used])
        shares = shares / shares.sum() * (1 if exact else LEAST)
        # Average pooling, because resizing has no deterministic gradient on CUDA.
        size = math.ceil(max(picture.shape[2:]) / SIDE)
        cells = avg_pool2d(picture, size, ceil_mode=True, count_include_pad=False)
        cells = cells.flatten(2).transpose(1, 2)  # (B, cells, 3)
        distance = (oklab(cells)[:, :, None] - oklab(colors)).square().sum(-1)
        return transport_cost(distance, shares, exact)


def oklab(rgb: Tensor) -> Tensor:
    """Colours in Oklab, from sRGB in [0, 1], both (..., 3); finite and smooth for any value.

    Ottosson 2020, https://bottosson.github.io/posts/oklab/. We differ below a cone response of
    0.001 (darker than #040404) and below 0: the cube root goes on along its tangent, since its own
    slope is infinite at black.
    """
    bright = ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    linear = bright.where(rgb > 0.04045, rgb / 12.92)
    cones = (linear[..., None, :] * rgb.new_tensor(_TO_CONES)).sum(-1)
    dark = 0.1 + (cones - 1e-3) / (3 * 0.1**2)
    roots = (cones.clamp(min=1e-3) ** (1 / 3)).where(cones > 1e-3, dark)
    # Sums, not matrix products: those are half precision under autocast, TF32 on some GPUs.
    return (roots[..., None, :] * rgb.new_tensor(_TO_OKLAB)).sum(-1)


def transport_cost(distance: Tensor, shares: Tensor, exact: bool) -> Tensor:
    """Cost of moving each image's cells onto the colours, (B,), from distances (B, cells, colours).

    Entropic optimal transport (Cuturi 2013, arXiv 1306.0895), semi-dual form: the mean soft minimum
    of `distance - bonus`, plus the bonus of all shares. Sinkhorn's iteration finds the bonus at
    which each colour gets its share; it is never negative where a share is only a lower bound
    (Chizat et al. 2016, arXiv 1607.05816). The softness starts at 0.3, which is faster. At the best
    bonus the cost is stationary in it, so the gradient leaves it out: each cell goes to its own
    mixture of colours. The result is up to `SOFTNESS * log(colours)` below the exact cost, which
    shows only between colours that are nearly the same.

    Args:
        shares: (colours,), positive, of sum at most 1.
        exact: each colour gets its share; otherwise at least that.
    """
    import torch

    with torch.no_grad():
        bonus = torch.zeros_like(distance[:, :1])  # (B, 1, colours)
        for softness in (max(SOFTNESS, 0.3 * 0.8**i) for i in range(ROUNDS)):
            cells = -softness * torch.logsumexp((bonus - distance) / softness, 2, keepdim=True)
            asked = torch.logsumexp((cells - distance) / softness, 1, keepdim=True)
            bonus = softness * (shares.log() + math.log(distance.shape[1]) - asked)
            bonus = bonus if exact else bonus.clamp(min=0)
    nearest = -SOFTNESS * torch.logsumexp((bonus - distance) / SOFTNESS, 2)  # (B, cells)
    return nearest.mean(1) + (shares * bonus[:, 0]).sum(1)


def colors_of(path: Path, count: int) -> tuple[list[str], list[float]]:
    """The main colours of a picture file and their shares, largest first: Pillow's median cut.

    Raises:
        SettingsError: it cannot be read, or is too large.
    """
    from pilotfish import read_picture  # which loads torch

    picture = read_picture(path, "Palette: image")
    picture.thumbnail((256, 256), Image.Resampling.NEAREST)  # others mix colours
    reduced = picture.quantize(count, Image.Quantize.MEDIANCUT, kmeans=1)
    pixels = reduced.convert("RGB").tobytes()
    found = Counter(pixels[i : i + 3].hex() for i in range(0, len(pixels), 3)).most_common()
    return [f"#{color}" for color, _ in found], [round(3 * n / len(pixels), 4) for _, n in found]


_TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
_TO_OKLAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]
