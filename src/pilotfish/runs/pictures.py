"""Pictures from tensors, and files from pictures."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from torch import Tensor

from ..errors import InputError, SettingsError
from ..guidance.regions import Region, box_weights, mask_weights
from ..hooks.area import Box, check_area
from . import decoding
from .metadata import PIXELS

# Of a picture file, which anybody may have made: looked at before it is read.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

PART = ".pilotfish-part"  # in the name of what is being written
WRITING = 3600  # seconds that it may take; what is older was left

Size = tuple[int, int]  # (height, width)


def to_pil(image: Tensor) -> list[Image.Image]:
    """Pictures from an image (B, 3, H, W) in [0, 1]; what lies outside is clamped.

    Rounds as diffusers does, so that equal latents give equal pixels.
    """
    pixels = image.detach().float().clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    return [Image.fromarray(p) for p in (pixels * 255).round().astype("uint8")]


def pixels(picture: Image.Image) -> Tensor:
    """A picture as (1, C, H, W) in [0, 1], float32."""
    values = np.asarray(picture, np.float32) / 255
    # Laid out in memory as diffusers' own, since convolutions round differently for others.
    batch = torch.from_numpy(values.reshape(1, picture.height, picture.width, -1))
    return batch.permute(0, 3, 1, 2)


def read_picture(
    path: str | Path, what: str, *, mode: Literal["RGB", "L"] = "RGB", size: Size | None = None
) -> Image.Image:
    """A picture from a file, as viewers show it; what is transparent is white, or black in "L".

    PNG, JPEG, WebP, GIF (its first frame), BMP or TIFF, of at most 32 megapixels, of every mode and
    depth; in sRGB with 8 bits a channel, upright.

    Args:
        what: for errors: what it is to be, such as "Clip: image".
        mode: "RGB", or "L" for a mask.
        size: (height, width); the middle is cut to that shape and resized. Without, or where it has
            that size, every pixel stays.

    Raises:
        SettingsError: it cannot be read, is too large, or does not say what is black and white in
            it: integers of 32 bits, floating-point values outside of [0, 1].
    """
    with _opened(path, what) as file:
        picture = decoding.shown(file)
    ground = Image.new("RGBA", picture.size, "black" if mode == "L" else "white")
    flat = Image.alpha_composite(ground, picture).convert(mode)
    return ImageOps.fit(flat, size[::-1], Image.Resampling.LANCZOS) if size else flat


@contextlib.contextmanager
def _opened(path: str | Path, what: str) -> Iterator[ImageFile]:
    """A picture file, not decoded yet; what goes wrong with it inside is a SettingsError."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            if math.prod(file.size) > PIXELS:
                raise ValueError(f"{file.size} pixels; at most {PIXELS} in all are read")
            yield file
    except Exception as error:  # whatever decoders raise on a foreign file
        raise SettingsError(
            f"{what} must be a picture that Pillow can read; got {str(path)!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def read_mask(path: str | Path, what: str) -> Tensor:
    """A mask file (1, 1, h, w) in [0, 1], 1 where it is white, as exact as the file is.

    Raises:
        SettingsError: as `read_picture`, or nothing in it is lighter than black.
    """
    with _opened(path, what) as file:
        mask = torch.from_numpy(decoding.mask_values(file).copy())[None, None]
    if not mask.any():
        raise SettingsError(f"{what} must be white somewhere; {path} is all black")
    return mask


def area_weights(
    area: Box | Path | str, size: Size, *, what: str, shape: Size | None = None
) -> Tensor:
    """What part of each cell lies in an `Area`, (1, 1, *size) in [0, 1]; never 0 in all of them.

    Of a mask file of another shape than `size`, the middle is taken, as of pictures.

    Args:
        size: (height, width) in cells or pixels.
        what: for errors: what it is, such as "Inpaint: mask".
        shape: (height, width) of the picture that a mask file belongs to, whose shape it must have.

    Raises:
        SettingsError: no area, no picture, of another shape than `shape`, or black where it counts.
    """
    try:
        area = check_area(area)
    except ValueError as error:
        raise SettingsError(f"{what} must be {error}; got {area!r}") from None
    if not isinstance(area, Path):
        return box_weights(area, size).float()
    mask = read_mask(area, what)
    height, width = mask.shape[2:]
    if shape is not None and width * shape[0] != height * shape[1]:
        raise SettingsError(
            f"{what} must have the shape of image, {shape[1]} x {shape[0]} pixels or as "
            f"many times more or fewer; {area} has {width} x {height}"
        )
    weights = mask_weights(mask, size, cut=True).float()
    if not weights.any():
        raise SettingsError(
            f"{what} must be white in the middle part that has the shape of the picture; {area} "
            f"({width} x {height}) is white only beside it"
        )
    return weights


def read_region(
    owner: str, area: Box | Path, soft_edge: float, mask_edge: Literal["soft", "hard"] = "soft"
) -> Region:
    """Where a guide with these settings acts; a mask file is stretched to the picture.

    Raises:
        SettingsError: as `read_mask`.
    """
    mask = read_mask(area, f"{owner}: mask") if isinstance(area, Path) else area
    return Region(owner, mask, soft_edge, hard=mask_edge == "hard")


def preview(rgb: Tensor, factor: int = 8) -> list[Image.Image]:
    """Small pictures from latent colours (B, 3, H, W), enlarged to roughly the picture's size."""
    size = (rgb.shape[3] * factor, rgb.shape[2] * factor)
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture in to_pil(rgb)]


def check_writable(path: str | Path) -> Path:
    """A picture's path, checked before the work: its ending, and the place, by a trial.

    Raises:
        InputError: the ending names no format, or no file can be written there.
    """
    path = Path(path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"cannot write {path}: end its name in .png, .jpg or .webp")
    return check_place(path)


def numbered(path: str | Path, count: int) -> list[Path]:
    """Where several pictures go: `cat-1.png`, `cat-2.png` ...; one picture goes to `cat.png`.

    Raises:
        InputError: see `check_writable`.
    """
    path = check_writable(path)
    several = [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    return several if count > 1 else [path]


def check_folder(path: Path) -> Path:
    """A file's path, with its folder made if need be.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a name with a NUL
        raise InputError(f"cannot write {path}: {error}") from error
    return path


def save_picture(picture: Image.Image, path: str | Path) -> Path:
    """Write a picture so that a reader never sees half a file; makes the folder if need be.

    Raises:
        InputError: the ending names no format, or the place cannot be written.
    """
    path = check_folder(check_writable(path))
    with whole_file(path) as part:
        picture.save(part)
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file when the context ends.

    Raises:
        InputError: the place cannot be written.
    """
    part = _part(path)
    _clear(path)
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def check_place(path: Path) -> Path:
    """A file's path, after a trial: an empty file comes and goes, in its folder or that above it.

    Raises:
        InputError: no file can be written there.
    """
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder; add a file's name")
    folder = next((p for p in path.parents if os.path.lexists(p)), path.parent)
    try:
        part = folder / _part(path).name
        part.touch()
        part.unlink()
    except (OSError, ValueError) as error:  # a name that is empty, or has a NUL
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from None
    return path


def _part(path: Path) -> Path:
    """What is written before it becomes the file."""
    return path.with_name(f".{path.stem}{PART}{path.suffix}")


def _clear(path: Path) -> None:
    """Take away what earlier runs, killed while they wrote, left in a file's folder."""
    for left in path.parent.glob(f".*{PART}{path.suffix}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > WRITING:
                left.unlink()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # As exact as isfinite().all() and five times as fast: NaN wins every comparison in amax.
    return math.isfinite(tensor.abs().amax().item())
