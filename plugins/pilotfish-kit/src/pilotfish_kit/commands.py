"""`pilotfish plugins new` and `pilotfish plugins check`; help needs no torch."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

import click

import pilotfish

if TYPE_CHECKING:
    from .trial import Outcome

MARKS = {"ok": "ok", "failed": "FAILED", "not tried": "-"}


@click.command()
@click.argument("name")
@click.option("--prompt", default="a red cat", show_default=True, help="Of the runs.")
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: a small random one]")
@click.pass_context
def check(ctx: click.Context, name: str, prompt: str, model: str | None) -> None:
    """Try in short runs what every plugin must keep.

    NAME is an installed plugin, or FILE.py:Class, with settings as --use takes them. The exit code
    is 1 where something fails.

    \b
    pilotfish plugins check ./my_loss.py:Warmth
    pilotfish plugins check 'palette:colors=[#035,#fa0]'
    """
    from .contract import examine

    plugin = pilotfish.make_plugin(name)
    outcomes = examine(plugin, None if model is None else pilotfish.load(model), prompt)
    states = [str(outcome.status) for outcome in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in MARKS)
    click.echo("\n".join([repr(plugin), *map(line, outcomes), counts]))
    ctx.exit("failed" in states)


def line(outcome: Outcome) -> str:
    """What came of one check, its name, and its claim or what is wrong."""
    return textwrap.fill(
        outcome.message or outcome.check.claim,
        max(shutil.get_terminal_size().columns, 60),
        initial_indent=f"  {MARKS[outcome.status]:6}  {outcome.check.name:15}  ",
        subsequent_indent=" " * 27,
        break_on_hyphens=False,
    )


@click.command()
@click.argument("name")
def new(name: str) -> None:
    """Write a package for a plugin, ready to publish: ./pilotfish-NAME."""
    from .new import create, next_steps

    click.echo(next_steps(create(name)))
