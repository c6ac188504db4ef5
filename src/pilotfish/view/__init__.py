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

Nothing here decodes latents unless it is asked to.
"""

from __future__ import annotations

from .film import Film, film
from .grid import Grid, grid
from .latents import RoundTrip, channels, roundtrip
from .layout import table
from .schedule import Schedule, schedule
from .tokens import Tokens, tokens

__all__ = [
    "Film",
    "Grid",
    "RoundTrip",
    "Schedule",
    "Tokens",
    "channels",
    "film",
    "grid",
    "roundtrip",
    "schedule",
    "table",
    "tokens",
]
