"""Where in the picture a guide acts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from ..errors import SettingsError
from ..runs.pictures import read_picture

SIDE = 512  # of the picture that a box is drawn in


class Region:
    """A mask of any size, from a picture or a box.

    Args:
        owner: for errors: whose it is.
        mask: a picture file, white where the guide acts; or (left, top, right, bottom) as fractions
            of the picture's width and height.
        soft_edge: how far edges fade, as a fraction of the shorter side.

    Attributes:
        area: the mean of its square: what part of the picture it is.

    Raises:
        SettingsError: the file is no picture, or the mask is empty.
    """

    hard = False

    def __init__(self, owner: str, mask: Path | Sequence[float], soft_edge: float) -> None:
        if isinstance(mask, Path):
            picture = read_picture(mask, f"{owner}: mask", mode="L")
        else:
            picture = _box(mask)
        radius = soft_edge * min(picture.size) / 2  # a standard deviation: most of the fade is 2
        self._picture = picture.filter(ImageFilter.GaussianBlur(radius)) if radius else picture
        if not self._picture.getbbox():
            raise SettingsError(
                f"{owner}: mask must have white in it, where the guide acts, as a picture, or be a "
                f"box [left, top, right, bottom]; got {mask}"
            )
        self.of = lru_cache(maxsize=4)(self._of)
        self.area = float(self.of((SIDE, SIDE)).square().mean())

    def _of(self, size: tuple[int, int]) -> Tensor:
        """The mask (1, 1, height, width) in [0, 1]."""
        height, width = size
        resized = self._picture.resize((width, height), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(resized, np.float32) / 255)[None, None]


def _box(fractions: Sequence[float]) -> Image.Image:
    left, top, right, bottom = (round(SIDE * fraction) for fraction in fractions)
    picture = Image.new("L", (SIDE, SIDE))
    if right > left and bottom > top:
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return picture
