"""gradio's components, made from fields of a form."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

import gradio as gr

from pilotfish import PRESETS, PilotfishError, Run, installed_plugins, load_class

from .content import FIRST, MORE
from .drawing import note
from .forms import Field, field_of, fields_of, shown
from .sheet import Page
from .stack import Item

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# For listeners that change no `gr.State`: the page hears of these through the queue alone.
NOBODY, ALL = "nothing", "without any plugin"
QUIET = {**HIDDEN, "queue": False}


def component(field: Field, value: Any = None, **more: Any) -> Any:
    """The component of a field.

    Args:
        value: what was given; None is the default.
    """
    label = field.name.replace("_", " ")
    common: dict[str, Any] = {
        "label": label,
        "value": shown(field, value),
        "interactive": True,
        **more,
    }
    if field.about:
        common.setdefault("info", field.about.splitlines()[0])
    if field.kind == "switch":
        return gr.Checkbox(**common)
    if field.kind == "choice":
        choices = [(choice or "the default", choice) for choice in field.choices]
        common["value"] = common["value"] or (field.default if field.default is not None else "")
        return gr.Dropdown(choices, **common)
    if field.kind == "slider":
        step = 1 if field.whole else 0.01
        return gr.Slider(field.low, field.high, step=step, **common)
    return gr.Textbox(placeholder=field.usual, max_lines=4, **common)


def form(item: Item, changed: Callable[[Field, Any], None]) -> None:
    """The form of a plugin; what is wrong with it where it has none.

    Args:
        changed: told of each field and its component.
    """
    try:
        plugin = load_class(item.use)
    except PilotfishError as error:
        gr.HTML(note("failed", str(error)))
        return
    own, shared = fields_of(plugin)
    summary = " ".join((plugin.__doc__ or "").split("\n\n")[0].split())
    gr.Markdown(f"**{item.name or item.use}** {summary}", padding=True)
    _fields(item, own, changed)
    if shared:
        with gr.Accordion("When, where and how", open=False):
            _fields(item, shared, changed)


def _fields(item: Item, fields: list[Field], changed: Callable[[Field, Any], None]) -> None:
    for field in fields:
        changed(field, component(field, item.settings.get(field.name), elem_id=f"set-{field.name}"))


def plugin_choices() -> list[tuple[str, str]]:
    """Every installed plugin with its heading, also of packages of others."""
    return [
        (f"{name} · {heading}", name) for heading, rows in installed_plugins().items()
        for name, _ in rows
    ]  # fmt: skip


def models() -> list[str]:
    """The installed models' names."""
    return sorted({entry.name for entry in entry_points(group="pilotfish.models")})


def families() -> str:
    """The model families that are installed."""
    names = {e.name.removesuffix("Pipeline") for e in entry_points(group="pilotfish.families")}
    return ", ".join(sorted(names))


def run_fields() -> dict[str, Field]:
    """The keys of a run that a page shows."""
    keys = [key for key in (*FIRST, *MORE) if key != "preset"]
    fields = {key: field_of(key, Run.model_fields[key]) for key in keys}
    # A prompt is text as it stands, whatever brackets it has.
    raw = {
        key: dataclasses.replace(fields[key], kind="raw") for key in ("prompt", "negative_prompt")
    }
    return fields | raw


def knob_fields(preset: str, given: Mapping[str, Any]) -> list[tuple[Field, Any]]:
    """The knobs of a preset that ships, each with its value; none of another preset."""
    usual = PRESETS.get(preset)
    infos: Mapping[str, Any] = getattr(type(usual), "__pydantic_fields__", {})
    return [
        (field_of(name, info), given.get(name, getattr(usual, name)))
        for name, info in infos.items()
        if name not in ("name", "source")
    ]


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """The engine's sentences as messages on the page."""
    try:
        yield
    except PilotfishError as error:
        raise gr.Error(str(error), duration=20, print_exception=False) from None


def compared(page: Page) -> Any:
    """What a run can be compared with."""
    names = [(item.name or item.use, str(item.key)) for item in page.items if item.on]
    return gr.Dropdown(choices=[NOBODY, *names, *([ALL] if names else [])], value=NOBODY)
