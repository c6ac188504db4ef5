"""What FLUX.1 and those after it share: two by two cells of the latents are one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .family import PipelineFamily


class PackedFamily(PipelineFamily):
    """A flow on packed latents; both predictions in calls of their own, see `PipelineFamily`.

    Attributes:
        heeds_flow_sigmas: whether the pipeline leaves the levels to a scheduler of flow sigmas.
    """

    together = False
    heeds_flow_sigmas: ClassVar[bool] = False

    @property
    def _multiple(self) -> int:
        return 2 * self.factor

    @property
    def _side(self) -> int | Sequence[int]:
        side: int = self._pipeline.default_sample_size
        return side

    @property
    def _channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @property
    def _tokens(self) -> int:
        """How many image tokens there are, each of two by two of the VAE's cells."""
        _, height, width = self.latent_shape(*self.size)
        return height * width * self.cells**2 // 4

    def _sigmas(self, steps: int, config: Mapping[str, Any]) -> Any:
        if self.heeds_flow_sigmas and config.get("use_flow_sigmas"):
            return None
        return np.linspace(1.0, 1 / steps, steps)


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW / 4, 4C): a token for two by two cells."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """`pack` backwards, to latents of that shape."""
    batch, channels, height, width = shape
    cells = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def places(*sizes: int) -> Tensor:
    """(tokens, axes): where each token lies in a grid of these sizes."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def true_cfg_scale(run: Any) -> float | None:
    """`true_cfg_scale` above 1, with a negative prompt; None otherwise."""
    scale: float = run.true_cfg_scale
    return scale if scale > 1 and run.negative_prompt is not None else None
