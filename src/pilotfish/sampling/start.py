"""Where a run may start."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedule import Schedule


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
    _schedule: Schedule = field(repr=False)

    def noised(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents (B, C, H, W) with noise, at the level of step `index`, as diffusers has it.

        Args:
            index: where the run will start.
        """
        return self._schedule.noised(x0, noise, index)
