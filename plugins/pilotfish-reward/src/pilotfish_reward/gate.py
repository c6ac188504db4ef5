"""A look at the finished picture before anybody gets it: `gate`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageFilter
from pydantic import field_serializer, field_validator
from torch import Tensor

from pilotfish import (
    Guide,
    PilotfishError,
    Setting,
    SettingsError,
    is_finite,
    pixels,
    to_pil,
)

if TYPE_CHECKING:
    from pilotfish import Run, Step

NUDENET = "nudenet"
EXPOSED = (  # of NudeNet's 18 classes
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
PYTHON = "python:"  # before the name of a callable in a run file
BLUR = 0.25  # of a box's longer side: nothing in it is told any more

Detector = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class Detection:
    """What was found: its class, its score from 0 to 1, and its box (left, top, right, bottom)."""

    label: str
    score: float
    box: tuple[int, int, int, int]


class Gate(Guide):
    """Blur, blacken or refuse a finished picture in which a detector finds what must not be there.

    The detector is NudeNet's, or a function of a picture. Its loss, the highest score of what
    counts, has no gradient: it moves nothing, but searches by particles go by it.
    """

    heading = "checks of the finished picture"

    class Settings(Guide.Settings):
        gradient: Literal["none"] = Setting(
            "none", description="a detector has none: its score is measured and moves nothing"
        )
        detector: Any = Setting(
            NUDENET,
            description="nudenet, or 'module:function', which gives a PIL picture a score from 0 "
            "to 1, or a list of tables with class, score and box [left, top, width, height]; in "
            "Python also the function itself",
        )
        classes: list[str] | None = Setting(
            None, description="the classes that count; exposed parts for nudenet, else all"
        )
        threshold: float = Setting(0.3, ge=0, le=1, description="the least score that counts")
        action: Literal["blur", "black", "refuse"] = Setting(
            "blur",
            description="blur: what was found; black: the whole picture; refuse: the run ends with "
            "an error",
        )

        @field_validator("detector")
        @classmethod
        def _named(cls, detector: Any) -> Any:
            if callable(detector) or detector == NUDENET:
                return detector
            if isinstance(detector, str) and detector.startswith(PYTHON):
                raise ValueError(
                    "the function itself: a run file holds only its name, and it must be passed "
                    "again in Python"
                )
            if not (isinstance(detector, str) and detector.count(":") == 1):
                raise ValueError("nudenet, 'module:function', or a function")
            return detector

        @field_serializer("detector", when_used="json")
        def _told(self, detector: Any) -> str:
            if not callable(detector):
                return str(detector)
            name = getattr(detector, "__qualname__", type(detector).__qualname__)
            return f"{PYTHON}{detector.__module__}:{name}"

    def setup(self, run: Run) -> Watch:
        detector, classes = self.settings.detector, self.settings.classes
        if detector == NUDENET:
            classes = classes or EXPOSED
        particles = next((t["particles"] for t in run.plugins if "particles" in t), 1)
        return Watch(find_detector(detector), classes, particles)

    def loss_guidance(self, step: Step, state: Watch) -> Tensor | None:
        # A look costs a decode: only where somebody goes by it, or once for the trace.
        if state.particles == 1 and not step.last:
            return None
        scores = [highest(state.found(picture)) for picture in to_pil(step.image)]
        return torch.tensor(scores, device=step.x0.device)

    def after_step(self, step: Step, state: Watch) -> None:
        if not step.last or self.scale_at(step.index, step.num_steps) == 0:
            return
        # By the VAE itself, whatever the run's decoder. The finished latents are x0 but for what
        # some schedulers leave of the noise at their end.
        model, x0 = step.run.model, step.x0.clone()
        chosen = x0[:: state.particles]
        seen = model.decode(chosen)
        seen = seen if is_finite(seen) else model.decode_float32(chosen)
        changed = False
        for index, picture in enumerate(to_pil(seen)):
            found = [d for d in state.found(picture) if d.score >= self.settings.threshold]
            if found:
                image = pixels(self._answered(picture, found, index)).to(seen)
                x0[index * state.particles] = model.encode(image)[0].to(x0)
                changed = True
        if changed:
            step.stop(x0)

    def _answered(self, picture: Image.Image, found: list[Detection], number: int) -> Image.Image:
        """The picture that comes out in the place of one in which something was found.

        Raises:
            PilotfishError: none is to come out.
        """
        if self.settings.action == "refuse":
            told = ", ".join(f"{d.label} {d.score:.2f}" for d in found)
            raise PilotfishError(
                f"the gate refuses picture {number + 1} of this run: {told}; take another seed or "
                "prompt"
            )
        if self.settings.action == "black":
            return Image.new("RGB", picture.size)
        return blurred(picture, [d.box for d in found])


@dataclass(frozen=True)
class Watch:
    """How a run's pictures are looked at.

    Attributes:
        classes: those that count; None for all.
        particles: how many candidates of each picture there are.
    """

    detector: Detector
    classes: Iterable[str] | None
    particles: int

    def found(self, picture: Image.Image) -> list[Detection]:
        """What counts in a picture, whatever its score.

        Raises:
            SettingsError: the detector answers something else.
        """
        answer = self.detector(picture)
        if not isinstance(answer, list | tuple):
            answer = [{"score": answer}]
        found = [detection(item, picture.size) for item in answer]
        return [d for d in found if self.classes is None or d.label in self.classes]


def detection(item: Any, size: tuple[int, int]) -> Detection:
    """One entry of a detector's answer; without a box it is the whole picture, (width, height).

    Raises:
        SettingsError: it is none.
    """
    try:
        table: Mapping[str, Any] = item
        left, top, width, height = map(int, table.get("box", (0, 0, *size)))
        box = left, top, left + width, top + height
        return Detection(str(table.get("class", "score")), float(table["score"]), box)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            "Gate: detector must answer a picture with a number, or a list of tables with class, "
            f"score and box [left, top, width, height]; got {item!r}"
        ) from error


def highest(found: list[Detection]) -> float:
    """The highest score, 0 where there is none."""
    return max((d.score for d in found), default=0.0)


def find_detector(detector: str | Detector) -> Detector:
    """The function that a setting names.

    Raises:
        SettingsError: there is none, or NudeNet is not installed.
    """
    if callable(detector):
        return detector
    if detector == NUDENET:
        return nudenet()
    module, name = detector.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"Gate: detector must be nudenet or an importable 'module:function'; got {detector!r} "
            f"({error})"
        ) from error
    if not callable(function):
        raise SettingsError(f"Gate: detector {detector!r} is no function")
    found: Detector = function
    return found


def nudenet() -> Detector:
    """NudeNet's detector, whose network is in its package: nothing is downloaded.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        from nudenet import NudeDetector
    except ImportError as error:
        raise SettingsError(
            "Gate: detector nudenet is not installed: pip install 'pilotfish-reward[gate]'"
        ) from error
    import numpy as np

    network = NudeDetector()
    # It takes pictures as OpenCV has them: blue first.
    return lambda picture: network.detect(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]))


def blurred(picture: Image.Image, boxes: Iterable[tuple[int, int, int, int]]) -> Image.Image:
    """A picture whose boxes are blurred beyond recognition."""
    changed = picture.copy()
    for left, top, right, bottom in boxes:
        box = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
        if box[0] < box[2] and box[1] < box[3]:
            part = changed.crop(box)
            radius = BLUR * max(part.size)
            changed.paste(part.filter(ImageFilter.GaussianBlur(radius)), box)
    return changed
