"""What is shown of the scores: tables, a plot of the curves, and sheets of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .pictures import Lab
from .points import PROMPTED, Point, Series, floors
from .points import UNGUIDED as WITHOUT

Row = Mapping[str, Any]
UNGUIDED = {WITHOUT, PROMPTED}
TITLES = {
    "label": "a label without a prompt",
    "blue": "blue, with a prompt",
    "palette": "palette, with a prompt",
}
FACTOR = "scale, as a multiple of the best"
AXES = {
    "factor": FACTOR,
    "object": "object right, by the judge",
    "distance": "Fréchet distance",
    "seconds": "processor seconds a picture",
    **{task: f"the guide's loss ({task})" for task in TITLES},
}
TILE, LEFT = 64, 130  # pixels
SHOWN = {"label": range(8), "blue": (2, 5, 10), "palette": (2, 5, 10)}  # of the first batch


def chosen(rows: Sequence[Row], task: str) -> list[Row]:
    """Each series of a task at its best whole point, the best first, those without a guide last."""
    tops: dict[str, Row] = {}
    for row in rows:
        if row["task"] == task and "distance" in row:
            top = tops.setdefault(row["series"], row)
            if row["merit"] > top["merit"]:
                tops[row["series"]] = row
    return sorted(tops.values(), key=lambda row: (row["series"] in UNGUIDED, -row["merit"]))


# ---- tables ----


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A Markdown table for each task."""
    return {
        task: table(chosen(result["points"], task), result["least_distance"][task], task)
        for task in TITLES
    }


def table(rows: Sequence[Row], least_distance: float, task: str) -> str:
    """Rows as Markdown, and below them what fresh pictures reach."""
    lines = [
        "| preset | scale | its loss | object right | Fréchet distance | calls | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name, scale = f"`{row['series']}`", f"{row['scale']:.3g}"
        if row["series"] in UNGUIDED:
            name, scale = row["series"], ""
        loss, right, calls, seconds = (
            row[key]["mean"] for key in (task, "object", "calls", "seconds")
        )
        lines.append(
            f"| {name} | {scale} | {loss:.3f} | {right:.0%} | {row['distance']:.0f} | {calls:.0f} "
            f"| {seconds:.2f} |"
        )
    return "\n".join([*lines, f"| as many fresh pictures | | | | {least_distance:.0f} | | |"])


def fill(page: Path, tables: Mapping[str, str], kind: str = "quality") -> None:
    """Put tables into a page, between `<!-- KIND: TASK -->` and `<!-- end -->`."""
    text = page.read_text("utf-8")
    for task, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {kind}: {task} -->\n")
        if mark:
            text = f"{before}{mark}{table}\n{rest[rest.index('<!-- end -->') :]}"
    page.write_text(text, "utf-8")


def filled(page: str, kind: str = "quality") -> dict[str, str]:
    """The tables in a page's text."""
    return dict(re.findall(rf"<!-- {kind}: (\w+) -->\n(.*?)\n<!-- end -->", page, re.S))


# ---- the plot ----


def plot(rows: Sequence[Row], target: Path) -> None:
    """A line of curves for each task; a series has the same colour in all of them."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = sorted({row["series"] for row in rows} - UNGUIDED)
    colors = dict(zip(names, colormaps["tab20"].colors, strict=False))
    figure = Figure(figsize=(20, 3.6 * len(TITLES)), layout="constrained")
    lines = figure.subplots(len(TITLES), 5, squeeze=False)
    for (task, title), axes in zip(TITLES.items(), lines, strict=True):
        last = [("distance", "object"), ("seconds", "object")]
        if task != "label":
            last = [(task, "object"), (task, "distance")]
        panels = [("factor", task), ("factor", "object"), ("factor", "distance"), *last]
        for axis, (x, y) in zip(axes, panels, strict=True):
            for top in chosen(rows, task):
                own = [row for row in rows if (row["task"], row["series"]) == (task, top["series"])]
                _curve(axis, own, top, (x, y), colors.get(top["series"], "gray"))
            if x == "factor":
                axis.set_xscale("log", base=2)
                axis.xaxis.get_major_locator().set_params(numticks=7)
                axis.xaxis.set_major_formatter("{x:.2g}")
                axis.minorticks_off()
            axis.set(xlabel=AXES[x], ylabel=AXES[y])
            axis.grid(alpha=0.3)
        axes[0].set_title(title)
        if axes[-1].get_legend_handles_labels()[1]:
            axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=70)
    Image.open(target).quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def _curve(axis: Any, rows: Sequence[Row], top: Row, panel: tuple[str, str], color: Any) -> None:
    """One series in one panel; of what is without a guide, a dotted line or a cross."""
    x, y = panel
    if top["series"] in UNGUIDED:
        if x == "factor":
            axis.axhline(_value(top, y, top), color=color, linestyle=":")
        else:
            axis.plot(_value(top, x, top), _value(top, y, top), "x", color=color)
        return
    known = [row for row in rows if "distance" in row or "distance" not in (x, y)]
    known.sort(key=lambda row: row["scale"])
    width = 3 if top["series"].startswith("balanced") else 1.4
    places = [(_value(row, x, top), _value(row, y, top)) for row in known]
    style = {"marker": ".", "linewidth": width, "color": color, "label": top["series"]}
    axis.plot(*zip(*places, strict=True), **style)


def _value(row: Row, name: str, top: Row) -> float:
    if name == "factor":
        return float(row["scale"] / top["scale"])
    return float(row["distance"] if name == "distance" else row[name]["mean"])


# ---- sheets ----


def sheet(lab: Lab, lines: Sequence[Sequence[Point]], target: Path) -> None:
    """Pictures of a task: a line for each series, at one or more scales side by side."""
    shown = SHOWN[lines[0][0].series.task]
    width = LEFT + max(map(len, lines)) * (len(shown) * TILE + 4)
    canvas = Image.new("RGB", (width, len(lines) * (TILE + 2)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for row, line in enumerate(lines):
        scales = ", ".join(f"{point.scale:.3g}" for point in line if point.scale)
        name = line[0].series.name.replace(", ", ",\n")
        draw.text((4, row * (TILE + 2) + 4), f"{name}\n{scales}", "black", font)
        for block, point in enumerate(line):
            for column, picture in enumerate(_pictures(lab, point, shown)):
                left = LEFT + block * (len(shown) * TILE + 4) + column * TILE
                canvas.paste(picture, (left, row * (TILE + 2)))
    canvas.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def _pictures(lab: Lab, point: Point, shown: Sequence[int]) -> Iterator[Image.Image]:
    kept = lab.read(point, 0)
    if kept is not None and len(kept["pictures"]):
        yield from (Image.fromarray(kept["pictures"][place]) for place in shown)


def lines(rows: Sequence[Row], series: Sequence[Series], task: str) -> list[list[Point]]:
    """What a task's sheet shows: each series at its best, of colours also at the scales around."""
    by_name = {s.name: s for s in (*series, *floors(series[0].model)) if s.task == task}
    found = []
    for row in chosen(rows, task):
        own = [r for r in rows if (r["task"], r["series"]) == (task, row["series"])]
        scales = sorted(r["scale"] for r in own)
        place = scales.index(row["scale"])
        around = scales[max(0, place - 1) : place + 2] if task != "label" else [row["scale"]]
        found.append([Point(by_name[row["series"]], scale) for scale in around])
    return found
