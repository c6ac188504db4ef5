"""The plugins of a page, in order: what the stack on it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pilotfish import Guide, InputError, Plugin, load_class, make_plugin, strength_at, value_text

from .forms import Field, fields_of, given

_keys = itertools.count(1)


@dataclass
class Item:
    """One plugin on the page.

    Attributes:
        use: what names it, as in a run file.
        on: whether it takes part in runs.
        settings: what was given of them.
        name: chosen for it; None is its own.
        key: tells it from the others of the page.
    """

    use: str
    settings: dict[str, Any] = field(default_factory=dict)
    on: bool = True
    name: str | None = None
    key: int = field(default_factory=lambda: next(_keys))

    @property
    def table(self) -> dict[str, Any]:
        """As a run file holds it."""
        name = {} if self.name is None else {"name": self.name}
        return {"use": self.use, **name, **self.settings}

    def set(self, setting: Field, entered: Any) -> None:
        """Take what a person entered.

        Raises:
            InputError: a quote or a bracket is not closed.
        """
        value = given(setting, entered)
        new = setting.name not in self.settings
        self.settings.pop(setting.name, None)
        if value is not None and not (new and value == setting.default):
            self.settings[setting.name] = value


def items_of(tables: Iterable[Mapping[str, Any]]) -> list[Item]:
    """The plugins of a run that was read.

    Raises:
        InputError: a table lacks `use`.
    """
    items = []
    for table in tables:
        settings = dict(table)
        use, name = settings.pop("use", None), settings.pop("name", None)
        if not isinstance(use, str):
            raise InputError(f"a plugin table needs `use`, the plugin's name; got {dict(table)!r}")
        items.append(Item(use, settings, name=name))
    return items


def moved(items: list[Item], key: int, to: int) -> list[Item]:
    """The same, with one of them at another place, which is cut off at the ends."""
    (item,) = (item for item in items if item.key == key)
    others = [other for other in items if other is not item]
    to = max(0, min(to, len(others)))
    return [*others[:to], item, *others[to:]]


def without(items: list[Item], key: int) -> list[Item]:
    """The same without one of them."""
    return [item for item in items if item.key != key]


def tables(items: Iterable[Item], but: int | None = None) -> list[dict[str, Any]]:
    """The plugins that are on, as a run's `plugins`; one of them may be left out."""
    return [item.table for item in items if item.on and item.key != but]


def normal(table: dict[str, Any]) -> dict[str, Any]:
    """A plugin's table with its settings as the plugin takes them: numbers where texts were.

    Raises:
        PilotfishError: it cannot be made so.
    """
    plugin = make_plugin(table)
    if not isinstance(plugin, Plugin):
        return table
    settings = plugin.settings.model_dump(mode="json", exclude_unset=True)
    kept = {key: table[key] for key in ("use", "name") if key in table}
    return {**kept, **{key: value for key, value in settings.items() if value is not None}}


def unlike_default(item: Item) -> dict[str, Any]:
    """Of a plugin's settings, those that are not what they would be anyway.

    Raises:
        PilotfishError: there is no such plugin.
    """
    own, shared = fields_of(load_class(item.use))
    usual = {field.name: value_text(field.default) for field in [*own, *shared]}
    return {k: v for k, v in item.settings.items() if value_text(v) != usual.get(k)}


def strengths(item: Item, points: int = 49) -> list[float]:
    """How strong a guide is over the run, within its window; none where it is no guide's.

    Raises:
        PilotfishError: there is no such plugin, or its settings are wrong.
    """
    infos = getattr(getattr(load_class(item.use), "Settings", None), "model_fields", {})
    own = {n: item.settings[n] for n in ("scale", "start", "stop") if n in item.settings}
    if not {"scale", "start", "stop"} <= infos.keys():
        return []
    settings = Guide(**own).settings
    moments = [at / (points - 1) for at in range(points)]
    return [
        strength_at(settings.scale, at) if settings.start <= at <= settings.stop else 0.0
        for at in moments
    ]
