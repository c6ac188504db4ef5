"""What a run tells, for people and for programs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ..sampling.sampler import Result
from ..sampling.shown import counted, leaked
from ..sampling.trace import Trace
from .starting import seconds_since_start


def latest_losses(trace: Trace) -> str:
    """For the progress bar: `blue 0.31, clip 0.82`."""
    return ", ".join(
        f"{name} {losses[-1]:.3g}" for name in trace.plugins if (losses := trace.losses(name))
    )


def report(result: Result, files: list[Path], seconds: float) -> str:
    """What a person wants to know after a run."""
    size = f"{result.run.width}x{result.run.height}"
    lines = [f"{path}  {size}, seed {result.run.seed + i}" for i, path in enumerate(files)]
    lines += [f"  {line}" for line in result.trace.told()]
    took = f"{seconds:.1f} s, {seconds_since_start():.1f} s since the start"
    return "\n".join([*lines, f"{counted(result.run.steps or 0)} in {took}"])


def summary(result: Result, files: list[Path], seconds: float) -> dict[str, Any]:
    """The same for a program."""
    trace = result.trace
    guides = {}
    for name in trace.plugins:
        losses = trace.losses(name)
        guides[name] = {
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "final_loss": trace.final_loss(name),
            "steps": len(losses),
            "outside": leaked(trace, name),
            "errors": [r.error for r in trace.of(name) if r.error],
        }
    return {
        "files": [str(path) for path in files],
        "seed": result.run.seed,
        "seconds": round(seconds, 3),
        "seconds_since_start": round(seconds_since_start(), 3),
        "guides": guides,
        "remarks": trace.remarks,
        "run": tomllib.loads(result.run.to_toml()),
    }
