"""What a picture file shows: colours and opacity, of every mode in which Pillow opens one."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from PIL.ImageFile import ImageFile

ORIENTATION = 0x0112  # in EXIF
WHITE_IS_ZERO, BITS = 262, 258  # in TIFF: the tag that is 0 then, and of bits a channel
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of a profile for a mode
Floats = NDArray[np.float32]


def shown(file: ImageFile) -> Image.Image:
    """What a viewer shows of an opened file: RGBA in sRGB, upright.

    A profile that is broken or made for other colours is ignored, as viewers do.

    Raises:
        ValueError: the file does not say what is black and what is white in it.
    """
    colours, alpha = _parts(file)
    if not isinstance(colours, Image.Image):
        colours = Image.fromarray((colours * 255).round().astype("uint8"))
    picture = _in_srgb(colours, file.info.get("icc_profile")).convert("RGB")
    if alpha is not None:
        picture.putalpha(alpha)
    return _upright(picture.convert("RGBA"), file)


def mask_values(file: ImageFile) -> Floats:
    """An opened file as a mask (h, w) in [0, 1], 0 where it is transparent, upright.

    Nothing is rounded to 8 bits. A mask is numbers: a profile changes nothing.

    Raises:
        ValueError: as `shown`; or black in what is read of colours with 16 bits a channel.
    """
    deep = ";16" in str(file.tile)
    colours, alpha = _parts(file)
    if isinstance(colours, Image.Image):
        red, green, blue = (np.asarray(c, np.int32) for c in colours.convert("RGB").split())
        # Whole numbers (ITU-R 601), so that white is exactly 1.
        colours = ((299 * red + 587 * green + 114 * blue) / 255_000).astype(np.float32)
        if deep and not colours.any():  # Pillow keeps 8 of them
            raise ValueError(
                "it is black in the upper 8 of its 16 bits a channel, which are all that is read "
                "of colours; save it as grey"
            )
    if alpha is not None:
        colours = (colours * (np.asarray(alpha, np.float32) / 255)).astype(np.float32)
    return np.asarray(_upright(Image.fromarray(colours), file))


def _parts(file: ImageFile) -> tuple[Image.Image | Floats, Image.Image | None]:
    """Colours (grey values of more than 8 bits as numbers; else "L", "RGB", "CMYK") and opacity."""
    if file.format == "TIFF":
        # No memory map: Pillow 13.0 takes its rows for columns where the picture is to be turned.
        file.filename = ""
    key = _key(file)
    file.load()
    if file.mode.startswith(("I", "F")):
        return _deep(file), key
    if file.mode == "CMYK":
        return file, None
    if file.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        return ImageCms.applyTransform(file, transform) or file, None
    picture = (file.convert("LA") if file.mode == "La" else file).convert("RGBA")
    alpha = picture.getchannel("A") if key is None else key
    grey = file.mode in ("1", "L", "LA", "La")
    return (picture.getchannel("R") if grey else picture.convert("RGB")), alpha


def _key(file: ImageFile) -> Image.Image | None:
    """Opacity from a PNG's transparent colour where Pillow, which has 8 bits, would mistake it."""
    raw = file.tile[0].args if file.tile else None
    key = file.info.get("transparency")
    if key is None or file.format != "PNG" or raw not in ("L;2", "L;4", "I;16B", "RGB;16B"):
        return None
    del file.info["transparency"]
    values = np.asarray(file)
    if raw == "RGB;16B":
        with Image.open(file.filename, formats=("PNG",)) as low:
            low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the other byte of each channel
            values = values.astype(np.uint16) * 256 + np.asarray(low)
    spread = {"L;2": 85, "L;4": 17}.get(raw, 1)
    same = values == np.asarray(key) * spread
    clear = same.all(axis=2) if same.ndim == 3 else same
    return Image.fromarray(np.where(clear, 0, 255).astype("uint8"))


def _deep(file: ImageFile) -> Floats:
    """Grey values in [0, 1] of a picture with more than 8 bits."""
    values, advice = np.asarray(file, np.float32), "save it with 8 or 16 bits a channel"
    tags = getattr(file, "tag_v2", {})
    if file.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"its floating-point values go from {low:g} to {high:g}, and only from 0 to 1 it "
                f"is certain what is black and white; {advice}"
            )
    elif file.mode == "I":
        raise ValueError(f"its integers do not say what is black and white; {advice}")
    else:
        values = values / (2 ** tags.get(BITS, (16,))[0] - 1)
    return 1 - values if tags.get(WHITE_IS_ZERO) == 0 else values


def _in_srgb(colours: Image.Image, icc: bytes | None) -> Image.Image:
    """Colours as an embedded profile means them."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
        if profile.profile.xcolor_space.strip() != SPACES[colours.mode]:
            return colours
        srgb = ImageCms.createProfile("sRGB")
        # Grey curves are up to 10 of 255 wrong near black where Little CMS makes them faster.
        flags = ImageCms.Flags.NOOPTIMIZE if colours.mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(profile, srgb, colours.mode, "RGB", flags=flags)
        if not _changes(transform, colours.mode):
            return colours
        return ImageCms.applyTransform(colours, transform) or colours
    except Exception:  # whatever is wrong with a profile, or with none
        return colours


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it does more than round, as that of a profile of sRGB itself."""
    if mode == "CMYK":
        return True
    probe = np.arange(256, dtype=np.uint8)[:, None]  # (256, 1)
    if mode == "RGB":
        probe = 17 * np.indices((16, 16, 16), np.uint8).reshape(3, 64, 64).transpose(1, 2, 0)
    after = ImageCms.applyTransform(Image.fromarray(probe), transform)
    before = probe if mode == "RGB" else probe[..., None]
    return bool(np.abs(np.asarray(after, np.int16) - before).max() > 1)


def _upright(picture: Image.Image, file: ImageFile) -> Image.Image:
    with contextlib.suppress(Exception):  # broken EXIF is ignored, as viewers do
        picture.getexif()[ORIENTATION] = file.getexif().get(ORIENTATION, 1)
        return ImageOps.exif_transpose(picture)
    return picture
