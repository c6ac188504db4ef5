"""A small picture above a progress bar, in terminals that have colours and room for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..sampling.step import Step

SIDE = 32  # cells of a picture's longer side; a line of text has two
ROOM = (SIDE + 8, SIDE // 2 + 6)  # columns and lines of a terminal


def fits() -> bool:
    """Whether stderr is a terminal of 24-bit colours with room for a picture."""
    columns, lines = shutil.get_terminal_size()
    colours = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    room = columns >= ROOM[0] and lines >= ROOM[1]
    return sys.stderr.isatty() and colours and "NO_COLOR" not in os.environ and room


@contextlib.contextmanager
def thumbnail(bar: tqdm[Any]) -> Iterator[Callable[[Step], None]]:
    """What draws a step's first picture above a bar, each over the one before.

    In here warnings wait: what is written between two pictures would be drawn over.
    """
    drawn = 0

    def draw(step: Step) -> None:
        nonlocal drawn
        picture = step.preview()[0]
        picture.thumbnail((SIDE, SIDE))
        lines, up = half_blocks(picture), f"\x1b[{drawn}A" if drawn else ""
        bar.clear()
        sys.stderr.write(up + "".join(f"{line}\n" for line in lines))
        bar.refresh()
        drawn = len(lines)

    usual, waiting = warnings.showwarning, []
    warnings.showwarning = lambda *told, **more: waiting.append(partial(usual, *told, **more))
    try:
        yield draw
    finally:
        warnings.showwarning = usual
        for tell in waiting:
            tell()


def half_blocks(picture: Image.Image) -> list[str]:
    """A picture in text: each sign is two pixels, the upper one's colour on the lower one's."""
    width, height = picture.size
    pixels = picture.convert("RGB").load()
    assert pixels is not None

    def sign(x: int, y: int) -> str:
        upper, lower = (";".join(map(str, pixels[x, row])) for row in (y, y + 1))  # type: ignore[arg-type]
        return f"\x1b[38;2;{upper};48;2;{lower}m▀"

    rows = range(0, height - 1, 2)
    return ["".join(sign(x, y) for x in range(width)) + "\x1b[0m" for y in rows]
