"""A sweep as one HTML file, which loads nothing and needs no server."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pilotfish

from .folder import Folder
from .plan import MODEL, Cell, Sweep
from .results import last_losses

TEMPLATE = Path(__file__).with_name("report.html")
EMBEDDED = 2000  # pictures; beyond, the file shows those of the folder, beside which it must stay
SIDE = 192  # pixels of an embedded picture's longer side


def write(folder: Folder, path: Path | None = None) -> tuple[Path, int]:
    """Write the report of the sweep that was run in a folder; its file, and how many cells.

    Raises:
        InputError: the folder holds no sweep, or the place cannot be written.
    """
    path = pilotfish.check_folder(path or folder.path / "report.html")
    sweep = folder.sweep()
    cells = sweep.cells()
    rows = [
        {json.dumps(row, default=str): at for at, row in reversed([*enumerate(d.rows)])}
        for d in sweep.dimensions
    ]
    embed = len(cells) <= EMBEDDED
    content = {
        "name": folder.path.resolve().name,
        "axes": [
            {"name": ", ".join(d.keys), "values": [told(d.keys, row) for row in d.rows]}
            for d in sweep.dimensions
        ],
        "cells": [
            _cell(folder, sweep, cell, rows, path if not embed else None, path.parent)
            for cell in cells
        ],
    }
    # No text of a prompt may end the element that it stands in.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    html = TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_SWEEP", text)
    with pilotfish.whole_file(path) as part:
        part.write_text(html, encoding="utf-8")
    return path, len(cells)


def told(keys: Sequence[str], row: Sequence[Any]) -> str:
    """A row of a dimension for people: `blue.scale = 0.5`."""
    pairs = zip((key.removeprefix("plugins.") for key in keys), row, strict=True)
    return ", ".join(f"{key} = {value}" for key, value in pairs)


def _cell(
    folder: Folder,
    sweep: Sweep,
    cell: Cell,
    rows: Sequence[Mapping[str, int]],
    linked: Path | None,
    start: Path,
) -> dict[str, Any]:
    """What the report knows of a cell.

    Args:
        rows: where on each dimension a row's values stand.
        linked: the report, if it is to show the folder's own pictures.
        start: the report's folder, from which links go.
    """
    trace = folder.trace(cell.name)
    values, at = iter(cell.values), []
    for dimension, found in zip(sweep.dimensions, rows, strict=True):
        row = [next(values) for _ in dimension.keys]
        at.append(found[json.dumps(row, default=str)])
    own: dict[str, Any] = {
        "name": cell.name,
        "at": at,
        "settings": flat(sweep.content(cell.values)),
    }
    if trace is None:
        return {**own, "failure": folder.failure(cell.name)}
    place = folder.cell(cell.name).parent
    files = [place / f["file"] for f in trace["files"] if f["file"].endswith(".png")]
    links = [Path(os.path.relpath(file, start)).as_posix() for file in files]
    last = {f"loss of {name}": values for name, values in last_losses(trace["records"]).items()}
    return {
        **own,
        "links": links,
        "pictures": links if linked else [_embedded(file) for file in files],
        "numbers": {
            name: [_finite(value) for value in values]
            for name, values in {**trace["scores"], **last}.items()
        },
        "losses": curves(trace["records"]),
        "remarks": trace["remarks"],
    }


def _embedded(file: Path) -> str:
    """A small picture as text; empty where the file is gone or damaged."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            small = picture.convert("RGB")
    except OSError:
        return ""
    small.thumbnail((SIDE, SIDE))
    memory = io.BytesIO()
    small.save(memory, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(memory.getvalue()).decode()}"


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float | None]]]:
    """Each guide's loss over the steps, as [step, mean over the pictures]."""
    found: dict[str, list[list[float | None]]] = {}
    for record in records:
        if record["loss"] and not record["final"]:
            mean = _finite(sum(record["loss"]) / len(record["loss"]))
            found.setdefault(record["plugin"], []).append([record["index"], mean])
    return found


def flat(content: Mapping[str, Any]) -> dict[str, str]:
    """A run's settings by their names, `plugins.blue.scale`, as text; the model's come first."""
    found = {key: content[key] for key in MODEL if key in content}
    for key, value in sorted(content.items()):
        if key == "plugins":
            for number, plugin in enumerate(value, 1):
                table = plugin if isinstance(plugin, Mapping) else {"use": plugin}
                name = table.get("name") or table.get("use")
                found |= {f"{number} {name}.{k}": v for k, v in table.items() if k != "name"}
        else:
            found[key] = value
    return {
        key: v if isinstance(v, str) else json.dumps(v, default=str) for key, v in found.items()
    }


def _finite(value: float) -> float | None:
    """JSON that browsers read knows no infinity."""
    return value if math.isfinite(value) else None
