"""Adding noise: how much of a picture is left, and what the network makes of it in one look.

Top: the same parrot with more and more noise, from left to right; at timestep 681 only who knows
of it still sees it. Bottom: what the network expects behind that noise, in a single call. With
little noise it is the picture; with much it is what parrots look like on average, in the right
colours and out of focus.

7 seconds and 0.5 GB on two CPU cores.
"""

import math
import sys
from pathlib import Path

import pilotfish_view as view

import pilotfish

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # part of the way to pure noise


def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 32) -> Path:
    """Make the picture; returns where it is."""
    sampler, prompt = pilotfish.load(model), "a parrot on a teal background"
    run = {"steps": steps, "seed": seed}
    clean = pilotfish.save_picture(sampler(prompt, **run).images[0], f"{out}/parrot.png")
    noisy, looks, labels = [], [], []
    for level in LEVELS:
        img2img = f"img2img:image={clean},start_step={steps - math.ceil(level * steps)}"
        step = next(sampler.stream(prompt, plugins=[img2img], **run))
        # With both at once, latents are of one size in every scheduler's coordinates.
        latents = step.latents / math.hypot(step.alpha, step.sigma)
        noisy += pilotfish.to_pil(sampler.model.decode(latents))
        looks += pilotfish.to_pil(step.image)
        labels.append(f"timestep {int(step.timestep)}")
    picture = view.table([noisy, looks], columns=labels, rows=["with noise", "one look"])
    return pilotfish.save_picture(picture, f"{out}/noise.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
