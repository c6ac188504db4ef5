"""Predicted x0 as a film: what the network expects to see, long before it is there.

Left, the latents as they are, decoded: noise that clears slowly. Right, what the network predicts
behind it at that step, x0: a blurred fire from the first steps on, which then gets its edges.
Guides look at the right side; that is why they can steer a picture that is not there yet.

7 seconds and 0.5 GB on two CPU cores.
"""

import sys
from pathlib import Path

import pilotfish_view as view

import pilotfish


def main(model: str | None = None, *, out: str = "out", steps: int = 12, seed: int = 32) -> Path:
    """Make the film; returns where it is."""
    sampler = pilotfish.load(model)
    stream = sampler.stream("a campfire on a black background", steps=steps, seed=seed)
    return view.film(stream, decoded=True).save(f"{out}/film.gif")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
