"""Prompts as people write them: `weights`, `long-prompt` and `regions`."""

from .regions import Regions
from .text import LongPrompt, Weights

__all__ = ["LongPrompt", "Regions", "Weights"]
