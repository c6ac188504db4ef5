"""A plugin on trial: fresh instances of it, and short runs in which its hook calls are watched."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PilotfishError, PluginError
from ..hooks.plugin import Guide, Plugin
from ..hooks.stack import Call, Stack
from ..models.text import Embedding
from ..runs.run import Run
from ..sampling.loop import Sampling
from ..sampling.sampler import Sampler, Stream
from ..sampling.step import Step
from ..sampling.trace import Trace
from .leftovers import tensors_in, world_state

PROMPT = "a red cat"
SEEDS = (7, 8)
# A guide is tried at every step, whatever its settings say.
ALWAYS = {"start": 0.0, "stop": 1.0, "every": 1}


class NoTwinError(PilotfishError):
    """A plugin cannot be made a second time."""


class ChangedInputError(PilotfishError):
    """A hook changed in place what it was given."""


@dataclass(frozen=True)
class Ordinary:
    """Square runs of a plugin, and one without it.

    Attributes:
        absent: final latents (1, C, H, W) without the plugin.
        singles: with it, one image each for `SEEDS`.
        pair: with it, both images in one run.
        trace: of the pair.
        before, after: state of the model and of torch when the plugin first ran, and afterwards.
    """

    absent: Tensor
    singles: list[Tensor]
    pair: Tensor
    trace: Trace
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass
class Trial:
    """A plugin, the model it is tried on, and what came to light in its runs.

    Attributes:
        drawn: the global random generators that a run has used.
        loaded: tensors that the latest run's `setup` left in the plugin.
    """

    plugin: Any
    sampler: Sampler
    prompt: str = PROMPT
    drawn: set[str] = field(default_factory=set)
    loaded: list[Tensor] = field(default_factory=list)

    def twin(self, **changes: Any) -> Any:
        """A fresh instance with the same settings, but for the changes; a guide acts always.

        Raises:
            NoTwinError: there is no way to make one.
        """
        try:
            if not isinstance(self.plugin, Plugin):
                return copy.deepcopy(self.plugin)
            settings = self.plugin.settings.model_dump()
            if isinstance(self.plugin, Guide):
                settings |= {**ALWAYS, "scale": settings["scale"] or 1.0}
            return type(self.plugin)(**{**settings, **changes})
        except Exception as error:  # a plugin is foreign code
            raise NoTwinError(
                f"cannot be made again from its settings alone: {type(error).__name__}: {error}"
            ) from error

    def stream(self, *plugins: Any, sampler: Sampler | None = None, **options: Any) -> Stream:
        """A run of two steps, every hook call watched."""
        stack = Stack(plugins)
        stack.calls = {hook: tuple(map(self._watched, c)) for hook, c in stack.calls.items()}
        run = Run(**{"prompt": self.prompt, "steps": 2, "seed": SEEDS[0], **options})
        return Stream(Sampling((sampler or self.sampler).model, run, stack))

    def take(self, *streams: Stream) -> list[Tensor]:
        """Take the steps of several runs in turn, to the end; their final latents."""
        with self._watched_random_state(), contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(contextlib.closing(stream))
            for _ in itertools.zip_longest(*streams):
                pass
            return [stream.result().latents for stream in streams]

    def latents(self, *plugins: Any, **options: Any) -> Tensor:
        """Final latents of one run."""
        return self.take(self.stream(*plugins, **options))[0]

    def cut_short(self, plugin: Any) -> None:
        """Leave a run after its first step."""
        with self._watched_random_state(), contextlib.closing(self.stream(plugin)) as stream:
            next(stream)

    @cached_property
    def ordinary(self) -> Ordinary:
        """The runs that every plugin must survive."""
        absent = self.latents()
        before = world_state(self.sampler.model)
        singles = [self.latents(self.twin(), seed=seed) for seed in SEEDS]
        stream = self.stream(self.twin(), num_images=2)
        pair = self.take(stream)[0]
        after = world_state(self.sampler.model)
        return Ordinary(absent, singles, pair, stream.trace, before, after)

    @cached_property
    def trouble(self) -> tuple[str, str] | None:
        """What went wrong in the ordinary runs: the check that looks for it, and the message."""
        try:
            _ = self.ordinary
        except Exception as error:  # a plugin is foreign code
            return kind_of(error), str(error) or repr(error)
        return None

    def _watched(self, call: Call) -> Call:
        def function(*arguments: Any) -> Any:
            given = dict(zip(call.arguments, arguments, strict=True))
            tensors = dict(inputs(given))
            before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            held = tensors_in(call.plugin) if call.hook == "setup" else {}
            answer = call.function(*arguments)
            for name, tensor in tensors.items():
                if not torch.allclose(tensor, before[name], rtol=0, atol=0, equal_nan=True):
                    raise ChangedInputError(
                        f"{call.hook}() changed {name} in place, which others read too; "
                        "make a new tensor"
                    )
            if call.hook == "setup":
                self.loaded = [t for i, t in tensors_in(call.plugin).items() if i not in held]
            return answer

        return dataclasses.replace(call, function=function)

    @contextlib.contextmanager
    def _watched_random_state(self) -> Iterator[None]:
        """A random state of its own, always the same; notes who changed it, and restores it."""
        sources = generators()
        before = {name: get() for name, (get, _, _) in sources.items()}
        for _, _, seed in sources.values():
            seed(SEEDS[0])
        fresh = {name: get() for name, (get, _, _) in sources.items()}
        try:
            yield
        finally:
            for name, (get, put, _) in sources.items():
                if not same_state(get(), fresh[name]):
                    self.drawn.add(name)
                put(before[name])


def generators() -> dict[str, tuple[Any, Any, Any]]:
    """Each global random generator: how to read its state, write it, and seed it."""
    found: dict[str, tuple[Any, Any, Any]] = {
        "torch": (
            torch.random.get_rng_state,
            torch.random.set_rng_state,
            torch.default_generator.manual_seed,
        ),
        "random": (random.getstate, random.setstate, random.seed),
        "numpy.random": (np.random.get_state, np.random.set_state, np.random.seed),
    }
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        found["torch.cuda"] = (cuda.get_rng_state_all, cuda.set_rng_state_all, cuda.manual_seed_all)
    return found


def same_state(one: Any, other: Any) -> bool:
    """Whether two states of a generator are equal, whatever they are made of."""
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(np.array_equal(one, other))


def kind_of(error: Exception) -> str:
    """The check that an error in an ordinary run belongs to."""
    if isinstance(error, NoTwinError):
        return "settings"
    if isinstance(error, ChangedInputError):
        return "inputs"
    if isinstance(error, PluginError) and error.hook is None:
        return "signature"
    if isinstance(error, PluginError) and error.__cause__ is None:
        return "loss" if error.hook == "loss_guidance" else "answers"
    return "runs"


def inputs(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a hook is given, by the name it knows them by."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Embedding):
            yield "embedding.values", value.values
            if value.pooled is not None:
                yield "embedding.pooled", value.pooled
        elif isinstance(value, Step):
            known = () if value._moment.output is None else ("x0", "rgb", "image")
            for attribute in ("latents", "embeddings", *known):
                yield f"step.{attribute}", getattr(value, attribute)
