"""The exceptions that pilotfish raises on purpose.

PilotfishError
├── InputError    (also a ValueError)    a value, a name or a file that the user gave is wrong
│   └── SettingsError                    a plugin's settings are wrong
├── PluginError                          a plugin broke its contract; names plugin, hook and step
├── ModelError                           the model cannot do what the run asks of it
└── NonFiniteError                       the latents or the picture became NaN or infinite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class ModelError(PilotfishError):
    """The model cannot do what the run asks of it."""


class NonFiniteError(PilotfishError):
    """The latents or the picture became NaN or infinite."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that does not exist: what came, the nearest choice, and all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"no {kind} called {name!r}.{hint} Available: {', '.join(choices) or 'none'}")
