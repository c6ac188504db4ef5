"""Pictures in labelled rows and columns."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageDraw, ImageFont

from pilotfish import InputError

SIDE = 128  # below, a picture is hard to see and its label does not fit; all sizes are in pixels
GAP = 8
LONGEST = 400  # characters of a label


class Shown:
    """What a notebook shows as its `picture()`."""

    def picture(self) -> Image.Image:
        """The picture."""
        raise NotImplementedError

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.picture().save(file, format="PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Label:
    """Text in as many lines as it takes in a width."""

    text: str
    room: int
    size: int

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Pillow's own, which writes English; for all else matplotlib's, where it is installed."""
        if not self.text.isascii():
            with contextlib.suppress(ImportError):
                from matplotlib import get_data_path

                return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", self.size)
        return ImageFont.load_default(size=self.size)

    @cached_property
    def lines(self) -> list[str]:
        """Wrapped between words; a word that is too long is broken, a text that is, ends."""
        lines = []
        for paragraph in self.text[:LONGEST].splitlines():
            line = ""
            for word in itertools.chain.from_iterable(map(self._pieces, paragraph.split())):
                if line and self._length(f"{line} {word}") > self.room:
                    lines.append(line)
                    line = word
                else:
                    line = f"{line} {word}".strip()
            lines.append(line)
        return lines

    def _pieces(self, word: str) -> Iterator[str]:
        while len(word) > 1 and self._length(word) > self.room:
            cut = next(n for n in range(1, len(word)) if self._length(word[: n + 1]) > self.room)
            yield word[:cut]
            word = word[cut:]
        yield word

    @property
    def width(self) -> int:
        """Of the longest line."""
        return max(map(self._length, self.lines), default=0)

    @property
    def height(self) -> int:
        """Of all lines."""
        return len(self.lines) * self._line_height

    def draw(self, sheet: Image.Image, left: int, top: int) -> None:
        """Write the lines, each in the middle of the room."""
        pen = ImageDraw.Draw(sheet)
        for number, line in enumerate(self.lines):
            place = (left + (self.room - self._length(line)) // 2, top + number * self._line_height)
            pen.text(place, line, fill="black", font=self.font)

    @property
    def _line_height(self) -> int:
        return self.size * 5 // 4

    def _length(self, text: str) -> int:
        return int(self.font.getlength(text)) + 1


def table(
    pictures: Sequence[Sequence[Image.Image | None]],
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Pictures in rows, with a label above each column and one left of each row.

    Pictures stay as they are, pixel for pixel; where none has a side of 128 pixels, each pixel
    becomes a square of 2 x 2, 3 x 3 ...

    Args:
        pictures: row by row; None leaves a place empty.
        columns: one label for each, or none at all.
        rows: as `columns`.
        title: above all.

    Raises:
        InputError: there is no picture, or not one label for each row and column.
    """
    _check(pictures, columns, rows)
    cells = _enlarged(pictures)
    widths, heights = _sizes(cells)
    size = min(max(max(heights) // 14, 14), 28)
    beside = _beside(rows, max(*widths, SIDE), size)
    above = [Label(text, room, size) for text, room in zip(columns, widths, strict=bool(columns))]
    left = GAP + (beside[0].room + GAP if beside else 0)
    whole = left + sum(widths) + GAP * len(widths)
    head = Label(title, whole - 2 * GAP, size)
    band = max((a.height for a in above), default=0)
    top = GAP + head.height + band
    sheet = Image.new("RGB", (whole, top + sum(heights) + GAP * len(heights)), "white")
    head.draw(sheet, GAP, GAP // 2)
    for x, label in zip(_starts(left, widths), above, strict=False):
        label.draw(sheet, x, top - label.height - GAP // 2)
    for y, height, label in zip(_starts(top, heights), heights, beside, strict=False):
        label.draw(sheet, GAP, y + (height - label.height) // 2)
    for y, row in zip(_starts(top, heights), cells, strict=True):
        for x, picture in zip(_starts(left, widths), row, strict=False):
            if picture:
                sheet.paste(picture, (x, y))
    return sheet


def strip(pictures: Sequence[Image.Image], labels: Sequence[str], height: int = 256) -> Image.Image:
    """Pictures side by side, all of one height, each with its label below.

    Raises:
        InputError: not one label for each picture.
    """
    if len(pictures) != len(labels) or not pictures:
        raise InputError(f"got {len(pictures)} pictures and {len(labels)} labels")
    font = ImageFont.load_default(size=height / 14)
    gap, line = height // 16, height // 8
    scaled = [
        p.convert("RGB").resize((p.width * height // p.height, height), Image.Resampling.LANCZOS)
        for p in pictures
    ]
    width = sum(p.width for p in scaled) + gap * (len(scaled) + 1)
    sheet = Image.new("RGB", (width, height + 2 * gap + line), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for picture, label in zip(scaled, labels, strict=True):
        sheet.paste(picture, (left, gap))
        middle = (left + picture.width / 2, gap + height + line * 0.6)
        draw.text(middle, label, fill="black", font=font, anchor="mm")
        left += picture.width + gap
    return sheet


def _check(
    pictures: Sequence[Sequence[Image.Image | None]], columns: Sequence[str], rows: Sequence[str]
) -> None:
    if not any(picture for row in pictures for picture in row):
        raise InputError("a table needs a picture; got none")
    shape = {"rows": (len(rows), len(pictures)), "columns": (len(columns), max(map(len, pictures)))}
    for name, (came, expected) in shape.items():
        if came not in (0, expected):
            raise InputError(f"{name} must be {expected} labels, or none at all; got {came}")


def _enlarged(pictures: Sequence[Sequence[Image.Image | None]]) -> list[list[Image.Image | None]]:
    """All in RGB, and by one whole factor so large that labels fit."""
    largest = max(max(p.size) for row in pictures for p in row if p)
    factor = -(-SIDE // largest)

    def enlarged(picture: Image.Image) -> Image.Image:
        size = (picture.width * factor, picture.height * factor)
        return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)

    return [[enlarged(p) if p else None for p in row] for row in pictures]


def _sizes(cells: list[list[Image.Image | None]]) -> tuple[list[int], list[int]]:
    """Each column's width and each row's height; what is empty is as large as the largest."""
    largest = [max(p.size[axis] for row in cells for p in row if p) for axis in (0, 1)]
    columns = itertools.zip_longest(*cells)
    return (
        [max((p.width for p in column if p), default=largest[0]) for column in columns],
        [max((p.height for p in row if p), default=largest[1]) for row in cells],
    )


def _beside(rows: Sequence[str], room: int, size: int) -> list[Label]:
    """The labels left of the rows, in as much room as the widest takes."""
    wrapped = [Label(text, room, size) for text in rows]
    return [Label(label.text, max(w.width for w in wrapped), size) for label in wrapped]


def _starts(first: int, lengths: Sequence[int]) -> list[int]:
    """Where each of several lengths begins."""
    steps = [length + GAP for length in lengths[:-1]]
    return [*itertools.accumulate(steps, initial=first)]
