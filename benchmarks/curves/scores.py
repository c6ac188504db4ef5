"""How good pictures are: adherence, fidelity and realism; the judge is apart from every guide."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from emoji_training.score import frechet_distance
from emoji_training.world import COLORS, GLYPHS, pixels, random_style, render
from pilotfish_emoji import BACKGROUNDS, FOLDER, OBJECTS, judge
from torch import Tensor
from torch.nn.functional import cross_entropy

from pilotfish.hooks import registry

from .pictures import Lab
from .points import BATCH, BATCHES, TASKS, UNGUIDED, WISHED, Point, Series, floors, labels

FRESH = 1024  # pictures of the world to compare with


@dataclass(frozen=True)
class Batch:
    """What is measured on some pictures: one value for each, and their features (B, 384)."""

    values: dict[str, list[float]]
    features: Tensor


class Scores:
    """Scores of a lab's pictures.

    Args:
        batches: of a whole point.
    """

    def __init__(self, lab: Lab, batches: int = BATCHES) -> None:
        self.lab, self.judge, self.count = lab, judge.load(FOLDER), batches * BATCH
        self._batch = cache(self._scored)

    def batches(self, point: Point) -> list[Batch]:
        """The finished batches of a point; empty where its runs break."""
        found = [self._batch(point, b) for b in range(BATCHES) if self._exists(point, b)]
        return [batch for batch in found if batch]

    def merit(self, point: Point) -> float | None:
        """What the search over scales looks for, by the first batch.

        The judge's mean probability of the wanted object; where colours are guided, times the part
        of the unguided loss that is gone. -inf where the run breaks; None if it is not done yet.
        """
        floor = unguided_point(point.series)
        if not (self._exists(point, 0) and self._exists(floor, 0)):
            return None
        batch, unguided = self._batch(point, 0), self._batch(floor, 0)
        return _merit([batch], [unguided], point.series.task) if batch else float("-inf")

    def row(self, point: Point) -> dict[str, Any] | None:
        """A point's scores: means with their standard errors; None without pictures.

        The Frechet distance depends on the number of pictures, so only whole points have one.
        """
        batches, series = self.batches(point), point.series
        if not batches:
            return None
        row: dict[str, Any] = {"task": series.task, "series": series.name, "scale": point.scale}
        row["count"] = sum(len(batch.features) for batch in batches)
        for name in batches[0].values:
            row[name] = mean([v for batch in batches for v in batch.values[name]])
        floor = self.batches(unguided_point(series))
        row["merit"] = round(_merit(batches, floor, series.task), 4)
        if row["count"] == self.count:
            features = torch.cat([batch.features for batch in batches])
            row["distance"] = round(frechet_distance(features, self.world(series.task)), 1)
        return row

    def world(self, task: str) -> Tensor:
        """Features (`FRESH`, 384) of fresh pictures of what a task's pictures should show."""
        return self._labelled if task == "label" else self._plain

    def least_distance(self, task: str) -> float:
        """The Frechet distance of as many fresh pictures: few never reach 0."""
        features, each = self.world(task), FRESH // self.count
        parts = [features[i::each] for i in range(4)]
        others = [features[torch.arange(FRESH) % each != i] for i in range(4)]
        pairs = zip(parts, others, strict=True)
        return round(statistics.fmean(frechet_distance(*pair) for pair in pairs), 1)

    def _exists(self, point: Point, batch: int) -> bool:
        return self.lab.file(point, batch).exists()

    def _scored(self, point: Point, batch: int) -> Batch | None:
        kept = self.lab.read(point, batch)
        if kept is None or not len(kept["pictures"]):
            return None
        images = torch.from_numpy(kept["pictures"]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            values = self._adherence(point.series, batch, images)
            values |= self._fidelity(point.series, batch, images)
            features = self.judge.features(images)
        values["seconds"] = [float(kept["seconds"])]
        values["calls"] = [float(kept["calls"])]
        return Batch(values, features)

    def _adherence(self, series: Series, batch: int, images: Tensor) -> dict[str, list[float]]:
        """The guides' own losses on the finished pictures."""
        if series.task == "label":
            objects = torch.tensor([o for o, _ in labels(series, batch)])
            losses = cross_entropy(self.lab.classifier(images), objects, reduction="none")
            return {"label": losses.tolist()}
        step = SimpleNamespace(image=images)
        return {
            task: registry.resolve(TASKS[task]).plugin.loss_guidance(step).tolist()
            for task in ("blue", "palette")
        }

    def _fidelity(self, series: Series, batch: int, images: Tensor) -> dict[str, list[float]]:
        """Whether the judge sees the wanted object and background, and how sure of the object."""
        verdict = self.judge.judge(images)
        wanted = labels(series, batch)
        objects = torch.tensor([o for o, _ in wanted])
        values = {
            "object": (verdict.object.argmax(1) == objects).float().tolist(),
            "sure": verdict.object.gather(1, objects.unsqueeze(1)).flatten().tolist(),
        }
        if series.task != "label":
            backgrounds = torch.tensor([b for _, b in wanted])
            right = verdict.background.argmax(1) == backgrounds
            values["background"] = right.float().tolist()
        return values

    @cached_property
    def _labelled(self) -> Tensor:
        """Of the eight objects in all styles and colours: what is asked for without a prompt."""
        random = Random(2)
        renders = (
            render(GLYPHS[name], COLORS[random.choice(BACKGROUNDS)], random_style(random), random)
            for name in WISHED
            for _ in range(FRESH // len(WISHED))
        )
        return self._features(renders)

    @cached_property
    def _plain(self) -> Tensor:
        """Of all objects in all colours, in no style: what the prompts ask for."""
        random = Random(3)
        renders = (
            render(GLYPHS[name], COLORS[random.choice(BACKGROUNDS)], "plain", random)
            for name in OBJECTS
            for _ in range(FRESH // len(OBJECTS))
        )
        return self._features(renders)

    @torch.no_grad()
    def _features(self, renders: Iterator[Any]) -> Tensor:
        images = torch.stack([pixels(picture) for picture in renders]).float() / 255
        return torch.cat([self.judge.features(part) for part in images.split(64)])


def unguided_point(series: Series) -> Point:
    """What a series' task comes to without a guide."""
    unguided = (f for f in floors(series.model) if f.name == UNGUIDED)
    return next(Point(floor) for floor in unguided if floor.task == series.task)


def _merit(batches: Sequence[Batch | None], unguided: Sequence[Batch | None], task: str) -> float:
    sure = _mean(batches, "sure")
    if task == "label":
        return sure
    return sure * (1 - _mean(batches, task) / _mean(unguided, task))


def _mean(batches: Sequence[Batch | None], name: str) -> float:
    return statistics.fmean(v for batch in batches if batch for v in batch.values[name])


def mean(values: Sequence[float]) -> dict[str, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "error": round(error, 4)}
