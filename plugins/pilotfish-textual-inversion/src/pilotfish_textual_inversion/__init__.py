"""Learned words (textual inversion): the plugin `concept`, and the trainer that makes its files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .plan import Plan

if TYPE_CHECKING:
    from .concept import Concept
    from .files import read, write
    from .trainer import train

__all__ = ["Concept", "Plan", "read", "train", "write"]

# Loaded when they are asked for, so that the command's help needs no torch.
_LAZY = {"Concept": "concept", "read": "files", "train": "trainer", "write": "files"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
