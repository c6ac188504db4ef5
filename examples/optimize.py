"""Sampling as optimisation: the predicted noise is a gradient, and an optimiser takes the steps.

What is predicted, x0, after so many calls of the network. Euler's method (DDIM) steps down the
predicted noise; so do SGD and Adam, with that noise as the gradient. SGD with a learning rate
above 1 is done before its 25 steps are over, with the same owl in less detail; Adam takes all of
them, and its owl is another one.

10 seconds and 0.5 GB on two CPU cores.
"""

import sys
from pathlib import Path

import pilotfish_view as view

import pilotfish

RULES: dict[str, list[object]] = {
    "no optimiser: DDIM": [],
    "SGD": ["optimize"],
    "SGD, momentum": ["optimize:momentum=0.5"],
    "Adam": ["optimize:optimizer=adam"],
}
CALLS = (1, 5, 9, 13, 17, 25)


def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 32) -> Path:
    """Make the picture; returns where it is."""
    sampler, rows, labels = pilotfish.load(model), [], []
    for name, plugins in RULES.items():
        looks = [
            pilotfish.to_pil(step.image)[0]
            for step in sampler.stream(
                "an owl on a yellow background",
                plugins=plugins,
                scheduler="ddim",
                steps=steps,
                seed=seed,
            )
        ]
        rows.append([looks[min(calls, len(looks)) - 1] for calls in CALLS])
        labels.append(f"{name}\ndone after {len(looks)}")
    columns = [f"call {calls}" for calls in CALLS]
    picture = view.table(rows, columns=columns, rows=labels)
    return pilotfish.save_picture(picture, f"{out}/optimize.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
