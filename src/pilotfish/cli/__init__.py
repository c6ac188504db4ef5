"""The command line. Only the command that runs imports what it needs: help loads no torch."""

from __future__ import annotations

from importlib.metadata import version

import click

from .program import Program, debug_option

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Program, context_settings=CONTEXT)
@click.version_option(version("pilotfish"), prog_name="pilotfish")
@debug_option
def main() -> None:
    """Small plugins that pilot a big diffusion model.

    \b
    pilotfish generate "a campfire" --use blue:scale=0.5 --seed 32
    pilotfish plugins list
    pilotfish doctor
    """
