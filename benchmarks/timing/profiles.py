"""What is timed on which machine: `smoke` anywhere in a minute, `cpu`, and `gpu`."""

from __future__ import annotations

from typing import Any

from .scenes import Scene

ENDS = ("U0", "S", "U1")  # what all others are told in, and our own
LIGHT = ("U0", "S", "U1", "U2", "O0", "None", "O1 rgb")
HALF = ("O1", "O1 checkpointed", "O1 x0")
EVERY_5 = "O1 every 5"  # which takes more steps than it is worth on a CPU
VARIANTS = (
    *("H1 x0", "O1 x0", "O3 x0", "O1 every 2", EVERY_5, "O1 checkpointed", "O3 balanced"),
    *("H3 mixed", "O3 mixed", "O1 tiny", "O1 x0 tiny", "O1 linear", "O1 x0 linear"),
)


def stacks(letters: str, *counts: int) -> tuple[str, ...]:
    """`stacks("HO", 1, 3)`: H1 O1 H3 O3."""
    return tuple(f"{letter}{count}" for count in counts for letter in letters)


FLOW = (*ENDS, *stacks("HO", 1, 3))


def again(how: str) -> tuple[str, ...]:
    """The main rows on changed networks."""
    return tuple(f"{name} {how}" for name in ("U0", "U1", "H1", "O1"))


def small(name: str, rows: tuple[str, ...], model: str = "small", **options: Any) -> Scene:
    """A scene on a small random model."""
    return Scene(f"small random model{name}", model, rows, **{"steps": 2, **options})


def gpu(name: str, model: str, rows: tuple[str, ...], minutes: float, **options: Any) -> Scene:
    """A scene that ends in time, of 20 steps in bfloat16."""
    settings = {"steps": 20, "dtype": "bfloat16", "minutes": minutes, **options}
    return Scene(name, model, rows, **settings)


# Ratios of about 1 need many rounds, and have a scene of their own.
PROFILES = {
    "smoke": (
        Scene("emoji model, hardly guided", "emoji", LIGHT, steps=3, rounds=15),
        Scene("emoji model", "emoji", (*ENDS, *stacks("HO", 1, 3), *stacks("NR", 3), *VARIANTS), 3),
        Scene("SD 3's shape", "random sd3", FLOW, 3),
    ),
    # Five minutes of one core, each row once. Runs of flows are longer: they begin with more.
    "cpu": (
        small(", hardly guided", LIGHT, steps=4, rounds=9),
        small(", guided", (*ENDS, *stacks("HO", 1, 3, 8))),
        small(", stacked", ("U0", "S", "O3", "N3"), steps=1),
        small(", variants", ("U0", "S", *(row for row in VARIANTS if row != EVERY_5)), rounds=3),
        small(", batch 8", ("U0", "S", *stacks("HO", 1, 8)), steps=1, batch=8, rounds=2),
        small(", SD 3's shape", FLOW, "small sd3", steps=4),
        small(", FLUX's shape", FLOW, "small flux", steps=4),
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
