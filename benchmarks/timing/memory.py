"""The memory of a guided run of Stable Diffusion 1.5's size on the CPU, and of its UNet's graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import handwritten
import torch
from torch import Tensor

from pilotfish.models.stable_diffusion import StableDiffusion

from . import measure, models
from .rows import Bench

STEPS = 2
CHECKPOINTING = ("on", "off")  # what takes less memory first, for a machine that has too little
CPU = torch.device("cpu")


def run(model: str | None = None) -> Iterator[dict[str, Any]]:
    """Bytes and seconds, more of them after each measurement, in case the memory does not suffice.

    Of a step's graph of the UNet, and of whole runs of two steps with a gradient through decoder
    and UNet, with and without checkpointing.
    """
    pipeline = models.load(model or "sd15", CPU, torch.float32)
    bench, work = Bench(pipeline, [handwritten.color()]), handwritten.Work("a campfire", STEPS)
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    result = {
        "model": model or "sd15",
        "pixels": pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        "steps": STEPS,
        "weight_bytes": sum(p.nbytes for network in networks for p in network.parameters()),
        "unet_graph": graph(bench.sampler.model),
        "runs": {},
    }
    yield result
    for checkpointing in CHECKPOINTING:
        start = time.perf_counter()
        peak = measure.peak_bytes(
            lambda how=checkpointing: bench.guided(work, bench.losses, checkpointing=how), CPU
        )
        result["runs"][checkpointing] = {
            "seconds": round(time.perf_counter() - start, 1),
            "peak_bytes": peak,
        }
        yield result


def graph(model: StableDiffusion) -> dict[str, Any]:
    """What the UNet's graph keeps for one image with and without a prompt, and how exact it is."""
    kept, gradients = {}, {}
    for checkpointing in CHECKPOINTING:
        gradients[checkpointing], kept[checkpointing] = _gradient(model, checkpointing)
    apart = (gradients["on"] - gradients["off"]).abs().max() / gradients["off"].abs().max()
    return {"kept_bytes": kept, "largest_difference": float(apart)}


def _gradient(model: StableDiffusion, checkpointing: str) -> tuple[Tensor, int]:
    """At the latents, and the bytes that the graph keeps for it."""
    config, generator = model.unet.config, torch.Generator().manual_seed(1)
    side = config.sample_size
    latents = torch.randn(2, config.in_channels, side, side, generator=generator).requires_grad_()
    text = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    outputs = []

    unet = model.differentiable(checkpointing).unet

    def predict() -> None:
        outputs.append(unet(latents, 500, encoder_hidden_states=text).sample)

    kept = measure.kept_bytes(predict)
    return torch.autograd.grad(outputs[0].square().sum(), latents)[0], kept
