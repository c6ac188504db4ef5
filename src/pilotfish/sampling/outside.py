"""What hard masks keep: outside of them, the picture of the run without their guides."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .step import Step

if TYPE_CHECKING:
    from .loop import Sampling


class Outside:
    """Outside of hard masks the picture is that of the run without the guides that have them.

    That run goes along, a step at a time: after each, its latents are put back there.

    Raises:
        InputError: a plugin of the run moves images to other places.
    """

    def __init__(self, sampling: Sampling) -> None:
        hard = {name for name, region in sampling.guides.regions.items() if region.hard}
        self._other: Sampling | None = None
        self._steps: Iterator[Step] = iter(())
        if not hard:
            return
        if sampling.stack.calls["resample"]:
            raise InputError("mask_edge='hard' cannot go with a plugin that resamples images")
        self._other = sampling.again(sampling.stack.without(hard))
        self._steps = self._other.steps()
        masks = [sampling.guides.regions[name].of(sampling.shape[1:]) for name in hard]
        self._inside = (torch.stack(masks).amax(dim=0) > 0).to(sampling.model.device)

    def held(self, latents: Tensor) -> Tensor:
        """A step's result, with the other run's own outside."""
        if self._other is None:
            return latents
        next(self._steps, None)
        return self._with(latents, self._other.latents)

    def held_x0(self, x0: Tensor) -> Tensor:
        """The same of what a run ends with that is ended early."""
        if self._other is None or self._other.latest is None:
            return x0
        return self._with(x0, self._other.latest.x0)

    def _with(self, ours: Tensor, theirs: Tensor | None) -> Tensor:
        return ours if theirs is None else torch.where(self._inside, ours, theirs.to(ours))

    def close(self) -> None:
        """End the other run."""
        if isinstance(self._steps, Generator):
            self._steps.close()
