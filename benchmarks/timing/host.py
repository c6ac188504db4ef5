"""What the loops cost beside the networks: stand-ins answer at once in their place."""

from __future__ import annotations

import statistics
from typing import Any

import handwritten
import torch
from handwritten import Work
from torch import Tensor
from torch.nn.functional import interpolate

from . import measure, models
from .rows import Bench, guided, unguided

STEPS = (20, 220)  # of two runs; their difference is the loop's
GUIDES = (1, 8)
ROUNDS = 9


def costs(rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds a step of every loop; of eight idle plugins, and of a guide beyond by hand.

    Processor time of one thread: what else runs on the machine counts little.
    """
    colors = [handwritten.color(k % 3, k / 10) for k in range(max(GUIDES))]
    bench = Bench(stand_in(), colors)
    rows = {**unguided(bench), **guided(bench, GUIDES)}
    names = ("U0", "U1", "U2", "O0", *(f"{letter}{k}" for k in GUIDES for letter in "HO"))
    rows = {name: rows[name] for name in names}
    with measure.clock_on(torch.device("cpu")) as clock:
        runs = [
            measure.measure(rows, Work("a campfire", steps), rounds, clock=clock) for steps in STEPS
        ]
    return {name: measure.spread(values) for name, values in per_step(*runs).items()}


def per_step(few: measure.Seconds, many: measure.Seconds) -> dict[str, list[float]]:
    """Microseconds of one step in every round, and differences between rows."""
    scale = 1e6 / (STEPS[1] - STEPS[0])
    spent = {n: [scale * (many[n][r] - few[n][r]) for r in few[n]] for n in few}

    def minus(name: str, other: str) -> list[float]:
        # Medians are told apart: rounds of processor time have nothing in common.
        return [value - statistics.median(spent[other]) for value in spent[name]]

    least, most = GUIDES
    first = minus(f"O{least}", f"H{least}")
    further = [
        (beyond - statistics.median(first)) / (most - least)
        for beyond in minus(f"O{most}", f"H{most}")
    ]
    return {**spent, "hooks": minus("O0", "U1"), "first guide": first, "further guide": further}


def stand_in() -> Any:
    """A pipeline whose networks cost nothing, yet have a gradient."""
    pipeline = models.load("random", torch.device("cpu"), torch.float32)
    factor = pipeline.vae_scale_factor

    def decode(latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (interpolate(latents[:, :3], scale_factor=factor),)

    pipeline.unet.forward = lambda sample, *_, **__: (sample * 0.1,)
    pipeline.vae.decode = decode
    return pipeline
