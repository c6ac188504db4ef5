"""Losses that people rank pictures by, losses of likeness and form, and a gate.

A reward is a loss: minus the score that a picture gets. No network is loaded and no large library
imported before a run needs it, and nothing is downloaded that no setting names.
"""

from .form import Edges, Sharpness, Symmetry
from .gate import Gate
from .preference import Aesthetic, Hps, ImageReward, PickScore
from .reference import ClipStyle, Perceptual

__all__ = [
    "Aesthetic",
    "ClipStyle",
    "Edges",
    "Gate",
    "Hps",
    "ImageReward",
    "Perceptual",
    "PickScore",
    "Sharpness",
    "Symmetry",
]
