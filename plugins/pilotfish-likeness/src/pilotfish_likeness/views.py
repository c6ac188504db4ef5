"""What a classifier is shown: the whole picture and random squares of it, at its own size."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 0.7  # side of a cutout, as a fraction of the picture's shorter side


def look(
    images: Tensor, size: tuple[int, int], count: int, generators: list[torch.Generator]
) -> Tensor:
    """Each image whole (squeezed if need be), and `count` random squares: (B, 1 + count, 3, *size).

    Args:
        images: (B, 3, H, W), any range of values; nothing is clamped.
        generators: one for each image, not used where `count` is 0.
    """
    height, width = images.shape[2:]
    windows = torch.tensor([[0.0, 0, height, width]]).double().expand(len(images), 1, 4)
    if count:
        cutouts = torch.stack([squares(height, width, count, g) for g in generators])
        windows = torch.cat([windows, cutouts], dim=1)  # (B, 1 + count, 4)
    top, left, tall, wide = windows.unbind(-1)
    rows = resizing(top, tall, height, size[0]).to(images)
    columns = resizing(left, wide, width, size[1]).to(images)
    lines = torch.einsum("bvyh,bchw->bvcyw", rows, images)
    return torch.einsum("bvcyw,bvxw->bvcyx", lines, columns)


def squares(height: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """Random squares inside a picture: rows (top, left, side, side), float64."""
    size, down, right = torch.rand(3, count, generator=generator, dtype=torch.float64)
    side = min(height, width) * (SMALLEST + (1 - SMALLEST) * size)
    return torch.stack([(height - side) * down, (width - side) * right, side, side], dim=-1)


def resizing(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Matrices (..., outputs, inputs) that resize windows of a line of pixels.

    Linear interpolation, antialiased as `torch.nn.functional.interpolate` has it; of the whole line
    the same numbers. As matrix products it has a deterministic gradient on CUDA, which
    `interpolate` has not.

    Args:
        start, length: of the windows in pixels, (...), float64.
    """
    step = (length / outputs)[..., None, None]
    centers = start[..., None, None] + step * (torch.arange(outputs)[:, None] + 0.5)
    distance = (torch.arange(inputs) + 0.5 - centers).abs()  # (..., outputs, inputs)
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)
