"""Pictures of what goes on in a run: PIL images, which notebooks show.

| name | shows |
|---|---|
| `channels` | latents, channel by channel |
| `schedule` | timesteps and noise levels of a scheduler |
| `tokens` | how a prompt is cut into tokens |
| `roundtrip` | what the VAE loses of a picture |
| `film` | a run, step by step: noisy latents left, predicted x0 right; as a film or a sheet |
| `grid` | one picture for each pair of two settings' values |
| `table` | any pictures in labelled rows and columns |
| `losses` | each guide's loss and share of the move over the steps |
| `strip` | pictures side by side, each with a label |

Nothing here decodes latents unless it is asked to.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .films import Film, film
    from .grids import Grid, grid
    from .latents import RoundTrip, channels, roundtrip
    from .layout import strip, table
    from .schedules import Schedule, schedule
    from .traces import losses
    from .words import Tokens, tokens

__all__ = [
    "Film",
    "Grid",
    "RoundTrip",
    "Schedule",
    "Tokens",
    "channels",
    "film",
    "grid",
    "losses",
    "roundtrip",
    "schedule",
    "strip",
    "table",
    "tokens",
]

# Loaded when they are asked for, so that the commands' help needs no torch.
_LAZY = {
    "Film": "films",
    "Grid": "grids",
    "RoundTrip": "latents",
    "Schedule": "schedules",
    "Tokens": "words",
    "channels": "latents",
    "film": "films",
    "grid": "grids",
    "losses": "traces",
    "roundtrip": "latents",
    "schedule": "schedules",
    "strip": "layout",
    "table": "layout",
    "tokens": "words",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
