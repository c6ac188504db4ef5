"""A plugin on trial: fresh twins of it, short runs, and what came of each check."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pilotfish import Guide, PilotfishError, Plugin, Result, Sampler, Stream
from pilotfish.testing import random_sampler

SEEDS = (7, 8)
SWITCHES = (
    *(torch.are_deterministic_algorithms_enabled, torch.get_float32_matmul_precision),
    *(torch.get_default_dtype, torch.get_num_threads, torch.is_grad_enabled),
)


class NotTried(Exception):
    """A check has nothing to look at; the message says why."""


def require(kept: bool, message: str) -> None:
    """Fail the check where the plugin does not keep what it looks for."""
    if not kept:
        raise PilotfishError(message)


@dataclass(frozen=True)
class Check:
    """One check: it returns where the plugin keeps its claim, and raises where it does not.

    Attributes:
        name: as reports write it, "scale-0".
        claim: what a plugin keeps that passes it.
        function: tries it.
        needs: the check without which this one says nothing, or None.
    """

    name: str
    claim: str
    function: Callable[[Trial], None]
    needs: Check | None


@dataclass(frozen=True)
class Outcome:
    """What came of one check; the message says why it failed or was not tried."""

    check: Check
    status: Literal["ok", "failed", "not tried"]
    message: str = ""


class Trial:
    """A plugin and the model it is tried on; each check is tried at most once.

    Args:
        side: of the pictures, in pixels; None is the model's own.

    Attributes:
        absent: final latents (1, C, H, W) of a run without the plugin.
        before: the state of the `world` before the plugin ran.
    """

    def __init__(
        self, plugin: Any, sampler: Sampler | None, prompt: str, side: int | None = None
    ) -> None:
        self._size = {"height": side, "width": side}
        self.plugin, self.sampler, self.prompt = plugin, sampler or random_sampler(), prompt
        self.absent, self.before = self.latents(), world(self.sampler.model)
        self.outcome = functools.cache(self._outcome)

    def _outcome(self, check: Check) -> Outcome:
        """What comes of a check, after the one that it needs."""
        try:
            if check.needs and self.outcome(check.needs).status != "ok":
                raise NotTried(f"see {check.needs.name}")
            check.function(self)
        except NotTried as reason:
            return Outcome(check, "not tried", str(reason))
        except Exception as error:  # a plugin is foreign code
            return Outcome(check, "failed", str(error) or repr(error))
        return Outcome(check, "ok")

    def twin(self, kind: type[Any] | None = None, **changes: Any) -> Any:
        """A fresh instance with the same settings, but for the changes.

        A guide acts at every step, whatever its settings say.
        """
        if not isinstance(self.plugin, Plugin):
            return copy.deepcopy(self.plugin)
        settings = self.plugin.settings.model_dump()
        if isinstance(self.plugin, Guide):
            scale = settings["scale"] or 1.0
            settings |= {"start": 0.0, "stop": 1.0, "every": 1, "scale": scale}
        return (kind or type(self.plugin))(**{**settings, **changes})

    def stream(self, *plugins: Any, sampler: Sampler | None = None, **options: Any) -> Stream:
        """A run of two steps."""
        options = {"steps": 2, "seed": SEEDS[0], **self._size, **options}
        return (sampler or self.sampler).stream(self.prompt, plugins=plugins, **options)

    def take(self, *streams: Stream) -> list[Result]:
        """Take the steps of several runs in turn, to the end."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of losses that rise: two steps say little
            for _ in itertools.zip_longest(*streams):
                pass
            return [stream.result() for stream in streams]

    def latents(self, *plugins: Any, **options: Any) -> Tensor:
        """Final latents of one run."""
        return self.take(self.stream(*plugins, **options))[0].latents

    @functools.cached_property
    def singles(self) -> list[Tensor]:
        """Final latents with the plugin, one image each for `SEEDS`."""
        return [self.latents(self.twin(), seed=seed) for seed in SEEDS]

    @functools.cached_property
    def pair(self) -> Result:
        """A run with the plugin of both images."""
        return self.take(self.stream(self.twin(), num_images=2))[0]


def hooks(plugin: object) -> dict[str, Callable[..., Any]]:
    """The hooks that a plugin's class implements."""
    members = inspect.getmembers(type(plugin), inspect.isfunction)
    return {name: member for name, member in members if hasattr(member, "pilotfish_impl")}


def world(model: Any) -> dict[str, Any]:
    """What a run must leave as it was, by name: torch's switches, and the model's networks."""
    state: dict[str, Any] = {f"torch.{switch.__name__}()": switch() for switch in SWITCHES}
    parts = [part for owner in (model, *model.text_encoders) for part in vars(owner).values()]
    for network in (part for part in parts if isinstance(part, nn.Module)):
        for path, module in network.named_modules(prefix=type(network).__name__):
            held = [(n, len(v) if n.endswith("hooks") else id(v)) for n, v in vars(module).items()]
            own = module.parameters(recurse=False)
            values = [(p.requires_grad, p.detach().double().norm().item()) for p in own]
            state[path] = held, values
    return state
