"""What is timed on which machine: `smoke` anywhere in a minute, `cpu`, and `gpu`."""

from __future__ import annotations

from typing import Any

from .scenes import Scene

ENDS = ("U0", "S", "U1")  # what all others are told in, and our own
LIGHT = ("U0", "S", "U1", "U2", "O0", "None", "O1 rgb")
HALF = ("O1", "O1 checkpointed", "O1 x0")
VARIANTS = (
    *("H1 x0", "O1 x0", "O3 x0", "O1 every 2", "O1 every 5", "O1 checkpointed", "O3 balanced"),
    *("H3 mixed", "O3 mixed", "O1 tiny", "O1 x0 tiny", "O1 linear", "O1 x0 linear"),
)


def stacks(letters: str, *counts: int) -> tuple[str, ...]:
    """`stacks("HO", 1, 3)`: H1 O1 H3 O3."""
    return tuple(f"{letter}{count}" for count in counts for letter in letters)


def again(how: str) -> tuple[str, ...]:
    """The main rows on changed networks."""
    return tuple(f"{name} {how}" for name in ("U0", "U1", "H1", "O1"))


def small(name: str, rows: tuple[str, ...], **options: Any) -> Scene:
    """A scene on the small random model."""
    return Scene(f"small random model{name}", "small", rows, **{"steps": 8, **options})


def gpu(name: str, model: str, rows: tuple[str, ...], minutes: float, **options: Any) -> Scene:
    """A scene that ends in time, of 20 steps in bfloat16."""
    settings = {"steps": 20, "dtype": "bfloat16", "minutes": minutes, **options}
    return Scene(name, model, rows, **settings)


# Ratios of about 1 need many rounds, and have a scene of their own.
PROFILES = {
    "smoke": (
        Scene("emoji model, hardly guided", "emoji", LIGHT, steps=3, rounds=15),
        Scene("emoji model", "emoji", (*ENDS, *stacks("HO", 1, 3), *stacks("NR", 3), *VARIANTS), 3),
    ),
    "cpu": (
        small(", hardly guided", LIGHT, rounds=40),
        small(", guided", (*ENDS, *stacks("HO", 1, 2, 3, 8)), rounds=9),
        small(", stacked", (*ENDS, "H1", "O3", *stacks("RN", 1, 2, 3, 8)), steps=2),
        small(", variants", (*ENDS, "H1", *VARIANTS), steps=5),
        small(", batch 4", (*ENDS, *stacks("HO", 1, 3)), steps=1, batch=4),
        small(", batch 8", (*ENDS, *stacks("HO", 1, 3, 8)), steps=1, batch=8),
        small(", bfloat16", (*ENDS, *stacks("HO", 1)), steps=4, dtype="bfloat16"),
        # torch 2.13's compiler for CPUs gives this UNet, by hand as well, a gradient a tenth
        # beside the right one; checkpointed it gives that.
        small(
            ", compiled",
            (*ENDS, "U0 compiled", "U1 compiled", "O1 checkpointed compiled"),
            steps=4,
        ),
    ),
    "gpu": (
        gpu("SD 1.5, 512 px, hardly guided", "sd15", LIGHT, 0.4, rounds=15),
        gpu(
            "SD 1.5, 512 px",
            "sd15",
            (*ENDS, *stacks("HO", 1, 3, 8), *stacks("RN", 3), *VARIANTS, "O1 large"),
            1.2,
            large="ViT-L-14",
        ),
        gpu("SD 1.5, 512 px, float16", "sd15", (*ENDS, *HALF), 0.3, dtype="float16"),
        gpu(
            "SD 1.5, 512 px, batch 8",
            "sd15",
            (*ENDS, *stacks("HO", 1, 3, 8), "O1 x0 tiny", "O1 checkpointed"),
            0.8,
            batch=8,
            steps=5,
        ),
        gpu(
            "SDXL's UNet, 1024 px",
            "sdxl",
            (*ENDS, *stacks("HO", 1, 3, 8), "O1 checkpointed", "O1 x0 tiny"),
            0.8,
            steps=5,
        ),
        gpu(
            "SDXL's UNet, 1024 px, batch 8",
            "sdxl",
            (*ENDS, "O1 checkpointed", "O1 x0 tiny"),
            0.6,
            batch=8,
            steps=2,
        ),
        gpu(
            "SD 1.5, 512 px, compiled and channels last",
            "sd15",
            (*ENDS, *again("compiled"), *again("channels last")),
            0.4,
        ),
    ),
}
