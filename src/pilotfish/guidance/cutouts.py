"""What networks that judge pictures are shown: the whole picture, and random squares of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["bilinear", "bicubic"]


def cutouts(
    images: Tensor,
    size: tuple[int, int],
    count: int,
    generators: Sequence[torch.Generator],
    *,
    smallest: float,
    kernel: Kernel = "bilinear",
) -> Tensor:
    """Each image whole, and `count` random squares of it: (B, 1 + count, C, *size).

    Cutouts make the gradient one that many crops agree on (Crowson 2021, "CLIP Guided Diffusion").
    We differ: the whole picture, squeezed if it is not square, is always among them, and a square's
    side is a fraction of the picture's, whatever the network's own size.

    Args:
        images: (B, C, H, W), any range of values; nothing is clamped.
        size: (height, width) of what comes out.
        generators: one for each image, not used where `count` is 0.
        smallest: side of a square, as a fraction of the picture's shorter side; the largest is 1.
        kernel: of the antialiased filter, as `torch.nn.functional.interpolate` calls it.
    """
    height, width = images.shape[2:]
    windows = torch.tensor([[0, 0, height, width]]).double().expand(len(images), 1, 4)
    if count:
        drawn = [squares(height, width, count, generator, smallest) for generator in generators]
        windows = torch.cat([windows, torch.stack(drawn)], dim=1)  # (B, 1 + count, 4)
    top, left, tall, wide = windows.unbind(-1)
    rows = resizing(top, tall, height, size[0], kernel, images)
    columns = resizing(left, wide, width, size[1], kernel, images)
    lines = torch.einsum("bvyh,bchw->bvcyw", rows, images)
    return torch.einsum("bvcyw,bvxw->bvcyx", lines, columns)


def squares(
    height: int, width: int, count: int, generator: torch.Generator, smallest: float
) -> Tensor:
    """Random squares of whole pixels inside a picture: rows (top, left, side, side), float64."""
    size, down, right = torch.rand(3, count, generator=generator, dtype=torch.float64)
    side = (min(height, width) * (smallest + (1 - smallest) * size)).ceil()
    top, left = ((height - side + 1) * down).floor(), ((width - side + 1) * right).floor()
    return torch.stack([top, left, side, side], dim=-1)


def resizing(
    start: Tensor, length: Tensor, inputs: int, outputs: int, kernel: Kernel, like: Tensor
) -> Tensor:
    """Matrices (..., outputs, inputs) that resize windows of a line of pixels.

    The numbers of `torch.nn.functional.interpolate(antialias=True)` for the window alone. As matrix
    products they have a deterministic gradient on CUDA, which `interpolate` has not.

    Args:
        start, length: of the windows in pixels, (...), float64.
        like: a tensor of the device and number format to answer in.
    """
    step = (length / outputs).unsqueeze(-1)
    centers = start.unsqueeze(-1) + step * (torch.arange(outputs) + 0.5) - 0.5  # (..., outputs)
    whole = centers.floor()
    # Whole and fractional part go on apart, since float32 would lose digits of their sum.
    rest, whole, width = (
        t.unsqueeze(-1).to(like, non_blocking=True) for t in (centers - whole, whole, step)
    )
    places = torch.arange(inputs).to(like, non_blocking=True)
    weights = _filter((places - whole - rest) / width.clamp(min=1), kernel)
    first, end = (t.unsqueeze(-1).to(like, non_blocking=True) for t in (start, start + length))
    weights = weights * ((places >= first) & (places < end)).unsqueeze(-2)
    return weights / weights.sum(-1, keepdim=True)


def _filter(distance: Tensor, kernel: Kernel) -> Tensor:
    """The triangle, or Keys' cubic with a = -0.5, as Pillow and antialiased `interpolate` do."""
    x = distance.abs()
    if kernel == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
