"""For plugin authors' tests: a small random model, a step of it, and a model that is exact.

pytest finds the fixtures `random_sampler`, `random_step` and `emoji_sampler` by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exact import GaussianModel
    from .random_models import families, random_pipeline, random_sampler, random_step

__all__ = ["GaussianModel", "families", "random_pipeline", "random_sampler", "random_step"]


def __getattr__(name: str) -> Any:  # pytest imports this package for its fixtures
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "exact" if name == "GaussianModel" else "random_models"
    return getattr(import_module(f".{module}", __name__), name)
