"""The step of a run, as plugins see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PilotfishError
from ..guidance.graph import Leaves
from ..guidance.noise import CLEAN, NoiseLevel, at_least_float32
from ..models.protocol import Conditioning
from ..runs import pictures as images
from ..runs.run import Run
from . import shown

if TYPE_CHECKING:
    from PIL.Image import Image

# What is put around one call of the network, or what makes it.
Patch = AbstractContextManager[Any] | Callable[[], AbstractContextManager[Any]]


@dataclass
class StepState:
    """What all views of one step share; lazy values are computed once.

    Attributes:
        conditioning: the prompt's, for each image.
        calls: what the network is told at each call: the prompt, with the negative prompt before it
            where both go in one call under guidance, or else the negative prompt in a second one.
        predict: see `Step.predict`.
        as_used: predicted clean latents as the scheduler uses them.
        following: the level after this step.
        output: what the network answered, or would have for this x0.
        call: the latents and the conditioning that the network gets at its present call.
        repeat: how often this step has been taken before.
        after: what the guides add to the step's result.
        direction: where they turn the step's noise, under the rule "sphere".
        renewed: the part of the next level's noise that is drawn anew, of its variance.
        losses: see `Step.losses`.
        further: see `Step.further_prediction`, by the plugin's name.
    """

    run: Run
    index: int
    num_steps: int
    timestep: Tensor
    level: NoiseLevel
    latents: Tensor
    conditioning: Conditioning
    generators: Callable[[str], list[torch.Generator]]
    calls: tuple[Conditioning, ...] = ()
    predict: Callable[[StepState, str, Any, Any, Tensor | None], Tensor] | None = None
    as_used: Callable[[Tensor], Tensor] = lambda x0: x0
    following: NoiseLevel = CLEAN
    output: Tensor | None = None
    call: tuple[Tensor, Conditioning] | None = None
    repeat: int = 0
    after: Tensor | None = None
    direction: Tensor | None = None
    renewed: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    further: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False
    _x0: Tensor | None = None
    _views: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # For error messages; a property would format it for every hook.
        self.where = f" (at step {self.index} of {self.num_steps}, sigma {self.level.sigma:.3g})"

    @property
    def x0(self) -> Tensor:
        """Predicted clean latents, which the scheduler will use."""
        if self._x0 is None:
            if self.output is None:
                raise PilotfishError(
                    "step.x0, eps, rgb and image are known only after the network has run; "
                    "in before_step use step.latents"
                )
            self._x0 = self.as_used(self.level.x0(self.latents, self.output))
        return self._x0

    @x0.setter
    def x0(self, x0: Tensor) -> None:
        """Replace x0, and the output by the one that would have given it."""
        if x0 is self._x0:
            return
        self._x0 = self.as_used(x0)
        if self.output is not None and self.level.out:  # at sigma 0 every output gives the same x0
            self.output = self.level.output(self.latents, self._x0).to(self.output.dtype)
        self._views.clear()

    def view(self, name: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        """A picture of x0, built once."""
        if name not in self._views:
            with torch.no_grad():  # a stream's reader may have gradients on
                self._views[name] = build(self.x0.detach())
        return self._views[name]

    def arguments(self, key: str = "", **more: Any) -> Callable[[str, Any], dict[str, Any]]:
        """What hooks may ask for: the step as each plugin sees it, and a chain's value as `key`."""
        return lambda name, value: {**more, key: value, "step": Step(self, name)}

    def detach(self) -> None:
        """Let go of the graph."""
        self.latents = self.latents.detach()
        self.output = None if self.output is None else self.output.detach()
        self._x0 = None if self._x0 is None else self._x0.detach()

    def take(self, indices: Tensor) -> None:
        """Let images go on in others' places, (B,)."""
        for name in ("latents", "output", "_x0", "after", "direction"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[indices.to(value.device)])
        self._views.clear()

    def finished(self, latents: Tensor) -> StepState:
        """The same step once more, at noise level zero, with the finished latents."""
        x0 = at_least_float32(latents)
        return replace(self, latents=latents, level=CLEAN, _x0=x0, _views={})


