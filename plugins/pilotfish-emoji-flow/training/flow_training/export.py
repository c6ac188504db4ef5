"""Writes the flow model as a complete diffusers folder with fp16 weights, and draws with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Final

import torch
from emoji_training.export import write
from pilotfish_emoji.names import FOLDER as EMOJI

from flow_training.networks import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from flow_training.text import build_encoders, build_tokenizer
from flow_training.transformer import EMPTY_TOKENS

STEPS: Final = 28
GUIDANCE: Final = 4.0


def pipeline(transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The transformer and the parts that are the emoji model's, as diffusers' pipeline."""
    vae = AutoencoderKL.from_pretrained(EMOJI / "vae")
    vae.register_to_config(shift_factor=0.0)  # its latents have mean 0
    first, second = build_encoders()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # as the times of the training
        vae=vae,
        text_encoder=first,
        tokenizer=build_tokenizer(),
        text_encoder_2=second,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(folder: Path, transformer: SD3Transformer2DModel) -> None:
    """Writes the whole folder; what lies beside the networks is kept."""
    pipe = pipeline(copy.deepcopy(transformer).cpu())
    write(folder, pipe.to(dtype=torch.float16))


def load(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a folder; diffusers must be told that there is no T5."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: StableDiffusion3Pipeline,
    prompts: list[str],
    *,
    seed: int = 0,
    guidance_scale: float = GUIDANCE,
    empty_tokens: int = EMPTY_TOKENS,
    chunk: int = 64,
) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) in [0, 1] by the pipeline's scheduler, in as many steps as it asks.

    Args:
        empty_tokens: the pipeline's `max_sequence_length`.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [prompts[start : start + chunk] for start in range(0, len(prompts), chunk)]
    images = [
        pipe(
            part,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            generator=generator,
            max_sequence_length=empty_tokens,
            output_type="pt",
        ).images
        for part in parts
    ]
    return torch.cat(images).float().cpu()
