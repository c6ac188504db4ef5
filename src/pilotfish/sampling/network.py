"""The network as one run calls it: with what plugins add to a call, and put around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..hooks.stack import Stack
from ..models.copies import make_eager
from ..models.protocol import Conditioning, LatentDiffusion
from .step import StepState


class Network:
    """The network of one run.

    Attributes:
        model: the model on copies of its networks: what is patched there, no other run sees.

    Raises:
        ModelError: a plugin wants to put something around it, and that cannot be.
    """

    def __init__(self, model: LatentDiffusion, checkpointing: str, stack: Stack) -> None:
        self._stack = stack
        # What makes that which is put around a layer that is computed again.
        self._around: Callable[[], AbstractContextManager[Any] | None] = nullcontext
        # Without plugins nothing is patched and no gradient taken: no copies then.
        self.model = model.differentiable(checkpointing, self._again if len(stack) else None)
        if stack.calls["around_network"]:
            if reason := self.model.refuse_gradients():
                raise ModelError(f"nothing can be put around the network's calls: {reason}")
            make_eager(self.model.denoiser)

    def _again(self) -> AbstractContextManager[Any] | None:
        return self._around()

    def __call__(
        self, state: StepState, latents: Tensor, conditioning: Conditioning, patch: Any = None
    ) -> Tensor:
        """Its output for scaled latents (N, C, H, W).

        Args:
            patch: see `Step.predict`.
        """
        before, state.call = (state.call, self._around), (latents, conditioning)
        if patch is not None:
            make_eager(self.model.denoiser)
        try:
            inputs = self._stack.chain(
                "network_inputs", {}, state.arguments("inputs"), _inputs_problem, state.where
            )
            around = partial(self._put_around, state, state.call, patch)
            plain = patch is None and not self._stack.calls["around_network"]
            # What can be entered once only cannot be entered again for a gradient.
            once = hasattr(patch, "__enter__")
            self._around = nullcontext if plain else (lambda: None) if once else around
            with around():
                return self.model.predict(latents, state.timestep, conditioning, **inputs)
        finally:
            state.call, self._around = before

    @contextmanager
    def _put_around(
        self, state: StepState, call: tuple[Tensor, Conditioning], patch: Any
    ) -> Iterator[None]:
        """The context managers of a call, made anew, also where layers are computed again.

        They are always left as if nothing had happened: checkpointing ends a layer by an exception
        of its own, and whatever was raised goes on by itself.
        """
        state.call = call
        with closing(ExitStack()) as entered:
            for manager in self._managers(state, patch):
                entered.enter_context(manager)
            yield

    @torch.no_grad()
    def _managers(self, state: StepState, patch: Any) -> Iterator[AbstractContextManager[Any]]:
        """The plugins' context managers, then the patch of this call alone."""
        for name, answer in self._stack.collect("around_network", state.arguments(), state.where):
            if not hasattr(answer, "__enter__"):
                what = f"returned {type(answer).__name__}; expected a context manager or None"
                self._stack.blame(name, "around_network", what, state.where)
            yield answer
        if patch is not None:
            yield patch if hasattr(patch, "__enter__") else patch()


def _inputs_problem(answer: Any, _: Any) -> str | None:
    if not hasattr(answer, "keys") or not all(isinstance(key, str) for key in answer):
        return f"returned {type(answer).__name__}; expected a mapping of names to tensors, or None"
    return None
