"""A part of the picture, as a setting: a mask file or a box."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

Box = tuple[float, float, float, float]


def check_area(area: Any) -> Box | Path:
    """A mask file, or a box (left, top, right, bottom) in fractions of the picture.

    Raises:
        ValueError: it is neither; says what an area is.
    """
    if isinstance(area, str | Path):
        return Path(area)
    try:
        left, top, right, bottom = map(float, area)
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return left, top, right, bottom
    except (TypeError, ValueError, OverflowError):
        pass  # no four numbers
    bounds = "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
    raise ValueError(f"a picture file, or [left, top, right, bottom] with {bounds}")


Area = Annotated[
    Box | Path,
    BeforeValidator(check_area),
    Field(title="a path to a picture, or a box [left, top, right, bottom]"),
]
"""A setting's type: a mask file, white where it counts, or a box [left, top, right, bottom].

A box is in fractions of the picture, 0 <= left < right <= 1 and 0 <= top < bottom <= 1.
`pilotfish.area_weights` gives what part of each cell or pixel lies in an area.
"""
