"""What a picture's file holds of the run that made it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import GuideWarning, InputError, PilotfishError
from .made_with import ALL

if TYPE_CHECKING:
    from .run import Run

PIXELS: Final = 32_000_000  # of a file that anybody may have made
FORMATS: Final = ("PNG", "JPEG", "WEBP")
KEY: Final = "pilotfish"  # before the run, or its name among texts
LENGTH: Final = 256_000 + 4 * ALL // 3  # characters: of a run, and of its input files
EXIF, USER_COMMENT = 0x8769, 0x9286  # Exif 2.32, 4.6.5: tags of a JPEG and a WebP
UNICODE: Final = b"UNICODE\0"  # ... and what a comment in UTF-16 begins with
SEGMENT: Final = 65_533 - 6  # bytes that a JPEG can hold of Exif


class Picture(Image.Image):
    """A finished picture, whose files hold its run. Copies and other sizes of it hold none.

    Attributes:
        run: that made it; None in a copy.
    """

    run: Run | None = None

    @classmethod
    def of(cls, picture: Image.Image, run: Run) -> Picture:
        """The same picture, with its run."""
        own = cls()
        vars(own).update(vars(picture), run=run)
        return own

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As Pillow's. PNG, JPEG and WebP hold the run, which `pilotfish replay` repeats.

        Warns:
            GuideWarning: the file does not hold it, and why.
        """
        if self.run is not None and not {"pnginfo", "exif"} & params.keys():
            ending = Path(fp).suffix.lower() if isinstance(fp, str | Path) else ""
            kind = format or Image.registered_extensions().get(ending, "")
            try:
                params |= holding(self.run.to_toml(), kind.upper())
            except PilotfishError as error:
                warnings.warn(f"the file holds no run: {error}", GuideWarning, stacklevel=2)
        super().save(fp, format, **params)


def holding(run: str, kind: str) -> dict[str, Any]:
    """What Pillow must be told so that a file of a format holds a run.

    Raises:
        PilotfishError: it cannot.
    """
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt(KEY, run)
        return {"pnginfo": info}
    if kind not in FORMATS:
        raise PilotfishError(f"of all formats only {', '.join(FORMATS)} can")
    exif = Image.Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = UNICODE + f"{KEY}\n{run}".encode("utf-16-be")
    if kind == "JPEG" and (size := len(exif.tobytes())) > SEGMENT:
        raise PilotfishError(
            f"it takes {size} bytes, and a JPEG holds {SEGMENT}; save a PNG or a WebP"
        )
    return {"exif": exif}


def read_run(path: str | Path) -> str:
    """The run that a picture was made by, as TOML, from what `save` wrote beside it.

    The file may come from anybody: nothing is decoded, and the text is not looked into.

    Raises:
        InputError: not a PNG, JPEG or WebP, one of more than 32 megapixels, or no run in it, or one
            of more than about 1.6 million characters.
    """
    try:  # a warning would be of its size, for which the limit is ours
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as opened:
            pixels = math.prod(opened.size)
            text = opened.info.get(KEY) or _comment(opened)
    except Exception as error:  # whatever a parser raises of bytes that are not as they should be
        raise InputError(
            f"cannot read {path}, expected a PNG, JPEG or WebP picture: {error}"
        ) from None
    if pixels > PIXELS:
        raise InputError(
            f"{path} has {pixels // 10**6} megapixels; at most {PIXELS} pixels are read"
        )
    if text is None:
        raise InputError(
            f"{path} holds no run: only a PNG, JPEG or WebP that pilotfish saved does, and not "
            "after another program has rewritten it"
        )
    if len(text) > LENGTH:
        raise InputError(f"{path} holds a run of {len(text)} characters; at most {LENGTH} are read")
    return str(text)


def _comment(picture: Image.Image) -> str | None:
    """The run in a picture's Exif."""
    if picture.format == "PNG":
        return None
    comment = picture.getexif().get_ifd(EXIF).get(USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(UNICODE):
        return None
    head, _, run = comment.removeprefix(UNICODE).decode("utf-16-be").partition("\n")
    return run if head == KEY else None
