"""Plots by matplotlib, which is an extra."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from pilotfish import PilotfishError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(height: float) -> Figure:
    """An empty figure, 8 inches wide.

    Raises:
        PilotfishError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PilotfishError(
            "a plot needs matplotlib: pip install 'pilotfish-view[plot]'"
        ) from error
    return Figure(figsize=(8, height), layout="constrained")


def rendered(figure: Figure) -> Image.Image:
    """The figure as a picture, 100 pixels an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image.open(file)
