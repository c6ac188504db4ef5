"""What a picture file shows: colours and opacity, of every mode in which Pillow opens one."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageOps
from PIL.ImageFile import ImageFile

ORIENTATION = 0x0112  # in EXIF
WHITE_IS_ZERO, BITS = 262, 258  # in TIFF: the tag that is 0 then, and of bits a channel
# PNG's kinds whose transparent colour Pillow mistakes, and what it multiplies their values by.
SPREAD = {"L;2": 85, "L;4": 17, "I;16B": 1, "RGB;16B": 1}


def shown(file: ImageFile) -> Image.Image:
    """What a viewer shows of an opened file: RGBA in sRGB, upright.

    A profile that is broken or made for other colours is ignored, as viewers do.

    Raises:
        ValueError: the file does not say what is black and what is white in it.
    """
    colours, opacity = _parts(file)
    if colours.mode == "F":
        colours = Image.fromarray((np.asarray(colours) * 255).round().astype("uint8"))
    picture = _in_srgb(colours, file.info.get("icc_profile"))
    picture.putalpha(opacity)
    return _upright(picture, file)


def mask_values(file: ImageFile) -> NDArray[np.float32]:
    """An opened file as a mask (h, w) in [0, 1], 0 where it is transparent, upright.

    Nothing is rounded to 8 bits. A mask is numbers: a profile changes nothing.

    Raises:
        ValueError: as `shown`; or black in what is read of colours with 16 bits a channel.
    """
    deep = ";16" in str(file.tile)
    colours, opacity = _parts(file)
    values = np.asarray(colours)
    if colours.mode != "F":
        # Whole numbers (ITU-R 601), so that white is exactly 1.
        values = np.asarray(colours.convert("RGB")) @ np.array([299, 587, 114], np.int32) / 255_000
        if deep and not values.any():  # Pillow keeps 8 of them
            raise ValueError(
                "it is black in the upper 8 of its 16 bits a channel, all that is read of colours; "
                "save it as grey"
            )
    values = values * (np.asarray(opacity, np.float32) / 255)
    return np.asarray(_upright(Image.fromarray(values.astype(np.float32)), file))


def _parts(file: ImageFile) -> tuple[Image.Image, Image.Image]:
    """Colours ("F" in [0, 1] where grey has more than 8 bits, else "L", "RGB", "CMYK"), opacity."""
    if file.format == "TIFF":
        # No memory map: Pillow 13.0 takes its rows for columns where the picture is to be turned.
        file.filename = ""
    opacity = _key(file) or Image.new("L", file.size, 255)
    file.load()
    if file.mode.startswith(("I", "F")):
        return _deep(file), opacity
    if file.mode == "CMYK":
        return file, opacity
    if file.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(file, lab, srgb, outputMode="RGB") or file, opacity
    picture = (file.convert("LA") if file.mode == "La" else file).convert("RGBA")
    opacity = ImageChops.darker(opacity, picture.getchannel("A"))
    grey = file.mode in ("1", "L", "LA", "La")
    return picture.getchannel("R") if grey else picture.convert("RGB"), opacity


def _key(file: ImageFile) -> Image.Image | None:
    """Opacity from a PNG's transparent colour where Pillow, which has 8 bits, would mistake it."""
    kind = file.tile[0].args if file.tile else None
    if file.format != "PNG" or kind not in SPREAD or "transparency" not in file.info:
        return None
    key = np.multiply(file.info.pop("transparency"), SPREAD[kind])
    values = np.asarray(file)
    if kind == "RGB;16B":
        with Image.open(file.filename, formats=("PNG",)) as low:
            low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the other byte of each channel
            values = values.astype(np.uint16) * 256 + np.asarray(low)
    clear = np.atleast_3d(values == key).all(axis=2)
    return Image.fromarray(np.where(clear, 0, 255).astype("uint8"))


def _deep(file: ImageFile) -> Image.Image:
    """Grey values in [0, 1] of a picture with more than 8 bits."""
    values, advice = np.asarray(file, np.float32), "save it with 8 or 16 bits a channel"
    low, high, tags = values.min(), values.max(), getattr(file, "tag_v2", {})
    if file.mode == "I":
        raise ValueError(f"its integers do not say what is black and white; {advice}")
    if file.mode == "F" and not 0 <= low <= high <= 1:
        raise ValueError(
            f"its floating-point values go from {low:g} to {high:g}, and only from 0 to 1 it "
            f"is certain what is black and white; {advice}"
        )
    if file.mode != "F":
        values = values / (2 ** tags.get(BITS, (16,))[0] - 1)
    return Image.fromarray(1 - values if tags.get(WHITE_IS_ZERO) == 0 else values)


def _in_srgb(colours: Image.Image, icc: bytes | None) -> Image.Image:
    """Colours as an embedded profile means them, or as they are for those of sRGB itself."""
    plain = colours.convert("RGB")
    # Grey curves are up to 10 of 255 wrong near black where Little CMS makes them faster.
    flags = ImageCms.Flags.NOOPTIMIZE if colours.mode == "L" else ImageCms.Flags.NONE
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc or b"")), ImageCms.createProfile("sRGB")
        meant = ImageCms.profileToProfile(colours, own, srgb, outputMode="RGB", flags=flags)
        differences = ImageChops.difference(meant or plain, plain).getextrema()
    except Exception:  # whatever is wrong with a profile, or with none
        return plain
    # A difference of 1 is rounding.
    return meant if meant and np.max(differences) > 1 else plain


def _upright(picture: Image.Image, file: ImageFile) -> Image.Image:
    with contextlib.suppress(Exception):  # broken EXIF is ignored, as viewers do
        picture.getexif()[ORIENTATION] = file.getexif().get(ORIENTATION, 1)
        return ImageOps.exif_transpose(picture)
    return picture
