"""The exceptions that pilotfish raises on purpose.

PilotfishError
├── InputError    (also a ValueError)    a value, a name or a file that the user gave is wrong
│   └── SettingsError                    a plugin's settings are wrong
├── PluginError                          a plugin broke its contract; names plugin, hook and step
│   └── DefinitionError (a TypeError)    a plugin's class is written wrong
├── ModelError                           the model cannot do what the run asks of it
├── OutOfMemoryError                     the device's memory was not enough
└── NonFiniteError                       the latents or the picture became NaN or infinite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class PilotfishError(Exception):
    """Base of every error that pilotfish raises on purpose."""


class InputError(PilotfishError, ValueError):
    """A value, a name or a file that the user gave is wrong."""


class SettingsError(InputError):
    """A plugin's settings are wrong."""


class PluginError(PilotfishError):
    """A plugin broke its contract.

    Attributes:
        plugin: the instance's name in its stack.
        hook: the hook that was called.
    """

    def __init__(self, message: str, *, plugin: str, hook: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
        self.hook = hook


class DefinitionError(PluginError, TypeError):
    """A plugin's class is written wrong; raised where it is defined."""


class ModelError(PilotfishError):
    """The model cannot do what the run asks of it."""


class NonFiniteError(PilotfishError):
    """The latents or the picture became NaN or infinite."""


class OutOfMemoryError(PilotfishError):
    """The device's memory was not enough, for one image neither; tells what helps.

    Attributes:
        latents: (B, C, H, W), as far as the run had come.
        finished: whether that is to its end, and only their decode failed.
    """

    def __init__(self, message: str, *, latents: Any = None, finished: bool = False) -> None:
        super().__init__(message)
        self.latents, self.finished = latents, finished


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether Python, torch or a device says so: without importing torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate")
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def told(error: BaseException) -> str:
    """An exception's kind and message, also where its own `__str__` raises."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}".removesuffix(": ")
    except Exception as other:
        return f"{kind} (whose message cannot be read: {type(other).__name__})"


class GuideWarning(UserWarning):
    """A guide did nothing in a run, or the opposite of what it is for."""


def in_utf8(value: Any) -> Any:
    """The value, if all text in it, in lists and mappings too, can be written as UTF-8.

    Raises:
        ValueError: it cannot: a terminal or a file in another encoding gave half of a character.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("text in UTF-8") from None
    elif isinstance(value, list | tuple | set):
        for item in value:
            in_utf8(item)
    elif isinstance(value, Mapping):
        in_utf8([*value.keys(), *value.values()])
    return value


def explain(error: Any, fields: Mapping[str, Any], kind: str) -> str:
    """A validation error of pydantic in sentences: what was expected, and what came.

    Args:
        fields: the model's, by name.
        kind: what they are called: "setting".
    """
    return " ".join(_sentence(problem, fields, kind) for problem in error.errors())


def _sentence(problem: Mapping[str, Any], fields: Mapping[str, Any], kind: str) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(name, fields, n=1)
        return f"no {kind} {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "missing":
        about = getattr(fields.get(name), "description", None)
        return f"{name} must be given" + (f" ({about})." if about else ".")
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not name:
        return f"{expected}."
    expected = "text" if problem["type"] == "string_type" else expected
    return f"{name} must be {expected}; got {repr(problem['input'])[:200]}."


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that does not exist: what came, the nearest choice, and all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"no {kind} called {name!r}.{hint} Available: {', '.join(choices) or 'none'}")
