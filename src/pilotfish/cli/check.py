"""What `pilotfish plugins check` does: try a plugin against the contract of plugins."""

from __future__ import annotations

from collections.abc import Sequence

from .. import load
from ..conformance import Outcome
from ..hooks.registry import resolve
from ..models.loading import quiet
from ..testing import examine, random_sampler
from .listing import columns


def report(use: str, prompt: str, model: str | None) -> tuple[str, int]:
    """The outcome of every check as text, and how many failed.

    Args:
        use: as `--use` takes it, with settings where the plugin needs some.
        model: what to try it on; None is a small random one.
    """
    quiet()
    plugin = resolve(use).plugin
    outcomes = examine(plugin, random_sampler() if model is None else load(model), prompt)
    counts = [f"{sum(o.status == s for o in outcomes)} {s}" for s in ("ok", "failed", "not tried")]
    text = f"{plugin!r}\n{columns(rows(outcomes), '  ')}\n{', '.join(counts)}"
    return text, sum(outcome.status == "failed" for outcome in outcomes)


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str]]:
    """One for each check: what came of it, its name, and its claim or what is wrong."""
    marks = {"ok": "ok", "failed": "FAILED", "not tried": "-"}
    return [(marks[o.status], o.check.name, o.message or o.check.claim) for o in outcomes]
