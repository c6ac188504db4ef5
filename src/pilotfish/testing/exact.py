"""A model whose answers are known exactly: a network for Gaussian data, and its posterior."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..guidance.noise import NoiseLevel, draw
from ..models import schedulers
from ..models.protocol import (
    Again,
    Conditioning,
    Defaults,
    Embedding,
    LatentDiffusion,
    Role,
    Site,
    TextEncoder,
)
from ..sampling.schedule import noise_level

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class GaussianModel:
    """The exact network for data N(0, std^2) in every coordinate; float64, on the CPU.

    It takes the place of a loaded model in `Sampler(GaussianModel())`. Every step's x0 is
    `E[x0 | latents]`; the "VAE" is x0 / 2 + 0.5 in three channels.

    Args:
        std: of the data.

    Attributes:
        calls, decodes: how often the network and the decoder were called.
    """

    id: str | None = None
    config: str | None = None
    folder: Path | None = None
    device, dtype, factor, size = torch.device("cpu"), torch.float64, 1, (4, 4)
    text_encoders: Sequence[TextEncoder] = ()
    sites: tuple[Site, ...] = ()
    guidance, together, masked = frozenset({"cfg"}), True, False
    defaults = Defaults(steps=50, guidance_scale=7.5, height=4, width=4, scheduler="ddim")
    denoiser = None

    def __init__(self, std: float = 0.7) -> None:
        self.std = std
        self.calls = self.decodes = 0

    @property
    def latents_dtype(self) -> torch.dtype:
        """The model's own."""
        return self.dtype

    def fingerprint(self) -> str:
        """Of the data that it knows."""
        return f"gaussian-{self.std:g}"

    def pipeline(self) -> None:
        """diffusers has none."""

    def new_scheduler(self, spec: Any) -> Any:
        """A scheduler by short name, or a table with `name` and configuration."""
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        kind = schedulers.named(options.pop("name"))
        takes = inspect.signature(kind).parameters
        if "clip_sample" in takes:
            options.setdefault("clip_sample", False)
        betas = {name: value for name, value in BETAS.items() if name in takes}
        self.scheduler = kind(**betas, **options)
        return self.scheduler

    def describe_scheduler(self, spec: Any) -> Any:
        """As it was given."""
        return spec

    def set_timesteps(self, scheduler: Any, steps: int, shape: Sequence[int]) -> None:
        """The scheduler's own choice."""
        scheduler.set_timesteps(steps)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Three channels, a pixel for a pixel."""
        return 3, height, width

    def noise(
        self, shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype
    ) -> Tensor:
        """Noise (B, C, H, W)."""
        return draw(shape, generators, dtype)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """There is nothing to say to it."""
        return Conditioning({"values": torch.zeros(1, 1, 1, dtype=self.dtype)})

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """What the scheduler's prediction type asks for, from latents as the scheduler scales them.

        Raises:
            ModelError: there are inputs, to which it would not react.
        """
        if inputs:
            raise ModelError(f"GaussianModel takes no {', '.join(inputs)}")
        index = int((self.scheduler.timesteps == timestep).nonzero()[0])
        level = noise_level(self.scheduler, index)
        if level.alpha == 1:  # undo scale_model_input
            latents = latents * level.norm
        self.calls += 1
        return level.output(latents, self.x0(latents, level))

    def cfg_scale(self, run: Any) -> float | None:
        """`guidance_scale` above 1, as diffusers has it."""
        scale: float = run.guidance_scale
        return scale if scale > 1 else None

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Ho & Salimans 2022, arXiv 2207.12598, in diffusers' convention."""
        return uncond + scale * (cond - uncond)

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

    decode_float32 = rgb = decode

    def encode(self, image: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        """Clean latents (B, 3, H, W); nothing is drawn."""
        return image.to(self.dtype) * 2 - 1

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """Its only decoder, which is linear."""
        if name.startswith("tiny"):
            raise ModelError("GaussianModel has no tiny decoder; use vae or linear")
        return self.decode

    def differentiable(
        self,
        checkpointing: str,
        again: Again | None = contextlib.nullcontext,
    ) -> GaussianModel:
        """Itself: it has no parameters to freeze, and nothing to patch."""
        return self

    def refuse_gradients(self) -> str | None:
        """Gradients can always be taken."""
        return None


if TYPE_CHECKING:

    def _held(model: GaussianModel) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
