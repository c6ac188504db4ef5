"""Prompts as people write them: `weights` and `long-prompt`."""

from .text import LongPrompt, Weights

__all__ = ["LongPrompt", "Weights"]
