"""Settings as fields of a form: what pydantic knows of a setting, and what a person writes."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pilotfish import Guide, Strength, parse_value, takes, value_text

CURVE = next(item.title for item in get_args(Strength) if isinstance(item, FieldInfo))


@dataclass(frozen=True)
class Field:
    """One setting in a form.

    Attributes:
        kind: "switch", "choice", "slider", "number", "curve", "raw" (text as it stands) or "text"
            (as `--use` takes it: lists, tables).
        about: what it means and takes.
        default: what it is where nothing is given; None where it must be, or is optional.
        usual: what stands in it while it is empty.
        choices: of a "choice"; the first one is "" where it may be left open.
        low, high: of a "slider".
        whole: no fractions.
    """

    name: str
    kind: str
    about: str
    default: Any = None
    required: bool = False
    usual: str = ""
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    whole: bool = False


def field_of(name: str, info: FieldInfo) -> Field:
    """A setting as a field; of a type that no form has, a text."""
    about = f"{info.description or ''}\n{takes(info)}".strip()
    required = info.is_required()
    default = None if required else info.get_default(call_default_factory=True, validated_data={})
    kind, more = _kind(info)
    return Field(name, kind, about, default, required, _usual(info, default), **more)


def _usual(info: FieldInfo, default: Any) -> str:
    """What it is where nothing is given: the default, what None means, or what it takes."""
    more = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    if info.is_required():
        return f"must be given: {takes(info)}"
    if default in (None, "", (), []):
        return str(more.get("none") or takes(info))
    return value_text(default)


def _kind(info: FieldInfo) -> tuple[str, dict[str, Any]]:
    annotation = info.annotation
    union = get_origin(annotation) in (Union, types.UnionType)
    parts = [a for a in get_args(annotation) if a is not type(None)] if union else [annotation]
    parts = [get_args(a)[0] if get_origin(a) is Annotated else a for a in parts]
    if info.title == CURVE:
        return "curve", {}
    if len(parts) > 1 or info.title:
        return ("raw", {}) if {*parts} <= {str, Path} else ("text", {})
    (part,) = parts
    optional = union or info.is_required()
    if get_origin(part) is Literal:
        return "choice", {"choices": (*([""] if optional else []), *map(str, get_args(part)))}
    if part is bool and not optional:
        return "switch", {}
    if part in (int, float):
        return _number(info, part is int, optional)
    return ("raw", {}) if part in (str, Path) else ("text", {})


def _number(info: FieldInfo, whole: bool, optional: bool) -> tuple[str, dict[str, Any]]:
    ends = {n: getattr(m, n) for m in info.metadata for n in ("ge", "le") if hasattr(m, n)}
    if {"ge", "le"} <= ends.keys() and not optional:
        return "slider", {"low": ends["ge"], "high": ends["le"], "whole": whole}
    return "number", {"whole": whole}


def fields_of(plugin: type[Any]) -> tuple[list[Field], list[Field]]:
    """A plugin class's own settings with its scale first, and those that every guide has."""
    settings = getattr(plugin, "Settings", None)
    infos: Mapping[str, FieldInfo] = getattr(settings, "model_fields", {})
    fields = [field_of(name, info) for name, info in infos.items()]
    shared = Guide.Settings.model_fields if issubclass(plugin, Guide) else {}
    own = [f for f in fields if f.name not in shared or f.name == "scale"]
    own.sort(key=lambda field: field.name != "scale")
    return own, [f for f in fields if f not in own]


def shown(field: Field, value: Any) -> Any:
    """A setting's value as its component takes it."""
    if field.kind in ("switch", "slider"):
        return field.default if value is None else value
    if value is None:
        return ""
    # Text that --use would take for another thing needs its quotes.
    plain = isinstance(value, str) and value[:1] not in ("'", '"', "[", "{")
    return str(value) if plain or field.kind in ("raw", "choice", "number") else value_text(value)


def given(field: Field, entered: Any) -> Any:
    """What a person entered, as a setting's value; None where it is left to the default.

    Raises:
        InputError: a quote or a bracket is not closed.
    """
    if entered is None or entered == "":
        return None
    if field.kind in ("curve", "text"):
        value = parse_value(str(entered).strip())
        return _numbers(value) if field.kind == "curve" else value
    if field.kind in ("number", "slider"):
        return _as_number(entered, field.whole)
    return entered


def _numbers(value: Any) -> Any:
    """A curve with numbers where texts were."""
    return [_numbers(v) for v in value] if isinstance(value, list) else _as_number(value, True)


def _as_number(entered: Any, whole: bool) -> Any:
    """A number; what is none stays as it is, for the engine to refuse."""
    try:
        number = float(entered)
    except (TypeError, ValueError):
        return entered
    return int(number) if whole and number.is_integer() else number
