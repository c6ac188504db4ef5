"""The plugins of one run: their order, how answers combine, and who is to blame.

pluggy gives registration and validation; it has no chain mode, drops `None` and never says who
returned what. So calls are folded here over its `get_hookimpls()`, in the user's order.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy

from ..errors import InputError, PilotfishError, PluginError, unknown
from . import specs
from .plugin import Plugin
from .registry import Entry, foreign, resolve

if TYPE_CHECKING:
    from torch import Tensor

# The values a hook may ask for, by argument name, for the plugin of that name and a chain's value.
Arguments = Callable[[str, Any], dict[str, Any]]
Named = tuple[str, Any]  # a plugin's name, and the plugin or its answer
# What is wrong with an answer; of a chain, with it and the value that it follows.
Check = Callable[[Any], str | None]
Problem = Callable[[Any, Any], str | None]
NEW = "others see it too: make a new tensor"


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
        self.entries = by_name([i if isinstance(i, Entry) else resolve(i) for i in items])
        self._manager = pluggy.PluginManager("pilotfish")
        self._manager.add_hookspecs(specs)
        for name, entry in self.entries.items():
            self._register(name, entry.plugin)
        self.calls = {hook: self._calls(hook) for hook in specs.KINDS}
        self._states: dict[str, Any] = {}

    def without(self, names: Collection[str]) -> Stack:
        """The same plugins, under the same names, but for some."""
        entries = self.entries.items()
        return Stack([dataclasses.replace(e, name=n) for n, e in entries if n not in names])

    def _register(self, name: str, plugin: object) -> None:
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            (hook,) = re.findall(r"hook '(\w+)'", str(error))
            if hook not in specs.KINDS:
                what = f"{self.label(name)}: {unknown('hook', hook, specs.KINDS)}"
                raise PluginError(what, plugin=name) from None
            asked = re.findall(r"'(\w+)'", str(error).splitlines()[-1])
            takes = ", ".join(signature(getattr(specs, hook)).parameters)
            what = f"asks for {', '.join(asked) or 'what it wraps'}; it takes: {takes}"
            self.blame(name, hook, what)
        except ValueError as error:
            twice = "stands in the list twice as one object; make two instances"
            raise InputError(f"{self.label(name)} {twice}") from error

    def _calls(self, hook: str) -> tuple[Call, ...]:
        """In the user's order."""
        found = {i.plugin_name: i for i in getattr(self._manager.hook, hook).get_hookimpls()}
        for name, i in found.items():
            if i.wrapper or i.hookwrapper:
                self.blame(name, hook, "is a wrapper; pilotfish has none")
        return tuple(
            Call(name, i.plugin, hook, i.function, tuple(i.argnames))
            for name in self.entries
            if (i := found.get(name))
        )

    def __iter__(self) -> Iterator[Named]:
        return ((name, entry.plugin) for name, entry in self.entries.items())

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def particles(self) -> int:
        """How many candidates of each picture go along; see `Plugin.particles`.

        Raises:
            InputError: two plugins ask for several.
        """
        found = {name: getattr(plugin, "particles", 1) for name, plugin in self}
        several = [name for name, count in found.items() if count > 1]
        if len(several) > 1:
            names = " and ".join(map(self.label, several))
            raise InputError(f"{names} each choose among candidates; one of them can, in one run")
        return max(found.values(), default=1)

    def tables(self) -> tuple[dict[str, Any], ...]:
        """The plugins as a run file holds them: `use`, `name` and all settings."""
        entries = self.entries.items()
        return tuple({"use": e.use, "name": n, **_settings(e.plugin)} for n, e in entries)

    def label(self, name: str) -> str:
        """The plugin as errors name it: `plugin 'clip' (pilotfish-clip 0.1.0)`."""
        version = self.entries[name].version
        return f"plugin {name!r}" + (f" ({version})" if version else "")

    def blame(self, name: str, hook: str, what: str, where: str = "") -> NoReturn:
        """Raise a `PluginError` that names plugin, hook and step."""
        raise PluginError(f"{self.label(name)}: {hook}() {what}{where}", plugin=name, hook=hook)

    def call(self, call: Call, values: dict[str, Any], where: str = "") -> Any:
        """One plugin's answer; whatever it raises names the plugin, the hook and the step."""
        values["state"], step = self._states.get(call.name), values.get("step")
        try:
            answer = call(values)
        except PilotfishError as error:
            if where and not isinstance(error, PluginError):
                told = str(error).rstrip(". ")
                error.args = (f"{self.label(call.name)}: {call.hook}(): {told}{where}",)
            raise
        except (Exception, SystemExit, GeneratorExit):  # told only now: a step calls many hooks
            what = f"{self.label(call.name)}: {call.hook}() raised"
            with foreign(what, call.name, call.hook, where):
                raise
        if step is not None and (changed := step.changed()):
            self.blame(call.name, call.hook, f"changed step.{changed} in place; {NEW}", where)
        return answer

    def setup(self, arguments: Arguments) -> None:
        """Set all up, in order; what each answers is its state."""
        for call in self.calls["setup"]:
            self._states[call.name] = self.call(call, arguments(call.name, None))

    def notify(self, hook: str, arguments: Arguments, where: str = "") -> None:
        """Call all, in order."""
        for call in self.calls[hook]:
            self.call(call, arguments(call.name, None), where)

    def first(self, hook: str, arguments: Arguments, problem: Check, where: str = "") -> Any:
        """The first answer that is not `None`, checked by `problem`; `None` if nobody answers."""
        for name, answer in self.collect(hook, arguments, where):
            if what := problem(answer):
                self.blame(name, hook, what, where)
            return answer
        return None

    def chain(
        self, hook: str, value: Any, arguments: Arguments, problem: Problem, where: str = ""
    ) -> Any:
        """Pass `value` through all, in order; each answer is checked by `problem(new, old)`."""
        for call in self.calls[hook]:
            values = arguments(call.name, value)
            versions = {name: _version(value) for name, value in values.items()}
            answer = self.call(call, values, where)
            for name, version in versions.items():
                if _version(values[name]) != version:
                    self.blame(call.name, hook, f"changed {name} in place; {NEW}", where)
            if answer is not None:
                if what := problem(answer, value):
                    self.blame(call.name, hook, what, where)
                value = answer
        return value

    def collect(self, hook: str, arguments: Arguments, where: str = "") -> Iterator[Named]:
        """All answers that are not `None`, one after the other, each with the plugin's name."""
        for call in self.calls[hook]:
            answer = self.call(call, arguments(call.name, None), where)
            if answer is not None:
                yield call.name, answer

    def teardown(self, arguments: Arguments) -> None:
        """Tear all down, in reverse, whatever they raise; the last error tells of the others."""
        errors: list[BaseException] = []
        for call in reversed(self.calls["teardown"]):
            try:
                self.call(call, arguments(call.name, None))
            except BaseException as error:
                errors.append(error)
        self._states.clear()
        if errors:
            *others, last = errors
            for other in others:
                last.add_note(f"and before it: {other}")
            raise last


