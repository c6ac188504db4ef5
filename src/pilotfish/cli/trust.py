"""What a run that anybody may have written asks for."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError
from ..guidance.presets import PRESETS, find_preset
from ..hooks.registry import MODEL_GROUP, installed
from ..runs.made_with import settings, texts
from ..runs.metadata import PIXELS
from ..runs.run import Run
from .overrides import as_table

MOST = 1000  # steps, images, words, colours ...; a run of more should be meant
MOST_PLUGINS = 100
MOST_WORK = 36_000  # see `_evaluations`; an hour at ten a second


def foreign_run(text: str, origin: str, **other: Any) -> tuple[dict[str, Any], list[str]]:
    """The content of a run that anybody may have written, and what it asks for.

    Nothing is imported, opened or downloaded; see `asks`.

    Args:
        text: TOML, as `read_run` gives it.
        origin: where it comes from, for errors.
        other: keys of it that are to be others.

    Raises:
        InputError: it is no run.
    """
    content = {**Run.parse(text, origin), **other}
    content["plugins"] = [as_table(item) for item in content["plugins"]]
    return content, [*asks(content)]


def asks(content: Mapping[str, Any]) -> Iterator[str]:
    """What a run would import, open or download beyond what is installed here under a name."""
    for key in ("model", "config"):
        model = content.get(key)
        if model is not None and str(model) not in installed(MODEL_GROUP):
            yield f"{key} {model!r}, a folder or a download"
    carried = _table(_table(content.get("made_with")).get("embedded"))
    for plugin in content["plugins"]:
        yield from _plugin_asks(plugin, carried)
    if ":" in (decoder := str(content.get("decoder", ""))):
        yield f"decoder {decoder!r}, a folder or a download"
    scheduler = content.get("scheduler")
    name = scheduler.get("name") if isinstance(scheduler, Mapping) else scheduler
    if ":" in str(name):
        yield f"scheduler {name!r}, code outside of diffusers"
    for file in _preset_files(content.get("preset")):
        yield f"preset {file!r}, a file"
    yield from _work(content)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}  # refused later


def _plugin_asks(plugin: Any, carried: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(plugin, Mapping):
        return  # refused later
    use = str(plugin.get("use", ""))
    if ":" in use or use.endswith(".py"):
        yield f"plugin {use!r}, code outside of the installed plugins"
    for setting, value in settings(plugin).items():
        for text in texts(value):
            if text not in carried and _is_place(text):
                yield f"{setting} = {text!r} of plugin {use!r}, a file, an address or code"


def _is_place(text: str) -> bool:
    """Whether a text names a file, an address, or code as MODULE:NAME."""
    code = re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", text)
    return bool(code) or any(c in text for c in "/\\~") or os.path.exists(text)


def _preset_files(preset: Any) -> list[str]:
    """What `find_preset` would read."""
    if isinstance(preset, Mapping):
        return _preset_files(preset.get("base"))
    return [preset] if isinstance(preset, str) and preset not in PRESETS else []


def _work(content: Mapping[str, Any]) -> Iterator[str]:
    """What would take very long, or all memory."""
    scheduler, plugins = content.get("scheduler"), content["plugins"]
    numbers = {
        **{key: content.get(key) for key in ("steps", "num_images", "max_sequence_length")},
        **(scheduler if isinstance(scheduler, Mapping) else {}),
    }
    for key, value in numbers.items():
        if isinstance(value, int) and value > MOST:
            yield f"{key} = {value}"
    if len(plugins) > MOST_PLUGINS:
        yield f"{len(plugins)} plugins"
    else:
        for key, value in _values(content):
            if (size := _size(value)) > MOST:
                yield f"{size} words and numbers in {key}"
    sides = [content.get(key) or 1 for key in ("num_images", "width", "height")]
    if all(isinstance(side, int) for side in sides) and math.prod(sides) > PIXELS:
        yield f"{math.prod(sides) / 1e6:.0f} megapixels"
    if (times := _evaluations(content)) > MOST_WORK:
        yield (
            f"the network {times:,} times for pictures of 512x512, some {times // 36_000:,} hours "
            "at ten a second"
        )


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each key's value, and each plugin's setting."""
    for key, value in content.items():
        if key != "plugins":
            yield key, value
    for plugin in content["plugins"]:
        for setting, value in plugin.items() if isinstance(plugin, Mapping) else ():
            yield f"{setting} of plugin {plugin.get('use')!r}", value


def _size(value: Any) -> int:
    """How many words and numbers there are in a value."""
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return len(value.split()) if isinstance(value, str) else 1


def _evaluations(content: Mapping[str, Any]) -> int:
    """How often a run asks the network, or what is as dear, counted for pictures of 512x512."""
    usual = {"steps": 50, "num_images": 1, "width": 512, "height": 512}
    counts = [content.get(key) or number for key, number in usual.items()]
    counts += [
        p["particles"] for p in content["plugins"] if isinstance(p, Mapping) and "particles" in p
    ]
    if not all(isinstance(count, int) for count in counts):
        return 0  # refused later
    preset = content.get("preset", "balanced")
    if not _preset_files(preset):
        knobs = find_preset(preset)
        counts += [knobs.recurrence, knobs.iterations, knobs.samples]
    return math.prod(counts) // 512**2


# ---- the network, whatever the setting that asks for it is called ----

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
_watched: list[list[str]] = []  # what is asked for in each `offline` that is open


@contextlib.contextmanager
def offline(origin: str, advice: str | None = None) -> Iterator[None]:
    """Nothing in here reaches the network: what tries to is refused, and told.

    It holds for all threads of the program.

    Args:
        origin: whose run it is.
        advice: what to do where that is wanted; None is the command line's.

    Raises:
        InputError: something tried, and failed for it.
    """
    _watch()
    asked: list[str] = []
    _watched.append(asked)
    try:
        with _hub_offline():
            yield
    except Exception as error:
        if "OfflineModeIsEnabled" in {type(e).__name__ for e in _causes(error)}:
            asked.append("the Hugging Face hub")
        if asked:
            raise InputError(_refusal(origin, asked, advice)) from error
        raise
    finally:
        _watched.remove(asked)
    if asked:
        warnings.warn(f"{_refusal(origin, asked, advice)}. It went on without", stacklevel=3)


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Its client, which would try what is refused again for most of a minute, does not try."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@functools.cache
def _watch() -> None:
    """Python's audit hook, once: there is no way to take one away."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _watched or event not in NETWORK:
            return
        address = arguments[1] if event == "socket.connect" else arguments[0]
        if isinstance(address, tuple):
            address = address[0]
        elif event == "socket.connect":
            return  # of this machine's own kind, as between processes
        for asked in _watched:
            asked.append(str(address))
        raise OSError(f"the network ({address}) is closed while a run is not trusted")

    sys.addaudithook(hook)


def _refusal(origin: str, asked: list[str], advice: str | None) -> str:
    usual = f"Read its run with `pilotfish replay {origin} --show`; if you want that, add --yes"
    return (
        f"{origin} asks for the network ({', '.join(dict.fromkeys(asked))}), which pilotfish does "
        f"for nobody unasked. {advice or usual}"
    )
