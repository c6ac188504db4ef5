"""Pictures over one or two settings of a run."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pilotfish import InputError, Result, Sampler, Stream, changed, split_values

from .layout import Shown, table


@dataclass(frozen=True)
class Axis:
    """A setting and its values: `plugins.blue.scale=0,50,200`.

    Attributes:
        key, values: as written; a text with a comma stands in quotes.
    """

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """An axis from text.

        Raises:
            InputError: it has no key or no values.
        """
        key, _, values = text.partition("=")
        found = tuple(split_values(values))
        if not key.strip() or not all(found):
            raise InputError(f"an axis is KEY=VALUE,VALUE,..., such as seed=1,2,3; got {text!r}")
        return cls(key.strip(), found)

    @property
    def changes(self) -> list[str]:
        """One for each value, as `pilotfish.changed` takes it."""
        return [f"{self.key}={value}" for value in self.values]

    @property
    def labels(self) -> list[str]:
        """One for each value, for people."""
        name = self.key.removeprefix("plugins.")
        return [f"{name} = {_unquoted(value)}" for value in self.values]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


class Grid(Shown):
    """One run for each pair of two settings' values; all are checked before the first runs.

    Args:
        start: begins a run from its content, the keyword arguments of `Sampler.stream`.
        content: what all runs have in common. A seed that is not given is drawn once for all.
        x: the setting from left to right, `KEY=VALUE,VALUE,...`.
        y: the setting from top to bottom; None is one row.

    Attributes:
        results: row by row; None where a run has not been made.

    Raises:
        InputError: an axis, or a value on it, is wrong; names the place.
    """

    def __init__(
        self,
        start: Callable[[dict[str, Any]], Stream],
        content: Mapping[str, Any],
        x: str,
        y: str | None = None,
    ) -> None:
        self.x, self.y = Axis.parse(x), Axis.parse(y) if y is not None else None
        if self.y is not None and self.y.key == self.x.key:
            raise InputError(f"the two axes must be two settings; got {self.x.key} twice")
        if content.get("seed") is None:
            content = {**content, "seed": secrets.randbelow(2**32)}
        rows = [[c] for c in self.y.changes] if self.y is not None else [[]]
        self._streams = [
            [self._begin(start, content, [x, *row]) for x in self.x.changes] for row in rows
        ]
        self.results: list[list[Result | None]] = [[None for _ in row] for row in self._streams]

    @staticmethod
    def _begin(
        start: Callable[[dict[str, Any]], Stream], content: Mapping[str, Any], changes: list[str]
    ) -> Stream:
        try:
            return start(functools.reduce(changed, changes, dict(content)))
        except InputError as error:
            raise InputError(f"{', '.join(changes)}: {error}") from error

    def __len__(self) -> int:
        """How many steps all runs have together."""
        return sum(len(stream) for row in self._streams for stream in row)

    def run(self, take: Callable[[Stream], Result] = Stream.result) -> None:
        """Make the pictures.

        Args:
            take: takes all steps of a run and gives its result; for who wants to watch.
        """
        for results, streams in zip(self.results, self._streams, strict=True):
            for column, stream in enumerate(streams):
                results[column] = take(stream)

    def picture(self) -> Image.Image:
        """The pictures with labelled axes; several images of one run stand side by side.

        Raises:
            InputError: no picture has been made.
        """
        return table(
            [[_side_by_side(r.images) if r else None for r in row] for row in self.results],
            columns=self.x.labels,
            rows=self.y.labels if self.y is not None else (),
        )


def grid(
    sampler: Sampler,
    prompt: str = "",
    *,
    x: str,
    y: str | None = None,
    plugins: Sequence[object] = (),
    **options: Any,
) -> Grid:
    """One picture for each pair of two settings' values.

    Args:
        x: from left to right, `KEY=VALUE,VALUE,...`: any keyword argument of the sampler
            (`seed=1,2,3`), a plugin's setting (`plugins.blue.scale=0,0.5,1`), or a knob of the
            preset (`recurrence=1,4`).
        y: the same from top to bottom; None is one row.
        plugins: as in `Sampler.__call__`.
        options: as in `Sampler.__call__`.

    Raises:
        InputError: something is wrong with any of the runs; none has been made then.
        PluginError, NonFiniteError: see `Sampler.__call__`.
    """
    content = {"prompt": prompt, "plugins": plugins, **options}
    made = Grid(lambda own: sampler.stream(**own), content, x, y)
    made.run()
    return made


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    widths = [picture.width for picture in pictures]
    joined = Image.new("RGB", (sum(widths), max(picture.height for picture in pictures)), "white")
    for number, picture in enumerate(pictures):
        joined.paste(picture, (sum(widths[:number]), 0))
    return joined
