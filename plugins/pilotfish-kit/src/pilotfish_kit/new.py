"""Write a distribution for a plugin, ready to publish."""

from __future__ import annotations

import os
import re
import tempfile
from importlib.metadata import distributions, entry_points, version
from pathlib import Path
from string import Template

import pilotfish
from pilotfish import InputError

TEMPLATE = Path(__file__).with_name("template")
LONGEST = 28  # so that no line of the template grows too long


def create(name: str, parent: Path = Path()) -> Path:
    """Write `pilotfish-NAME` into a folder, all of it or nothing.

    Returns:
        The new folder.

    Raises:
        InputError: the name cannot be used, or something is there already.
    """
    check_name(name)
    folder = parent / f"pilotfish-{name}"
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; nothing was written")
    try:
        with tempfile.TemporaryDirectory(prefix=".pilotfish-", dir=parent) as workplace:
            draft = Path(workplace, folder.name)
            for path, text in render(name).items():
                draft.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
                draft.joinpath(path).write_text(text, encoding="utf-8")
            draft.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def check_name(name: str) -> None:
    """Check that a new plugin can have this name.

    Raises:
        InputError: it does not do for a package, a module and a class, or it is taken.
    """
    if not re.fullmatch(r"(?!pilotfish-)[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise InputError(
            "a plugin's name takes small letters, digits and single hyphens, begins with a letter, "
            f"has at most {LONGEST} characters and no pilotfish- before it; got {name!r}. "
            "For example: film-grain"
        )
    if name.startswith("test") or class_name(name) in {*pilotfish.__all__, "None", "Tensor"}:
        raise InputError(f"the name {name!r} has a meaning to pilotfish or pytest; choose another")
    packages = {distribution.name for distribution in distributions()}
    if f"pilotfish-{name}" in packages or entry_points(group="pilotfish.plugins", name=name):
        raise InputError(f"an installed package has the name {name!r} already; choose another")


def class_name(name: str) -> str:
    """`film-grain` -> `FilmGrain`."""
    return "".join(part.capitalize() for part in name.split("-"))


def render(name: str) -> dict[str, str]:
    """The files of a distribution, by their path in its folder."""
    words = {
        "name": name,
        "kind": class_name(name),
        "module": f"pilotfish_{name.replace('-', '_')}",
        "least": ".".join(version("pilotfish").split(".")[:2]),
    }
    files = {path.relative_to(TEMPLATE).with_suffix(""): path for path in TEMPLATE.rglob("*.txt")}
    return {
        Template(str(place)).substitute(words): Template(path.read_text("utf-8")).substitute(words)
        for place, path in sorted(files.items())
    }


def next_steps(folder: Path) -> str:
    """What was written, and what to do with it."""
    name = folder.name.removeprefix("pilotfish-")
    files = "".join(f"\n  {path}" for path in render(name))
    return f"""{folder}{os.sep}{files}

Next:
  cd {folder}
  python -m pip install -e ".[test]"
  python -m pytest
  pilotfish plugins check {name}
  pilotfish generate "a campfire" --use {name}"""
