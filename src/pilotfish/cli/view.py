"""`pilotfish view`. What needs torch is imported when it runs: help needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .program import Commands, debug_option

if TYPE_CHECKING:
    from ..sampling.sampler import Sampler
    from ..view import Schedule, Tokens


@click.group(cls=Commands)
def view() -> None:
    """Look at a scheduler or a prompt."""


@view.command("schedule")
@click.argument("scheduler", metavar="NAME")
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: the emoji model]")
@click.option("--out", metavar="FILE", help="Also draw a plot, which takes matplotlib.")
@debug_option
def view_schedule(scheduler: str, steps: int, model: str | None, out: str | None) -> None:
    """Timestep, alpha and sigma of each step of a scheduler.

    \b
    pilotfish view schedule euler --steps 30 --out schedule.png
    """
    from ..view import schedule

    sampler = loaded(model, out)
    tell(schedule(sampler.model.new_scheduler(scheduler), steps), out)


@view.command("tokens")
@click.argument("prompt")
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: the emoji model]")
@click.option("--out", metavar="FILE", help="Also draw a picture.")
@debug_option
def view_tokens(prompt: str, model: str | None, out: str | None) -> None:
    """How a model cuts PROMPT into tokens.

    \b
    pilotfish view tokens "a watercolor of a cat"
    """
    from ..view import tokens

    tell(tokens(loaded(model, out), prompt), out)


def loaded(model: str | None, out: str | None) -> Sampler:
    """A model, once it is clear that the picture can be written."""
    from ..models.loading import load, quiet
    from ..runs.pictures import check_writable
    from ..sampling.sampler import Sampler

    if out is not None:
        check_writable(out)
    quiet()
    return Sampler(load(model, device="cpu"))


def tell(shown: Schedule | Tokens, out: str | None) -> None:
    """Print a table, and write its picture where one is asked for."""
    from ..runs.pictures import save

    click.echo(shown)
    if out is not None:
        save(shown.picture(), out)
