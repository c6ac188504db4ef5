"""What the plugins share: a window in the run, the two predictions, and the space they act in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pilotfish import Plugin, Setting, at_least_float32

if TYPE_CHECKING:
    from pilotfish import Step


@dataclass(frozen=True)
class Predictions:
    """Both predictions and what was made of them, (B, C, H, W) each, at least float32.

    Attributes:
        guided: as the plugins before left it; `uncond + scale * (cond - uncond)` at first.
        scale: that of classifier-free guidance, (B, 1, 1, 1).
    """

    guided: Tensor
    cond: Tensor
    uncond: Tensor
    scale: Tensor

    @classmethod
    def of(cls, prediction: Tensor, cond: Tensor, uncond: Tensor, step: Step) -> Predictions:
        """Those of a step.

        The scale is how much of `cond - uncond` lies in what the model's family makes of both: some
        count theirs from 0, and some bring the sum back to a norm.
        """
        guided, cond, uncond = (at_least_float32(t) for t in (prediction, cond, uncond))
        with torch.no_grad():  # a number of the run's, not of the network's
            begun = step.run.model.combine(cond, uncond, step.run.cfg_scale)
            direction = cond - uncond
            square = inner(direction, direction)
            scale = torch.where(square > 0, inner(begun - uncond, direction) / square, 1.0)
        return cls(guided, cond, uncond, scale)

    def as_x0(self, step: Step) -> Predictions:
        """The clean latents that they mean."""
        guided, cond, uncond = (step.to_x0(t) for t in (self.guided, self.cond, self.uncond))
        return Predictions(guided, cond, uncond, self.scale)

    @property
    def direction(self) -> Tensor:
        """What is added `scale` times: `cond - uncond` at first."""
        return (self.guided - self.uncond) / self.scale

    def beyond_cond(self, direction: Tensor) -> Tensor:
        """The guided prediction with another direction in what goes beyond cond; cond stays."""
        return self.guided + (self.scale - 1) * (direction - self.direction)

    def instead_of_uncond(self, uncond: Tensor) -> Tensor:
        """The guided prediction with another one in uncond's place; cond stays."""
        return self.guided + (1 - self.scale) * (uncond - self.uncond)


class Windowed(Plugin):
    """A plugin that acts in a window of the run."""

    heading = "classifier-free guidance"

    class Settings(Plugin.Settings):
        """What every plugin of the package has that follows the run."""

        start: float = Setting(0.0, ge=0, le=1, description="first moment, a fraction of the run")
        stop: float = Setting(1.0, ge=0, le=1, description="last moment, a fraction of the run")

    def _inside(self, step: Step) -> bool:
        """Whether a step lies in the window; at sigma 0 every prediction means the same x0."""
        in_time: bool = self.settings.start <= step.progress < self.settings.stop
        return in_time and step.sigma > 0


class Spaced(Windowed):
    """A plugin that combines predictions, in the network's own space or in that of x0."""

    class Settings(Windowed.Settings):
        space: Literal["x0", "output"] = Setting(
            "output", description="act on the network's own output, or on the x0 that it means"
        )

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: Step, state: Any
    ) -> Tensor | None:
        if uncond is None or not self._inside(step):
            return None
        both = Predictions.of(prediction, cond, uncond, step)
        if self.settings.space == "output":
            return self._combined(both, state).to(prediction.dtype)
        return step.to_prediction(self._combined(both.as_x0(step), state)).to(prediction.dtype)

    def _combined(self, both: Predictions, state: Any) -> Tensor:
        """The guided prediction."""
        raise NotImplementedError


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of images, (B, 1, 1, 1)."""
    return (first * second).sum(dim=(1, 2, 3), keepdim=True)


def positive(squares: Tensor) -> Tensor:
    """Squared norms that can be divided by, with a finite gradient of their root."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny)


def norm(images: Tensor) -> Tensor:
    """Norms of images, (B, 1, 1, 1), above 0."""
    return positive(inner(images, images)).sqrt()


def projected(images: Tensor, axis: Tensor) -> Tensor:
    """The part of each image that is parallel to another one."""
    return inner(images, axis) / positive(inner(axis, axis)) * axis
