"""Where noise comes from: one generator per image, always on the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ..runs.run import Run


class Generators:
    """The generators of one run.

    Attributes:
        own: the run's, for its first noise and for the scheduler's.
    """

    def __init__(self, run: Run) -> None:
        self.own = seeded(run, "")
        self._run = run
        self._named: dict[str, list[torch.Generator]] = {}

    def of(self, name: str) -> list[torch.Generator]:
        """Those of a plugin, or of a purpose of the host: the same ones throughout the run."""
        if name not in self._named:
            self._named[name] = seeded(self._run, name)
        return self._named[name]

    def resample(self, indices: Sequence[int]) -> None:
        """Let each place draw on as the image that goes on in it."""
        for generators in (self.own, *self._named.values()):
            generators[:] = [copied(generators[index]) for index in indices]


def seeded(run: Run, name: str) -> list[torch.Generator]:
    """One CPU generator per image: the run's own, or a plugin's, independent of all others."""
    seeds = [run.seed + i for i in range(run.num_images)]
    if name:
        digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for seed in seeds)
        seeds = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def copied(generator: torch.Generator) -> torch.Generator:
    """A generator that draws the same from here on."""
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def indices_problem(answer: Any, count: int) -> str | None:
    """What is wrong with a `resample`'s answer."""
    try:
        indices = torch.tensor(torch.as_tensor(answer).tolist())
    except (TypeError, ValueError, RuntimeError):
        return f"returned {type(answer).__name__}; expected indices of the images, shape ({count},)"
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if not whole or indices.shape != (count,) or not ((indices >= 0) & (indices < count)).all():
        return f"returned {indices.tolist()}; expected {count} indices of images, 0 to {count - 1}"
    return None
