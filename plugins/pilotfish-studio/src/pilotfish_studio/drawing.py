"""HTML of what happens: a run as it goes, its losses, a guide's strength, the stack."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from pilotfish import PilotfishError, value_text

from .stack import Item, strengths, unlike_default
from .work import Done, Event, Failed, Job, Loading, Stopped, Taken, Waiting

SIDE = 512  # pixels of a live picture's longer side, at most


def told(event: Event) -> str:
    """What the stage shows after an event."""
    match event:
        case Waiting(before):
            several = f"{len(before)} runs are" if len(before) > 1 else "One run is"
            names = "".join(f"<li>{escape(name) or 'no prompt'}</li>" for name in before)
            return note("waiting", f"{several} before this one.<ol>{names}</ol>")
        case Loading(model):
            return note("loading", f"Loading the model <b>{escape(model)}</b> ...")
        case Taken():
            return _taken(event)
        case Done():
            images = _pictures([address(file) for file in event.files], "done")
            return images + about(event)
        case Stopped(index):
            what = f"Stopped after step {index}." if index else "Stopped before its first step."
            return note("stopped", f"{what} No picture was written.")
        case Failed(sentence):
            return note("failed", escape(sentence))


def note(kind: str, content: str) -> str:
    """A box with words; `content` is HTML."""
    role = "alert" if kind == "failed" else "status"
    return f'<div class="note {kind}" role="{role}">{content}</div>'


def _taken(event: Taken) -> str:
    share = (event.index + 1) / event.num_steps
    part = f" · {escape(event.part)}" if event.part else ""
    caption = f"step {event.index + 1} of {event.num_steps} · sigma {event.sigma:.3g}{part}"
    bar = f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
    images = [_data(picture) for picture in event.pictures]
    return f"{_pictures(images)}{bar}<p>{caption}</p>{losses(event.losses)}"


def about(event: Done) -> str:
    """What there is to tell of a run beside its pictures."""
    part = f"{escape(event.part)} · " if event.part else ""
    caption = f"{part}seed {event.seed} · {event.about} · {event.seconds:.1f} s"
    files = ", ".join(
        f'<a href="{address(file)}" download="{escape(file.name)}">{escape(file.name)}</a>'
        for file in [*event.files, *([event.film] if event.film else [])]
    )
    remarks = "".join(note("remark", escape(remark)) for remark in event.remarks)
    film = f'<img class="film" src="{address(event.film)}" alt="the film">' if event.film else ""
    return f"<p>{caption}<br>{files}</p>{losses(event.losses)}{remarks}{film}"


def address(file: Path) -> str:
    """Where the page finds a file of the folder."""
    return f"/gradio_api/file={quote(str(file.resolve()))}"


def _pictures(images: Sequence[str], kind: str = "live") -> str:
    columns = min(len(images), 2)
    tags = "".join(f'<img src="{image}" alt="">' for image in images)
    return f'<div class="pictures {kind} of{columns}">{tags}</div>'


def _data(picture: Image.Image) -> str:
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def losses(found: dict[str, list[float]]) -> str:
    """A row for each guide: its loss now, and its curve."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{values[0]:.4g}</td>"
        f"<td>{line(values)}</td><td><b>{values[-1]:.4g}</b></td></tr>"
        for name, values in found.items()
        if values
    )
    return f'<table class="losses"><caption>loss</caption>{rows}</table>' if rows else ""


def line(values: Sequence[float], width: int = 120, height: int = 28, zero: bool = False) -> str:
    """A curve, from left to right; with `zero` its axis is at 0."""
    low, high = min([*values, *([0.0] if zero else [])]), max([*values, *([0.0] if zero else [])])
    span, across = (high - low) or 1.0, (width - 4) / max(len(values) - 1, 1)

    def down(value: float) -> float:
        return 2 + (height - 4) * (high - value) / span

    points = " ".join(f"{2 + i * across:.1f},{down(v):.1f}" for i, v in enumerate(values))
    axis = f'<path class="axis" d="M0 {down(0):.1f}H{width}"/>' if zero else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'{axis}<polyline points="{points}"/></svg>'
    )


def stack_rows(items: Iterable[Item], selected: int | None) -> str:
    """The stack: each plugin with its switch, its strength over the run, and its arrows."""
    rows = "".join(_row(item, item.key == selected) for item in items)
    empty = '<p class="empty">No plugins yet: the prompt alone steers.</p>'
    return f'<ol class="stack">{rows}</ol>' if rows else empty


def _row(item: Item, selected: bool) -> str:
    name = escape(item.name or item.use)
    classes = " ".join(["item", *(["selected"] * selected), *(["off"] * (not item.on))])
    try:
        given, strength = unlike_default(item), _strength(item)
    except PilotfishError as error:
        wrong = f'<span class="wrong" title="{escape(str(error))}">!</span>'
        given, strength = item.settings, wrong
    summary = ", ".join(f"{key} {value_text(value)}" for key, value in given.items())
    return (
        f'<li class="{classes}" draggable="true" data-key="{item.key}">'
        f'<span class="grip" aria-hidden="true">⠿</span>'
        f'<button data-do="switch" role="switch" aria-checked="{str(item.on).lower()}" '
        f'aria-label="{name} on"></button>'
        f'<button class="name" data-do="select" aria-label="{name}, its form"><b>{name}</b>'
        f"<small>{escape(summary)}</small></button>{strength}"
        f'<button data-do="up" aria-label="move {name} up">↑</button>'
        f'<button data-do="down" aria-label="move {name} down">↓</button>'
        f'<button data-do="remove" aria-label="remove {name}">✕</button></li>'
    )


def _strength(item: Item) -> str:
    """A guide's scale over the run, where it has one."""
    values = strengths(item)
    return line(values, 56, 22, zero=True) if values else "<span></span>"


def line_of(jobs: Sequence[Job], own: Job) -> str:
    """The line before the networks, where somebody waits."""
    if len(jobs) < 2:
        return ""
    rows = "".join(
        f"<li>{escape(str(job.content['prompt'])) or 'no prompt'}"
        f"{' (this page)' if job.page == own.page else ' (another page)'}</li>"
        for job in jobs
    )
    return note("waiting", f"The first one runs, the others wait:<ol>{rows}</ol>")
