"""The step of a run, as plugins see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PilotfishError
from ..guidance.gradients import Leaves
from ..guidance.noise import CLEAN, NoiseLevel
from ..models.text import Conditioning
from ..runs import pictures as images
from ..runs.run import Run

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Moment:
    """What all views of one step share; lazy values are computed once."""

    run: Run
    index: int
    num_steps: int
    timestep: Tensor
    level: NoiseLevel
    latents: Tensor
    conditioning: Conditioning
    generators: Callable[[str], list[torch.Generator]]
    following: Callable[[], NoiseLevel] = lambda: CLEAN  # the level after this step
    output: Tensor | None = None
    known_x0: Tensor | None = None
    repeat: int = 0  # how often this step has been taken before
    after_step: Tensor | None = None  # what the guides do to the step's result
    stopped: bool = False
    views: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # For error messages; a property would format it for every hook.
        self.where = f" at step {self.index} of {self.num_steps} (sigma {self.level.sigma:.3g})"

    def x0(self) -> Tensor:
        """Predicted clean latents."""
        if self.known_x0 is None:
            if self.output is None:
                raise PilotfishError(
                    "step.x0, eps, rgb and image are known only after the network has run; "
                    "in before_step use step.latents"
                )
            self.known_x0 = self.level.x0(self.latents, self.output)
        return self.known_x0

    def view(self, name: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        """A picture of x0, built once."""
        if name not in self.views:
            with torch.no_grad():  # a stream's reader may have gradients on
                self.views[name] = build(self.x0().detach())
        return self.views[name]

    def detach(self) -> None:
        """Let go of the graph."""
        self.latents = self.latents.detach()
        self.output = None if self.output is None else self.output.detach()
        self.known_x0 = None if self.known_x0 is None else self.known_x0.detach()

    def change_x0(self, x0: Tensor) -> None:
        """Replace x0, and the output that would have given it."""
        if self.output is None:
            raise ValueError("no prediction to change")
        self.output = self.level.output(self.latents, x0).to(self.output.dtype)
        self.known_x0 = x0
        self.views.clear()


class Step:
    """One step of a run: read-only, with lazy values that all plugins share."""

    __slots__ = ("_leaves", "_moment", "_plugin")

    def __init__(self, moment: Moment, plugin: str = "", leaves: Leaves | None = None) -> None:
        self._moment, self._plugin, self._leaves = moment, plugin, leaves

    @property
    def index(self) -> int:
        """Position in the loop, from 0."""
        return self._moment.index

    @property
    def num_steps(self) -> int:
        """Of the loop: two-stage schedulers such as Heun have nearly two for each of the user's."""
        return self._moment.num_steps

    @property
    def run(self) -> Run:
        """The run's description; `run.model` holds the networks."""
        return self._moment.run

    @property
    def progress(self) -> float:
        """`index / num_steps`: 0 at the first step, below 1 at the last."""
        return self.index / self.num_steps

    @property
    def last(self) -> bool:
        """Whether the run ends after this step: because no other follows, or by `stop`."""
        return self._moment.stopped or self.index + 1 == self.num_steps

    @property
    def timestep(self) -> Tensor:
        """The network's own index, a scalar."""
        return self._moment.timestep

    @property
    def alpha(self) -> float:
        """`latents = alpha * x0 + sigma * eps`."""
        return self._moment.level.alpha

    @property
    def sigma(self) -> float:
        """`latents = alpha * x0 + sigma * eps`."""
        return self._moment.level.sigma

    @property
    def next_alpha(self) -> float:
        """`alpha` of the latents that the step leads to; 1 after the last."""
        return self._moment.following().alpha

    @property
    def next_sigma(self) -> float:
        """`sigma` of the latents that the step leads to; 0 after the last."""
        return self._moment.following().sigma

    @property
    def latents(self) -> Tensor:
        """Noisy latents (B, C, H, W), before this step is taken."""
        return self._moment.latents.detach()

    @property
    def eps(self) -> Tensor:
        """Predicted noise (B, C, H, W), after classifier-free guidance."""
        moment = self._moment
        x0 = moment.x0().detach()
        return moment.level.eps(moment.latents.detach(), x0)

    @property
    def x0(self) -> Tensor:
        """Predicted clean latents (B, C, H, W), float32."""
        if self._leaves is not None:
            return self._leaves("x0")
        return self._moment.x0().detach()

    @property
    def image(self) -> Tensor:
        """x0 decoded by the run's `decoder`: (B, 3, 8H, 8W) in [0, 1], not clamped; once a step."""
        if self._leaves is not None:
            return self._leaves("image")
        return self._moment.view("image", self.run.model.decoder(self.run.decoder))

    @property
    def rgb(self) -> Tensor:
        """Linear estimate of the colours of x0 (B, 3, H, W) in about [0, 1], nearly free."""
        if self._leaves is not None:
            return self._leaves("rgb")
        return self._moment.view("rgb", self.run.model.rgb)

    @property
    def embeddings(self) -> Tensor:
        """The prompt's embedding as the network gets it (B, T, D)."""
        return self._moment.conditioning.values

    @property
    def generator(self) -> list[torch.Generator]:
        """One CPU generator per image, this plugin's own: other plugins do not change its draws."""
        return self._moment.generators(self._plugin)

    def preview(self) -> list[Image]:
        """Small pictures of x0, without a decode."""
        return images.preview(self.rgb)

    def stop(self, x0: Tensor | None = None) -> None:
        """End the run after this step; its x0, or the one given, becomes the result."""
        if x0 is not None:
            self._moment.change_x0(x0)
        self._moment.stopped = True
