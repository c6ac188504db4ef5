"""The transformer of Stable Diffusion 3, trained on cached latents by rectified flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from emoji_training.loop import Run, train
from emoji_training.muon import Muon
from torch import Tensor, nn

from flow_training.networks import CLIPTokenizer, SD3Transformer2DModel
from flow_training.text import WIDTH, Encoders

LAYERS, HEADS, HEAD_WIDTH = 6, 4, 64
DROPPED = 0.12  # share of empty captions, for classifier-free guidance
EMPTY_TOKENS = 1  # stand for the T5 that the model does not have; `max_sequence_length`
# Who calls the pipeline as it is asks for 256 of them, so that now and then training does too.
MANY_TOKENS, MANY_EVERY = 256, 24
SPREAD = 1.0  # of the logit-normal times


@dataclass(frozen=True)
class Captions:
    """What the transformer is told of each distinct caption, and which one belongs to a picture.

    `values` (M, T, D) and `pooled` (M, D) as the pipeline makes them; the empty caption is row 0.
    `rows` (N) says the caption of each picture.
    """

    values: Tensor
    pooled: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Latents:
    """What the encoder deems likely of the pictures' scaled latents, (N, 4, 16, 16)."""

    means: Tensor
    stds: Tensor


def build_transformer() -> SD3Transformer2DModel:
    """The transformer with random weights."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def read_captions(encoders: Encoders, tokenizer: CLIPTokenizer, captions: list[str]) -> Captions:
    """The encoders' last but one layers beside each other, and their projected outputs."""
    distinct = ["", *sorted({*captions} - {""})]
    ids = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    outputs = [encoder.eval()(ids, output_hidden_states=True) for encoder in encoders]
    rows = {text: row for row, text in enumerate(distinct)}
    return Captions(
        torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
        torch.cat([output.text_embeds for output in outputs], dim=-1),
        torch.tensor([rows[text] for text in captions]),
    )


def train_transformer(
    transformer: SD3Transformer2DModel,
    latents: Latents,
    captions: Captions,
    *,
    num_steps: int,
    checkpoint: Path,
    learning_rate: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
    snapshot: Callable[[int, nn.Module], None] | None = None,
) -> SD3Transformer2DModel:
    """The transformer with its averaged weights after `num_steps` batches."""
    transformer.to(device)

    def loss(module: SD3Transformer2DModel, step: int, generator: torch.Generator) -> Tensor:
        x0, values, pooled = draw_batch(latents, captions, batch // workers, generator)
        times = draw_times(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator)
        at = times.view(-1, 1, 1, 1)
        empty = MANY_TOKENS if step % MANY_EVERY == 0 else EMPTY_TOKENS
        told = torch.cat([values, values.new_zeros(len(x0), empty, values.shape[2])], dim=1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            velocity = module(
                hidden_states=((1 - at) * x0 + at * noise).to(device),
                timestep=(1000 * times).to(device),
                encoder_hidden_states=told.to(device),
                pooled_projections=pooled.to(device),
            ).sample
        error: Tensor = (velocity.float() - (noise - x0).to(device)).square().mean()
        return error

    run = Run(
        transformer,
        loss,
        num_steps,
        learning_rate,
        checkpoint,
        seed,
        optimizers=split_optimizers,
        workers=workers,
        ema_decay=0.998,
        snapshot=snapshot,
    )
    train(run)
    return transformer


def draw_batch(
    latents: Latents, captions: Captions, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, and what is told of them: of some nothing."""
    chosen = torch.randint(len(latents.means), (batch,), generator=generator)
    noise = torch.randn((batch, *latents.means.shape[1:]), generator=generator)
    x0 = latents.means[chosen].float() + latents.stds[chosen].float() * noise
    dropped = torch.rand(batch, generator=generator) < DROPPED
    rows = torch.where(dropped, 0, captions.rows[chosen])
    return x0, captions.values[rows], captions.pooled[rows]


def draw_times(batch: int, generator: torch.Generator) -> Tensor:
    """Times (B,) in (0, 1), logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1), spread
    evenly over the batch.
    """
    places = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    normal = torch.special.ndtri(places.clamp(1e-4, 1 - 1e-4))
    times: Tensor = (SPREAD * normal).sigmoid()
    return times


def split_optimizers(
    module: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else; two of Muon, which step at one time."""
    inside: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in module.named_parameters():
        block = name.startswith("transformer_blocks.") and parameter.ndim == 2
        (inside if block else others).append(parameter)
    return [
        Muon(inside[::2], learning_rate, weight_decay),
        Muon(inside[1::2], learning_rate, weight_decay),
        torch.optim.AdamW(others, learning_rate, weight_decay=weight_decay),
    ]
