"""From what a user wrote to plugin instances.

Installed plugins are known by the metadata of their distributions (entry-point group
`pilotfish.plugins`, for the command line `pilotfish.commands`); a module is imported only when a
run names its plugin, so one broken package hurts nobody else. The environment variable
`PILOTFISH_PLUGINS` limits discovery of plugins and commands: the names to offer, separated by
commas, or `none`. It is about names: files and `module:Class` are always found.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, PilotfishError, PluginError, is_out_of_memory, told, unknown
from .plugin import Plugin, check_name, guide, implemented, instance_problem
from .use import parse_use

LIMIT = "PILOTFISH_PLUGINS"
FILE_PREFIX = "pilotfish_file_"  # of the names of modules made from files
PLUGIN_GROUP = "pilotfish.plugins"
MODEL_GROUP = "pilotfish.models"
COMMAND_GROUP = "pilotfish.commands"
FAMILY_GROUP = "pilotfish.families"
KINDS = {
    PLUGIN_GROUP: "plugin",
    MODEL_GROUP: "model",
    COMMAND_GROUP: "command",
    FAMILY_GROUP: "model family",
}


@dataclass(frozen=True)
class Installed:
    """What some installed distribution offers: a plugin, a model or a command; not imported."""

    name: str
    target: str
    distribution: str
    version: str
    summary: str

    @property
    def package(self) -> str:
        """The distribution with its version: `pilotfish-clip 0.1.0`."""
        return f"{self.distribution} {self.version}"

    @property
    def found(self) -> bool:
        """Whether the top-level module exists; it may still fail on import."""
        return importlib.util.find_spec(self.target.split(":")[0].split(".")[0]) is not None


@dataclass(frozen=True)
class Entry:
    """One plugin of a run: the instance, what names it in a run file, and its chosen name."""

    plugin: object
    use: str
    name: str | None = None

    @functools.cached_property
    def version(self) -> str | None:
        """The distribution that it comes with, as `Installed.package`; None where from a file."""
        entries = installed().get(self.use)
        return entries[0].package if entries else None


def installed(group: str = PLUGIN_GROUP) -> dict[str, list[Installed]]:
    """What is installed, by name; a name with two entries is claimed by two distributions."""
    found: dict[str, list[Installed]] = {}
    wanted = limit() if group in (PLUGIN_GROUP, COMMAND_GROUP) else None
    for entry in _entry_points(group):
        if wanted is None or entry.name in wanted:
            about = Installed(entry.name, entry.value, *_about(entry.dist))
            found.setdefault(entry.name, []).append(about)
    return dict(sorted(found.items()))


def limit() -> list[str] | None:
    """The names that `PILOTFISH_PLUGINS` lets through; None where it is not set."""
    text = os.environ.get(LIMIT)
    if text is None:
        return None
    return [name for part in text.split(",") if (name := part.strip()) not in ("", "none")]


def hidden() -> list[str]:
    """The names that are installed but that `PILOTFISH_PLUGINS` keeps from being offered."""
    return sorted({entry.name for entry in _entry_points(PLUGIN_GROUP)} - set(installed()))


@functools.cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


@functools.cache  # each run asks for it, and a distribution parses its file at each question
def _about(distribution: Distribution | None) -> tuple[str, str, str]:
    """Name, version and summary."""
    if distribution is None:
        return "unknown", "unknown", ""
    summary = str(distribution.metadata.json.get("summary", ""))
    return distribution.name, distribution.version, summary


def find(name: str, group: str = PLUGIN_GROUP) -> Installed:
    """The one installed plugin, model or command of that name.

    Raises:
        InputError: there is none (with the nearest name), or two distributions claim the name.
    """
    kind = KINDS[group]
    choices = installed(group)
    if name not in choices:
        if group == PLUGIN_GROUP and name in hidden():
            why = f"{LIMIT}={os.environ[LIMIT]} hides it; name it there too, or unset the variable"
            raise InputError(f"plugin {name!r} is installed, but {why}")
        raise unknown(kind, name, choices)
    if len(choices[name]) > 1:
        owners = " and ".join(claim.package for claim in choices[name])
        raise InputError(f"two packages claim the {kind} {name!r}: {owners}. Uninstall one.")
    return choices[name][0]


# What plugins' authors stumble over, and what to do: parts of messages of Python and of torch.
HINTS = {
    "of 'Step' object has no setter": "a step is read-only; a hook returns what it changes",
    "Can't call numpy() on Tensor that requires grad": "a loss is made of torch operations; what "
    "needs NumPy takes step.image.detach(), and is measured with gradient='none'",
}


@contextlib.contextmanager
def foreign(
    what: str, plugin: str, hook: str | None = None, end: str = "", *, ours: bool = False
) -> Iterator[None]:
    """Around foreign code: whatever it raises becomes an error that tells whose it is.

    Args:
        what: the error's beginning, such as "plugin 'clip' does not import:".
        ours: also what we raise ourselves; otherwise that goes on as it is.

    Raises:
        PluginError: with what was raised as its cause.
    """
    try:
        yield
    except (Exception, SystemExit, GeneratorExit) as error:
        # What memory is not enough for is tried in parts.
        if (isinstance(error, PilotfishError) and not ours) or is_out_of_memory(error):
            raise
        cause = told(error).rstrip(". ")  # more of the sentence follows
        hints = "".join(f"; {hint}" for part, hint in HINTS.items() if part in cause)
        message = f"{what} {cause}{hints}{end}"
        raise PluginError(message, plugin=plugin, hook=hook) from error


def load_object(target: str, owner: str) -> Any:
    """Import `module:object`.

    Raises:
        PluginError: the module does not import or lacks the object; names owner and cause.
    """
    module, _, attribute = target.partition(":")
    more = ". Reinstall or uninstall its package; `pilotfish doctor` tells more."
    with foreign(f"{owner} does not import:", owner, end=more, ours=True):
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def load_installed(name: str, group: str = PLUGIN_GROUP) -> Any:
    """What is installed under a name, imported.

    Raises:
        InputError: see `find`.
        PluginError: it does not import.
    """
    entry = find(name, group)
    return load_object(entry.target, f"{KINDS[group]} {name!r} ({entry.package})")


def load_class(use: str) -> type[Any]:
    """The plugin class that `use` names: an installed name, `file.py:Class` or `module:Class`."""
    if file := re.fullmatch(r"(.*\.py)(?::(.*))?", use):
        loaded = _class_in_file(Path(file[1]), file[2])
    elif ":" in use:
        loaded = load_object(use, f"plugin {use!r}")
    else:
        loaded = load_installed(use)
    if not inspect.isclass(loaded):
        raise PluginError(f"plugin {use!r} is {loaded!r}; expected a class", plugin=use)
    return loaded


def _class_in_file(path: Path, name: str | None) -> type[Any]:
    """Import a single file; without a class name, its only `Plugin` subclass."""
    if not os.path.isfile(path):
        raise InputError(f"no plugin file {path}; expected PATH.py:Class")
    module = _file_as_module(path)
    own = (c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__)
    classes = {c.__name__: c for c in own if inspect.isclass(c) and issubclass(c, Plugin)}
    if not name and len(classes) == 1:
        (name,) = classes
    if not name and classes:
        raise InputError(
            f"{path} has {len(classes)} plugin classes: name one, {path}:{' or :'.join(classes)}"
        )
    if name not in classes:
        raise unknown(f"plugin class in {path}", name or "", classes)
    return classes[name]


def _file_as_module(path: Path) -> ModuleType:
    """The module of a file, run once."""
    name = f"{FILE_PREFIX}{path.stem}_{abs(hash(path.resolve()))}"
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, path)  # a .py file has one
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with foreign(f"plugin file {path} does not import:", str(path), ours=True):
                spec.loader.exec_module(sys.modules[name])
        except PluginError:
            del sys.modules[name]
            raise
    return sys.modules[name]


def resolve(item: object) -> Entry:
    """One item of a `plugins` list as an instance.

    Args:
        item: a plugin instance, a string `use:setting=value,...`, a mapping with `use`, optionally
            `name`, and the settings, or a function: see `guide`.

    Raises:
        InputError, SettingsError, PluginError: nothing is named so, or it cannot be made.
    """
    if isinstance(item, str):
        use, settings = parse_use(item)
        item = {**settings, "use": use}
    if isinstance(item, Mapping):
        entry = _made(item)
    else:
        if callable(item) and not inspect.isclass(item) and not implemented(item):
            item = guide(item)
        entry = Entry(item, use_of(type(item)))
    if problem := instance_problem(entry.plugin):
        name = entry.use or type(entry.plugin).__name__
        raise PluginError(f"plugin {name!r}: {problem}", plugin=name)
    return entry


def _made(table: Mapping[str, Any]) -> Entry:
    settings = dict(table)
    use, name = settings.pop("use", None), settings.pop("name", None)
    if not isinstance(use, str):
        raise InputError(f"a plugin table needs `use`, the plugin's name; got {dict(table)!r}")
    if name is not None:
        check_name(name)
    loaded = load_class(use)
    with foreign(f"plugin {use!r} cannot be made:", use):
        return Entry(loaded(**settings), use, name)


def use_of(plugin: type[Any]) -> str:
    """What names this class in a run file: its installed name, or `file.py:Class`, `module:Class`.

    Classes that nobody could import again (`__main__`, local ones) give `""`.
    """
    target = f"{plugin.__module__}:{plugin.__qualname__}"
    for name, entries in installed().items():
        if entries[0].target == target:
            return name
    if plugin.__module__ == "__main__" or "<locals>" in plugin.__qualname__:
        return ""
    if plugin.__module__.startswith(FILE_PREFIX):
        return f"{inspect.getfile(plugin)}:{plugin.__qualname__}"
    return target
