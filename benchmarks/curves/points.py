"""What is measured, and in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from emoji_training.world import caption, random_style
from pilotfish_emoji import BACKGROUNDS, OBJECTS

from pilotfish import PRESETS, Preset
from pilotfish.guidance import moves as rules
from pilotfish.guidance.presets import find_preset

BATCH, BATCHES = 16, 4  # pictures at a time, and for a whole point
WISHED = ("fox", "cat", "frog", "campfire", "owl", "car", "tree", "crown")  # without a prompt
PALETTE = ("#14213d", "#fca311", "#e5e5e5")
NOISY = {"name": "flowmatch-euler", "stochastic_sampling": True}
RUNS: dict[str, dict[str, Any]] = {  # by model
    "emoji": {"steps": 25, "scheduler": "euler-ancestral"},  # one that draws noise, for `dsg`
    "emoji-flow": {"steps": 25},  # its own scheduler draws none: `dsg` has `NOISY`
}
TASKS: dict[str, dict[str, Any]] = {
    "label": {"use": "classifier", "label": 0},  # which class 0 is, `pictures.Turned` says
    "blue": {"use": "blue"},
    "palette": {"use": "palette", "colors": PALETTE},
}
LONGEST = 8  # scales at which a series is looked at with the first batch


@dataclass(frozen=True, eq=False)
class Series:
    """One way of guiding, to be measured over `scale`.

    Attributes:
        task: what is asked for: a label without a prompt, or colours with one.
        name: of the preset, with what is changed of it.
        start: where the search for the best scale starts; 0: no guide.
        model: a name of `RUNS`.
        preset, guide, run: what differs from the task's own.
    """

    task: str
    name: str
    start: float = 0.0
    preset: str | Mapping[str, Any] = "balanced"
    model: str = "emoji"
    guide: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompted(self) -> bool:
        """Whether there is a prompt: colours are asked for beside one."""
        return self.task != "label" or self.name == PROMPTED


@dataclass(frozen=True)
class Point:
    """A series at one scale."""

    series: Series
    scale: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """Of the run."""
        guidance_scale = 4.0 if self.series.prompted else 1.0
        run = {**RUNS[self.series.model], "guidance_scale": guidance_scale, **self.series.run}
        return {**run, "preset": self.series.preset}

    @property
    def guide(self) -> dict[str, Any] | None:
        """As in a list of plugins; None is no guide."""
        if not self.scale:
            return None
        return {**TASKS[self.series.task], **self.series.guide, "scale": self.scale}

    def file(self, weights: str, batch: int) -> str:
        """A name that changes with everything that a batch's pictures depend on."""
        what = [self.options, _knobs(self.options.pop("preset")), self.guide]
        what += [texts(self.series, batch), rules.UNPROMPTED_PULL, weights]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
        name = f"{self.series.task}-{self.series.name}-{self.scale:g}" if self.scale else "unguided"
        return f"{re.sub('[^a-z0-9.]+', '-', name)}-{batch}-{digest.hexdigest()[:10]}.npz"


def _knobs(preset: Any) -> dict[str, Any]:
    """What counts of a preset: a knob that comes in later, unused, changes nothing."""
    found = find_preset(preset)
    usual = {f.name: f.default for f in dataclasses.fields(Preset)}
    knobs = {name: getattr(found, name) for name in usual if name not in ("name", "source")}
    return {name: value for name, value in knobs.items() if value != usual[name]}


# ---- what the pictures should show ----


