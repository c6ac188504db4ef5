"""The network as one run calls it: with what plugins add to a call, and put around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..hooks.stack import Stack
from ..models.copies import make_eager
from ..models.protocol import Conditioning, LatentDiffusion
from .step import Step, StepState


class Network:
    """The network of one run.

    Attributes:
        model: the model on copies of its networks: what is patched there, no other run sees.

    Raises:
        ModelError: a plugin wants to put something around it, and that cannot be.
    """

    def __init__(self, model: LatentDiffusion, checkpointing: str, stack: Stack) -> None:
        self._stack = stack
        self._around: contextlib.AbstractContextManager[Any] | None = contextlib.nullcontext()
        # Without plugins nothing is patched and no gradient taken: no copies then.
        self.model = model.differentiable(checkpointing, self._again if len(stack) else None)
        if stack.calls["around_network"] and (reason := self.model.refuse_gradients()):
            raise ModelError(f"nothing can be put around the network's calls: {reason}")
        if stack.calls["around_network"]:
            make_eager(self.model.denoiser)

    def _again(self) -> contextlib.AbstractContextManager[Any] | None:
        return self._around

    def __call__(
        self, state: StepState, latents: Tensor, conditioning: Conditioning, patch: Any = None
    ) -> Tensor:
        """Its output for scaled latents (N, C, H, W).

        Args:
            patch: see `Step.predict`.
        """
        before = state.network_latents, state.network_conditioning, self._around
        state.network_latents, state.network_conditioning = latents, conditioning
        if patch is not None:
            make_eager(self.model.denoiser)
        try:
            inputs = self._inputs(state)
            around = Around(lambda: self._managers(state, latents, conditioning, patch))
            plain = patch is None and not self._stack.calls["around_network"]
            # What can be entered once only cannot be entered again for a gradient.
            once = hasattr(patch, "__enter__")
            self._around = contextlib.nullcontext() if plain else None if once else around
            with around:
                return self.model.predict(latents, state.timestep, conditioning, **inputs)
        finally:
            state.network_latents, state.network_conditioning, self._around = before

    def _inputs(self, state: StepState) -> dict[str, Any]:
        inputs = self._stack.chain(
            "network_inputs",
            {},
            lambda name, value: {"inputs": value, "step": Step(state, name)},
            _inputs_problem,
            state.where,
        )
        return dict(inputs)

    @torch.no_grad()
    def _managers(
        self, state: StepState, latents: Tensor, conditioning: Conditioning, patch: Any
    ) -> Iterator[contextlib.AbstractContextManager[Any]]:
        """The plugins' context managers, then the patch of this call alone."""
        state.network_latents, state.network_conditioning = latents, conditioning
        answers = self._stack.collect(
            "around_network", lambda name, _: {"step": Step(state, name)}, state.where
        )
        for name, answer in answers:
            if not hasattr(answer, "__enter__"):
                what = f"returned {type(answer).__name__}; expected a context manager or None"
                self._stack.blame(name, "around_network", what, state.where)
            yield answer
        if patch is not None:
            yield patch if hasattr(patch, "__enter__") else patch()


class Around:
    """Context managers made anew each time they are entered, also where layers are computed again.

    They are always left as if nothing had happened: checkpointing ends a layer by an exception of
    its own, and whatever was raised goes on by itself.
    """

    def __init__(
        self, managers: Callable[[], Iterator[contextlib.AbstractContextManager[Any]]]
    ) -> None:
        self._managers = managers
        self._open: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as entered:
            for manager in self._managers():
                entered.enter_context(manager)
            self._open.append(entered.pop_all())

    def __exit__(self, *_: object) -> None:
        self._open.pop().close()


def _inputs_problem(answer: Any, _: Any) -> str | None:
    if not hasattr(answer, "keys") or not all(isinstance(key, str) for key in answer):
        return f"returned {type(answer).__name__}; expected a mapping of names to tensors, or None"
    return None
