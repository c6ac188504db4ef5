"""A run, step by step: as a film, or as a sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pilotfish import InputError, PilotfishError, Step, check_folder, to_pil, whole_file

from .layout import Shown, table

COLUMNS = ("noisy latents", "predicted x0")
FRAME_SIDE, SHEET_SIDE = 256, 128  # pixels, of an estimate's longer side
FRAME, LAST = 100, 2000  # milliseconds; the last frame of a GIF stays
ENDINGS = (".gif", ".mp4")


class Film(Shown):
    """What a run looks like at each step: noisy latents left, predicted x0 right.

    Args:
        decoded: sharp pictures, for two decodes a step; else the linear estimate of the colours,
            which costs nothing to speak of.
    """

    def __init__(self, *, decoded: bool = False) -> None:
        self.decoded = decoded
        self._pictures: list[list[Image.Image]] = []  # noisy and clean of each image, in turn
        self._captions: list[str] = []

    def __len__(self) -> int:
        return len(self._pictures)

    @torch.no_grad()
    def add(self, step: Step) -> None:
        """Take a picture of one step, as `sampler.stream` gives it."""
        # Of one size at every noise level, whatever the scheduler's coordinates are.
        latents = step.latents / math.hypot(step.alpha, step.sigma)
        model = step.run.model
        if self.decoded:
            by_vae = step.run.decoder == "vae"  # then the guides may have decoded it already
            noisy, clean = model.decode(latents), step.image if by_vae else model.decode(step.x0)
        else:
            noisy, clean = model.rgb(latents), step.rgb
        pairs = zip(to_pil(noisy), to_pil(clean), strict=True)
        self._pictures.append([picture for pair in pairs for picture in pair])
        self._captions.append(f"step {step.index + 1} of {step.num_steps}\nsigma {step.sigma:.3g}")

    @property
    def frames(self) -> list[Image.Image]:
        """One for each step, all of one size; several images of a run stand below each other."""
        return [self._frame(at) for at in range(len(self))]

    def _frame(self, at: int) -> Image.Image:
        pictures = self._row(at, FRAME_SIDE)
        pairs = [*zip(pictures[::2], pictures[1::2], strict=True)]
        return table(pairs, columns=COLUMNS, title=self._captions[at].replace("\n", ", "))

    def sheet(self, rows: int = 8) -> Image.Image:
        """Some steps, evenly spread from first to last, below each other.

        Raises:
            InputError: no step was taken, or not a positive number of rows.
        """
        if not self._pictures or rows < 1:
            raise InputError(f"a sheet needs steps and rows; got {len(self)} steps, {rows} rows")
        last, rows = len(self) - 1, min(rows, len(self))
        chosen = [round(row * last / max(rows - 1, 1)) for row in range(rows)]
        return table(
            [self._row(at, SHEET_SIDE) for at in chosen],
            columns=COLUMNS * (len(self._pictures[0]) // 2),
            rows=[self._captions[at] for at in chosen],
        )

    picture = sheet

    def _row(self, at: int, side: int) -> list[Image.Image]:
        """A step's pictures; estimates, which are as small as latents, enlarged."""
        if self.decoded:
            return self._pictures[at]
        factor = side / max(self._pictures[at][0].size)
        return [
            p.resize((round(p.width * factor), round(p.height * factor)), Image.Resampling.BICUBIC)
            for p in self._pictures[at]
        ]

    @staticmethod
    def check(path: str | Path) -> Path:
        """A film's path, checked before the work.

        Raises:
            InputError: the ending is no film's, or the folder cannot be made.
            PilotfishError: imageio is missing.
        """
        path = Path(path)
        if path.suffix.lower() not in ENDINGS:
            raise InputError(f"cannot write {path}: end a film's name in {' or '.join(ENDINGS)}")
        if path.suffix.lower() == ".mp4":
            _imageio()
        return check_folder(path)

    def save(self, path: str | Path) -> Path:
        """Write a film: `.gif`, or `.mp4`, which takes imageio.

        Raises:
            InputError: no step was taken, or the place cannot be written.
            InputError, PilotfishError: see `check`.
        """
        path = self.check(path)
        frames = self.frames
        if not frames:
            raise InputError(f"cannot write {path}: no step was taken")
        with whole_file(path) as part:
            if path.suffix.lower() == ".gif":
                shown = [FRAME] * (len(frames) - 1) + [LAST]
                first, *more = frames
                first.save(part, save_all=True, append_images=more, duration=shown, loop=0)
            else:
                _save_mp4(frames, part)
        return path


def film(steps: Iterable[Step], *, decoded: bool = False) -> Film:
    """A film of all steps of a run; the stream that gave them has the result.

    Args:
        steps: usually `sampler.stream(...)`.
        decoded: see `Film`.
    """
    made = Film(decoded=decoded)
    for step in steps:
        made.add(step)
    return made


def _save_mp4(frames: list[Image.Image], path: Path) -> None:
    """H.264 with half as many colours each way, which every player takes: so sides are even."""
    pixels = np.stack([np.asarray(frame) for frame in frames])  # (frames, height, width, 3)
    odd = [(0, side % 2) for side in pixels.shape[1:3]]
    pixels = np.pad(pixels, ((0, 0), *odd, (0, 0)), "edge")
    # Unless it is told that even is enough, imageio enlarges pictures to a multiple of 16.
    options = {"fps": 1000 / FRAME, "macro_block_size": 2, "quality": 8}
    _imageio().imwrite(path, pixels, plugin="FFMPEG", **options)


def _imageio() -> Any:
    try:
        import imageio.v3
        import imageio_ffmpeg  # noqa: F401  # imageio asks for it only when it writes
    except ImportError as error:
        raise PilotfishError(
            "an .mp4 film needs imageio: pip install 'pilotfish-view[film]'; a .gif does not"
        ) from error
    return imageio.v3
