"""What a run tells, for people and for programs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sampling.sampler import Result
from ..sampling.shown import counted
from ..sampling.trace import Trace


def latest_losses(trace: Trace) -> str:
    """For the progress bar: `blue 0.31, clip 0.82`."""
    return ", ".join(
        f"{name} {losses[-1]:.3g}" for name in trace.plugins if (losses := trace.losses(name))
    )


def report(result: Result, files: list[Path], seconds: float) -> str:
    """What a person wants to know after a run."""
    size = f"{result.run.width}x{result.run.height}"
    lines = [f"{path}  {size}, seed {result.run.seed + i}" for i, path in enumerate(files)]
    lines += [f"  {line}" for line in _guide_lines(result.trace)]
    return "\n".join([*lines, f"{counted(result.run.steps or 0)} in {seconds:.1f} s"])


def _guide_lines(trace: Trace) -> Iterator[str]:
    for name in trace.plugins:
        losses, failed = trace.losses(name), [r for r in trace.of(name) if r.error]
        if losses:
            final = trace.final_loss(name)
            by_vae = "" if final is None else f"; {final:.4g} by the VAE"
            fell = f"{losses[0]:.4g} -> {losses[-1]:.4g} ({counted(len(losses))})"
            yield f"{name}: loss {fell}{by_vae}"
        if (outside := leaked(trace, name)) is not None:
            yield f"{name}: {outside:.1%} of the moves at its steps lie outside its mask"
        if failed:
            yield f"{name}: failed at {counted(len(failed))}, the first time: {failed[0].error}"


def leaked(trace: Trace, name: str) -> float | None:
    """What part of the moves lies outside a guide's mask, mean over steps and images."""
    parts = [part for record in trace.of(name) for part in record.outside]
    return sum(parts) / len(parts) if parts else None


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
        "guides": guides,
        "remarks": trace.remarks,
        "run": tomllib.loads(result.run.to_toml()),
    }
