"""Writes docs/shipped.md from the plugins' metadata and classes: `python docs/make_shipped.py`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pilotfish import Guide
from pilotfish.cli.listing import docstring_summary, setting_rows
from pilotfish.hooks.plugin import implemented
from pilotfish.hooks.registry import COMMAND_GROUP, MODEL_GROUP, PLUGIN_GROUP, load_class

FILE = Path(__file__).with_name("shipped.md")
PROJECTS = sorted(FILE.parents[1].glob("plugins/*/pyproject.toml"))
ROUTINE = ("setup", "teardown")  # they say nothing of what a plugin is for

HEAD = """\
# The plugins that ship

Each package is installed by itself, and its page says what its plugins take and what was measured
with them. `pilotfish plugins list` tells what is installed, `pilotfish plugins show NAME` what a
plugin takes. This page is written by `docs/make_shipped.py` from the plugins; change it there.
"""

GUIDES = """\
## What every guide takes

A plugin whose hooks name `loss_guidance` is a guide. Beside its own settings it has these, which
pilotfish applies, not the plugin:
"""

ELSE = """\
## Models and commands

Packages may also bring models, for `--model` and `pilotfish.load`, and commands of their own:
"""


def page() -> str:
    """The whole page."""
    projects = [tomllib.loads(f.read_text(encoding="utf-8"))["project"] for f in PROJECTS]
    rows = [row for project in projects for row in plugins(project)]
    others = [row for project in projects for row in offers(project)]
    parts = [
        HEAD,
        table(("plugin", "what it does", "hooks", "package"), rows),
        GUIDES,
        table(*guide_settings()),
        ELSE,
        table(("name", "what", "package"), others),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def plugins(project: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each plugin of a package."""
    for name in entry_points(project, PLUGIN_GROUP):
        plugin = load_class(name)
        hooks = [hook for hook in implemented(plugin) if hook not in ROUTINE]
        links = ", ".join(f"[`{hook}`](hooks.md#{hook})" for hook in hooks)
        yield f"`{name}`", docstring_summary(plugin), links, link(project)


def offers(project: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each model and each command of a package."""
    for group, what in ((MODEL_GROUP, "model"), (COMMAND_GROUP, "command")):
        for name in entry_points(project, group):
            yield f"`{name.replace('.', ' ')}`", what, link(project)


def entry_points(project: dict[str, Any], group: str) -> Iterable[str]:
    """The names that a package gives in a group."""
    names: dict[str, str] = project.get("entry-points", {}).get(group, {})
    return names


def link(project: dict[str, Any]) -> str:
    """A package's name, leading to its page."""
    return f"[{project['name']}](../plugins/{project['name']}/README.md)"


def guide_settings() -> tuple[Sequence[str], Iterator[tuple[str, ...]]]:
    """The head, and a row for each setting of every guide."""
    head, *rows = setting_rows(Guide)
    return head, ((f"`{name}`", *rest) for name, *rest in rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell is no border."""
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
