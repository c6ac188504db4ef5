"""Who works at a cell: a lock with a heartbeat, for several machines on one disk.

A lock is a folder `NAME.lock.N` beside the cell, for making a folder fails wherever it is there
already, on network disks too. Who finds it abandoned makes the next number, which one can do alone:
nothing is ever taken away from its owner, so that no two can think that they took it over. What is
written before it is whole lies inside of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEAT = 5.0  # seconds between two signs of life
ABANDONED = 60.0  # without one; the disk's own clock measures it


@contextlib.contextmanager
def claimed(cell: Path, beat: float = BEAT, abandoned: float = ABANDONED) -> Iterator[Path | None]:
    """The lock's folder, while this process has the cell; None where another one works at it.

    Args:
        cell: what is claimed, without an ending: `cells/3f/3f07...`.

    Raises:
        OSError: the place cannot be written.
    """
    lock = _claim(cell, abandoned)
    if lock is None:
        yield None
        return
    done = threading.Event()
    heart = threading.Thread(target=_keep_alive, args=(lock, done, beat), daemon=True)
    heart.start()
    try:
        yield lock
    finally:
        done.set()
        heart.join()
        release(cell, lock)


def _claim(cell: Path, abandoned: float) -> Path | None:
    locks = locks_of(cell)
    if locks and is_held(locks[-1], abandoned):
        return None
    number = _number(locks[-1]) + 1 if locks else 0
    lock = cell.with_name(f"{cell.name}.lock.{number}")
    cell.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.mkdir()
        # Missing for a moment, or if this process dies here: its age decides then.
        (lock / "owner").write_text(json.dumps({"where": here(), "pid": os.getpid()}))
    except (FileExistsError, FileNotFoundError):  # another one was faster, or cleared up behind it
        return None
    return lock


def release(cell: Path, lock: Path) -> None:
    """Take away a lock, and the abandoned ones before it."""
    for other in locks_of(cell):
        if _number(other) <= _number(lock):
            shutil.rmtree(other, ignore_errors=True)


def locks_of(cell: Path) -> list[Path]:
    """The locks of a cell, the newest last."""
    return sorted(cell.parent.glob(f"{cell.name}.lock.*"), key=_number)


def _number(lock: Path) -> int:
    return int(lock.suffix[1:])


def is_held(lock: Path, abandoned: float = ABANDONED) -> bool:
    """Whether its owner lives: by its process on this machine, by its heartbeat on others."""
    owner = owner_of(lock)
    if owner.get("where") == here() and not _is_alive(int(owner["pid"])):
        return False
    try:
        return _now(lock.parent) - lock.stat().st_mtime < abandoned
    except FileNotFoundError:
        return False


def owner_of(lock: Path) -> dict[str, Any]:
    """The machine and the process that made a lock; empty where they are not known."""
    try:
        owner: dict[str, Any] = json.loads((lock / "owner").read_text())
    except (OSError, ValueError):
        return {}
    return owner


def _now(folder: Path) -> float:
    """The time by the clock of the disk, which several machines share."""
    os.utime(folder)
    return folder.stat().st_mtime


def _keep_alive(lock: Path, done: threading.Event, beat: float) -> None:
    while not done.wait(beat):
        with contextlib.suppress(OSError):  # a disk that is away for a while
            os.utime(lock)


@functools.cache
def here() -> str:
    """This machine since its start, and the space of its process numbers where there are several.

    Host names alone are the same in copies of a container.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux has them
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
