"""Two guides for likeness: `classifier`, to a class, and `reference`, to a picture."""

from .classifier import Classifier
from .reference import Reference

__all__ = ["Classifier", "Reference"]
