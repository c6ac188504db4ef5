"""How a model's pictures are noised for training, and what it is to answer then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pilotfish import InputError, ModelError


class Noising:
    """The noise of a model, by a scheduler of diffusers that can add it.

    A diffusion's timesteps are spread evenly. A flow's are logit-normal: Esser et al. 2024, arXiv
    2403.03206, section 3.1, with location 0 and scale 1, and shifted as the scheduler's
    configuration says whatever the picture's size.

    Attributes:
        num_timesteps: how many timesteps a step's draw may tell apart.
    """

    def __init__(self, model: Any) -> None:
        try:
            # Any of a diffusion's schedulers knows its noise; this one can also add it.
            self._scheduler, self._flow = model.new_scheduler("ddpm"), False
        except InputError:  # the model goes along a flow
            self._scheduler, self._flow = model.new_scheduler("flowmatch-euler"), True
        self.num_timesteps = int(self._scheduler.config.num_train_timesteps)
        kind = "flow" if self._flow else self._scheduler.config.prediction_type
        if kind not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ModelError(f"prediction type {kind!r} cannot be trained against")
        self._kind = kind

    def timesteps(self, even: Tensor) -> Tensor:
        """The network's timesteps (B,) for those that were drawn evenly, 0 to `num_timesteps`."""
        if not self._flow:
            return even
        normal = torch.special.ndtri((even.cpu() + 0.5) / self.num_timesteps)
        places = (normal.sigmoid() * self.num_timesteps).long()
        timesteps: Tensor = self._scheduler.timesteps[places].to(even.device)
        return timesteps

    def add(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents (B, C, H, W)."""
        if self._flow:
            latents: Tensor = self._scheduler.scale_noise(x0, timesteps, noise)
        else:
            latents = self._scheduler.add_noise(x0, noise, timesteps)
        return latents

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to answer; the velocity of a flow is noise - x0."""
        if self._kind == "v_prediction":
            velocity: Tensor = self._scheduler.get_velocity(x0, noise, timesteps)
            return velocity
        return {"flow": noise - x0, "epsilon": noise, "sample": x0}[self._kind]
