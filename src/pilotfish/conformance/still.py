"""The checks that look at a plugin without running it."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

from ..hooks.plugin import Guide, Plugin, refuse_near_miss
from ..hooks.registry import use_of
from ..hooks.specs import KINDS
from ..hooks.stack import Stack
from ..runs.run import Run
from .check import Broken, NotTried, check
from .leftovers import left_by_import
from .trial import Trial

# An import may hold small tables; a network's weights are larger.
IMPORTED_BYTES = 2**20


@check()
def signature(trial: Trial) -> None:
    """Every hook is one that pilotfish calls, with arguments that it fills."""
    plugin = trial.plugin
    own = set(dir(type(plugin))) - set(dir(Guide)) | set(KINDS)
    for name in sorted(own):
        member = getattr(plugin, name, None)
        if name in KINDS and member is not None:
            _check_hook(name, member)
        elif inspect.isroutine(member) and not name.startswith("_"):
            _check_no_near_miss(plugin, name)
    _check_has_hooks(plugin)
    Stack([plugin])


def _check_hook(name: str, member: Any) -> None:
    if not hasattr(member, "pilotfish_impl"):
        raise Broken(
            f"{name} is never called: it is no method of a class that inherits from "
            "pilotfish.Plugin. Mark it with @pilotfish.hookimpl"
        )
    if inspect.iscoroutinefunction(member) or inspect.isgeneratorfunction(member):
        raise Broken(f"{name}() is async or a generator: calling it runs nothing. Write a function")
    for parameter in inspect.signature(member).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise Broken(
                f"{name}() takes {parameter}: hooks are called with the arguments that they name, "
                "and nothing arrives there. Name them"
            )
        if parameter.default is not parameter.empty:
            raise Broken(
                f"{name}() gives {parameter.name!r} a default, so it is never filled. "
                "Remove the default"
            )


def _check_has_hooks(plugin: object) -> None:
    hooks = [hook for hook in KINDS if hasattr(plugin, hook)]
    if not hooks:
        raise Broken(f"implements no hook. Hooks: {', '.join(KINDS)}")
    if isinstance(plugin, Guide) and "loss_guidance" not in hooks:
        raise Broken("is a Guide without loss_guidance(); inherit from Plugin instead")


def _check_no_near_miss(plugin: object, name: str) -> None:
    try:
        refuse_near_miss(type(plugin).__name__, name)
    except TypeError as error:
        raise Broken(str(error)) from None


@check()
def identity(trial: Trial) -> None:
    """It equals only itself, and it can be hashed."""
    plugin = trial.plugin
    try:
        hash(plugin)
    except TypeError as error:
        raise Broken(f"cannot be hashed ({error}); plugins compare by identity") from None
    twin = copy.copy(plugin)
    if plugin != plugin or plugin == twin or hash(plugin) == hash(twin):
        raise Broken(
            "equals another instance; plugins compare by identity: no __eq__ and no __hash__, "
            "no dataclass and no pydantic model. Hold such an object instead"
        )


@check()
def settings(trial: Trial) -> None:
    """Its settings survive a run file, and make the same plugin again."""
    plugin = trial.plugin
    trial.twin()
    if not isinstance(plugin, Plugin):
        raise NotTried("it has no settings")
    if taken := {"use", "name"} & set(type(plugin.settings).model_fields):
        raise Broken(f"has a setting {min(taken)!r}, which a run file needs for itself")
    again = _from_run_file(plugin)
    for name, value in plugin.settings:
        if getattr(again.settings, name) != value:
            raise Broken(
                f"setting {name!r} is {value!r}, but {getattr(again.settings, name)!r} when it "
                "comes back from a run file; a validator must leave its own answer as it is"
            )


def _from_run_file(plugin: Plugin) -> Any:
    """The same plugin, written to a run file and read."""
    try:
        own = plugin.settings.model_dump(mode="json")
        text = Run(plugins=({"use": "x", "name": "x", **own},)).to_toml()
        (table,) = Run.parse(text)["plugins"]
        return type(plugin)(**{k: v for k, v in table.items() if k not in ("use", "name")})
    except Exception as error:  # a plugin is foreign code
        raise Broken(
            f"its settings do not come back from a run file: {type(error).__name__}: {error}"
        ) from error


@check()
def imports(trial: Trial) -> None:
    """Importing it loads no network."""
    target = _target(type(trial.plugin))
    left = left_by_import(target, tuple(sys.path))
    if failure := left.get("failure"):
        raise Broken(f"does not import in a fresh interpreter: {failure}")
    if missing := left["missing"]:
        if target.startswith(missing):
            raise NotTried(f"there is no module {missing!r} that others could import")
        raise Broken(f"does not import in a fresh interpreter: no module named {missing!r}")
    if left["networks"]:
        raise Broken(f"builds {', '.join(left['networks'])} on import; load networks in setup")
    if left["tensors"] > IMPORTED_BYTES:
        size = left["tensors"] / 2**20
        raise Broken(f"holds {size:.0f} MB of tensors after its import; load them in setup")


def _target(plugin: type[Any]) -> str:
    """What its module is called from outside, or its file and class."""
    use = use_of(plugin)
    if not use:
        raise NotTried("it is defined in this session: there is no module to import")
    return use if ".py:" in use else plugin.__module__
