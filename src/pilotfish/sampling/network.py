"""The network as one run calls it: with what plugins add to a call, and put around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, PilotfishError, PluginError, is_out_of_memory, told
from ..hooks.stack import Stack
from ..models.copies import make_eager
from ..models.protocol import Conditioning, LatentDiffusion
from .step import StepState

# What is changed in the network for some images of a call.
PatchOf = Callable[[slice], AbstractContextManager[Any]]
# Latents as the network takes them at a timestep.
Scaled = Callable[[Tensor, Tensor], Tensor]


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
        self,
        state: StepState,
        latents: Tensor,
        conditioning: Conditioning,
        patch: Any = None,
        plugin: str | None = None,
    ) -> Tensor:
        """Its output for scaled latents (N, C, H, W).

        Args:
            patch: see `Step.predict`.
            plugin: who asks, where it is not the step itself.

        Raises:
            PluginError: the network raised something, with what plugins change of it.
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
        except Exception as error:
            self._blame(error, state, plugin)
            raise
        finally:
            state.call, self._around = before

    def _blame(self, error: Exception, state: StepState, plugin: str | None) -> None:
        """Name the plugins that change the network or its inputs, where it raised something."""
        hooks = ("network_inputs", "around_network", "further_prediction")
        names = [call.name for hook in hooks for call in self._stack.calls[hook]]
        names = names if plugin is None else [plugin, *names]
        if names and not (isinstance(error, PilotfishError) or is_out_of_memory(error)):
            whose = " and ".join(dict.fromkeys(self._stack.label(name) for name in names))
            what = f"{whose}: the network, with what it adds or changes, raised {told(error)}"
            raise PluginError(f"{what}{state.where}", plugin=names[0]) from error

    def both(self, state: StepState, scaled: Scaled) -> tuple[Tensor, Tensor | None]:
        """The predictions for the prompt and the negative prompt; the state gets further ones.

        In one call where the family's pipeline makes one. Further ones join it, but where plugins
        change the network around its calls: they cannot know whose images those are.

        Args:
            scaled: latents as the network takes them at a timestep.
        """
        count, further = len(state.latents), self._further(state)
        joined = self.model.together and not self._stack.calls["around_network"]
        patches = [(name, patch) for name, patch in further if joined]
        outputs: list[Tensor] = []
        for asked in state.calls:
            own = len(asked["values"]) // count
            answers = self._joined(state, scaled, asked, [patch for _, patch in patches])
            outputs += reversed(answers[:own])
            state.further.update(zip(dict(patches), answers[own:], strict=True))
        for name, patch in further[len(patches) :]:
            latents, alone = scaled(state.latents, state.timestep), partial(patch, slice(0, count))
            state.further[name] = self(state, latents, state.conditioning, alone, name)
        cond, *uncond = outputs  # (B, C, H, W) each
        return cond, uncond[0] if uncond else None

    def _joined(
        self, state: StepState, scaled: Scaled, told: Conditioning, patches: Sequence[PatchOf]
    ) -> Sequence[Tensor]:
        """One call's answers, (B, C, H, W) each; the last ones for the prompt, patched."""
        for _ in patches:
            told = told.cat(state.conditioning)
        count, images = len(state.latents), len(told["values"])
        latents = scaled(torch.cat([state.latents] * (images // count)), state.timestep)
        firsts = range(images - count * len(patches), images, count)
        whose = [partial(p, slice(f, f + count)) for p, f in zip(patches, firsts, strict=True)]
        patch = partial(_entered, whose) if whose else None
        return torch.split(self(state, latents, told, patch), count)

    def _further(self, state: StepState) -> list[tuple[str, PatchOf]]:
        """What plugins want changed for a further prediction each."""
        hook = "further_prediction"
        answers = list(self._stack.collect(hook, state.arguments(), state.where))
        for name, patch in answers:
            if not callable(patch):
                what = f"returned {type(patch).__name__}; expected a function of a slice, or None"
                self._stack.blame(name, hook, what, state.where)
        return answers

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


@contextmanager
def _entered(patches: Sequence[Callable[[], AbstractContextManager[Any]]]) -> Iterator[None]:
    """Several patches of one call."""
    with ExitStack() as entered:
        for patch in patches:
            entered.enter_context(patch())
        yield


def _inputs_problem(answer: Any, _: Any) -> str | None:
    if not hasattr(answer, "keys") or not all(isinstance(key, str) for key in answer):
        return f"returned {type(answer).__name__}; expected a mapping of names to tensors, or None"
    return None
