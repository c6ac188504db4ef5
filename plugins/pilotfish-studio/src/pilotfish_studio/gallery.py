"""The tab with the folder's pictures."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from . import history
from .drawing import address, note
from .parts import QUIET


@dataclass
class Gallery:
    """The tab's parts that others listen to.

    Attributes:
        refresh: gives the pictures again, from `filters` to `shown`.
        chosen: the picture that was chosen last, as a path.
        load, again, changes: buttons and what is changed, for the page.
    """

    refresh: Any
    filters: list[Any]
    shown: list[Any]
    chosen: Any
    load: Any
    again: Any
    changes: Any


def gallery_tab(folder: Path) -> Gallery:
    """The tab, in the page that is being built."""
    chosen, before, paths = gr.State(None), gr.State(None), gr.State([])
    with gr.Row(equal_height=True):
        search = gr.Textbox(
            placeholder="Search: prompt, seed, plugin", show_label=False, scale=6, min_width=200,
            container=False, elem_id="search",
        )  # fmt: skip
        starred = gr.Checkbox(label="★ only", scale=1, min_width=90, container=False)
        fresh = gr.Button("Look again", size="sm", scale=1, min_width=100)
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            grid = gr.Gallery(
                show_label=False, columns=4, height="auto", allow_preview=False, object_fit="cover",
                buttons=[], elem_id="grid", interactive=False,
            )  # fmt: skip
        with gr.Column(scale=4, min_width=320):
            about = gr.HTML('<p class="empty">Choose a picture.</p>', elem_id="about")
            with gr.Row():
                load = gr.Button("Load its run", size="sm", min_width=100)
                star = gr.Button("★ Star", size="sm", min_width=80)
                compare = gr.Button("Compare with the last one", size="sm", min_width=150)
            with gr.Row(equal_height=True):
                changes = gr.Textbox(
                    label="Again with", placeholder="steps=30, plugins.blue.scale=2, seed=5",
                    scale=4, min_width=180,
                )  # fmt: skip
                again = gr.Button("Again", scale=1, min_width=80)
            slider = gr.ImageSlider(visible=False, interactive=False, show_label=False)

    def refresh(words: str, only: bool) -> tuple[Any, list[str]]:
        found = history.pictures(folder, words or "", only)
        return [(str(made.path), made.caption) for made in found], [str(m.path) for m in found]

    def choose(files: list[str], last: str | None, event: gr.SelectData) -> tuple[Any, ...]:
        path = files[event.index]
        return path, last, told(Path(path))

    def mark(file: str | None, words: str, only: bool) -> tuple[Any, list[str]]:
        if file is None:
            raise gr.Error("choose a picture first")
        history.star(Path(file))
        return refresh(words, only)

    def side_by_side(file: str | None, last: str | None) -> Any:
        if file is None or last is None:
            raise gr.Error("choose one picture, then another")
        return gr.ImageSlider(value=(last, file), visible=True)

    filters, shown = [search, starred], [grid, paths]
    gr.on([search.input, starred.input, fresh.click], refresh, filters, shown, **QUIET)
    grid.select(choose, [paths, chosen], [chosen, before, about], **QUIET)
    star.click(mark, [chosen, *filters], shown, **QUIET)
    compare.click(side_by_side, [chosen, before], slider, **QUIET)
    return Gallery(refresh, filters, shown, chosen, load, again, changes)


def told(path: Path) -> str:
    """A picture with what its run says."""
    made = next((m for m in history.pictures(path.parent) if m.path == path), None)
    image = f'<div class="pictures of1"><img src="{address(path)}" alt=""></div>'
    if made is None or not made.run:
        return image + note("remark", f"{escape(path.name)} holds no run.")
    run = made.run
    keys = ("prompt", "seed", "steps", "guidance_scale", "preset", "model")
    rows = [(key.replace("_", " "), run[key]) for key in keys if key in run]
    plugins = run.get("plugins", [])
    names = ", ".join(str(p.get("use")) for p in plugins if isinstance(p, dict))
    rows += [("plugins", names)] if names else []
    cells = "".join(f"<tr><th>{k}</th><td>{escape(str(v))}</td></tr>" for k, v in rows)
    return f'{image}<table class="losses">{cells}</table>'