def by_name(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Names in order: the chosen one, else the plugin's own, with `#2`, `#3` for further ones."""
    named: dict[str, Entry] = {}
    numbers: Counter[str] = Counter()
    for entry in entries:
        if entry.name in named:
            raise InputError(f"two plugins are named {entry.name!r}; give each a name of its own")
        name = base = entry.name or _own_name(entry)
        while name in named:
            numbers[base] += 1
            name = f"{base}#{numbers[base] + 1}"
        named[name] = entry
    return named


def _own_name(entry: Entry) -> str:
    """`blue` of `blue`, `Warmth` of `./my_loss.py:Warmth`, `my_loss` of `./my_loss.py`."""
    last = entry.use.rpartition(":")[2] or type(entry.plugin).__name__
    return re.sub(r"[^\w#.<>-]", "_", Path(last).stem if last.endswith(".py") else last)


def _version(value: Any) -> int | None:
    """What counts a tensor's changes in place; torch keeps none for those of inference mode."""
    kept = hasattr(type(value), "_version") and not value.is_inference()
    return value._version if kept else None


def _settings(plugin: object) -> dict[str, Any]:
    return plugin.settings.model_dump(mode="json") if isinstance(plugin, Plugin) else {}


def tensor_problem(answer: Any, old: Tensor) -> str | None:
    """What is wrong with a chain's new tensor: it must keep shape, dtype and device."""
    from torch import Tensor  # here, so that a run's content is read and changed without it

    if not isinstance(answer, Tensor):
        return f"returned {type(answer).__name__}; expected a tensor or None"
    for what in ("shape", "dtype", "device", "layout"):
        came, expected = (getattr(tensor, what) for tensor in (answer, old))
        if came != expected:
            came, expected = (tuple(v) if what == "shape" else v for v in (came, expected))
            return f"returned {what} {came}; expected {expected}, like its input"
    return None