def labels(series: Series, batch: int) -> list[tuple[int, int | None]]:
    """Object and background that each picture of a batch should have.

    With a prompt every object once, backgrounds spread, no pair that training left out; without
    one, eight objects in turn on any background.
    """
    if series.task == "label":
        return [(OBJECTS.index(WISHED[i % len(WISHED)]), None) for i in range(BATCH)]
    objects = range((batch + 2) % BATCHES, len(OBJECTS), BATCHES)
    return [(o, (7 * o + o // 10 + 5) % 10) for o in objects][:BATCH]


def texts(series: Series, batch: int) -> list[str]:
    """The prompts of a batch; all empty without one."""
    if not series.prompted:
        return [""] * BATCH
    random = Random(batch)
    return [
        caption(OBJECTS[o], random.choice(BACKGROUNDS), random_style(random))
        if b is None
        else caption(OBJECTS[o], BACKGROUNDS[b])
        for o, b in labels(series, batch)
    ]


# ---- all series ----

# Where the search over scales starts, from first trials or guessed; 1 where none is given.
STARTS = {
    "label": {"balanced": 4.0},
    "blue": {"deep-dive": 200.0, "clip-guided": 200.0, "dps": 200.0, "dsg": 2.0}
    | {"freedom": 10.0, "mpgd": 0.25, "tfg": 100.0, "ugd": 200.0, "lgd": 200.0},
}
SLOW = ("tfg", "ugd", "lgd")  # several decodes a step
LIKELIHOODS = ("mmps", "pgdm", "diffpir")  # no loss here is one: closed_form.py measures them
FLOWS = ("flowchef", "flowdps")  # only flows have them
DEAREST = ("ugd", "lgd")  # four to eight times as dear, and far from the best on the emoji model
ON_FLOWS = ("balanced, 4 cutouts, stop 0.8", "balanced, 4 cutouts, stop 0.8, 3 recurrences")
PROMPTED, UNGUIDED = "prompted", "unguided"


@cache
def floors(model: str) -> tuple[Series, ...]:
    """What the others are compared with: no guide, and for a label a prompt instead."""
    unguided = (Series(task, UNGUIDED, model=model) for task in TASKS)
    return (*unguided, Series("label", PROMPTED, model=model))


@cache
def all_series(model: str) -> tuple[Series, ...]:
    """Every preset for any loss, for a label and for blue, variants of `balanced`, its palette."""
    flow = model == "emoji-flow"
    left_out = LIKELIHOODS + (DEAREST if flow else FLOWS)
    names = [*(name for name in PRESETS if name not in SLOW + left_out), *SLOW]
    presets = [
        Series(task, name, starts.get(name, 1.0), name, run=run)
        for task, starts in STARTS.items()
        for name in names
        if name not in left_out
        for run in [{"scheduler": NOISY} if flow and name == "dsg" else {}]
    ]
    more = [s for s in variants() if not flow or s.name in ON_FLOWS]
    found = [*presets, *more, Series("palette", "balanced", 1.0)]
    return tuple(dataclasses.replace(s, model=model) for s in found)


def variants() -> list[Series]:
    """For a label: `balanced` with up to 75 calls of the network, and the next best presets."""
    looks, called = {"cutouts": 4, "stop": 0.8}, "4 cutouts, stop 0.8"
    often = {"base": "balanced", "recurrence": 3, "recurrence_stop": 0.8}
    as_freedom = {**often, "recurrence_start": 0.3, "recurrence_stop": 0.6}
    always = {"base": "balanced", "recurrence": 3, "gradient": "latents"}

    def series(change: str, *args: Any, **changes: Any) -> Series:
        return Series("label", f"balanced, {change}", 4.0, *args, **changes)

    return [
        series(called, guide=looks),
        series(f"{called}, 65 steps", guide=looks, run={"steps": 65}),
        series(f"{called}, 3 recurrences", often, looks),
        series(f"{called}, recurrence of freedom", as_freedom, looks),
        series("latents, 3 recurrences, ddim", always, run={"scheduler": "ddim"}),
        Series("label", f"dsg, {called}", 2.0, "dsg", looks),
        Series("label", f"freedom, {called}", 8.0, "freedom", looks),
    ]


# ---- the order ----

Merit = Callable[[Point], float | None]
Wish = tuple[Point, int]  # a point, and which of its batches


def plan(series: Sequence[Series], merit: Merit, *, quick: bool = False) -> Iterator[Wish]:
    """What to measure, first things first, as far as can be said from what is measured.

    Each series is looked at with one batch, at scales a factor of 4 apart, until the best is not at
    an end; then the best gets all its pictures, then the scales at half and twice the best, then
    those at a quarter and four times.

    Args:
        merit: of a point by its first batch, -inf where its run breaks; None where that batch is
            not there yet.
        quick: one batch at one scale.
    """
    batches = 1 if quick else BATCHES
    yield from _batches([Point(floor) for floor in floors(series[0].model)], batches)
    if quick:
        yield from ((Point(s, s.start), 0) for s in series)
        return
    yield from ((Point(s, scale), 0) for s in series for scale in walk(s, merit))
    tops = [top for s in series if (top := best(s, merit))]
    tops.sort(key=lambda top: top.series.name in SLOW)  # so that most curves are done early
    for factors in ((1,), (2, 0.5), (4, 0.25)):
        around = [Point(top.series, top.scale * factor) for top in tops for factor in factors]
        yield from _batches(around, batches)


def _batches(points: Sequence[Point], count: int) -> Iterator[Wish]:
    return ((point, batch) for point in points for batch in range(count))


def walk(series: Series, merit: Merit) -> list[float]:
    """The scales at which a series is looked at, in order of size."""
    scales = [series.start / 4, series.start, series.start * 4]
    while len(scales) < LONGEST:
        merits = [merit(Point(series, scale)) for scale in scales]
        if None in merits:
            break
        top = max(range(len(scales)), key=lambda i: (merits[i], i))
        if top == 0:
            scales.insert(0, scales[0] / 4)
        elif top == len(scales) - 1:
            scales.append(scales[-1] * 4)
        else:
            break
    return scales


def best(series: Series, merit: Merit) -> Point | None:
    """The point of the walk with the highest merit; None while any of them is missing."""
    points = [Point(series, scale) for scale in walk(series, merit)]
    merits = [merit(point) for point in points]
    known = [m for m in merits if m is not None]
    if len(known) < len(points) or math.isinf(max(known)):
        return None
    return points[merits.index(max(known))]
