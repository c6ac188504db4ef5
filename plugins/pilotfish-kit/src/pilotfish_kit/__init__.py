"""For authors of plugins: what every plugin must keep, as checks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contract import CHECKS, check_plugin, examine, parametrize_with_checks

__all__ = ["CHECKS", "check_plugin", "examine", "parametrize_with_checks"]


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for: `pilotfish plugins new` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'pilotfish_kit' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.contract"), name)
