"""How strong a guide is, as a setting: a number, or a curve over the run."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

LARGEST = 3.4e38  # of float32, in which gradients are weighted
Curve = tuple[tuple[float, float], ...]


def check_strength(value: Any) -> float | Curve:
    """A number, or a curve's points (progress, strength).

    Raises:
        ValueError: it is neither; says what they are.
    """
    try:
        if not isinstance(value, list | tuple):
            points: Curve = ((0.0, float(value)),)
        else:
            points = tuple((float(progress), float(strength)) for progress, strength in value)
        finite = all(abs(strength) <= LARGEST for _, strength in points)
        moments = [0.0, *(progress for progress, _ in points), 1.0]
        if points and finite and all(a <= b for a, b in itertools.pairwise(moments)):
            return points if isinstance(value, list | tuple) else points[0][1]
    except (TypeError, ValueError, OverflowError):
        pass  # no numbers, or no pairs of them
    raise ValueError(
        "a finite number, or a curve [[progress, strength], ...] whose progress rises from 0 to 1"
    )


Strength = Annotated[
    float | Curve,
    BeforeValidator(check_strength),
    Field(title="a number, or a curve [[progress, strength], ...]"),
]
"""A setting: a number, or a curve over the run `[[progress, strength], ...]`; see `strength_at`."""


def strength_at(strength: float | Sequence[Sequence[float]], progress: float) -> float:
    """The number, or the curve at a fraction of the run: straight lines between its points.

    Before its first point and after its last one it stays as it is there; of two points at one
    moment the later one counts from that moment on.
    """
    if isinstance(strength, int | float):
        return strength
    after = bisect_right(strength, progress, key=lambda point: point[0])
    if after in (0, len(strength)):
        return strength[min(after, len(strength) - 1)][1]
    (begin, first), (end, last) = strength[after - 1 : after + 1]
    return first + (last - first) * (progress - begin) / (end - begin)
