"""What every plugin must keep: the checks, in the order in which reports tell them."""

from __future__ import annotations

from . import running, still
from .check import Check, Examination, Outcome
from .trial import PROMPT, Trial

__all__ = ["CHECKS", "PROMPT", "Check", "Examination", "Outcome", "Trial"]

CHECKS = {
    check.name: check
    for check in (
        still.signature,
        still.identity,
        still.settings,
        still.imports,
        running.runs,
        running.loss,
        running.answers,
        running.inputs,
        running.undo,
        running.random_state,
        running.repeat,
        running.instances,
        running.batch,
        running.scale_0,
        running.sizes,
        running.bfloat16,
        running.through_network,
        running.teardown,
    )
}
"""What every plugin must keep, check by check, by their names."""
