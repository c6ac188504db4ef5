"""Where in the picture a guide acts: boxes and masks, averaged exactly at any size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import SettingsError

SIDE = 512  # cells a side at which a region's area is measured
REACH = 3.0  # deviations at which the Gaussian ends: beyond, a mask is exactly 0 or 1


class Region:
    """A mask at any size.

    Args:
        owner: for errors: whose it is.
        mask: (1, 1, h, w) in [0, 1], 1 where the guide acts, stretched to the picture; or (left,
            top, right, bottom) as fractions of the picture's width and height.
        soft_edge: how far edges fade, as a fraction of the picture's shorter side.
        hard: 1 in cells that the mask covers by more than half, else 0; without a soft edge.

    Attributes:
        area: the mean of its square: what part of the picture it is.
        hard: as given.

    Raises:
        SettingsError: it is hard, and so fine that no picture holds any of it.
    """

    def __init__(
        self, owner: str, mask: Tensor | Sequence[float], soft_edge: float, *, hard: bool = False
    ) -> None:
        self._owner, self._mask, self.hard = owner, mask, hard
        self._soft_edge = 0.0 if hard else soft_edge
        self.of = lru_cache(maxsize=4)(self._of)
        self.area = float(self.of((SIDE, SIDE)).double().square().mean())

    def _of(self, size: tuple[int, int]) -> Tensor:
        """The mask (1, 1, height, width) in [0, 1], float32.

        Raises:
            SettingsError: it is hard, and covers no cell by more than half.
        """
        covered = self._covered(size)
        inside = covered > 0.5 if self.hard else covered
        if self.hard and not inside.any():
            raise SettingsError(
                f"{self._owner}: mask_edge='hard' keeps the cells that the mask covers by more "
                f"than half, and of {size[0]} x {size[1]} it covers none; take a larger mask, or "
                "mask_edge='soft'"
            )
        return inside.float()

    def _covered(self, size: tuple[int, int]) -> Tensor:
        deviation = self._soft_edge / 2 * min(size)  # most of the fade is two of them
        if isinstance(self._mask, Tensor):
            return mask_weights(self._mask, size, deviation)
        return box_weights(self._mask, size, deviation)


def box_weights(box: Sequence[float], size: tuple[int, int], deviation: float = 0.0) -> Tensor:
    """What part of each cell a box covers, (1, 1, *size) in [0, 1], float64.

    Args:
        box: (left, top, right, bottom) as fractions of the width and the height.
        deviation: of the Gaussian that blurs it, in cells.
    """
    left, top, right, bottom = box
    rows, columns = (
        covered(torch.tensor(ends, dtype=torch.float64) * cells, cells, deviation)
        for ends, cells in zip(((top, bottom), (left, right)), size, strict=True)
    )
    return (rows @ columns.T)[None, None]


def mask_weights(
    mask: Tensor, size: tuple[int, int], deviation: float = 0.0, *, cut: bool = False
) -> Tensor:
    """The mean of a mask in each cell, (1, 1, *size) in [0, 1], float64.

    Args:
        mask: (1, 1, h, w) in [0, 1].
        deviation: of the Gaussian that blurs it, in cells.
        cut: the middle is cut to the cells' shape; otherwise the mask is stretched to it.
    """
    sides = list(zip(mask.shape[2:], size, strict=True))
    scale = min(side / cells for side, cells in sides)  # of the mask's pixels in a cell
    lines = []
    for side, cells in sides:
        taken = scale * cells if cut else float(side)
        edges = (torch.arange(side + 1).double() - (side - taken) / 2) * cells / taken
        lines.append(covered(edges, cells, deviation))
    rows, columns = lines
    return (rows @ mask[0, 0].double() @ columns.T).clamp(0, 1)[None, None]


def covered(edges: Tensor, cells: int, deviation: float = 0.0) -> Tensor:
    """What part of each cell of a line lies in each interval, (cells, intervals), float64.

    Args:
        edges: of the intervals, rising, in cells from the line's start, (intervals + 1,).
        deviation: of the Gaussian that blurs the intervals, in cells. An interval at the line's end
            goes on beyond it, so that nothing fades there.
    """
    borders = torch.arange(cells + 1, dtype=torch.float64)[:, None]
    parts = borders.clamp(edges[:-1], edges[1:]).diff(dim=0)
    if not deviation:
        return parts
    # The integral of the distribution is max(x, 0) plus this, which is 0 beyond its reach.
    x = ((borders - edges) / deviation).abs().clamp(max=REACH)
    end = torch.tensor(REACH).to(x)
    tail = _tail(x) - _tail(end) - torch.special.ndtr(-end) * (end - x)
    faded = deviation / torch.special.erf(end / 2**0.5) * tail.diff(dim=0)
    faded = torch.where((edges <= 0) | (edges >= cells), 0, faded)
    return (parts - faded.diff(dim=1)).clamp(0, 1)


def _tail(x: Tensor) -> Tensor:
    """The integral of the normal distribution's upper tail from x on."""
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    tail: Tensor = density - x * torch.special.ndtr(-x)
    return tail
