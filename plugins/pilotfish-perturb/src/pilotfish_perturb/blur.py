"""A Gaussian blur by two products with matrices, whose gradient is the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from pilotfish import ModelError


def blurred(maps: Tensor, deviation: float, reach: int) -> Tensor:
    """Maps (..., H, W) under a Gaussian; at the edges they go on as in a mirror.

    Args:
        deviation: the Gaussian's, in cells.
        reach: how many cells away it ends; on small maps half of their side.
    """
    down, across = (_weights(size, deviation, reach).to(maps) for size in maps.shape[-2:])
    return down @ maps @ across.mT


def _weights(size: int, deviation: float, reach: int) -> Tensor:
    """(size, size): what each cell of a row takes of each."""
    reach = min(reach, size // 2)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / deviation).square())
    places = (torch.arange(size)[:, None] + offsets).abs()
    places = (size - 1) - (size - 1 - places).abs()  # (size, 2 * reach + 1)
    taken = (weights / weights.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.double).scatter_add_(1, places, taken)


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many tokens: those of latents (H, W), halved until they fit.

    Raises:
        ModelError: they never fit.
    """
    rows, columns = size
    while rows * columns > tokens:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise ModelError(
            f"{tokens} image tokens are no grid of {size[0]} x {size[1]} latents, halved or not: "
            "these layers cannot be blurred; choose others"
        )
    return rows, columns
