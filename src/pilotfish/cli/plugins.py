"""`pilotfish plugins`. What a command needs is imported when it runs: help needs no torch."""

from __future__ import annotations

import contextlib
import sys

import click

from .program import Commands, debug_option


@click.group(cls=Commands)
def plugins() -> None:
    """What is installed, and what it takes."""


@plugins.command("list")
@debug_option
def list_plugins() -> None:
    """All installed plugins; none of them is imported.

    The environment variable PILOTFISH_PLUGINS limits what is found: names with commas, or none.
    """
    from .listing import list_text

    click.echo(list_text())


@plugins.command("show")
@click.argument("name")
@debug_option
def show_plugin(name: str) -> None:
    """One plugin's hooks and settings, with a block to paste.

    NAME is an installed plugin, or FILE.py:Class.
    """
    from .listing import show_text

    click.echo(show_text(name))


@plugins.command("check")
@click.argument("name")
@click.option("--prompt", default="a red cat", show_default=True, help="Of the runs.")
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: a small random one]")
@debug_option
@click.pass_context
def check_plugin(ctx: click.Context, name: str, prompt: str, model: str | None) -> None:
    """Try in short runs what every plugin must keep.

    NAME is an installed plugin, or FILE.py:Class, with settings as --use takes them. The exit code
    is 1 where something fails.

    \b
    pilotfish plugins check ./my_loss.py:Warmth
    pilotfish plugins check 'palette:colors=[#035,#fa0]'
    """
    from .check import report

    with contextlib.redirect_stdout(sys.stderr):  # what plugins print
        text, failed = report(name, prompt, model)
    click.echo(text)
    if failed:
        ctx.exit(1)


@plugins.command("new")
@click.argument("name")
@debug_option
def new_plugin(name: str) -> None:
    """Write a package for a plugin, ready to publish: ./pilotfish-NAME."""
    from .new import create, next_steps

    click.echo(next_steps(create(name)))
