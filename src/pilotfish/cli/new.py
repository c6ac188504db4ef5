"""What `pilotfish plugins new` does: write a distribution that is ready to publish."""

from __future__ import annotations

import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

import pilotfish

from ..errors import InputError
from ..hooks.registry import hidden, installed
from .template import FILES

PATTERN = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 28  # so that no line of the template grows too long


def create(name: str, parent: Path = Path()) -> Path:
    """Write `pilotfish-NAME` into a folder, all of it or nothing.

    Returns:
        The new folder.

    Raises:
        InputError: the name cannot be used, or something is there already.
    """
    check_free(check_name(name))
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


def check_name(name: str) -> str:
    """A new plugin's name.

    Raises:
        InputError: it does not do for a package, a module and a class.
    """
    bare = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("pilotfish-")
    if name != bare or not PATTERN.fullmatch(name) or len(name) > LONGEST:
        good = bare if PATTERN.fullmatch(bare) and len(bare) <= LONGEST else "warmth"
        raise InputError(
            "a plugin's name takes small letters, digits and single hyphens, begins with a letter, "
            f"has at most {LONGEST} characters and no pilotfish- before it; got {name!r}. "
            f"For example: {good}"
        )
    if name == "none" or class_name(name) in {*pilotfish.__all__, "Tensor"}:
        raise InputError(f"the name {name!r} has a meaning in pilotfish already; choose another")
    if name.startswith("test"):
        raise InputError(
            f"pytest would take the class {class_name(name)} for tests; choose another name"
        )
    return name


def check_free(name: str) -> None:
    """Refuse what would clash with an installed plugin or package."""
    if name in installed() or name in hidden():
        raise InputError(f"there is an installed plugin {name!r} already; choose another name")
    try:
        found = version(f"pilotfish-{name}")
    except PackageNotFoundError:
        return
    raise InputError(f"the package pilotfish-{name} {found} is installed; choose another name")


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
    return {
        Template(path).substitute(words): Template(text).substitute(words)
        for path, text in FILES.items()
    }


def next_steps(folder: Path) -> str:
    """What was written, and what to do with it."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    name = folder.name.removeprefix("pilotfish-")
    lines = [f"{folder}{os.sep}", *(f"  {file}" for file in files)]
    commands = [
        f"cd {folder}",
        'python -m pip install -e ".[test]"',
        "python -m pytest",
        f"pilotfish plugins check {name}",
        f'pilotfish generate "a campfire" --use {name}',
    ]
    return "\n".join([*lines, "", "Next:", *(f"  {command}" for command in commands)])
