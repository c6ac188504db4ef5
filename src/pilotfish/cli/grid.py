"""`pilotfish grid`. What needs torch is imported when it runs: help needs none."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .program import debug_option

if TYPE_CHECKING:
    from ..sampling.sampler import Result, Sampler, Stream


@click.command()
@click.argument("run_file", metavar="RUN.toml")
@click.option("--x", required=True, metavar="KEY=VALUE,...", help="From left to right.")
@click.option("--y", metavar="KEY=VALUE,...", help="From top to bottom.")
@click.option("--out", default="grid.png", show_default=True, metavar="FILE", help="The picture.")
@click.option(
    "-s", "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one value: steps=20."
)
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: the run's own]")
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
@debug_option
def grid(
    run_file: str,
    x: str,
    y: str | None,
    out: str,
    changes: tuple[str, ...],
    model: str | None,
    device: str | None,
) -> None:
    """One picture for each pair of two settings' values, with labels.

    An axis takes what --set takes: a value of the run, a plugin's setting, a knob of the preset.
    All runs are checked before the first one starts.

    \b
    pilotfish generate "a campfire" --use blue --save-run run.toml
    pilotfish grid run.toml --x plugins.blue.scale=0,0.5,1 --y seed=1,2,3
    """
    from .overrides import compose

    content = compose(run_file, (), changes, {"model": model})
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print
        answer = make_grid(content, x, y, out, device)
    click.echo(answer)


def make_grid(content: dict[str, Any], x: str, y: str | None, out: str, device: str | None) -> str:
    """Make a grid and write it, also where it breaks off; what there is to tell."""
    from tqdm import tqdm

    from ..runs import pictures as images
    from ..view import Grid

    path, begin = images.check_writable(out), time.perf_counter()
    grid = Grid(starter(device), content, x, y)
    steps, rows = len(grid), grid.results
    try:
        with tqdm(total=steps, unit="step", file=sys.stderr) as bar:
            grid.run(functools.partial(watched, bar))
    finally:
        if rows[0][0]:
            images.save(grid.picture(), path)
    seconds = time.perf_counter() - begin
    return f"{path}  {len(rows[0])} x {len(rows)} pictures\n{steps} steps in {seconds:.1f} s"


def starter(device: str | None) -> Callable[[dict[str, Any]], Stream]:
    """What begins a run from its content; each model is loaded once."""
    from ..models.loading import load, quiet
    from ..sampling.sampler import Sampler

    quiet()

    @functools.cache
    def sampler(model: str | None, dtype: str | None) -> Sampler:
        return Sampler(load(model, device=device, dtype=dtype))

    def start(content: dict[str, Any]) -> Stream:
        return sampler(content.pop("model", None), content.pop("dtype", None)).stream(**content)

    return start


def watched(bar: Any, stream: Stream) -> Result:
    """A run's result, with a progress bar that goes on over all runs."""
    before = bar.n
    for step in stream:
        bar.update(before + step.index + 1 - bar.n)
    bar.update(before + len(stream) - bar.n)  # a run may be stopped early
    return stream.result()
