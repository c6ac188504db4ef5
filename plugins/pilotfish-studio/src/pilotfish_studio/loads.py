"""Runs that come from pictures: read, asked for, and shown on the page."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from pilotfish import changed, foreign_run, read_run, split_values

from .drawing import note
from .forms import Field, shown
from .parts import compared, sentences
from .sheet import Page


class Loads:
    """What loads a picture's run, which anybody may have written.

    Args:
        values: the page's components, by a run's keys.
        fields: the same as fields, where they are.
        model: where a run names none.
    """

    def __init__(self, values: Mapping[str, Any], fields: Mapping[str, Field], model: str) -> None:
        self.values, self.fields, self.model = values, fields, model

    def load(
        self, page: Page, version: int, file: str | None, changes: str = ""
    ) -> tuple[Any, ...]:
        """Read a picture's run, which anybody may have written; it is loaded or asked for."""
        with sentences():
            if file is None:
                raise gr.Error("choose a picture first")
            name = Path(file).name
            # Without the files that it may carry: each that it names is asked for.
            content, asked = foreign_run(read_run(file), name, made_with=None)
            content = functools.reduce(changed, split_values(changes) if changes else (), content)
            if not asked:
                return self._taken(page, version, content, name)
        page.asked = (content, name)
        things = "".join(f"<li>{escape(thing)}</li>" for thing in asked)
        words = f"The run in <b>{escape(name)}</b> asks for <ul>{things}</ul>It is not loaded yet."
        untouched = (gr.skip(),) * (5 + len(self.values))
        return note("ask", words), gr.Group(visible=True), *untouched

    def _taken(
        self, page: Page, version: int, content: dict[str, Any], origin: str | None
    ) -> tuple[Any, ...]:
        values = page.load(content, origin)
        words = f"The run in <b>{escape(origin or '')}</b> is loaded. Nothing of it reaches the "
        told_of = note("ask", f"{words}network until you trust it.") if origin else ""
        shown = [self._shown(key, values.get(key)) for key in self.values]
        group, tabs = gr.Group(visible=origin is not None), gr.Tabs(selected="make")
        return told_of, group, page.rows(), version + 1, version + 1, compared(page), tabs, *shown

    def _shown(self, key: str, value: Any) -> Any:
        if key == "model":
            return value or self.model
        return shown(self.fields[key], value) if key in self.fields else value

    def trust(self, page: Page, version: int) -> tuple[Any, ...]:
        if page.asked is not None:
            with sentences():
                return self._taken(page, version, page.asked[0], None)
        page.origin = None
        return "", gr.Group(visible=False), *(gr.skip(),) * (5 + len(self.values))

    def refuse(self, page: Page) -> tuple[Any, ...]:
        page.asked = None
        return "", gr.Group(visible=False)
