"""A check of the contract of plugins, and an examination of a plugin by several.

A check returns where the plugin keeps it, raises `Broken` where it does not, and `NotTried` where
it has nothing to look at. It is tried only where those that it needs were kept, so that one fault
is told once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..errors import PilotfishError
from .trial import Trial


class Broken(PilotfishError):
    """A plugin does not keep what the check looks for."""


class NotTried(Exception):
    """A check has nothing to look at; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: as reports write it, "scale-0".
        claim: what a plugin keeps that passes it.
        function: tries it.
        needs: the checks without which this one says nothing.
    """

    name: str
    claim: str
    function: Callable[[Trial], None]
    needs: tuple[Check, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of one check; the message says why it failed or was not tried."""

    check: Check
    status: Literal["ok", "failed", "not tried"]
    message: str = ""


@dataclass
class Examination:
    """The checks of one plugin, each tried at most once."""

    trial: Trial
    done: dict[str, Outcome] = field(default_factory=dict)

    def outcome(self, check: Check) -> Outcome:
        """What comes of a check, after those that it needs."""
        if check.name not in self.done:
            self.done[check.name] = self._try(check)
        return self.done[check.name]

    def _try(self, check: Check) -> Outcome:
        for needed in check.needs:
            if self.outcome(needed).status == "failed":
                return Outcome(check, "not tried", f"see {needed.name}")
        try:
            check.function(self.trial)
        except NotTried as reason:
            return Outcome(check, "not tried", str(reason))
        except Exception as error:  # a plugin is foreign code
            return Outcome(check, "failed", str(error) or repr(error))
        return Outcome(check, "ok")


def check(*needs: Check) -> Callable[[Callable[[Trial], None]], Check]:
    """Make a function a check: its name is the check's, its docstring the claim."""

    def make(function: Callable[[Trial], None]) -> Check:
        name = function.__name__.replace("_", "-")
        return Check(name, inspect.getdoc(function) or "", function, needs)

    return make
