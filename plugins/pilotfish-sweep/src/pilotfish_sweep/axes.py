"""The `[axes]` of a sweep: what varies, and which values go together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish import InputError

ZIP, RANDOM = "zip", "random"
AN_AXIS = (
    "a list of values, {from = 0, to = 1, count = 5}, {from = 1, to = 9, step = 2} or "
    '{file = "prompts.txt"}'
)
A_DRAW = "{uniform = [0, 1]}, {log_uniform = [0.01, 10]}, {integers = [0, 99]} or a list of choices"


@dataclass(frozen=True)
class Dimension:
    """Settings that vary together; the cells of a sweep are the product of its dimensions.

    Attributes:
        keys: the settings, as `pilotfish.with_value` takes them.
        rows: a value of each key in each row.
    """

    keys: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def dimensions(table: Mapping[str, Any], folder: Path) -> list[Dimension]:
    """The dimensions of an `[axes]` table; a preset's name comes before its knobs.

    Args:
        table: settings with their values; `[[axes.zip]]` tables, whose axes go together row by
            row; `[axes.random]`, whose axes are drawn together.
        folder: where a file of values is looked for.

    Raises:
        InputError: an axis is none, the lengths of a zip differ, or a setting varies twice.
    """
    if not isinstance(table, Mapping) or not table:
        raise InputError(
            f"[axes] must be a table of settings, such as seed = [1, 2]; got {table!r}"
        )
    found = [
        Dimension((key,), tuple((value,) for value in values(spec, key, folder)))
        for key, spec in table.items()
        if key not in (ZIP, RANDOM)
    ]
    zips = table.get(ZIP, [])
    for group in zips if isinstance(zips, list) else [zips]:
        found.append(_zipped(group, folder))
    if RANDOM in table:
        found.append(_drawn(table[RANDOM]))
    keys = [key for dimension in found for key in dimension.keys]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"axes: {twice[0]} varies twice; give all of its values in one axis")
    # Another preset takes the place of changed knobs, so it must be there before them.
    return sorted(found, key=lambda dimension: "preset" not in dimension.keys)


def values(spec: Any, key: str, folder: Path) -> list[Any]:
    """The values of one axis.

    Raises:
        InputError: it is none, has no value, or its file cannot be read.
    """
    problem = f"axes: {key} must be {AN_AXIS}; got {spec!r}"
    if isinstance(spec, list):
        found = spec
    elif isinstance(spec, Mapping) and {*spec} == {"file"}:
        found = _lines(folder / str(spec["file"]), key)
    elif isinstance(spec, Mapping) and {"from", "to"} <= {*spec}:
        found = _range(spec, problem)
    elif isinstance(spec, Mapping) and not {*spec} & {"from", "to", "file"}:
        first = next(iter(spec), "")
        raise InputError(f'axes: write "{key}.{first}" in quotes if it is one setting; {problem}')
    else:
        raise InputError(problem)
    if not found:
        raise InputError(f"axes: {key} has no values")
    return found


def _lines(path: Path, key: str) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"axes: cannot read the file of {key}, {path}: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _range(spec: Mapping[str, Any], problem: str) -> list[Any]:
    """`from` to `to`, both included where the step meets `to`."""
    more = {key: value for key, value in spec.items() if key not in ("from", "to")}
    first, last = _two_numbers([spec["from"], spec["to"]], problem)
    if more.keys() <= {"count", "spacing"} and "count" in more:
        count, spacing = more["count"], more.get("spacing", "linear")
        log = spacing == "log"
        if not _whole(count) or count < 1 or spacing not in ("linear", "log"):
            raise InputError(problem)
        if log and min(first, last) <= 0:
            raise InputError(f"{problem}; spacing log takes numbers above 0")
        return [_between(first, last, i / max(count - 1, 1), log) for i in range(count)]
    step = more.get("step", 1)
    if more.keys() <= {"step"} and _number(step) and step != 0 and (last - first) / step >= 0:
        # Multiplied, not added up, so that no error grows; the margin is for 0.1 * 3 > 0.3.
        count = math.floor((last - first) / step + 1e-9) + 1
        return [_decimal(first + i * step) for i in range(count)]
    raise InputError(problem)


def _between(first: float, last: float, part: float, log: bool) -> float:
    """A part 0 to 1 of the way, exact at both ends."""
    if part in (0, 1):
        return last if part else first
    return _decimal(first * (last / first) ** part if log else first + (last - first) * part)


def _decimal(value: float) -> float:
    """0.3, not 0.30000000000000004: what a person would have written, and so the same cell."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _zipped(group: Any, folder: Path) -> Dimension:
    if not isinstance(group, Mapping) or not group:
        raise InputError(f"axes: zip must be [[axes.zip]] tables of axes; got {group!r}")
    columns = {key: values(spec, key, folder) for key, spec in group.items()}
    if len({len(column) for column in columns.values()}) > 1:
        told = ", ".join(f"{len(column)} of {key}" for key, column in columns.items())
        raise InputError(f"axes: a zip takes as many values of each setting; got {told}")
    return Dimension(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def _drawn(group: Any) -> Dimension:
    """Random search: each draw depends on the seed, its number and its key alone."""
    group = dict(group) if isinstance(group, Mapping) else {}
    count, seed = group.pop("count", None), group.pop("draw_seed", 0)
    if not _whole(count) or count < 1 or not _whole(seed) or not group:
        raise InputError(
            "axes: random must be a table with count = N, if need be draw_seed = N, and a setting "
            f"or more: {A_DRAW}"
        )
    draws = {key: _distribution(spec, key) for key, spec in group.items()}
    rows = (
        tuple(draw(random.Random(f"{seed} {number} {key}")) for key, draw in draws.items())
        for number in range(count)
    )
    return Dimension(tuple(draws), tuple(rows))


def _distribution(spec: Any, key: str) -> Callable[[random.Random], Any]:
    """What draws a value; by `random()` alone, the one method that Python keeps as it is."""
    problem = f"axes: random: {key} must be {A_DRAW}; got {spec!r}"
    if isinstance(spec, list) and spec:
        return lambda own: spec[int(own.random() * len(spec))]
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise InputError(problem)
    ((kind, ends),) = spec.items()
    first, last = _two_numbers(ends, problem)
    if kind == "uniform":
        return lambda own: _between(first, last, own.random(), log=False)
    if kind == "log_uniform" and min(first, last) > 0:
        return lambda own: _between(first, last, own.random(), log=True)
    if kind == "integers" and _whole(first) and _whole(last) and first <= last:
        return lambda own: int(first + own.random() * (last + 1 - first))
    raise InputError(problem)


def _two_numbers(ends: Any, problem: str) -> tuple[float, float]:
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_number, ends)):
        raise InputError(problem)
    return ends[0], ends[1]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
