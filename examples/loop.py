"""The loop: all that happens between noise and picture, in a dozen lines, beside pilotfish's own.

Two rows that are equal to the bit. Top: a campfire out of noise by the loop below, with nothing
but the model's networks and its scheduler. Bottom: `sampler.stream`, whose every step can be
looked at, stopped, or changed by a plugin. The shape is there after 10 steps of 25; the rest
takes the noise away.

7 seconds and 0.5 GB on two CPU cores.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pilotfish_view as view
import torch

import pilotfish


def bare_loop(model: Any, prompt: str, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """The latents before each step and after the last, with nothing but the networks."""
    usual = model.defaults
    tokens = model.tokenizer(["", prompt], padding="max_length", return_tensors="pt")
    embeddings = model.text_encoder(tokens.input_ids.to(model.device))[0]
    scheduler = model.new_scheduler(None)
    scheduler.set_timesteps(steps, device=model.device)
    shape = (1, *model.latent_shape(usual.height, usual.width))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        yield latents
        both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        uncond, cond = model.unet(both, timestep, encoder_hidden_states=embeddings).sample.chunk(2)
        noise = uncond + usual.guidance_scale * (cond - uncond)  # classifier-free guidance
        latents = scheduler.step(noise, timestep, latents).prev_sample
    yield latents


@torch.no_grad()
def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 32) -> Path:
    """Make the picture; returns where it is."""
    sampler, prompt = pilotfish.load(model), "a campfire on a black background"
    bare = [*bare_loop(sampler.model, prompt, steps, seed)]
    stream = sampler.stream(prompt, steps=steps, seed=seed)
    ours = [*(step.latents for step in stream), stream.result().latents]
    print(f"equal to the bit: {all(map(torch.equal, bare, ours))}")
    shown = [round(part * (len(ours) - 1)) for part in (0, 0.4, 0.6, 0.8, 1)]
    rows = [
        [pilotfish.to_pil(sampler.model.decode(run[i]))[0] for i in shown] for run in (bare, ours)
    ]
    labels = [f"after {i} steps" for i in shown]
    picture = view.table(rows, columns=labels, rows=["the bare loop", "pilotfish"])
    return pilotfish.save_picture(picture, f"{out}/loop.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
