"""How the fuzzing tests draw their cases, and what each of them must keep to."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Of each test. `make fuzz` asks for many more, and for other ones each time.
EXAMPLES = int(os.environ.get("PILOTFISH_FUZZ", "0"))
SECONDS, BYTES = 5, 2**30


def fuzzed(usual: int, part: float = 1.0):
    """A hypothesis test of so many examples, always the same ones; or of `PILOTFISH_FUZZ`.

    Args:
        part: of `PILOTFISH_FUZZ`, where a case is dear, or several tests share the number.
    """
    return settings(
        max_examples=round(EXAMPLES * part) or usual,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,  # `bounded` has one, in the process's own time
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def bounded(folder: Path | None = None) -> Iterator[None]:
    """No case takes 5 seconds of a core or 1 GB more, or leaves a file in the folder."""
    before, begin, there = peak(), time.process_time(), files(folder)
    yield
    assert time.process_time() - begin < SECONDS
    assert peak() - before < BYTES
    assert files(folder) == there


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def files(folder: Path | None) -> list[Path]:
    return sorted(folder.rglob("*")) if folder is not None else []


@st.composite
def mutated(draw, whole: bytes, least: int = 1) -> bytes:
    """A file with some of its bytes changed, taken out, doubled or put in, or its end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(least, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 9))
        match draw(st.sampled_from(["change", "flip", "delete", "insert", "double", "cut"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "flip":
                data[at : at + 1] = bytes(b ^ (1 << length % 8) for b in data[at : at + 1])
            case "delete":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "double":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
    return bytes(data)
