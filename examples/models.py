"""One guide, two models: the same plugins on a UNet and on a flow transformer.

Top: the emoji model, in the layout of Stable Diffusion 1.x. Bottom: emoji-flow, in that of Stable
Diffusion 3, trained apart: other latents, another schedule, two text encoders. From left to right
nothing guides, blue, a palette, and both at once, with the same settings in both rows. A model that
is named behind the command gets a row of its own.

20 seconds and 0.6 GB on two CPU cores.
"""

import sys
from pathlib import Path

import pilotfish_view as view

import pilotfish

PALETTE = {"use": "palette", "colors": ["#003355", "#ffaa00"]}
STACKS = {"plain": [], "blue": ["blue"], "palette": [PALETTE], "both": ["blue", PALETTE]}


def main(
    model: str | None = None, *, out: str = "out", steps: int | None = None, seed: int = 32
) -> Path:
    """Make the picture; returns where it is."""
    names, rows = ["emoji", "emoji-flow", *([model] if model else [])], []
    for name in names:
        sampler, row = pilotfish.load(name), []
        for plugins in STACKS.values():
            prompt = "a campfire on a black background"
            row += sampler(prompt, plugins=plugins, steps=steps, seed=seed).images
        rows.append(row)
    table = view.table(rows, columns=list(STACKS), rows=names)
    return pilotfish.save_picture(table, f"{out}/models.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
