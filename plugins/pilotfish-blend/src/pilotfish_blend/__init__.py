"""Mixed prompts and mixed words: `blend`, `token-blend` and `token-swap`."""

from .prompts import Blend
from .words import TokenBlend, TokenSwap

__all__ = ["Blend", "TokenBlend", "TokenSwap"]
