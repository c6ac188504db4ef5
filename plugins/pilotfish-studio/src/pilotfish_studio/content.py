"""What a page says, as the content of a run, and as what others can use of it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

import tomli_w

from pilotfish import PRESETS, InputError, Run, find_preset, value_text

from .stack import normal

MODEL = ("model", "config", "dtype")  # of a run's content, for `pilotfish.load`
# What every page shows of a run; the other keys stand under "more".
FIRST = ("prompt", "negative_prompt", "steps", "guidance_scale", "seed", "preset")
FOUND = ("plugins", "model_id", "config", "dtype", "made_with", "anyway")
MORE = tuple(key for key in Run.model_fields if key not in (*FIRST, *FOUND))


def content_of(
    values: Mapping[str, Any], knobs: Mapping[str, Any], plugins: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of a run: what a page leaves open is not in it.

    Args:
        values: `model` and keys of a run.
        knobs: of the preset, that differ from it.
    """
    usual = {key: field.default for key, field in Run.model_fields.items()}
    content = {k: v for k, v in values.items() if v not in (None, "", usual.get(k))}
    if knobs:
        content["preset"] = {"base": content.get("preset", "balanced"), **knobs}
    return {"prompt": "", **content, "plugins": plugins}


def preset_and_knobs(preset: Any) -> tuple[str, dict[str, Any]]:
    """The name of a preset that ships, and what a run's preset has other than that.

    Raises:
        InputError: there is no such preset.
    """
    found = find_preset(preset)
    base = found.name if found.name in PRESETS else "balanced"
    usual = dataclasses.asdict(PRESETS[base])
    knobs = {k: v for k, v in dataclasses.asdict(found).items() if v != usual[k]}
    return base, {k: v for k, v in knobs.items() if k not in ("name", "source")}


def as_run_file(content: Mapping[str, Any]) -> str:
    """For `pilotfish generate --run`.

    Raises:
        PilotfishError: a plugin cannot be made so.
    """
    plugins = [normal(table) for table in content["plugins"]]
    return tomli_w.dumps({**content, "plugins": plugins} if plugins else _plain(content))


def as_command(content: Mapping[str, Any]) -> str:
    """For a shell.

    Raises:
        InputError: a table of the run has no place on a command line.
        PilotfishError: a plugin cannot be made so.
    """
    parts = [f"pilotfish generate {shlex.quote(_text('prompt', content['prompt']))}"]
    for key, value in _plain(content).items():
        if key == "preset" and isinstance(value, Mapping):
            parts.append(f"--preset {shlex.quote(str(value['base']))}")
            knobs = {k: v for k, v in value.items() if k != "base"}
            parts += [f"-s {shlex.quote(f'{k}={value_text(v)}')}" for k, v in knobs.items()]
        elif key in ("height", "width"):
            parts.append(f"-s {key}={value}")
        elif key != "prompt":
            parts.append(f"--{key.replace('_', '-')} {shlex.quote(_text(key, value))}")
    parts += [f"--use {shlex.quote(use_text(normal(table)))}" for table in content["plugins"]]
    return " \\\n    ".join(parts)


def as_python(content: Mapping[str, Any]) -> str:
    """For a program.

    Raises:
        PilotfishError: a plugin cannot be made so.
    """
    load = ", ".join(
        repr(content[key]) if key == "model" else f"{key}={content[key]!r}"
        for key in MODEL
        if key in content
    )
    options = {k: v for k, v in _plain(content).items() if k not in (*MODEL, "prompt")}
    lines = [f"    {key}={value!r},\n" for key, value in options.items()]
    plugins = "".join(f"        {normal(table)!r},\n" for table in content["plugins"])
    lines += [f"    plugins=[\n{plugins}    ],\n"] if plugins else []
    return (
        f"import pilotfish\n\nsampler = pilotfish.load({load})\n"
        f"result = sampler(\n    {content['prompt']!r},\n{''.join(lines)})\n"
        'result.save("picture.png")\n'
    )


def use_text(table: Mapping[str, Any]) -> str:
    """A plugin as `--use` takes it: `blue:scale=2,every=5`."""
    given = [f"{key}={value_text(value)}" for key, value in table.items() if key != "use"]
    return ":".join([table["use"], ",".join(given)]) if given else str(table["use"])


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """All but the plugins."""
    return {key: value for key, value in content.items() if key != "plugins"}


def _text(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        raise InputError(f"a command line takes no table for {key}; copy the run file")
    return str(value)


def words(text: str) -> list[str]:
    """The words of a search, in small letters."""
    return re.findall(r"\S+", text.lower())
