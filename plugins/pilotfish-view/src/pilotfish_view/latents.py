"""Latents, and what the VAE does to a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pilotfish import InputError, Sampler, is_finite, pixels, to_pil

from .layout import Shown, table

ERROR_GAIN = 4  # an error of a quarter is white


def channels(latents: Tensor) -> Image.Image:
    """Latents channel by channel: one row per image, black the least value of all, white the most.

    Args:
        latents: (B, C, H, W).

    Raises:
        InputError: another shape, or values that are not finite.
    """
    if latents.ndim != 4 or not latents.numel() or not is_finite(latents):
        raise InputError(
            f"latents must be finite and of shape (B, C, H, W); got {tuple(latents.shape)}"
        )
    values = latents.detach().float().cpu()
    least, most = float(values.min()), float(values.max())
    gray = ((values - least) / ((most - least) or 1) * 255).round().byte().numpy()  # (B, C, H, W)
    names = [f"channel {i}\n{_range(values[:, i])}" for i in range(values.shape[1])]
    rows = [f"image {i + 1}" for i in range(len(values))] if len(values) > 1 else []
    return table([[Image.fromarray(c) for c in g] for g in gray], columns=names, rows=rows)


def _range(values: Tensor) -> str:
    return f"{float(values.min()):.2f} to {float(values.max()):.2f}"


@dataclass(frozen=True)
class RoundTrip(Shown):
    """A picture, and what is left of it after the VAE has encoded and decoded it.

    Attributes:
        before, after: pictures of the same size.
        latents: (1, C, H, W), what is between them.
        error: (8H, 8W) in [0, 1], the mean of the absolute difference over the three colours.
        rms: the root mean square of the difference, 0 to 1.
    """

    before: Image.Image
    after: Image.Image
    latents: Tensor
    error: Tensor
    rms: float

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB: 30 is good, 40 hardly visible."""
        return -20 * math.log10(self.rms) if self.rms else math.inf

    def picture(self) -> Image.Image:
        """Before, after, and where they differ."""
        bright = (self.error * ERROR_GAIN).clamp(0, 1)
        difference = Image.fromarray((bright * 255).round().byte().numpy())
        labels = [
            "before",
            f"after, through {self.latents[0].numel()} numbers",
            f"error, {ERROR_GAIN} times as bright: RMS {self.rms:.3f}, {self.psnr:.1f} dB",
        ]
        return table([[self.before, self.after, difference]], columns=labels)


@torch.no_grad()
def roundtrip(sampler: Sampler, picture: Image.Image) -> RoundTrip:
    """What a model's VAE loses of a picture; one encode, one decode.

    Args:
        picture: cut on all sides to a multiple of the VAE's factor.

    Raises:
        InputError: the picture is smaller than that factor.
    """
    model = sampler.model
    before = _cut(picture.convert("RGB"), model.factor)
    image = pixels(before)  # (1, 3, 8H, 8W)
    latents = model.encode(image)
    decoded = model.decode(latents).clamp(0, 1).cpu()
    difference = decoded.float() - image
    return RoundTrip(
        before,
        to_pil(decoded)[0],
        latents,
        difference[0].abs().mean(dim=0),
        float(difference.square().mean().sqrt()),
    )


def _cut(picture: Image.Image, factor: int) -> Image.Image:
    """The middle of a picture, of a size that the VAE takes."""
    width, height = (side // factor * factor for side in picture.size)
    if not width or not height:
        raise InputError(
            f"the picture must be at least {factor} x {factor} pixels, the VAE's factor; "
            f"got {picture.width} x {picture.height}"
        )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
