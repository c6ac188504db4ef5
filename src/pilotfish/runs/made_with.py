"""What a picture was made with, beside its settings: weights, packages, input files."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pydantic

from ..errors import InputError
from ..hooks.registry import hidden, installed

EACH, ALL = 256_000, 1_000_000  # bytes of the input files that travel in a run
# Of those that do: data, which no loader here runs as code (as it may pickles).
CARRIED: Final = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    ".safetensors",
)
Tables = Iterable[Mapping[str, Any]]


class MadeWith(pydantic.BaseModel):
    """What else a run needs to give the same picture.

    Attributes:
        pilotfish: its version.
        weights: the model's fingerprint; None if unknown.
        packages: of each installed plugin, by its name: `pilotfish-clip 0.1.0`.
        files: SHA-256 of each file that a plugin's setting names, and of each file with a plugin.
        embedded: small ones of these inputs themselves, in base64.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    pilotfish: str | None = None
    weights: str | None = None
    packages: dict[str, str] = {}
    files: dict[str, str] = {}
    embedded: dict[str, str] = {}

    @classmethod
    def here(
        cls,
        tables: Tables,
        weights: str | None = None,
        embed: bool = False,
        places: Mapping[str, Path] | None = None,
    ) -> MadeWith:
        """What a run with these plugins would be made with now.

        Args:
            embed: with the input files in it, if they are small.
            places: where files are that do not lie where the settings say.
        """
        tables, known = list(tables), installed()
        uses = {str(table.get("use")) for table in tables}
        found = {name: (places or {}).get(name) or _file(name) for name in named(tables)}
        inputs = {name: path for name, path in found.items() if path is not None}
        code = {name: _file(name) for name in map(_plugin_file, uses) if name}
        return cls(
            pilotfish=_version(),
            weights=weights,
            packages={use: known[use][0].package for use in sorted(uses & known.keys())},
            files={name: _hash(path) for name, path in {**inputs, **code}.items() if path},
            embedded=_carried(inputs) if embed else {},
        )

    def differences(self, tables: Tables, here: MadeWith) -> Iterator[str]:
        """What of a run's plugins would be missing or other than it was: a line for each."""
        tables = list(tables)
        for use in dict.fromkeys(str(table.get("use")) for table in tables):
            if use in self.packages and use not in here.packages and use not in hidden():
                yield f"plugin {use!r} is not installed: {_advice(self.packages[use])}"
        for name in (*named(tables), *(_plugin_file(str(t.get("use"))) for t in tables)):
            if name in self.files and self.files[name] != here.files.get(name):
                what = "has changed" if name in here.files else "is missing"
                yield f"{name!r} {what}: put the file there that the picture was made with"

    def releases(self, here: MadeWith) -> Iterator[str]:
        """Which packages are here in other versions: a line for each."""
        both = [(self.packages.get(use, now), now) for use, now in here.packages.items()]
        if self.pilotfish is not None:
            both.append((f"pilotfish {self.pilotfish}", f"pilotfish {here.pilotfish}"))
        for was, now in dict.fromkeys(both):
            if was != now:
                yield f"{_advice(was)}; here is {now}"

    def other_weights(self, here: MadeWith) -> Iterator[str]:
        """Whether the model is another one, in a line."""
        if self.weights is not None and self.weights != here.weights:
            now = here.weights or "unknown, as it is offloaded"
            yield (
                f"the model has other weights, or another dtype: made with {self.weights}, here "
                f"{now}; load the model that the picture was made with, in its dtype"
            )

    def unpacked(self) -> Unpacked:
        """The files that travelled along, written to a folder of their own.

        Raises:
            InputError: one is of a kind that does not travel, too large, or not what its hash says.
        """
        if sum(map(len, self.embedded.values())) > 4 * (ALL // 3 + len(self.embedded)):
            raise InputError(f"the run's input files are too large; at most {ALL} bytes are read")
        return Unpacked.of({name: self._content(name) for name in self.embedded})

    def _content(self, name: str) -> bytes:
        text = self.embedded[name]
        if Path(name).suffix.lower() not in CARRIED:
            raise InputError(
                f"a run carries no input such as {name!r}; {', '.join(CARRIED)} can be"
            )
        try:
            content = base64.b64decode(text, validate=True)
        except ValueError:
            content = b""
        if len(content) > EACH or hashlib.sha256(content).hexdigest() != self.files.get(name):
            raise InputError(
                f"the input {name!r} in the run is broken: it must have at most {EACH} bytes, and "
                "those that its hash under made_with.files is of. Take another copy of the picture"
            )
        return content


@dataclass(frozen=True)
class Unpacked:
    """Input files in a folder that goes when nothing refers to them any more.

    Attributes:
        places: where each is, by what the run calls it.
    """

    places: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, contents: Mapping[str, bytes]) -> Unpacked:
        """These contents as files, by what the run calls them."""
        if not contents:
            return cls()
        folder = Path(tempfile.mkdtemp(prefix="pilotfish-inputs-"))
        # Nothing of a stranger's name but its ending.
        names = {n: folder / f"{i}{Path(n).suffix.lower()}" for i, n in enumerate(contents)}
        own = cls(names)
        weakref.finalize(own, shutil.rmtree, folder, ignore_errors=True)
        for name, place in names.items():
            place.write_bytes(contents[name])
        return own

    def local(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """A plugin's table, whose settings name the files where they are."""
        return _renamed(table, {name: str(path) for name, path in self.places.items()})

    def called(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table as the run has it: `local` backwards."""
        return _renamed(table, {str(path): name for name, path in self.places.items()})


def tell(differences: Iterable[str], anyway: bool) -> None:
    """Refuse a run that would give another picture; or tell, a warning for each difference.

    Raises:
        InputError: there are some, and it is not to go on anyway.
    """
    lines = list(differences)
    if lines and not anyway:
        raise InputError(
            "this would be another picture than the one that was made:\n"
            + "".join(f"  {line}\n" for line in lines)
            + "To go on all the same: --anyway, or anyway=True in Python"
        )
    for line in lines:
        warnings.warn(f"another picture: {line}", stacklevel=3)


@functools.cache  # it is read from a file
def _version() -> str:
    return version("pilotfish")


def texts(value: Any) -> Iterator[str]:
    """All texts in a setting's value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a plugin's table has beside its class and its name."""
    return {key: value for key, value in table.items() if key not in ("use", "name")}


def named(tables: Tables) -> list[str]:
    """All texts in plugins' settings, each once: some name files."""
    return list(dict.fromkeys(text for table in tables for text in texts(settings(table))))


def _file(text: str) -> Path | None:
    """The file that a text names, if there is one: with an ending or a folder, unlike words."""
    path = os.path.expanduser(text)
    looks_like_one = os.path.dirname(text) or os.path.splitext(text)[1]
    readable = os.path.isfile(path) and os.access(path, os.R_OK)
    return Path(path) if looks_like_one and readable else None


def _plugin_file(use: str) -> str:
    """The file in `file.py:Class`; or nothing."""
    found = re.fullmatch(r"(.*\.py)(:.*)?", use)
    return found[1] if found else ""


def _hash(path: Path) -> str:
    about = path.stat()
    if about.st_size < ALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _hash_of(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache  # each run of a LoRA of 200 MB would wait for it
def _hash_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _carried(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Those input files that a run carries; tells of the others."""
    room, found = ALL, {}
    for name, path in inputs.items():
        size = path.stat().st_size
        if path.suffix.lower() not in CARRIED or size > min(EACH, room):
            warnings.warn(
                f"{name!r} does not travel in the run ({size} bytes): only {', '.join(CARRIED)} "
                f"of at most {EACH} bytes, {ALL} in all, do",
                stacklevel=2,
            )
        else:
            room -= size
            found[name] = base64.b64encode(path.read_bytes()).decode()
    return found


def _advice(package: str) -> str:
    """What a package's name and version say; the file may come from anybody."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*) ([\w.+!-]+)", package, re.ASCII)
    told = f"made with {package!r}"
    return f"made with {package}: pip install {found[1]}=={found[2]}" if found else told


def _renamed(table: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, Mapping):
            return {renamed(key): renamed(item) for key, item in value.items()}
        return [*map(renamed, value)] if isinstance(value, list | tuple) else value

    return {**table, **renamed(settings(table))}
