"""What guides may see by instead of the model's own decoder: cheaper, with another gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..guidance.noise import at_least_float32
from .hub import load_config
from .schedulers import diffusers
from .weights import load_network


def enlarged(rgb: Tensor, factor: int) -> Tensor:
    """Colours at latent size (B, 3, H, W), interpolated to the image's (B, 3, 8H, 8W)."""
    matrices = [_interpolation(length, factor) for length in rgb.shape[2:]]
    rows, columns = (matrix.to(rgb, non_blocking=True) for matrix in matrices)
    # Products, because the gradient of `interpolate` is not deterministic on CUDA.
    return rows.T @ rgb @ columns


def _interpolation(length: int, factor: int) -> Tensor:
    """(length, factor * length): linear interpolation as a matrix."""
    unit = torch.eye(length)[None]
    return torch.nn.functional.interpolate(unit, scale_factor=factor, mode="linear")[0]


@torch.no_grad()
def fit_rgb(encode: Callable[[Tensor], Tensor], factor: int) -> Tensor:
    """(C + 1, 3): least squares from latents (and 1) to average-pooled pixels.

    Fitted once per VAE on smooth random colour fields, so that it needs no pictures.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator)
    size = 16 * factor
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    latents = encode(image.clamp(0, 1)).double().cpu()  # float32 would round a VAE's small ones off
    pooled = torch.nn.functional.avg_pool2d(image.double(), factor)
    columns = latents.movedim(1, -1).flatten(0, 2)  # (pixels, C)
    columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
    colors = pooled.movedim(1, -1).flatten(0, 2)
    # A little ridge: latents are of size one, and an untrained VAE's carry next to nothing.
    ridge = 1e-3 * len(columns) * torch.eye(columns.shape[1], dtype=columns.dtype)
    ridge[-1, -1] = 0
    matrix: Tensor = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ colors)
    return matrix.float()


def linear(matrix: Tensor, latents: Tensor) -> Tensor:
    """Colours (B, 3, H, W), float32, from latents (B, C, H, W) by the matrix of `fit_rgb`."""
    matrix = matrix.to(latents.device)
    colors = torch.einsum("bchw,cr->brhw", latents.float(), matrix[:-1])
    return colors + matrix[-1].view(1, 3, 1, 1)


def load_tiny(target: str, channels: int, factor: int, dtype: torch.dtype) -> Any:
    """A diffusers `AutoencoderTiny`, frozen, for latents of so many channels.

    Raises:
        ModelError: it cannot be loaded, is of another kind, or takes other latents.
    """
    kind = diffusers.AutoencoderTiny
    try:
        config = load_config(kind, target)
        if config.get("_class_name") != kind.__name__:
            raise ValueError(f"it holds {config.get('_class_name')}")
    except (OSError, ValueError, ModelError) as error:
        raise ModelError(f"cannot load an AutoencoderTiny from {target!r}: {error}") from error
    tiny = load_network(kind, target, f"AutoencoderTiny {target!r}", dtype)
    own = tiny.config
    enlarges = own.upsampling_scaling_factor ** (len(own.num_decoder_blocks) - 1)
    if (own.latent_channels, enlarges) != (channels, factor):
        raise ModelError(
            f"the AutoencoderTiny {target!r} takes latents of {own.latent_channels} channels and "
            f"enlarges {enlarges} times; this model's have {channels}, enlarged {factor} times"
        )
    return tiny.eval().requires_grad_(False)


def decode_tiny(tiny: Any, latents: Tensor) -> Tensor:
    """As `StableDiffusion.decode`; a TAESD takes latents as they are: its `scaling_factor` is 1."""
    scaled = latents.to(dtype_of(tiny)) / tiny.config.scaling_factor + tiny.config.shift_factor
    return at_least_float32(tiny.decode(scaled, return_dict=False)[0]) / 2 + 0.5


def dtype_of(network: torch.nn.Module) -> torch.dtype:
    """Of its weights. diffusers' own `dtype` walks through all modules: a millisecond for a VAE."""
    return next(network.parameters()).dtype
