"""Where a run may start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """What `start_latents` needs to begin a run elsewhere than at pure noise.

    Attributes:
        order: steps of the loop for each of the user's: 2 for Heun, mostly 1.
        generator: one CPU generator per image, the run's own. The starting noise is drawn from it,
            and after it what the scheduler draws.
    """

    order: int
    generator: list[torch.Generator]
    _scheduler: Any = field(repr=False)

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents (B, C, H, W) with noise, at the level of step `index`, as diffusers has it.

        Args:
            index: where the run will start.
        """
        if hasattr(self._scheduler, "set_begin_index"):  # it looks there for the level
            self._scheduler.set_begin_index(index)
        timesteps = self._scheduler.timesteps[index].repeat(len(x0))
        latents: Tensor = self._scheduler.add_noise(x0, noise, timesteps)
        return latents
