"""The page: its parts, and what they tell each other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from pilotfish import PRESETS

from . import drawing
from .content import as_command, as_python, as_run_file
from .drawing import told
from .forms import Field, given
from .gallery import gallery_tab
from .history import ENDINGS
from .loads import Loads
from .parts import (
    ALL,
    HIDDEN,
    NOBODY,
    QUIET,
    compared,
    component,
    families,
    form,
    knob_fields,
    models,
    plugin_choices,
    run_fields,
    sentences,
)
from .sheet import Page
from .work import Done, Job, Studio, Waiting

HEAD = "<h1>pilotfish studio{}</h1>"
EMPTY = '<p class="empty">The picture appears here, step by step.</p>'
STACK_JS = Path(__file__).with_name("stack.js").read_text(encoding="utf-8")


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio, not yet served."""
    demo: gr.Blocks
    with gr.Blocks(
        title="pilotfish studio",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 3600),
    ) as demo:
        Layout(studio, demo)
    return demo


class Layout:
    """The components of a page and their listeners."""

    def __init__(self, studio: Studio, demo: gr.Blocks) -> None:
        self.studio = studio
        self.page, self.version, self.loads = gr.State(Page()), gr.State(0), gr.State(0)
        self.fields = run_fields()
        self.values: dict[str, Any] = {}
        self.head = gr.HTML(HEAD.format(""), elem_id="head")
        with gr.Tabs(selected="make") as self.tabs:
            with gr.Tab("Make", id="make"):
                self._bar()
                with gr.Row(equal_height=False):
                    with gr.Column(scale=6, min_width=320):
                        self._stage()
                    with gr.Column(scale=5, min_width=320):
                        self._plugins()
                        self._settings(demo)
                        self._copies()
            with gr.Tab("Gallery", id="gallery"):
                self.gallery = gallery_tab(studio.folder)
        self._listen(demo)

    # ---- what stands where ----

    def _bar(self) -> None:
        with gr.Row(equal_height=True, elem_id="bar"):
            self.values["prompt"] = gr.Textbox(
                label="Prompt", placeholder="a campfire", max_lines=4, scale=8, min_width=280,
                elem_id="prompt", autofocus=True,
            )  # fmt: skip
            self.generate = gr.Button("Generate", variant="primary", scale=1, min_width=120)
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)

    def _stage(self) -> None:
        self.trust = gr.Group(visible=False)
        with self.trust:
            self.asks = gr.HTML()
            with gr.Row():
                self.trusted = gr.Button("Trust this run", size="sm")
                self.refused = gr.Button("Leave it", size="sm")
        self.stage = gr.HTML(EMPTY, elem_id="stage")
        self.slider = gr.ImageSlider(
            label="without | with", visible=False, interactive=False, max_height=560,
            elem_id="slider",
        )  # fmt: skip
        self.queue = gr.HTML(elem_id="queue")
        with gr.Row():
            self.compare = gr.Dropdown(
                [NOBODY], value=NOBODY, label="Compare with a run without", scale=3, min_width=180
            )
            self.film = gr.Checkbox(label="Film", info="also as a GIF", scale=1, min_width=90)
        self.dropped = gr.File(
            label="Drop a picture to load its run", file_types=[*ENDINGS], height=140,
            elem_id="drop",
        )  # fmt: skip

    def _plugins(self) -> None:
        self.add = gr.Dropdown(
            plugin_choices(), value=None, label="Add a plugin", allow_custom_value=True,
            info="an installed one, or FILE.py:Class", elem_id="add",
        )  # fmt: skip
        self.stack = gr.HTML(Page().rows(), js_on_load=STACK_JS, elem_id="stack")

        @gr.render(  # type: ignore[untyped-decorator]
            inputs=[self.page], triggers=[self.version.change], show_progress="hidden"
        )
        def inspector(page: Page) -> None:
            if page.item is not None:
                with gr.Group():
                    form(page.item, functools.partial(self._field, page.item.key))

    def _field(self, key: int, setting: Field, part: Any) -> None:
        """Listen to one field of the form that is shown."""

        def change(page: Page, entered: Any) -> str:
            for item in (item for item in page.items if item.key == key):
                with sentences():
                    item.set(setting, entered)
            return page.rows()

        part.change(change, [self.page, part], self.stack, **QUIET)

    def _settings(self, demo: gr.Blocks) -> None:
        fields = self.fields
        with gr.Row():
            for key, least in (("steps", 90), ("guidance_scale", 110), ("seed", 110)):
                self.values[key] = component(
                    fields[key],
                    min_width=least,
                    info=None,
                    label=key.split("_")[0],
                    elem_id=f"run-{key}",
                )
        with gr.Accordion("Model", open=False):
            self.values["model"] = gr.Dropdown(
                models(), value=self.studio.networks.get("model") or "emoji", label="Model",
                info=f"an installed one, a folder, a hub id or a file; families: {families()}",
                allow_custom_value=True,
            )  # fmt: skip
            self.about = gr.HTML()
        with gr.Accordion("Preset and knobs", open=False):
            self.values["preset"] = gr.Dropdown(
                [*PRESETS], value="balanced", label="Preset", allow_custom_value=True,
                info="how losses become a move",
            )  # fmt: skip

            @gr.render(  # type: ignore[untyped-decorator]
                inputs=[self.page, self.values["preset"]],
                triggers=[self.values["preset"].change, self.loads.change, demo.load],
                show_progress="hidden",
            )
            def knobs(page: Page, preset: str) -> None:
                with gr.Row(elem_classes="fields"):
                    for knob, value in knob_fields(preset, page.knobs):
                        part = component(knob, value, elem_id=f"knob-{knob.name}", min_width=200)
                        self._knob(knob, part, preset)

        with gr.Accordion("More", open=False), gr.Row(elem_classes="fields"):
            for key in [key for key in fields if key not in self.values]:
                self.values[key] = component(fields[key], elem_id=f"run-{key}", min_width=200)

    def _knob(self, knob: Field, part: Any, preset: str) -> None:
        usual = getattr(PRESETS[preset], knob.name)

        def change(page: Page, entered: Any) -> None:
            page.knobs.pop(knob.name, None)
            value = given(knob, entered)
            if value not in (None, usual):
                page.knobs[knob.name] = value

        part.change(change, [self.page, part], None, **QUIET)

    def _copies(self) -> None:
        with gr.Accordion("Copy this run", open=False):
            with gr.Row():
                self.copies = {
                    name: gr.Button(name, size="sm", min_width=80)
                    for name in ("as command", "as Python", "as run file")
                }
            self.copy = gr.Code(show_label=False, interactive=False, wrap_lines=True)

    # ---- what happens when ----

    @property
    def inputs(self) -> list[Any]:
        """What a run is made of."""
        return [self.page, *self.values.values()]

    def _listen(self, demo: gr.Blocks) -> None:
        buttons = [self.generate.click, self.values["prompt"].submit]
        self._runs(functools.partial(gr.on, buttons), trigger_mode="multiple")
        self.stop.click(self._stop, None, None, **QUIET)
        demo.unload(self._stop)
        about = f"<small>pictures go to {escape(str(self.studio.folder))}</small>"
        demo.load(lambda: HEAD.format(about), None, self.head, **HIDDEN)
        self.add.input(
            self._add, [self.page, self.version, self.add],
            [self.stack, self.version, self.add, self.compare], **HIDDEN,
        )  # fmt: skip
        self.stack.click(
            self._act, [self.page, self.version], [self.stack, self.version, self.compare], **HIDDEN
        )
        self.values["preset"].input(lambda page: page.knobs.clear(), self.page, None, **QUIET)
        self.values["model"].input(lambda page: page.kept.clear(), self.page, None, **QUIET)
        copies = (as_command, as_python, as_run_file)
        for button, how in zip(self.copies.values(), copies, strict=True):
            button.click(functools.partial(self._copy, how), self.inputs, self.copy, **QUIET)
        self._listen_to_loads()

    def _listen_to_loads(self) -> None:
        loads = Loads(self.values, self.fields, self.studio.networks.get("model") or "emoji")
        loaded = [self.asks, self.trust, self.stack, self.version, self.loads, self.compare]
        outputs = [*loaded, self.tabs, *self.values.values()]
        inputs, gallery = [self.page, self.version], self.gallery
        self.dropped.upload(loads.load, [*inputs, self.dropped], outputs, **HIDDEN)
        self.trusted.click(loads.trust, inputs, outputs, **HIDDEN)
        self.refused.click(loads.refuse, self.page, [self.asks, self.trust], **QUIET)
        gallery.load.click(loads.load, [*inputs, gallery.chosen], outputs, **HIDDEN)
        again = gallery.again.click(
            loads.load, [*inputs, gallery.chosen, gallery.changes], outputs, **HIDDEN
        )
        self._runs(again.success)

    def _runs(self, trigger: Any, **more: Any) -> None:
        """Let something start a run; the gallery shows it afterwards."""
        inputs = [self.compare, self.film, *self.inputs]
        shown = [self.stage, self.slider, self.queue, self.about]
        made = trigger(self._run, inputs, shown, **HIDDEN, **more)
        made.then(self.gallery.refresh, self.gallery.filters, self.gallery.shown, **HIDDEN)

    def _stop(self, request: gr.Request) -> None:
        self.studio.stop(str(request.session_hash))

    def _add(self, page: Page, version: int, use: str | None) -> tuple[Any, ...]:
        if use:
            page.add(use)
        return page.rows(), version + 1, gr.Dropdown(value=None), compared(page)

    def _act(self, page: Page, version: int, event: gr.EventData) -> tuple[Any, ...]:
        asked = event._data or {}
        if "action" in asked:
            page.act(asked["action"], asked["key"], asked.get("to", 0))
        return page.rows(), version + 1, compared(page)

    def _content(self, page: Page, entered: tuple[Any, ...]) -> dict[str, Any]:
        values = {
            key: given(self.fields[key], value) if key in self.fields else value
            for key, value in zip(self.values, entered, strict=True)
        }
        if values["model"] in ("emoji", ""):
            values["model"] = None
        return page.content(values)

    def _copy(self, how: Any, page: Page, *entered: Any) -> str:
        with sentences():
            return str(how(self._content(page, entered)))

    def _run(
        self, request: gr.Request, compare: str, film: bool, page: Page, *entered: Any
    ) -> Iterator[tuple[Any, ...]]:
        """A run on the stage, step by step; with another one beside it where that is asked for."""
        content = self._content(page, entered)
        job = Job(
            content, str(request.session_hash), page.origin, film, page.rival(compare, NOBODY, ALL)
        )
        html, done, about = gr.skip(), list[Done](), gr.skip()
        for event in self.studio.events(job):
            line = drawing.line_of(self.studio.line, job)
            if isinstance(event, Waiting) and any(j.page == job.page for j in self.studio.line[:1]):
                yield gr.skip(), gr.skip(), line, gr.skip()  # the stage shows that one
                continue
            if isinstance(event, Done):
                done.append(event)
                about = f"<small>{escape(self.studio.about)}</small>"
            html = told(event)
            yield html, gr.ImageSlider(visible=False), line, about
        pair = (str(done[1].files[0]), str(done[0].files[0])) if len(done) == 2 else None
        if pair is not None:
            html = '<div class="pictures done"></div>' + "".join(map(drawing.about, done))
        yield html, gr.ImageSlider(value=pair, visible=pair is not None), "", about
