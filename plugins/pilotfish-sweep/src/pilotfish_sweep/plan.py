"""A sweep: a run with axes, and the cells that it comes to."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

import pilotfish
from pilotfish import InputError, make_plugin

from .axes import ZIP, Dimension, dimensions

MODEL = ("model", "config", "dtype")  # of a run file, as `pilotfish.load` takes them
CHECKED = 1000  # values of an axis that are tried before the first cell is made
SEED = 0  # of a sweep that leaves it open: the same file is the same cells


class Cell(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: the hash of its content.
        values: one for each of the sweep's keys.
        batch: cells of one model and prompt have one number.
    """

    name: str
    values: tuple[Any, ...]
    batch: int


@dataclass(frozen=True)
class Sweep:
    """A sweep file's content.

    Attributes:
        base: what all cells have in common, the content of a run file.
        dimensions: see `axes.dimensions`.
        scores: tables of guides with `use`, or of functions with `judge`, that judge each picture.
    """

    base: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    scores: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """The sweep of a file.

        Raises:
            InputError: it cannot be read, or is none; names the place.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"cannot read the sweep file {path}: {error}") from None
        try:
            return cls.of(content, Path(path).parent, str(path))
        except InputError as error:
            told = str(error)
            raise InputError(told if told.startswith(str(path)) else f"{path}: {told}") from error

    @classmethod
    def of(cls, content: Mapping[str, Any], folder: Path, origin: str = "the sweep") -> Sweep:
        """The sweep of a file's content; files of values are looked for in the folder.

        Raises:
            InputError: it is none; names the place.
        """
        rest = dict(content)
        axes, scores = rest.pop("axes", None), rest.pop("scores", [])
        if axes is None:
            raise InputError(f"{origin} has no [axes]: what is to vary, such as seed = [1, 2, 3]")
        if not isinstance(scores, list) or not all(isinstance(s, dict) for s in scores):
            raise InputError(f"{origin}: scores must be [[scores]] tables with use or judge")
        base, found = pilotfish.Run.parse(tomli_w.dumps(rest), origin), dimensions(axes, folder)
        base.pop("made_with", None)  # its cells are other runs
        if "seed" not in base and not any("seed" in dimension.keys for dimension in found):
            base["seed"] = SEED
        return cls(base, tuple(found), tuple(scores))

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that vary."""
        return tuple(key for dimension in self.dimensions for key in dimension.keys)

    @property
    def scored(self) -> str:
        """The hash of what judges the pictures."""
        return hashed(self.scores)

    def content(self, values: Sequence[Any]) -> dict[str, Any]:
        """A cell's content, that of a run file."""
        return functools.reduce(_with, zip(self.keys, values, strict=True), self.base)

    def cells(self) -> list[Cell]:
        """All cells, each once; those of one model and prompt follow each other."""
        batches: dict[str, int] = {}
        found: dict[str, Cell] = {}
        for content, values in _product(self.dimensions, self.base):
            name = hashed(content)
            if name not in found:
                shared = json.dumps([content.get(key) for key in (*MODEL, "prompt")])
                found[name] = Cell(name, values, batches.setdefault(shared, len(batches)))
        return sorted(found.values(), key=lambda cell: cell.batch)

    def check(self) -> None:
        """Try every value of every axis, of long ones the first thousand, and every score.

        Raises:
            InputError, PluginError: a run cannot have it; names the axis and the value.
        """
        first = [dimension.rows[0] for dimension in self.dimensions]
        check_run(self.content([*itertools.chain(*first)]), "the first cell")
        for at, dimension in enumerate(self.dimensions):
            for row in itertools.islice(dimension.rows, 1, CHECKED):
                values = itertools.chain(*first[:at], row, *first[at + 1 :])
                told = ", ".join(f"{k} = {v!r}" for k, v in zip(dimension.keys, row, strict=True))
                check_run(self.content([*values]), told)
        for score in self.scores:
            if "use" in score:
                make_plugin(score)
            elif not isinstance(score.get("judge"), str):
                raise InputError(
                    "scores: a table needs use, a guide's name, or judge, a function as "
                    f"MODULE:NAME or FILE.py:NAME; got {score!r}"
                )

    def to_toml(self) -> str:
        """The sweep as a file, with every value written out, so that it needs no other file."""
        axes: dict[str, Any] = {}
        for dimension in self.dimensions:
            columns = zip(*dimension.rows, strict=True)
            table = {k: list(c) for k, c in zip(dimension.keys, columns, strict=True)}
            if len(table) == 1:
                axes |= table
            else:
                axes.setdefault(ZIP, []).append(table)
        return tomli_w.dumps({**self.base, "axes": axes, "scores": list(self.scores)})


def hashed(content: Any) -> str:
    """32 hexadecimal digits that stand for a content, in whatever order its keys are written."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_run(content: Mapping[str, Any], told: str) -> None:
    """Refuse what no sampler would begin with, as far as that is known without a model.

    Raises:
        InputError, PluginError: begins with what is told of the cell.
    """
    own = {k: v for k, v in content.items() if k not in (*MODEL, "plugins")}
    try:
        pilotfish.Run(**own)
        for item in content["plugins"]:
            make_plugin(item)
    except InputError as error:
        raise InputError(f"{told}: {error}") from error


def _with(content: dict[str, Any], item: tuple[str, Any]) -> dict[str, Any]:
    return pilotfish.with_value(content, *item)  # which takes torch: imported here


def _product(
    dimensions: Sequence[Dimension], content: dict[str, Any], before: tuple[Any, ...] = ()
) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Content and values of each cell; the last dimension varies first."""
    if not dimensions:
        yield content, before
        return
    dimension, *others = dimensions
    for row in dimension.rows:
        own = functools.reduce(_with, zip(dimension.keys, row, strict=True), content)
        yield from _product(others, own, before + row)
