"""A stack of four: four plugins in one run, each added to those before it.

A puppy, and what is left of it with one, two, three and four plugins: its word is half a skunk's,
so it turns black and white; its colours are drawn to a palette; then towards blue as well, so the
red ground turns violet; and an optimiser takes the steps. One call of the network a step serves
them all.

12 seconds and 0.6 GB on two CPU cores.
"""

import sys
from pathlib import Path

import pilotfish_view as view

import pilotfish

STACK = (
    {"use": "token-blend", "word": "puppy", "mix": {"skunk": 0.45}},
    {"use": "palette", "colors": ["#102040", "#d04060", "#ffe0b0"]},
    {"use": "blue", "scale": 0.5},
    {"use": "optimize"},
)


def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 5) -> Path:
    """Make the picture; returns where it is."""
    sampler, pictures = pilotfish.load(model), []
    for count in range(len(STACK) + 1):
        result = sampler(
            "a puppy on a gray background",
            plugins=STACK[:count],
            steps=steps,
            seed=seed,
        )
        pictures += result.images
    labels = ["plain", *(f"+ {table['use']}" for table in STACK)]
    return pilotfish.save_picture(view.strip(pictures, labels), f"{out}/stack.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
