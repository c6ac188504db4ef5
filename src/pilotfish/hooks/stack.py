"""The plugins of one run: their order, how answers combine, and who is to blame.

pluggy gives registration and validation; it has no chain mode, drops `None` and never says who
returned what. So calls are folded here over its `get_hookimpls()`, in the user's order.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pluggy
from torch import Tensor

from ..errors import InputError, PilotfishError, PluginError
from . import specs
from .plugin import Plugin
from .registry import Entry, resolve

# The values a hook may ask for, by argument name, for the plugin of that name and a chain's value.
Arguments = Callable[[str, Any], dict[str, Any]]
Problem = Callable[[Any, Any], str | None]


@dataclass(frozen=True)
class Call:
    """One plugin's implementation of one hook."""

    name: str
    plugin: Any
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, values: dict[str, Any]) -> Any:
        return self.function(*[values[argument] for argument in self.arguments])


class Stack:
    """The plugins of one run, in the order the user listed them.

    Args:
        items: see `pilotfish.hooks.registry.resolve`. Two of a kind are named `clip` and `clip#2`.

    Raises:
        InputError, SettingsError, PluginError: an item cannot be made, breaks a hook's signature,
            or implements an unknown hook.
    """

    def __init__(self, items: Sequence[object] = ()) -> None:
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise InputError(f"plugins must be a list; got {items!r}")
        entries = [item if isinstance(item, Entry) else resolve(item) for item in items]
        self.entries = by_name(entries)
        self._manager = pluggy.PluginManager("pilotfish")
        self._manager.add_hookspecs(specs)
        for name, entry in self.entries.items():
            self._register(name, entry)
        self._check_pending()
        self.calls = {hook: self._calls(hook) for hook in specs.KINDS}
        self._states: dict[str, Any] = {}

    def without(self, names: Collection[str]) -> Stack:
        """The same plugins, under the same names, but for some."""
        entries = self.entries.items()
        return Stack([dataclasses.replace(e, name=n) for n, e in entries if n not in names])

    def _register(self, name: str, entry: Entry) -> None:
        try:
            self._manager.register(entry.plugin, name)
        except pluggy.PluginValidationError as error:
            hooks = [hook for hook in specs.KINDS if f"hook {hook!r}" in str(error)]
            takes = "".join(
                f". {h} takes: {', '.join(inspect.signature(getattr(specs, h)).parameters)}"
                for h in hooks
            )
            raise PluginError(
                f"{self.label(name)}: {str(error).splitlines()[-1]}{takes}", plugin=name
            ) from error
        except ValueError as error:
            raise InputError(
                f"{self.label(name)} stands in the list twice as one object; make two instances"
            ) from error

    def _check_pending(self) -> None:
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            name = str(self._manager.get_name(error.plugin))
            raise PluginError(
                f"{self.label(name)}: {error}. Hooks: {', '.join(specs.KINDS)}", plugin=name
            ) from error

    def _calls(self, hook: str) -> tuple[Call, ...]:
        order = list(self.entries)
        caller = getattr(self._manager.hook, hook)
        implementations = sorted(caller.get_hookimpls(), key=lambda i: order.index(i.plugin_name))
        for i in implementations:
            if i.wrapper or i.hookwrapper:
                raise PluginError(
                    f"{self.label(i.plugin_name)}: {hook} is a wrapper; pilotfish has none",
                    plugin=i.plugin_name,
                )
        return tuple(
            Call(i.plugin_name, i.plugin, hook, i.function, tuple(i.argnames))
            for i in implementations
        )

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, entry.plugin) for name, entry in self.entries.items())

    def __len__(self) -> int:
        return len(self.entries)

    def tables(self) -> tuple[dict[str, Any], ...]:
        """The plugins as a run file holds them: `use`, `name` and all settings."""
        return tuple(
            {"use": entry.use, "name": name, **_settings(entry.plugin)}
            for name, entry in self.entries.items()
        )

    def label(self, name: str) -> str:
        """The plugin as errors name it: `plugin 'clip' (pilotfish-clip 0.1.0)`."""
        version = self.entries[name].version
        return f"plugin {name!r}" + (f" ({version})" if version else "")

    def blame(self, name: str, hook: str, what: str, where: str = "") -> NoReturn:
        """Raise a `PluginError` that names plugin, hook and step."""
        raise PluginError(f"{self.label(name)}: {hook}() {what}{where}", plugin=name, hook=hook)

    def call(self, call: Call, values: dict[str, Any], where: str = "") -> Any:
        """One plugin's answer; whatever it raises names the plugin, the hook and the step."""
        values["state"] = self._states.get(call.name)
        try:
            return call(values)
        except PilotfishError:
            raise
        except (Exception, SystemExit) as error:  # a plugin is foreign code
            raise PluginError(
                f"{self.label(call.name)}: {call.hook}() raised {type(error).__name__}: "
                f"{error}{where}",
                plugin=call.name,
                hook=call.hook,
            ) from error

    def setup(self, arguments: Arguments) -> None:
        """Set all up, in order; what each answers is its state."""
        for call in self.calls["setup"]:
            self._states[call.name] = self.call(call, arguments(call.name, None))

    def notify(self, hook: str, arguments: Arguments, where: str = "") -> None:
        """Call all, in order."""
        for call in self.calls[hook]:
            self.call(call, arguments(call.name, None), where)

    def first(
        self, hook: str, arguments: Arguments, problem: Callable[[Any], str | None], where: str = ""
    ) -> Any:
        """The first answer that is not `None`, checked by `problem`; `None` if nobody answers."""
        for call in self.calls[hook]:
            answer = self.call(call, arguments(call.name, None), where)
            if answer is not None:
                if what := problem(answer):
                    self.blame(call.name, hook, what, where)
                return answer
        return None

    def chain(
        self, hook: str, value: Any, arguments: Arguments, problem: Problem, where: str = ""
    ) -> Any:
        """Pass `value` through all, in order; each answer is checked by `problem(new, old)`."""
        for call in self.calls[hook]:
            version = getattr(value, "_version", None)
            answer = self.call(call, arguments(call.name, value), where)
            if getattr(value, "_version", None) != version:
                self.blame(
                    call.name, hook, "changed its input in place; return a new tensor", where
                )
            if answer is not None:
                if what := problem(answer, value):
                    self.blame(call.name, hook, what, where)
                value = answer
        return value

    def collect(
        self, hook: str, arguments: Arguments, where: str = ""
    ) -> Iterator[tuple[str, Any]]:
        """All answers that are not `None`, one after the other, each with the plugin's name."""
        for call in self.calls[hook]:
            answer = self.call(call, arguments(call.name, None), where)
            if answer is not None:
                yield call.name, answer

    def teardown(self, arguments: Arguments) -> None:
        """Tear all down, in reverse, whatever they raise; then raise the first error."""
        errors = []
        for call in reversed(self.calls["teardown"]):
            try:
                self.call(call, arguments(call.name, None))
            except PilotfishError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def by_name(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Names in order: the chosen one, else the plugin's own, with `#2`, `#3` for further ones."""
    named: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in named:
            raise InputError(f"two plugins are named {entry.name!r}; give each a name of its own")
        base = entry.name or _own_name(entry)
        name, count = base, 1
        while name in named:
            count += 1
            name = f"{base}#{count}"
        named[name] = entry
    return named


def _own_name(entry: Entry) -> str:
    """`blue` of `blue`, `Warmth` of `./my_loss.py:Warmth`, `my_loss` of `./my_loss.py`."""
    last = entry.use.rpartition(":")[2] or type(entry.plugin).__name__
    return re.sub(r"[^\w#.<>-]", "_", Path(last).stem if last.endswith(".py") else last)


def _settings(plugin: object) -> dict[str, Any]:
    return plugin.settings.model_dump(mode="json") if isinstance(plugin, Plugin) else {}


def tensor_problem(answer: Any, old: Tensor) -> str | None:
    """What is wrong with a chain's new tensor: it must keep shape, dtype and device."""
    if not isinstance(answer, Tensor):
        return f"returned {type(answer).__name__}; expected a tensor or None"
    for what in ("shape", "dtype", "device"):
        came, expected = getattr(answer, what), getattr(old, what)
        if came != expected:
            came, expected = (tuple(v) if what == "shape" else v for v in (came, expected))
            return f"returned {what} {came}; expected {expected}, like its input"
    return None
