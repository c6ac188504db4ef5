"""The pictures of a folder, with the runs that they hold."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish import PilotfishError, read_run

from .content import words

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
STARS = "stars.txt"  # names of files, one a line
MOST = 240  # pictures that are shown


@dataclass(frozen=True)
class Made:
    """A picture of the folder.

    Attributes:
        run: what it holds, read as TOML and not looked into; empty where it holds none.
    """

    path: Path
    run: dict[str, Any]
    starred: bool

    @property
    def caption(self) -> str:
        """What stands below it."""
        seed = f" · {self.run['seed']}" if "seed" in self.run else ""
        return f"{'★ ' * self.starred}{self.run.get('prompt') or self.path.stem}{seed}"


def pictures(folder: Path, search: str = "", starred: bool = False) -> list[Made]:
    """The folder's pictures, the newest first, that have all words of a search in their runs."""
    marked, wanted, found = stars(folder), words(search), []
    files = [p for p in folder.glob("*") if p.suffix.lower() in ENDINGS and p.name[0] != "."]
    times = {path: path.stat().st_mtime_ns for path in files}
    for path in sorted(files, key=lambda path: (times[path], path.name), reverse=True):
        text = _text(path, times[path])
        searched = f"{path.name} {text}".lower()
        if (path.name in marked or not starred) and all(word in searched for word in wanted):
            found.append(Made(path, _run(text), path.name in marked))
        if len(found) == MOST:
            break
    return found


@functools.lru_cache(4096)
def _text(path: Path, time: int) -> str:
    """The run in a picture's file as it was at that time; empty where it holds none."""
    try:
        return read_run(path)
    except PilotfishError:
        return ""


def _run(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def stars(folder: Path) -> set[str]:
    """The names of the pictures that are starred."""
    file = folder / STARS
    return set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()


def star(path: Path) -> bool:
    """Star a picture, or take its star away; whether it has one now.

    Raises:
        InputError: the folder cannot be written.
    """
    from pilotfish import whole_file  # with torch, which the page does not wait for

    marked = stars(path.parent) ^ {path.name}
    with whole_file(path.parent / STARS) as part:
        part.write_text("".join(f"{name}\n" for name in sorted(marked)), encoding="utf-8")
    return path.name in marked
