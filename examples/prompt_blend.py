"""Prompt blend: the encoder's output of two prompts, mixed, and mixed anew at every step.

As with single words, but the whole prompts are encoded first and their embeddings mixed. The
mouse takes on the leopard's coat, then its legs. Last column: the mix changes during the run,
from the first prompt to the second: the place is the first one's, because it is decided early,
and the coat is the second one's.

18 seconds and 0.5 GB on two CPU cores.
"""

import sys
from pathlib import Path
from typing import Any

import pilotfish_view as view

import pilotfish

WEIGHTS = (0.0, 0.4, 0.5, 0.6, 1.0)


def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 32) -> Path:
    """Make the picture; returns where it is."""
    sampler, rows = pilotfish.load(model), []
    for first, second in (("puppy", "skunk"), ("mouse", "leopard")):
        prompts = [f"a {animal} on a teal background" for animal in (first, second)]
        blends: list[dict[str, Any]] = [{"prompts": {prompts[1]: weight}} for weight in WEIGHTS]
        blends.append({"prompts": dict.fromkeys(prompts, 1), "schedule": "travel"})
        results = [
            sampler(
                prompts[0],
                plugins=[{"use": "blend", **blend}],
                steps=steps,
                seed=seed,
            )
            for blend in blends
        ]
        rows.append([result.images[0] for result in results])
    columns = [*(f"{weight:.0%} second" for weight in WEIGHTS), "0% to 100% during the run"]
    picture = view.table(rows, columns=columns, rows=["puppy and skunk", "mouse and leopard"])
    return pilotfish.save_picture(picture, f"{out}/prompt_blend.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