class Step:
    """One step of a run: read-only, with lazy values that all plugins share."""

    __slots__ = ("_leaves", "_plugin", "_read", "_state")

    def __init__(self, state: StepState, plugin: str = "", leaves: Leaves | None = None) -> None:
        self._state, self._plugin, self._leaves = state, plugin, leaves
        self._read: list[tuple[str, Tensor, int]] = []

    def _shared(self, name: str, tensor: Tensor) -> Tensor:
        """A value that others read too, which so may not be changed in place."""
        if not tensor.is_inference():  # which keeps no version
            self._read.append((name, tensor, tensor._version))
        return tensor

    def changed(self) -> str | None:
        """What was read here and then changed in place, by name; see `Stack.call`."""
        return next((name for name, tensor, old in self._read if tensor._version != old), None)

    def __repr__(self) -> str:
        return f"Step({self.index} of {self.num_steps}, sigma {self.sigma:.3g})"

    def _repr_html_(self) -> str:
        return shown.step_html(self)

    @property
    def index(self) -> int:
        """Position in the loop, from 0."""
        return self._state.index

    @property
    def num_steps(self) -> int:
        """Of the loop: two-stage schedulers such as Heun have nearly two for each of the user's."""
        return self._state.num_steps

    @property
    def run(self) -> Run:
        """The run's description; `run.model` holds the networks."""
        return self._state.run

    @property
    def progress(self) -> float:
        """`index / num_steps`: 0 at the first step, below 1 at the last."""
        return self.index / self.num_steps

    @property
    def last(self) -> bool:
        """Whether the run ends after this step: because no other follows, or by `stop`."""
        return self._state.stopped or self.index + 1 == self.num_steps

    @property
    def timestep(self) -> Tensor:
        """The network's own index, a scalar."""
        return self._shared("timestep", self._state.timestep)

    @property
    def alpha(self) -> float:
        """`latents = alpha * x0 + sigma * eps`."""
        return self._state.level.alpha

    @property
    def sigma(self) -> float:
        """`latents = alpha * x0 + sigma * eps`."""
        return self._state.level.sigma

    @property
    def next_alpha(self) -> float:
        """`alpha` of the latents that the step leads to; 1 after the last."""
        return self._state.following.alpha

    @property
    def next_sigma(self) -> float:
        """`sigma` of the latents that the step leads to; 0 after the last."""
        return self._state.following.sigma

    @property
    def latents(self) -> Tensor:
        """Noisy latents (B, C, H, W), before this step is taken."""
        return self._shared("latents", self._state.latents.detach())

    @property
    def eps(self) -> Tensor:
        """Predicted noise (B, C, H, W), after classifier-free guidance."""
        state = self._state
        return state.level.eps(state.latents.detach(), state.x0.detach())

    @property
    def x0(self) -> Tensor:
        """Predicted clean latents (B, C, H, W), float32."""
        return self._leaves("x0") if self._leaves else self._shared("x0", self._state.x0.detach())

    def to_x0(self, prediction: Tensor) -> Tensor:
        """What clean latents a prediction of the network means: (B, C, H, W), at least float32.

        Differentiable where this step's gradient goes through the network.
        """
        return self._state.level.x0(self._state.latents, prediction)

    def to_prediction(self, x0: Tensor) -> Tensor:
        """The prediction that means these clean latents; not at sigma 0, where each means all."""
        return self._state.level.output(self._state.latents, x0)

    @property
    def image(self) -> Tensor:
        """x0 decoded by the run's `decoder`: (B, 3, 8H, 8W) in [0, 1], not clamped; once a step.

        8 stands for the model's own `factor`, as wherever `8H` is written.
        """
        return self._shown("image", lambda x0: self.run.model.decoder(self.run.decoder)(x0))

    @property
    def rgb(self) -> Tensor:
        """Linear estimate of the colours of x0 (B, 3, H, W) in about [0, 1], nearly free."""
        return self._shown("rgb", lambda x0: self.run.model.rgb(x0))

    def _shown(self, name: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        if self._leaves:
            return self._leaves(name)
        return self._shared(name, self._state.view(name, build))

    @property
    def losses(self) -> Mapping[str, Tensor]:
        """The loss of each guide that was asked at this step, (B,), before its move."""
        return self._state.losses

    @property
    def embeddings(self) -> Tensor:
        """The prompt's embedding as the network gets it (B, T, D)."""
        return self._shared("embeddings", self._state.conditioning["values"])

    @property
    def network_latents(self) -> Tensor:
        """What the network gets at its present call, scaled: (N, C, H, W), N is B or more.

        Known in `network_inputs` and `around_network`.
        """
        return self._shared("network_latents", self._call("network_latents")[0])

    @property
    def conditioning(self) -> Conditioning:
        """What the network is told at its present call, for N images: `conditioning["values"]` ...

        Known in `network_inputs` and `around_network`.
        """
        told = self._call("conditioning")[1]
        for name, tensor in told.tensors.items():
            self._shared(f"conditioning[{name!r}]", tensor)
        return told

    def _call(self, name: str) -> tuple[Tensor, Conditioning]:
        if self._state.call is None:
            raise PilotfishError(f"step.{name} is known only when the network is called")
        return self._state.call

    @property
    def further_prediction(self) -> Tensor:
        """The one that this plugin's hook `further_prediction` asked for: (B, C, H, W).

        Differentiable where this step's gradient goes through the network.
        """
        if self._plugin not in self._state.further:
            raise PilotfishError(
                f"plugin {self._plugin!r}: step.further_prediction is known after the network's "
                "call, and only to a plugin whose hook further_prediction asked for one at this "
                "step; step.predict() makes one at once"
            )
        return self._shared("further_prediction", self._state.further[self._plugin])

    def predict(
        self,
        conditioning: Conditioning | str | None = None,
        patch: Patch | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """One more prediction of the network at this step: (B, C, H, W), of its own kind.

        Differentiable where this step's gradient goes through the network.

        Args:
            conditioning: another prompt, as text, or what `step.conditioning` is like; None is the
                run's own prompt.
            patch: what is changed in `run.model.denoiser` for this call alone: a context manager,
                or a function that makes one, which is asked again where layers are computed again
                for a gradient. With a context manager itself, no layer of this call is
                checkpointed.
            offset: what is added to the latents for this call alone, (B, C, H, W).
        """
        if self._state.predict is None:
            raise PilotfishError("step.predict needs a run; this step has none")
        return self._state.predict(self._state, self._plugin, conditioning, patch, offset)

    @property
    def generator(self) -> list[torch.Generator]:
        """One CPU generator per image, this plugin's own: other plugins do not change its draws."""
        return self._state.generators(self._plugin)

    def preview(self) -> list[Image]:
        """Small pictures of x0, without a decode."""
        return images.preview(self.rgb)

    def stop(self, x0: Tensor | None = None) -> None:
        """End the run after this step; its x0, or the one given, becomes the result."""
        if x0 is not None:
            self._state.x0 = x0
        self._state.stopped = True
