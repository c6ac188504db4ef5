"""Token blend: a word that does not exist, between two that do.

From left to right a word's vector moves to another's, on a straight line. Around the middle it
stands for animals that nobody has named: a puppy's face in a skunk's black and white, a spotted
one with a mouse's ears. The change is not even: little up to a third, nearly all of it between 45
and 65 %.

16 seconds and 0.5 GB on two CPU cores.
"""

import sys
from pathlib import Path

import pilotfish_view as view

import pilotfish

PAIRS = (("puppy", "skunk"), ("mouse", "leopard"))
WEIGHTS = (0.0, 0.35, 0.45, 0.5, 0.55, 0.65, 1.0)


def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 32) -> Path:
    """Make the picture; returns where it is."""
    sampler, rows = pilotfish.load(model), []
    for first, second in PAIRS:
        blends = [{"use": "token-blend", "word": first, "mix": {second: w}} for w in WEIGHTS]
        results = [
            sampler(
                f"a {first} on a teal background",
                plugins=[blend],
                steps=steps,
                seed=seed,
            )
            for blend in blends
        ]
        rows.append([result.images[0] for result in results])
    columns = [f"{weight:.0%} second" for weight in WEIGHTS]
    picture = view.table(rows, columns=columns, rows=[f"{a} to {b}" for a, b in PAIRS])
    return pilotfish.save_picture(picture, f"{out}/token_blend.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
