"""One model on one machine: its rows checked, timed and counted."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import handwritten
import torch
from handwritten import Work

from . import measure, models
from .rows import Bench, rows_of

PROMPT = "a campfire on a black background"
CHECKED_STEPS = 2  # differences of rounding grow with the steps


@dataclass(frozen=True)
class Scene:
    """One model, batch and number format, and the rows that are timed on it.

    Attributes:
        model: see `models.load`.
        rows: their names, see `rows.py`.
        rounds: at most.
        minutes: no round begins after so many.
        large: a larger CLIP for the row "O1 large".
    """

    name: str
    model: str
    rows: tuple[str, ...]
    steps: int
    batch: int = 1
    dtype: str = "float32"
    rounds: int = 5
    minutes: float = float("inf")
    large: str | None = None


def play(scene: Scene, device: torch.device, scheduler: str) -> dict[str, Any]:
    """A scene's rows: checked, timed and counted."""
    start = time.monotonic()
    dtype = getattr(torch, scene.dtype)
    pipeline = models.load(scene.model, device, dtype, scheduler)
    clip = models.load_clip(scene.model, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        models.save_tiny(scene.model, pipeline.vae, folder)
        bench = Bench(pipeline, handwritten.clips(clip, 8, dtype), folder)
        if scene.large is not None:
            large = models.make_clip(scene.large, device, dtype)
            bench.large = handwritten.clips(large, 1, dtype)[0]
        measured = _measured(bench, scene, device)
        return {
            "scene": {k: v for k, v in asdict(scene).items() if k not in ("rows", "minutes")},
            "scheduler": scheduler,
            **measured,
            "minutes": round((time.monotonic() - start) / 60, 1),
        }


def _measured(bench: Bench, scene: Scene, device: torch.device) -> dict[str, Any]:
    work = Work(PROMPT, scene.steps, scene.batch)
    scale = handwritten.fitting_scale(bench.pipeline, work, bench.losses[0])
    work = replace(work, scale=scale)
    rows = rows_of(bench, scene.rows)
    apart = measure.check(rows, replace(work, steps=min(CHECKED_STEPS, work.steps)))
    rows = {name: row for name, row in rows.items() if row.timed}
    with measure.clock_on(device) as clock:
        seconds = measure.measure(rows, work, scene.rounds, scene.minutes, clock)
    return {
        "work": asdict(work),
        "largest_difference": apart,
        "rows": {
            name: {
                "what": row.what,
                "seconds": {index: round(s, 4) for index, s in seconds[name].items()},
                "counted": measure.count(bench, row, work, device),
            }
            for name, row in rows.items()
        },
    }
