"""A sweep's folder: what is where in it, and which cells are done.

`sweep.toml` is the sweep, `cells/3f/3f07....toml` a cell's run file, named by the hash of its
content, and beside it, of the same name, its pictures, its trace (`.json`), or why it failed
(`.failed`). The trace comes last, so that with it a cell is done. `log/` tells who made which cell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pilotfish import InputError

from . import claims
from .plan import Sweep

TRACE, FAILED, RUN = ".json", ".failed", ".toml"


class Folder:
    """A sweep's folder.

    Attributes:
        path: where it is.
        cells: where the cells are, in folders of the first two letters of their names.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cells = self.path / "cells"

    def cell(self, name: str) -> Path:
        """The files of a cell, without an ending."""
        return self.cells / name[:2] / name

    def sweep(self) -> Sweep:
        """The sweep that was run here the last time.

        Raises:
            InputError: there is none.
        """
        file = self.path / "sweep.toml"
        if not file.is_file():
            raise InputError(
                f"{self.path} holds no sweep: there is no {file.name} in it. "
                f"`pilotfish sweep run SWEEP.toml --out {self.path}` makes one"
            )
        return Sweep.read(file)

    def begin(self, sweep: Sweep) -> None:
        """Make the folder, find out whether it can be written, and write the sweep down.

        Raises:
            InputError: it cannot be written.
        """
        text = sweep.to_toml().encode()
        with self.writing():
            self.cells.mkdir(parents=True, exist_ok=True)
            self._place("sweep.toml", text)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around what writes: an error of the disk says what is left and how to go on.

        Raises:
            InputError: the place cannot be written.
        """
        try:
            yield
        except (OSError, InputError) as error:
            cause = error.__cause__ if isinstance(error, InputError) else error
            if not isinstance(cause, OSError):
                raise
            raise InputError(
                f"cannot write the sweep's folder {self.path}: {cause}. What is finished in it "
                "stays; make room, or make it writable, and the same command goes on"
            ) from error

    def _place(self, name: str, text: bytes) -> None:
        """Write a file at once, also where several do the same."""
        part = self.path / f".{name}.{os.getpid()}.part"
        try:
            part.write_bytes(text)
            to_disk(part)
            part.replace(self.path / name)
        finally:
            part.unlink(missing_ok=True)

    def trace(self, name: str) -> dict[str, Any] | None:
        """What is known of a finished cell; None where it is not done, or its trace is damaged."""
        try:
            trace = json.loads(self.cell(name).with_suffix(TRACE).read_bytes())
            return trace if isinstance(trace, dict) and trace["files"] else None
        except (OSError, ValueError, KeyError):
            return None

    def failure(self, name: str) -> dict[str, Any] | None:
        """Why a cell failed, `kind` and `message`; None where it has not."""
        try:
            failure = json.loads(self.cell(name).with_suffix(FAILED).read_bytes())
            return failure if isinstance(failure, dict) and failure["message"] else None
        except (OSError, ValueError, KeyError):
            return None

    def is_done(self, name: str, scored: str, *, thorough: bool = False) -> bool:
        """Whether a cell has its trace, its run file and all of its pictures, whole.

        Args:
            scored: what its pictures must have been judged by.
            thorough: compare what is in the files, not only how much.
        """
        trace = self.trace(name)
        if trace is None or trace["scored"] != scored:
            return False
        folder = self.cell(name).parent
        return all(_is_whole(folder / fact["file"], fact, thorough) for fact in trace["files"])

    def names(self) -> Iterator[str]:
        """The files that cells have, by their names."""
        if self.cells.is_dir():
            for letters in os.scandir(self.cells):
                if letters.is_dir():
                    yield from (entry.name for entry in os.scandir(letters.path))

    def locks(self) -> Iterator[Path]:
        """All claims, held or abandoned."""
        for name in self.names():
            stem, _, number = name.partition(".lock.")
            if number:
                yield self.cell(stem).parent / name

    def clear_up(self) -> None:
        """Take away the claims that nobody holds any more, with what they left half done."""
        for lock in [*self.locks()]:
            if not claims.is_held(lock):
                shutil.rmtree(lock, ignore_errors=True)

    def undo(self, name: str) -> None:
        """Take away what says that a cell is done.

        Raises:
            InputError: the folder cannot be written.
        """
        with self.writing():
            self.cell(name).with_suffix(TRACE).unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Take away what says that a cell failed."""
        self.cell(name).with_suffix(FAILED).unlink(missing_ok=True)

    def log(self, **entry: Any) -> None:
        """Add a line to this process's log."""
        folder = self.path / "log"
        folder.mkdir(exist_ok=True)
        line = json.dumps({**entry, "where": claims.here().split()[0], "pid": os.getpid()})
        with open(folder / f"{claims.here().split()[0]}-{os.getpid()}.jsonl", "a") as file:
            file.write(f"{line}\n")

    def logged(self) -> Iterator[dict[str, Any]]:
        """All lines of the log; what is no line of it, such as one that was cut off, is not one."""
        for file in sorted((self.path / "log").glob("*.jsonl")):
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and "cell" in entry:
                        yield entry


def place(lock: Path, files: Iterable[Path]) -> None:
    """Move what was made within a lock to its place beside it, in order.

    Raises:
        OSError: the disk is full, or the lock has been given up for abandoned.
    """
    for file in files:
        to_disk(file)
        file.replace(lock.parent / file.name)


def to_disk(file: Path) -> None:
    """Have the disk itself hold a file before it gets its name: a machine may lose its power."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def facts(file: Path) -> dict[str, Any]:
    """What tells a whole file from a damaged one."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": file.name, "bytes": len(content), "sha256": digest}


def _is_whole(file: Path, fact: Mapping[str, Any], thorough: bool) -> bool:
    try:
        if thorough:
            return facts(file) == fact
        return bool(file.stat().st_size == fact["bytes"])
    except OSError:
        return False
