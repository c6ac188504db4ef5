"""`pilotfish grid` and `pilotfish view`. What needs torch is imported when it runs."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pilotfish import Result, Sampler, Stream

    from . import Schedule, Tokens

MODEL = "FOLDER|HUB_ID|NAME"


@click.command()
@click.argument("run_file", metavar="RUN.toml")
@click.option("--x", required=True, metavar="KEY=VALUE,...", help="From left to right.")
@click.option("--y", metavar="KEY=VALUE,...", help="From top to bottom.")
@click.option("--out", default="grid.png", show_default=True, metavar="FILE", help="The picture.")
@click.option(
    "-s", "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one value: steps=20."
)
@click.option("--model", metavar=MODEL, help="[default: the run's own]")
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
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
    from pilotfish import Run, changed

    content = functools.reduce(changed, changes, Run.read(run_file))
    content.pop("made_with", None)  # these runs are others
    if model is not None:
        content["model"] = model
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print
        answer = make_grid(content, x, y, out, device)
    click.echo(answer)


def make_grid(content: dict[str, Any], x: str, y: str | None, out: str, device: str | None) -> str:
    """Make a grid and write it, also where it breaks off; what there is to tell."""
    from tqdm import tqdm

    from pilotfish import check_writable, load, save_picture

    from . import Grid

    sampler = functools.cache(functools.partial(load, device=device))  # each model is loaded once

    def start(content: dict[str, Any]) -> Stream:
        model, *more = (content.pop(key, None) for key in ("model", "dtype", "config"))
        return sampler(model, dtype=more[0], config=more[1]).stream(**content)

    path, begin = check_writable(out), time.perf_counter()
    grid = Grid(start, content, x, y)
    steps, rows = len(grid), grid.results
    try:
        with tqdm(total=steps, unit="step", file=sys.stderr) as bar:
            grid.run(functools.partial(watched, bar))
    finally:
        if rows[0][0]:
            save_picture(grid.picture(), path)
    seconds = time.perf_counter() - begin
    return f"{path}  {len(rows[0])} x {len(rows)} pictures\n{steps} steps in {seconds:.1f} s"


def watched(bar: Any, stream: Stream) -> Result:
    """A run's result, with a progress bar that goes on over all runs."""
    before = bar.n
    for step in stream:
        bar.update(before + step.index + 1 - bar.n)
    bar.update(before + len(stream) - bar.n)  # a run may be stopped early
    return stream.result()


@click.group()
def view() -> None:
    """Look at a scheduler or a prompt."""


@view.command("schedule")
@click.argument("scheduler", metavar="NAME")
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--model", metavar=MODEL, help="[default: the emoji model]")
@click.option("--out", metavar="FILE", help="Also draw a plot, which takes matplotlib.")
def view_schedule(scheduler: str, steps: int, model: str | None, out: str | None) -> None:
    """Timestep, alpha and sigma of each step of a scheduler.

    \b
    pilotfish view schedule euler --steps 30 --out schedule.png
    """
    from . import schedule

    networks = loaded(model, out).model
    tell(schedule(networks.new_scheduler(scheduler), steps, networks), out)


@view.command("tokens")
@click.argument("prompt")
@click.option("--model", metavar=MODEL, help="[default: the emoji model]")
@click.option("--out", metavar="FILE", help="Also draw a picture.")
def view_tokens(prompt: str, model: str | None, out: str | None) -> None:
    """How a model cuts PROMPT into tokens.

    \b
    pilotfish view tokens "a watercolor of a cat"
    """
    from . import tokens

    tell(tokens(loaded(model, out), prompt), out)


def loaded(model: str | None, out: str | None) -> Sampler:
    """A model, once it is clear that the picture can be written."""
    from pilotfish import check_writable, load

    if out is not None:
        check_writable(out)
    return load(model, device="cpu")


def tell(shown: Schedule | Tokens, out: str | None) -> None:
    """Print a table, and write its picture where one is asked for."""
    from pilotfish import save_picture

    click.echo(shown)
    if out is not None:
        save_picture(shown.picture(), out)
