"""One value of a run changed by its name: `steps=20`, `plugins.blue.scale=2`, `rho=0.5`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_origin

from ..errors import InputError, unknown
from ..guidance.presets import KNOBS, find_preset
from ..hooks.plugin import Plugin
from ..hooks.registry import Entry, use_of
from ..hooks.stack import by_name
from ..hooks.use import parse_use, parse_value
from ..runs.run import KEYS, MODEL_KEYS, unknown_key
from ..runs.toml import read_toml

# Keys of a run whose value is text as it stands; the others are TOML values.
TEXT_KEYS = {
    *(*MODEL_KEYS, "preset", "prompt", "negative_prompt"),
    *(n for n, f in KEYS.items() if f.annotation is str or get_origin(f.annotation) is Literal),
}


def changed(content: Mapping[str, Any], change: str) -> dict[str, Any]:
    """A run's content with one value changed: its own, a plugin's setting, or a preset's knob.

    Args:
        content: the keyword arguments of a sampler or the keys of a run file; stays as it is.
        change: `steps=20`, `plugins.NAME.SETTING=VALUE`, or `rho=0.5`.

    Raises:
        InputError: it has no `=`, or there is no such key or plugin.
    """
    key, equals, text = change.partition("=")
    key, text = key.strip(), text.strip()
    if not equals:
        raise InputError(f"a change is KEY=VALUE, such as steps=20; got {change!r}")
    if _is_knob(key):
        return with_value(content, key, _toml_value("", text))
    return with_value(
        content, key, parse_value(text) if key.startswith("plugins.") else _toml_value(key, text)
    )


def with_value(content: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A run's content with one value changed, as `changed`, but the value is no text to be read.

    Args:
        content: as of `changed`; stays as it is.
        key: `steps`, `plugins.NAME.SETTING`, or a preset's knob: `rho`, `preset.rho`.

    Raises:
        InputError: there is no such key or plugin.
    """
    if _is_knob(key):
        preset = content.get("preset", KEYS["preset"].default)
        return {**content, "preset": _preset(preset, key, value)}
    if key.startswith("plugins."):
        name, _, setting = key.removeprefix("plugins.").rpartition(".")
        if not name:
            raise InputError(f"a change is plugins.NAME.SETTING=VALUE; got {key!r}")
        return {**content, "plugins": _plugins(content.get("plugins", ()), name, setting, value)}
    return {**content, _known_key(key): value}


def _is_knob(key: str) -> bool:
    return key.removeprefix("preset.") in KNOBS


def _plugins(items: Iterable[Any], name: str, setting: str, value: Any) -> list[Any]:
    """The plugins, but for the one that the run will give this name: it has another setting."""
    plugins = [table(item) for item in items]
    positions = {name: at for at, name in enumerate(by_name([_entry(item) for item in plugins]))}
    if name not in positions:
        raise unknown("plugin in this run", name, positions)
    plugin = plugins[positions[name]]
    if isinstance(plugin, Mapping):
        plugins[positions[name]] = {**plugin, setting: value}
    elif isinstance(plugin, Plugin):
        given = plugin.settings.model_dump(exclude_unset=True)
        plugins[positions[name]] = type(plugin)(**{**given, setting: value})
    else:
        raise InputError(f"plugin {name!r} has no settings: {type(plugin).__name__} is no Plugin")
    return plugins


def table(item: object) -> Any:
    """A plugin as a run file's table; `use:setting=value` is one too. An instance stays one."""
    if isinstance(item, Mapping):
        return dict(item)
    if not isinstance(item, str):
        return item
    use, settings = parse_use(item)
    return {"use": use, **settings}


def _entry(item: Any) -> Entry:
    """What names the plugin in a stack."""
    if isinstance(item, Mapping):
        return Entry(item, str(item.get("use", "")), item.get("name"))
    return Entry(item, use_of(type(item)))


def _preset(preset: Any, key: str, value: Any) -> dict[str, Any]:
    """The preset as a table, with one knob changed."""
    knobs = preset if isinstance(preset, Mapping) else find_preset(preset).changes()
    return {**knobs, key.removeprefix("preset."): value}


def _known_key(key: str) -> str:
    known = {*KEYS, *MODEL_KEYS}
    if key not in known:
        raise unknown_key("key", key, [*known, *KNOBS, "plugins.NAME.SETTING"])
    return key


def _toml_value(key: str, text: str) -> Any:
    """A number, a table ... as in a run file; what is none of these stays text."""
    if key not in TEXT_KEYS or text[:1] in ("'", '"'):
        with contextlib.suppress(InputError):
            return read_toml(f"value = {text}", "the value")["value"]
    return text
