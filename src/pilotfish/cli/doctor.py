"""`pilotfish doctor`: versions, devices, models, plugins and commands, and what is broken."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from ..hooks.plugin import implemented
from ..hooks.registry import (
    COMMAND_GROUP,
    FAMILY_GROUP,
    MODEL_GROUP,
    PLUGIN_GROUP,
    Installed,
    find,
    installed,
    load_class,
    load_installed,
    load_object,
)
from .listing import columns, limit_note, metadata_problem
from .program import debug_option

NEEDED = ("pilotfish", "torch", "diffusers", "transformers", "pluggy", "pydantic")
OPTIONAL = ("torchvision", "open-clip-torch", "matplotlib")
NONE = {
    "guiding, computed for bfloat16": "this machine does not say how much memory it has",
    "model families": "none: reinstall pilotfish",
    "models": "none installed; `pip install pilotfish-emoji` gives one that runs offline",
    "plugins": "none",
    "commands": "none beside pilotfish's own",
}


@dataclass(frozen=True)
class Finding:
    """One line: what, what about it, and what is wrong with it, if anything."""

    name: str
    detail: str
    fault: str | None = None


@click.command()
@debug_option
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Look at versions, devices, models and plugins; exit code 1 where something is broken."""
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print when they are imported
        text, broken = examine()
    click.echo(text)
    if broken:
        ctx.exit(1)


def examine() -> tuple[str, int]:
    """Everything as text, and the number of things that are broken."""
    sections = {
        "versions": [*versions(), *networks()],
        "devices": devices(),
        "guiding, computed for bfloat16": list(guiding()),
        "model families": list(offers(FAMILY_GROUP, _check_family)),
        "models": list(offers(MODEL_GROUP, _check_model)),
        "plugins": list(offers(PLUGIN_GROUP, _check_plugin)),
        "commands": list(
            offers(COMMAND_GROUP, lambda entry: load_installed(entry.name, COMMAND_GROUP))
        ),
    }
    parts = []
    for title, findings in sections.items():
        rows = [(f.name, f.detail, f"BROKEN: {f.fault}" if f.fault else "") for f in findings]
        parts.append(f"{title}\n" + (columns(rows, "  ") if rows else f"  {NONE[title]}"))
    parts += filter(None, [limit_note()])
    broken = sum(f.fault is not None for findings in sections.values() for f in findings)
    parts.append(f"{broken} broken: see above." if broken else "All is well.")
    return "\n\n".join(parts), broken


def versions() -> Iterator[Finding]:
    """Python and the packages that matter."""
    yield Finding("python", platform.python_version())
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            if name in NEEDED:
                yield Finding(name, "", "not installed")


def networks() -> Iterator[Finding]:
    """Whether diffusers and transformers import, and next to which torchvision."""
    if fault := attempt(lambda: importlib.import_module("pilotfish.models.stable_diffusion")):
        yield Finding("the networks", "diffusers or transformers", fault)
    if importlib.util.find_spec("torchvision") is not None and attempt(_torch) is None:
        from ..models import torchvision as torchvision_fakes

        state = torchvision_fakes.state()
        mended = "" if state == "whole" else " (mended: its transforms work)"
        yield Finding("torchvision is", state + mended)


def _torch() -> None:
    importlib.import_module("torch")


def devices() -> list[Finding]:
    """Where networks can run."""
    if fault := attempt(_torch):
        return [Finding("torch", "", fault)]
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        gib = torch.cuda.get_device_properties(i).total_memory / 2**30
        found.append(Finding(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {gib:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "Apple GPU"))
    return [*found, Finding("cpu", f"{torch.get_num_threads()} of {os.cpu_count()} threads")]


def guiding() -> Iterator[Finding]:
    """Which models can be guided through the network on the best device, and the first way to."""
    if attempt(_torch):
        return
    device, gib = room()
    peaks = json.loads(Path(__file__).with_name("memory.json").read_text(encoding="utf-8"))
    for name, ways in peaks.items() if gib else ():
        if device != "cuda":  # text encoders that are away would be in the same memory
            ways = {way: peak for way, peak in ways.items() if "text off" not in way}
        # A tenth of the memory is for what is not computed, see docs/models.md.
        found = next((way for way, peak in ways.items() if peak <= 0.9 * gib), None)
        least = f"no: {min(ways.values())} GiB at least, of {gib:.0f}"
        yield Finding(name, f"on {device}: {found or least}")


def room() -> tuple[str, float]:
    """The device that a model goes to by default, and its memory in GiB; 0 if unknown."""
    import torch

    from ..sampling.memory import total_memory

    if not torch.cuda.is_available() and torch.backends.mps.is_available():
        return "mps", torch.mps.recommended_max_memory() / 2**30
    name = "cuda" if torch.cuda.is_available() else "cpu"
    return name, total_memory(torch.device(name)) / 2**30


def offers(group: str, check: Callable[[Installed], None]) -> Iterator[Finding]:
    """What is installed, imported; one thing that is broken does not stop the rest."""
    for claims in installed(group).values():
        for entry in claims:
            fault = metadata_problem(entry, claims) or attempt(lambda e=entry: check(e))  # type: ignore[misc]
            yield Finding(entry.name, f"{entry.distribution} {entry.version}", fault)


def _check_plugin(entry: Installed) -> None:
    plugin = load_class(entry.name)
    if not implemented(plugin):
        raise TypeError(f"{entry.target} implements no hook")


def _check_family(entry: Installed) -> None:
    family = load_object(find(entry.name, FAMILY_GROUP).target, f"model family {entry.name!r}")
    if not callable(family):
        raise TypeError(f"{entry.target} is {family!r}; expected what takes a pipeline")


def _check_model(entry: Installed) -> None:
    folder = Path(load_object(find(entry.name, MODEL_GROUP).target, f"model {entry.name!r}"))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"there is no model_index.json in {folder}")


def attempt(action: Callable[[], object]) -> str | None:
    """Why it fails, on one line, or None; foreign code may raise anything, `SystemExit` too."""
    try:
        action()
    except (Exception, SystemExit) as error:
        cause = error.__cause__ or error
        return " ".join(f"{type(cause).__name__}: {cause}".split())
    return None
