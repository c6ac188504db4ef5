"""The autoencoder: 64 x 64 pictures to latents (4, 16, 16) and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from emoji_training.loop import Run, train
from emoji_training.muon import split_optimizers
from emoji_training.networks import AutoencoderKL
from emoji_training.world import sheet

SCALING_FACTOR = 0.18215  # Stable Diffusion's; `normalise` makes it true of this VAE
KL_WEIGHT = 1e-6
CROPS_UNTIL = 0.75  # share of the steps on crops, five times as fast as whole pictures
CROP = 32
LATENT_NOISE = 0.03  # in units of the scaled latents


def build_vae(block_out_channels: Sequence[int] = (32, 64, 64)) -> AutoencoderKL:
    """The VAE with random weights."""
    levels = len(block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def train_vae(
    vae: AutoencoderKL,
    images: Tensor,
    *,
    num_steps: int,
    checkpoint: Path,
    crops_until: float = CROPS_UNTIL,
    learning_rate: float = 2e-3,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
) -> AutoencoderKL:
    """The VAE trained on uint8 pictures (N, 3, 64, 64), its latents normalised.

    Args:
        crops_until: the share of the steps on crops of 32 x 32; whole pictures, a quarter as many
            in a batch, follow, because a group norm sees other statistics in a crop.
    """
    vae.to(device, memory_format=torch.channels_last)

    def loss(module: AutoencoderKL, step: int, generator: torch.Generator) -> Tensor:
        crops = step < crops_until * num_steps
        pixels = pick(images, batch if crops else batch // 4, generator)
        pixels = crop(pixels, generator) if crops else pixels
        return vae_loss(module, pixels.to(device), generator)

    train(Run(vae, loss, num_steps, learning_rate, checkpoint, seed))
    vae.eval()
    normalise(vae, images[:2048])
    return vae


class Decoder(nn.Module):
    """The half of the VAE that can still learn when the UNet relies on the other."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1] from unscaled latents."""
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


def train_decoder(
    vae: AutoencoderKL,
    images: Tensor,
    means: Tensor,
    *,
    num_steps: int,
    checkpoint: Path,
    learning_rate: float = 1e-3,
    batch: int = 8,
    workers: int = 1,
    seed: int = 2,
) -> AutoencoderKL:
    """The VAE with a sharper decoder for the scaled latents `means` of the pictures.

    A little noise on the latents teaches it to forgive those that a UNet makes.
    """
    vae.to(memory_format=torch.channels_last)

    def loss(module: Decoder, step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(means), (batch // workers,), generator=generator)
        noise = torch.randn((len(chosen), *means.shape[1:]), generator=generator)
        latents = (means[chosen].float() + LATENT_NOISE * noise) / SCALING_FACTOR
        pixels = to_model(images[chosen]).to(vae.device)
        return reconstruction_loss(module(latents.to(vae.device)) - pixels)

    run = Run(
        Decoder(vae),
        loss,
        num_steps,
        learning_rate,
        checkpoint,
        seed,
        optimizers=split_optimizers,
        workers=workers,
        ema_decay=0.99,
    )
    train(run)
    return vae.eval()


def pick(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random pictures in [-1, 1], channels last in memory."""
    chosen = images[torch.randint(len(images), (count,), generator=generator)]
    return to_model(chosen).contiguous(memory_format=torch.channels_last)


def to_model(images: Tensor) -> Tensor:
    """uint8 pictures as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The same random square of 32 x 32 out of every picture."""
    top, left = torch.randint(pixels.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
    return pixels[..., top : top + CROP, left : left + CROP]  # (B, 3, 32, 32)


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """L1 of the pictures and of their gradients, and a little KL."""
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    loss: Tensor = reconstruction_loss(decoded - pixels) + KL_WEIGHT * posterior.kl().mean()
    return loss


def reconstruction_loss(error: Tensor) -> Tensor:
    """L1 of the error and of its gradients, which keeps edges sharp."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents of uint8 pictures: (N, 4, 16, 16) each."""
    means, stds = [], []
    for part in images.split(chunk):
        posterior = vae.encode(to_model(part).to(vae.device)).latent_dist
        means.append((posterior.mean * vae.config.scaling_factor).cpu())
        stds.append((posterior.std * vae.config.scaling_factor).cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Moves an affine map into the 1x1 convolutions beside the latents.

    The VAE computes the same pictures as before; each channel of its scaled latents now has mean 0
    and variance 1, with Stable Diffusion's own scaling factor.
    """
    mean, std = encode(vae, images)
    total = mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    center, spread = (value.to(vae.device) / SCALING_FACTOR for value in total)  # (4,) each
    gain = 1 / (SCALING_FACTOR * spread)
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(gain)
    out.bias += out.weight[:, :, 0, 0] @ center
    out.weight /= gain[None, :, None, None]
    into.weight[:channels] *= gain[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - center) * gain
    into.bias[channels:] += 2 * gain.log()  # the second half is the log variance


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, images: Tensor, path: Path) -> float:
    """Mean L1 error on [-1, 1]; saves a sheet of pictures over their reconstructions."""
    latents, _ = encode(vae, images)
    decoded = vae.decode(latents.to(vae.device) / vae.config.scaling_factor).sample.cpu()
    rows = zip(to_model(images).split(16), decoded.split(16), strict=True)
    both = torch.cat([part for row in rows for part in row])
    sheet(both / 2 + 0.5).save(path)
    return float((decoded - to_model(images)).abs().mean())
