"""How long a device takes for a part of its work, without waiting for it in between."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

Span = tuple[Any, Any]  # two marks


def mark(device: torch.device) -> Any:
    """This moment in what a device does: on CUDA, which works behind Python, not Python's own."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds(spans: Iterable[Span]) -> float:
    """The sum of spans that the device has done."""
    return sum(_between(start, end) for start, end in spans)


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000  # CUDA's milliseconds
