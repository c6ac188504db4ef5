"""Losses of form that need no weights: `edges`, `sharpness` and `symmetry`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor

from pilotfish import Guide, Setting, pixels, read_picture

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Edges(Guide):
    """Draw along the edges of a given picture; without one, draw more edges, or fewer below 0.

    Edges are the length of the Sobel gradient (Sobel & Feldman 1968), in each colour: how much a
    value rises from pixel to pixel. The loss is the mean squared difference of both pictures'
    edges, or minus the mean of the picture's own.
    """

    class Settings(Guide.Settings):
        image: Path | None = Setting(
            None, description="a picture file whose edges to draw", examples=["picture.png"]
        )

    def setup(self, run: Run) -> Tensor | None:
        if self.settings.image is None:
            return None
        size = cast("tuple[int, int]", (run.height, run.width))  # known once a run is set up
        picture = read_picture(self.settings.image, "Edges: image", size=size)
        return edges(pixels(picture).to(run.model.device))

    def loss_guidance(self, step: Step, state: Tensor | None) -> Tensor:
        found = edges(step.image)
        if state is None:
            return -found.mean(dim=(1, 2, 3))
        return (found - state.to(found)).square().mean(dim=(1, 2, 3))


class Sharpness(Guide):
    """Make the picture sharp, or soft below 0: the variance of its Laplacian.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". The score is that of
    the grey picture, with the kernel of eight neighbours whose sizes add up to 1; the loss is minus
    the score.
    """

    def loss_guidance(self, step: Step) -> Tensor:
        return -sharpness(step.image)


class Symmetry(Guide):
    """Make the picture its own mirror image; below 0, as unlike it as can be.

    The loss is the mean squared difference of the picture and its mirror image.
    """

    class Settings(Guide.Settings):
        axis: Literal["vertical", "horizontal", "both", "point"] = Setting(
            "vertical",
            description="what it is mirrored at: vertical makes left and right alike, horizontal "
            "top and bottom, both all four quarters; point turns it by half a circle",
        )

    def loss_guidance(self, step: Step) -> Tensor:
        return asymmetry(step.image, self.settings.axis)


def edges(images: Tensor) -> Tensor:
    """How steep each value is, in 1 / pixel: (B, C, H, W); a ramp's is its slope."""
    from kornia.filters import sobel

    steepness: Tensor = sobel(images)
    return steepness


def sharpness(images: Tensor) -> Tensor:
    """Variance of the Laplacian of the grey pictures, (B,)."""
    from kornia.color import rgb_to_grayscale
    from kornia.filters import laplacian

    found = laplacian(rgb_to_grayscale(images), kernel_size=3)
    variance: Tensor = found.var(dim=(1, 2, 3), correction=0)
    return variance


def asymmetry(images: Tensor, axis: str) -> Tensor:
    """Mean squared difference (B,) of images and their mirror images; of both, the mean."""
    from kornia.geometry.transform import hflip, rot180, vflip

    mirrors = {"vertical": [hflip], "horizontal": [vflip], "both": [hflip, vflip]}
    found = [
        (images - mirror(images)).square().mean(dim=(1, 2, 3))
        for mirror in mirrors.get(axis, [rot180])
    ]
    total: Tensor = sum(found[1:], start=found[0])
    return total / len(found)
