"""Where noise comes from: one generator per image, always on the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

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


def draw(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """Noise of shape (B, ...), each image from its own generator, so neighbours do not matter."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators])
