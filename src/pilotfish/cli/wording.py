"""What a setting takes, in plain words: its type, its bounds, and what it is where not given."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

# One and several of each type.
NOUNS: dict[Any, tuple[str, str]] = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    Path: ("a path to a file", "paths to files"),
    Callable: ("a Python object", "Python objects"),
    Any: ("a text, or a Python object", "texts, or Python objects"),
}
# Attributes of what pydantic keeps in `FieldInfo.metadata`.
BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length")


def takes(field: FieldInfo) -> str:
    """What a setting takes: `a number from 0 to 1`, `a list of texts; not empty`.

    A field's `title` says it where types cannot: `Setting(title="a path to a picture")`.
    """
    return field.title or _said(field.annotation, field.metadata, many=False)


def default(field: FieldInfo) -> str:
    """What a setting is where it is not given."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "optional"
    if value in ("", [], {}, ()):
        return "default empty"
    return f"default {list(value) if isinstance(value, tuple) else value}"


def _said(kind: Any, metadata: Iterable[Any], many: bool) -> str:
    """A type with its bounds; `many` for the things in a list."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        fields = [item for item in args[1:] if isinstance(item, FieldInfo)]
        if title := next((field.title for field in fields if field.title), None):
            return title
        inner = [more for field in fields for more in field.metadata]
        return _said(args[0], [*args[1:], *inner, *metadata], many)
    if origin in (Union, types.UnionType):
        alternatives = [arg for arg in args if arg is not type(None)]
        # Bounds of several types are a validator's to tell.
        bounds = metadata if len(alternatives) == 1 else ()
        return either([_said(arg, bounds, many) for arg in alternatives])
    if origin is Literal:
        return either([str(arg) for arg in args])
    return _plain(origin or kind, args, many) + _bounds(metadata, sized=kind in (int, float))


def _plain(kind: Any, args: Sequence[Any], many: bool) -> str:
    """A type without its bounds."""
    if kind is tuple and Ellipsis not in args:
        return f"{len(args)} {_said(args[0], (), many=True)}"
    if kind in (list, tuple):
        return f"{'lists' if many else 'a list'} of {_said(args[0], (), many=True)}"
    if kind is dict:
        keys, value = _said(args[0], (), many=True), _said(args[1], (), many=False)
        return f"{'tables' if many else 'a table'} of {keys}, each with {value}"
    name = getattr(kind, "__name__", str(kind))
    return NOUNS.get(kind, (f"a {name}", f"{name} objects"))[many]


def _bounds(metadata: Iterable[Any], sized: bool) -> str:
    """Bounds, to stand behind a type."""
    found = {
        name: getattr(item, name)
        for item in metadata
        for name in BOUNDS
        if getattr(item, name, None) is not None
    }
    if not sized:
        ends = {"min_length": "at least", "max_length": "at most"}
        told = "".join(f"; {word} {found[name]}" for name, word in ends.items() if name in found)
        return "; not empty" if told == "; at least 1" else told
    match found:
        case {"ge": low, "le": high}:
            return f" from {low} to {high}"
        case {"ge": low, "lt": high}:
            return f" from {low} to below {high}"
        case {"gt": low, "le": high}:
            return f" above {low}, up to {high}"
        case {"gt": low, "lt": high}:
            return f" between {low} and {high}"
        case {"ge": low}:
            return f", {low} or more"
        case {"gt": low}:
            return f" above {low}"
        case {"le": high}:
            return f", {high} or less"
        case {"lt": high}:
            return f" below {high}"
    return ""


def either(things: Sequence[str]) -> str:
    """`a, b or c`; a comma before `or` where one of them has its own."""
    *others, last = things
    if not others:
        return last
    comma = "," if any(" or " in thing or "," in thing for thing in things) else ""
    return f"{', '.join(others)}{comma} or {last}"
