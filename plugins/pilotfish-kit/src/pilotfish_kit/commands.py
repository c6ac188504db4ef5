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
@click.option("--family", metavar="NAME|all", help="A small random one of that family.")
@click.pass_context
def check(
    ctx: click.Context, name: str, prompt: str, model: str | None, family: str | None
) -> None:
    """Try in short runs what every plugin must keep.

    NAME is an installed plugin, or FILE.py:Class, with settings as --use takes them. The exit code
    is 1 where something fails.

    \b
    pilotfish plugins check ./my_loss.py:Warmth
    pilotfish plugins check 'palette:colors=[#035,#fa0]'
    pilotfish plugins check blue --family all
    """
    from pilotfish.testing import families, random_sampler

    from .contract import examine

    if model and family:
        raise click.UsageError("--model and --family are two models; give one")
    plugin, failed = pilotfish.make_plugin(name), False
    for each in families() if family == "all" else (family,):
        # Some families are made for pictures of 1024 pixels, which a check need not be of.
        sampler = random_sampler(family=each) if each else pilotfish.load(model) if model else None
        outcomes = examine(plugin, sampler, prompt, side=32 if each else None)
        states = [str(outcome.status) for outcome in outcomes]
        counts = ", ".join(f"{states.count(state)} {state}" for state in MARKS)
        title = f"{plugin!r} on {each}" if each else repr(plugin)
        click.echo("\n".join([title, *map(line, outcomes), counts]))
        failed = failed or "failed" in states
    ctx.exit(failed)


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
