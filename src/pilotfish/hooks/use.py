"""Use strings: a plugin with its settings as one text, `blue:scale=2,every=5`."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError

DEEPEST = 32  # lists and mappings in a value


def parse_use(text: str) -> tuple[str, dict[str, Any]]:
    """Split `use:setting=value,...` into the plugin's name and its settings.

    Values: `'quoted'` or `"quoted"` text, `[a, b]`, `{key=value}`; everything else stays text for
    the plugin's settings to convert. Commas and colons inside quotes and brackets do not split.

    Raises:
        InputError: a quote or bracket is not closed, or a setting has no `=`.
    """
    found = re.fullmatch(r"([^:]+(?::[^:=,]+)?)(?::(.*=.*)?)?", text, re.DOTALL)
    if not found:
        raise InputError(f"expected NAME or NAME:setting=value,...; got {text!r}")
    settings: dict[str, Any] = {}
    for part in split_values(found[2]) if found[2] else []:
        key, equals, value = map(str.strip, part.partition("="))
        if not equals or not key:
            raise InputError(f"expected setting=value in {text!r}; got {part!r}")
        if key in settings:
            raise InputError(f"setting {key!r} is given twice in {text!r}")
        settings[key] = parse_value(value)
    return found[1].strip(), settings


def parse_value(text: str, depth: int = 0) -> Any:
    """A setting's value as written on the command line: quoted text, list, mapping, or text.

    Raises:
        InputError: a quote or bracket is not closed, or they nest deeper than 32.
    """
    if depth > DEEPEST:
        raise InputError(f"more than {DEEPEST} brackets within each other in {text[:40]!r}...")
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1].strip()
        return [parse_value(part, depth + 1) for part in split_values(inner)] if inner else []
    if text.startswith("{") and text.endswith("}"):
        pairs = [split_outside(part, "=") for part in split_values(text[1:-1])]
        if any(len(pair) != 2 for pair in pairs):
            raise InputError(f"expected {{key=value, ...}}; got {text!r}")
        parsed = [[parse_value(part.strip(), depth + 1) for part in pair] for pair in pairs]
        return {str(key): value for key, value in parsed}
    return text


def split_values(text: str) -> list[str]:
    """Values that commas part, as they are written; a comma in quotes or brackets parts nothing.

    Raises:
        InputError: a quote or bracket is not closed.
    """
    return [part.strip() for part in split_outside(text, ",")]


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator that is not inside quotes or brackets.

    A quote opens only where a value begins, so that an apostrophe inside a word is text.
    """
    parts: list[str] = []
    depth, quote, start, before = 0, "", 0, ""
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and before in ("", "=", ",", "[", "{", ":"):
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        before = before if char.isspace() else char
    if quote or depth:
        raise InputError(f"a quote or bracket is not closed in {text!r}")
    return [*parts, text[start:]]
