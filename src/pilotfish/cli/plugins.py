"""`pilotfish plugins`. What a command needs is imported when it runs: help needs no torch."""

from __future__ import annotations

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
