"""TOML that anybody may have written: what is read of it is small enough to look at."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from ..errors import InputError

DEEPEST = 32  # tables and lists within each other; a run has four
PARTS = 32  # of a dotted key, for which Python's reader takes the square of their number
LARGEST = 10**300  # whole numbers; those of thousands of digits cannot be written in a message
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
LONG_KEY = re.compile(rf"(?<![\w-])(?:{_PART}){{{PARTS}}}")  # from its start: linear in time


def read_toml(text: str, origin: str) -> dict[str, Any]:
    """The tables of a text.

    Args:
        origin: what a message calls it: its file's name.

    Raises:
        InputError: it is not TOML, nests deeper than 32 tables and lists, or has whole numbers of
            more than 300 digits.
    """
    if LONG_KEY.search(text):
        raise InputError(f"{origin} is not read: a key of more than {PARTS} parts, a.b.c ...")
    try:
        content = tomllib.loads(text)
    except RecursionError:  # [[[[[[ ...
        raise InputError(_too_deep(origin)) from None
    except ValueError as error:  # TOMLDecodeError, and Python's own of long numbers and dates
        json = text.lstrip().startswith("{")
        hint = ". It looks like JSON; TOML has lines such as: steps = 20" if json else ""
        raise InputError(f"{origin} is not valid TOML: {str(error)[:300]}{hint}") from None
    _check(content, origin)
    return content


def _check(value: Any, origin: str, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise InputError(_too_deep(origin))
    if isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{origin} is not read: it holds a number of more than 300 digits")
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, dict | list) else ():
        _check(item, origin, depth + 1)


def _too_deep(origin: str) -> str:
    return f"{origin} is not valid TOML here: more than {DEEPEST} tables or lists in each other"
