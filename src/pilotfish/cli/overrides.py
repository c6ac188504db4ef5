"""From a run file, `--set` and options to the content of one run."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, unknown
from ..presets import KNOBS, find_preset
from ..registry import Entry, parse_use, parse_value
from ..run import Options, Run
from ..stack import by_name

# Keys of a run whose value on the command line is text as it stands; the others are TOML values.
TEXT_KEYS = (
    *("prompt", "negative_prompt", "preset", "model", "dtype", "checkpointing", "on_error"),
    "decoder",
)


def compose(
    run_file: str | None, uses: tuple[str, ...], changes: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The keys of a run: the file's, then `--set`, then the options that were given."""
    content = Run.read(run_file) if run_file is not None else {"plugins": []}
    content["plugins"] = [_table(item) for item in (uses or content["plugins"])]
    if size := options.pop("size", None):
        options["width"], options["height"] = size
    given = {key: value for key, value in options.items() if value is not None}
    if "preset" in given:  # before --set, which may change one of its knobs
        content["preset"] = given.pop("preset")
    for change in changes:
        apply(change, content)
    return {**content, **given}


def _table(item: object) -> dict[str, Any]:
    """A plugin as a run file's table; `use:setting=value` is one too."""
    if isinstance(item, Mapping):
        return dict(item)
    if not isinstance(item, str):
        raise InputError(f"a plugin is a table with `use`, or NAME:SETTING=VALUE; got {item!r}")
    use, settings = parse_use(item)
    return {"use": use, **settings}


def apply(change: str, content: dict[str, Any]) -> None:
    """One `--set`: `steps=20`, `plugins.NAME.SETTING=VALUE`, or a knob of the preset: `rho=0.5`.

    Raises:
        InputError: it has no `=`, or there is no such key or plugin.
    """
    key, equals, value = change.partition("=")
    key, value = key.strip(), value.strip()
    if not equals:
        raise InputError(f"--set takes KEY=VALUE, such as steps=20; got {change!r}")
    if key.removeprefix("preset.") in KNOBS:
        content["preset"] = _changed(content.get("preset", Run.preset), key, value)
        return
    if not key.startswith("plugins."):
        content[_known_key(key)] = _toml_value(key, value)
        return
    name, _, setting = key.removeprefix("plugins.").rpartition(".")
    if not name:
        raise InputError(f"--set takes plugins.NAME.SETTING=VALUE; got {change!r}")
    tables = _by_name(content["plugins"])
    if name not in tables:
        raise unknown("plugin in this run", name, tables)
    tables[name][setting] = parse_value(value)


def _changed(preset: Any, key: str, text: str) -> dict[str, Any]:
    """The preset as a table, with one knob changed."""
    table = preset if isinstance(preset, Mapping) else find_preset(preset).changes()
    return {**table, key.removeprefix("preset."): _toml_value("", text)}


def _known_key(key: str) -> str:
    known = {*Options.__annotations__, "prompt", "model", "dtype"}
    if key not in known:
        raise unknown("key", key, [*known, *KNOBS, "plugins.NAME.SETTING"])
    return key


def _toml_value(key: str, text: str) -> Any:
    """A number, a table ... as in a run file; what is none of these stays text."""
    if key not in TEXT_KEYS or text[:1] in ("'", '"'):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(f"value = {text}")["value"]
    return text


def _by_name(tables: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The plugins' tables by the names that the run will give them."""
    entries = [Entry(table, str(table.get("use", "")), table.get("name")) for table in tables]
    return dict(zip(by_name(entries), tables, strict=True))
