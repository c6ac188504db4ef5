"""A model whose answers are known exactly: a network for Gaussian data, and its posterior."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..guidance.noise import NoiseLevel, noise_level
from ..models.text import Conditioning


class GaussianModel:
    """The exact network for data N(0, std^2) in every coordinate; float64, on the CPU.

    It takes the place of a loaded model in `Sampler(GaussianModel())`. Every step's x0 is
    `E[x0 | latents]`; the "VAE" is x0 / 2 + 0.5 in three channels.

    Args:
        std: of the data.
    """

    id, device, dtype, factor, text_encoders = None, torch.device("cpu"), torch.float64, 1, ()

    def __init__(self, std: float = 0.7) -> None:
        self.std = std
        self.calls = self.decodes = 0

    def new_scheduler(self, spec: Any) -> Any:
        """A scheduler by short name, or a table with `name` and configuration."""
        from ..models import schedulers  # needs diffusers

        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        kind = schedulers.available()[options.pop("name")]
        if "clip_sample" in inspect.signature(kind).parameters:
            options.setdefault("clip_sample", False)
        self.scheduler = kind(**betas, **options)
        return self.scheduler

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Three channels, a pixel for a pixel."""
        return 3, height or 4, width or 4

    def condition(self, embeddings: list[Any]) -> Conditioning:
        """There is nothing to say to it."""
        return Conditioning(torch.zeros(1, 1, 1, dtype=self.dtype))

    def predict(self, latents: Tensor, timestep: Any, conditioning: Conditioning) -> Tensor:
        """The noise, from latents as the scheduler scales them."""
        index = int((self.scheduler.timesteps == timestep).nonzero()[0])
        level = noise_level(self.scheduler, index)
        if level.alpha == 1:  # undo scale_model_input
            latents = latents * level.norm
        self.calls += 1
        return level.eps(latents, self.x0(latents, level))

    def x0(self, latents: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | latents]."""
        total = (level.alpha * self.std) ** 2 + level.sigma**2
        return latents * level.alpha * self.std**2 / total

    def variance(self, level: NoiseLevel) -> float:
        """Var[x0 | latents], in each coordinate."""
        total = (level.alpha * self.std) ** 2 + level.sigma**2
        return self.std**2 * level.sigma**2 / total

    def decode(self, latents: Tensor) -> Tensor:
        """Image (B, 3, H, W)."""
        self.decodes += 1
        return latents / 2 + 0.5

    rgb = decode

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """Its only decoder, which is linear."""
        if name.startswith("tiny"):
            raise ModelError("GaussianModel has no tiny decoder; use vae or linear")
        return self.decode

    def differentiable(self, checkpointing: str) -> contextlib.AbstractContextManager[None]:
        """It has no parameters to freeze."""
        return contextlib.nullcontext()

    def refuse_gradients(self) -> str | None:
        """Gradients can always be taken."""
        return None
