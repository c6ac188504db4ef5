"""Seconds, floating-point operations, calls and bytes of rows; and that they compute the same."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from handwritten import Work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .rows import Answer, Bench, Row

LEAST_DIFFERENCE = 2  # of guided from unguided latents, in tolerances: or nothing was compared

Seconds = dict[str, dict[int, float]]  # row -> round -> seconds


def check(rows: dict[str, Row], work: Work) -> dict[str, float]:
    """How far rows that must be the same lie apart, as a part of the largest latent.

    Raises:
        RuntimeError: two rows do not compute the same, or a guide changes nothing.
    """
    answers = {name: row.run(work) for name, row in rows.items()}
    apart = {}
    for name, row in rows.items():
        if row.same_as is None:
            continue
        difference = apart[f"{name}/{row.same_as}"] = _apart(answers, name, row.same_as)
        if not difference <= row.tolerance:
            raise RuntimeError(f"{name} and {row.same_as} differ: {difference:.2g}")
        if row.tolerance == 0:
            _check_pictures(answers, name, row.same_as.replace(" latents", ""))
        elif _apart(answers, name, "U0 latents") < LEAST_DIFFERENCE * row.tolerance:
            raise RuntimeError(f"{name}: the guide changes too little; nothing would be compared")
    return apart


def _apart(answers: dict[str, Answer], name: str, other: str) -> float:
    latents, expected = (answers[n][0].double() for n in (name, other))
    return float((latents - expected).abs().max() / expected.abs().max())


def _check_pictures(answers: dict[str, Answer], name: str, other: str) -> None:
    if answers[name][0].dtype != torch.float32:
        return  # diffusers rounds pictures to half precision before it makes bytes of them
    for picture, expected in zip(answers[name][1], answers[other][1], strict=True):
        if picture.tobytes() != expected.tobytes():
            raise RuntimeError(f"{name} and {other}: equal latents, but other pictures")


def measure(
    rows: dict[str, Row],
    work: Work,
    rounds: int,
    minutes: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of every row in every round, in a shuffled order, after a warm-up of one step.

    `check` was the first warm-up. Ends with the round in which the minutes are over.
    """
    for row in rows.values():
        row.run(replace(work, steps=1))
    gc.collect()
    gc.freeze()  # the imported modules, or each collection takes longer than a fast row
    order, shuffle = list(rows), random.Random(0)
    seconds: Seconds = {name: {} for name in rows}
    end = time.monotonic() + 60 * minutes
    for index in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            if index % rows[name].every == 0:
                seconds[name][index] = stopwatch(lambda r=rows[name]: r.run(work), clock)
        if time.monotonic() > end:
            break
    return seconds


@contextlib.contextmanager
def clock_on(device: torch.device) -> Iterator[Callable[[], float]]:
    """Wall time on a GPU; on the CPU processor time of one thread: what else runs counts little."""
    if device.type == "cuda":
        yield time.perf_counter
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.process_time
    finally:
        torch.set_num_threads(threads)


def stopwatch(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, without the garbage of the calls before."""
    gc.collect()
    start = clock()
    run()  # ends with pictures in main memory, so a GPU has nothing left to do
    return clock() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min, max, and how many."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def ratio(seconds: Seconds, name: str, other: str, without: str | None = None) -> dict[str, float]:
    """Of two rows of the same round, each without the seconds of a third one."""
    shared = seconds[name].keys() & seconds[other].keys()
    values = []
    for index in sorted(shared):
        less = seconds[without][index] if without else 0.0
        values.append((seconds[name][index] - less) / (seconds[other][index] - less))
    return spread(values)


def slope(seconds: Seconds, letter: str, counts: Sequence[int], steps: str, none: str) -> dict:
    """What one more guide costs, in unguided steps: least squares over the number of guides.

    Args:
        letter: of the rows.
        steps, none: rows whose difference is the cost of the unguided steps.
    """
    shared = set.intersection(*(set(seconds[f"{letter}{count}"]) for count in counts))
    values = []
    for index in sorted(shared):
        ys = [seconds[f"{letter}{count}"][index] for count in counts]
        per_guide = statistics.linear_regression(counts, ys).slope
        values.append(per_guide / (seconds[steps][index] - seconds[none][index]))
    return spread(values)


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of all products and convolutions, attention written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def count_calls(bench: Bench, run: Callable[[], object]) -> dict[str, int]:
    """How often a row calls the network and the decoder."""
    with counted(bench.network) as network, counted(bench.pipeline.vae.decoder) as decoder:
        run()
    return {"network": len(network), "decoder": len(decoder)}


@contextlib.contextmanager
def counted(network: torch.nn.Module) -> Iterator[list[None]]:
    """A list that grows by one with each call of the network."""
    calls: list[None] = []
    hook = network.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors held at a time, beyond what they held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    held = peak = 0
    for change in _allocations(run):
        held += change
        peak = max(peak, held)
    return peak


def kept_bytes(run: Callable[[], object]) -> int:
    """What tensors hold on the CPU after a call beyond what they held before."""
    return sum(_allocations(run))


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes that tensors took (and gave back, below 0) on the CPU, in order."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def count(bench: Bench, row: Row, work: Work, device: torch.device) -> dict[str, int | None]:
    """A row's operations and calls in so many steps, and the peak memory of a step."""
    one = replace(work, steps=1)
    steps = 1 if row.steady else work.steps
    counts: dict[str, int | None] = {"steps": steps}
    counts |= dict.fromkeys(("flops", "network_calls", "decoder_calls"))
    if row.counted:

        def run() -> None:
            counts["flops"] = count_flops(lambda: row.run(replace(work, steps=steps)))

        calls = count_calls(bench, run)
        counts |= {f"{name}_calls": number for name, number in calls.items()}
    return {**counts, "peak_bytes": peak_bytes(lambda: row.run(one), device)}
