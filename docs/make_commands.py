"""Writes docs/commands.md from the commands' own help: `python docs/make_commands.py`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from pilotfish.cli import main
from pilotfish.cli.program import OWN
from pilotfish.hooks.registry import COMMAND_GROUP, LIMIT, load_installed

FILE = Path(__file__).with_name("commands.md")
PROJECTS = sorted(FILE.parents[1].glob("plugins/*/pyproject.toml"))
WIDTH = 80

HEAD = """\
# Command line

<!-- Written by docs/make_commands.py; change the commands. -->

What `--help` says of each command.

Results go to standard output, progress and warnings to standard error. The exit code is 0 where all
went well, 1 where pilotfish refused or a check failed, 2 where the command line itself was wrong,
and 130 after Ctrl-C. An error is one line, and one more for each thing that is not what a picture
was made with; `--debug` shows its traceback.
"""


def page() -> str:
    """The whole page."""
    sections = [section(path) for path in paths(main, [])]
    sections += [section(path, source) for name, source in added() for path in added_paths(name)]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


def added() -> Iterator[tuple[str, str]]:
    """The commands that this repository's plugins add, each with its package."""
    for file in PROJECTS:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        for name in project.get("entry-points", {}).get(COMMAND_GROUP, {}):
            yield name, project["name"]


def added_paths(name: str) -> Iterator[list[str]]:
    """The paths of an added command, and of those in it."""
    return paths(load_installed(name, COMMAND_GROUP), name.split("."))


def paths(command: click.Command, path: list[str]) -> Iterator[list[str]]:
    """The words that call a command, and each command in it; not those that packages add."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in sorted(command.commands) if path else OWN:
            if found := command.get_command(context, name):
                yield from paths(found, [*path, name])


def section(path: list[str], package: str = "") -> str:
    """One command: its help, as a reader of the terminal gets it."""
    name = " ".join(["pilotfish", *path])
    told = f"\n\nComes with [{package}](../plugins/{package}/README.md)." if package else ""
    return f"## {name}{told}\n\n```text\n{help_of(path)}\n```"


def help_of(path: list[str]) -> str:
    """What `--help` prints."""
    only_ours = {LIMIT: ",".join(name for name, _ in added())}
    done = CliRunner(env=only_ours).invoke(
        main, [*path, "--help"], prog_name="pilotfish", terminal_width=WIDTH
    )
    if done.exit_code:
        raise SystemExit(f"pilotfish {' '.join(path)} --help: {done.output}")
    return done.stdout.strip()


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
