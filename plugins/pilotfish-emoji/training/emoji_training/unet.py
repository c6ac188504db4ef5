"""The denoiser: a UNet and its text encoder, trained together on cached latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emoji_training.loop import Run, train
from emoji_training.muon import split_optimizers
from emoji_training.networks import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    UNet2DConditionModel,
)
from emoji_training.tokenizer import token_ids

WIDTH = 128
DROPPED = 0.15  # share of empty captions, for classifier-free guidance
MIN_SNR = 5.0  # Hang et al. 2023, arXiv 2303.09556
TIMESTEPS = 1000
NOISE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Latents:
    """The training set as the UNet sees it.

    `means` and `stds` describe the scaled latents (N, 4, 16, 16); `ids` are the captions' tokens
    (N, 77), `empty` those of the empty caption (77).
    """

    means: Tensor
    stds: Tensor
    ids: Tensor
    empty: Tensor


class Denoiser(nn.Module):
    """The UNet and the text encoder as one module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """The predicted noise, shape of the latents."""
        embeddings = self.text_encoder(ids).last_hidden_state  # (B, 77, 128)
        eps: Tensor = self.unet(latents, timesteps, embeddings).sample
        return eps


def build_unet(block_out_channels: Sequence[int] = (64, 128, 192)) -> UNet2DConditionModel:
    """The UNet with random weights; the lowest level has no cross attention."""
    crossed = len(block_out_channels) - 1
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers means the number of heads
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text encoder at width 128, two layers deep, with random weights."""
    return CLIPTextModel(text_config(tokenizer))


def text_config(tokenizer: CLIPTokenizer, **more: Any) -> CLIPTextConfig:
    """Its shape for a tokenizer: as many positions as that has."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def caption_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, 77); equal captions are read once."""
    distinct = sorted(set(captions))
    rows = dict(zip(distinct, token_ids(tokenizer, distinct), strict=True))
    return torch.tensor([rows[text] for text in captions])


def train_denoiser(
    denoiser: Denoiser,
    data: Latents,
    *,
    num_steps: int,
    checkpoint: Path,
    learning_rate: float = 2e-3,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
    snapshot: Callable[[int, nn.Module], None] | None = None,
    snapshot_seconds: float = 600.0,
) -> Denoiser:
    """The denoiser with its averaged weights after `num_steps` batches."""
    denoiser.to(device)
    denoiser.unet.to(memory_format=torch.channels_last)
    alphas_cumprod = DDIMScheduler(**NOISE).alphas_cumprod

    def loss(module: Denoiser, step: int, generator: torch.Generator) -> Tensor:
        latents, timesteps, ids = draw_batch(data, batch // workers, generator)
        noise = torch.randn(latents.shape, generator=generator)
        kept = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        eps = module(noisy.to(device), timesteps.to(device), ids.to(device))
        error = (eps - noise.to(device)).square().mean((1, 2, 3))  # (B,)
        weighted: Tensor = error * min_snr_weight(alphas_cumprod[timesteps]).to(device)
        return weighted.mean()

    run = Run(
        denoiser,
        loss,
        num_steps,
        learning_rate,
        checkpoint,
        seed,
        optimizers=split_optimizers,
        workers=workers,
        ema_decay=0.998,
        snapshot=snapshot,
        snapshot_seconds=snapshot_seconds,
    )
    train(run)
    return denoiser


def draw_batch(
    data: Latents, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps spread evenly over the range, and token ids, some of them empty."""
    chosen = torch.randint(len(data.means), (batch,), generator=generator)
    noise = torch.randn((batch, *data.means.shape[1:]), generator=generator)
    latents = data.means[chosen].float() + data.stds[chosen].float() * noise
    places = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (places * TIMESTEPS).long()
    dropped = torch.rand(batch, generator=generator) < DROPPED
    ids = torch.where(dropped[:, None], data.empty, data.ids[chosen])
    return latents, timesteps, ids


def min_snr_weight(alphas_cumprod: Tensor) -> Tensor:
    """min(SNR, 5) / SNR, the weight of each timestep for noise prediction."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR) / snr
