"""The sample sheet: what was to be learned, and what the word gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .concept import Concept
from .files import replace
from .lesson import Lesson
from .plan import Plan

if TYPE_CHECKING:
    from pilotfish import Sampler

COLUMNS = 8
STEPS = 25  # of a sample


class Sheet:
    """Three rows: the pictures, samples with the first word, the same with the learned one."""

    def __init__(self, sampler: Sampler, plan: Plan, lesson: Lesson) -> None:
        self._sampler, self._plan = sampler, plan
        texts = plan.prompts or [captions[0] for captions in lesson.captions]
        self._texts = list(texts)[:COLUMNS]
        self._pictures = list(lesson.pictures)[:COLUMNS]
        self._before: list[Image.Image] | None = None

    def draw(self, file: Path) -> Path:
        """Write the sheet beside the learned word's file."""
        plan = self._plan
        if self._before is None:
            self._before = self._samples([plan.before(text) for text in self._texts], [])
        after = self._samples([plan.spell(text) for text in self._texts], [Concept(file=file)])
        drawn = sheet(
            [("pictures", self._pictures), (plan.init, self._before), (plan.token, after)]
        )
        return replace(file.with_suffix(".png"), lambda part: drawn.save(part, format="PNG"))

    def _samples(self, prompts: Sequence[str], plugins: Sequence[object]) -> list[Image.Image]:
        return [
            self._sampler(prompt, plugins=plugins, steps=STEPS, seed=self._plan.seed + i).images[0]
            for i, prompt in enumerate(prompts)
        ]


def sheet(rows: Sequence[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Rows of pictures of one size, each row below its name."""
    width, height = rows[0][1][0].size
    line = 24
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (columns * width, len(rows) * (height + line)), "white")
    brush, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=line * 0.6)
    for row, (name, pictures) in enumerate(rows):
        top = row * (height + line)
        brush.text((4, top + line / 2), name, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (column * width, top + line))
    return canvas
