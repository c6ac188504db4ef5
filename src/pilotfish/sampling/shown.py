"""How runs look: on a line where they are printed, and as HTML in a notebook.

What is shown imports this module, so its kinds are not named here.
"""

from __future__ import annotations

import base64
import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from statistics import fmean
from typing import Any

from PIL import Image

SIDE, MOST = 192, 8  # pixels of a picture's longer side, and pictures
CURVE = (120, 24)  # pixels
AGAINST = -0.1  # a mean cosine below it is told


def losses(trace: Any) -> str:
    """`blue 0.51 -> 0.34, clip 0.83 -> 0.79`."""
    found = ((name, trace.losses(name)) for name in trace.plugins)
    return ", ".join(f"{name} {v[0]:.3g} -> {v[-1]:.3g}" if v else name for name, v in found)


def guide_lines(trace: Any) -> Iterator[str]:
    """Of each guide its loss from first to last, its share, and what went wrong."""
    for name in trace.plugins:
        values, failed = trace.losses(name), [r for r in trace.of(name) if r.error]
        if values:
            final, share = trace.final_loss(name), mean_share(trace, name)
            by_vae = "" if final is None else f"; {final:.4g} by the VAE"
            several = len(trace.plugins) > 1 and share is not None
            moved = f", {share:.0%} of the moves" if several else ""
            change = f"loss {values[0]:.4g} -> {values[-1]:.4g}"
            yield f"{name}: {change} ({counted(len(values))}){moved}{by_vae}"
        if (outside := leaked(trace, name)) is not None:
            yield f"{name}: {outside:.1%} of the moves at its steps lie outside its mask"
        if failed:
            yield f"{name}: failed at {counted(len(failed))}, the first time: {failed[0].error}"


def conflicts(trace: Any) -> Iterator[str]:
    """The pairs of guides that pulled against each other."""
    for name, other in itertools.combinations(trace.plugins, 2):
        if (cosines := trace.cosines(name, other)) and (mean := fmean(cosines)) < AGAINST:
            yield f"{name} and {other} pulled against each other: cosine {mean:.2f} on average"


def mean_share(trace: Any, name: str) -> float | None:
    """A guide's part of the moves at its steps, mean over steps and images."""
    shares = [share for record in trace.of(name) for share in record.share]
    return fmean(shares) if shares else None


def leaked(trace: Any, name: str) -> float | None:
    """What part of the moves lies outside a guide's mask, mean over steps and images."""
    parts = [part for record in trace.of(name) for part in record.outside]
    return fmean(parts) if parts else None


def result_line(result: Any) -> str:
    """Pictures, prompt and losses."""
    run, count = result.run, len(result.images)
    what = f"{count} picture{'s' * (count > 1)} of {run.width}x{run.height}"
    told = f"{what}, prompt={_short(run.prompt)!r}, seed={run.seed}"
    return f"Result({told}{', ' * bool(result.trace)}{losses(result.trace)})"


def result_html(result: Any) -> str:
    """Small pictures, and what each guide did."""
    shown = "".join(map(_picture, result.images[:MOST]))
    more = len(result.images) - MOST
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    run = result.run
    about = f"{_short(run.prompt, 200)!r}, seed {run.seed}, {counted(run.steps)}"
    return f"<div>{shown}{rest}<p>{escape(about)}</p>{trace_html(result.trace)}</div>"


def trace_html(trace: Any) -> str:
    """A row for each guide: its loss from first to last, its curve, its share, what went wrong."""
    if not trace.plugins:
        return "<p>No guide acted.</p>"
    head = ("guide", "loss", "", "share of the moves", "steps", "")
    rows = [_row(trace, name) for name in trace.plugins]
    told = (*conflicts(trace), *trace.remarks)
    remarks = "".join(f"<p>{escape(remark)}</p>" for remark in told)
    return _table(head, rows) + remarks


def step_html(step: Any) -> str:
    """Small pictures of x0 where it is known, and where the run is."""
    about = f"<p>{escape(repr(step))}</p>"
    known = step._state.output is not None
    return "".join(map(_picture, step.preview()[:MOST])) + about if known else about


class Live:
    """One place of a notebook that shows the latest step; anywhere else nothing."""

    def __init__(self) -> None:
        self._place: Any = None

    def show(self, step: Any, trace: Any) -> None:
        """Small pictures of x0, by the linear estimate of its colours, and each guide's losses."""
        if not in_notebook():
            return
        from IPython.display import display

        html = "".join(map(_picture, step.preview()[:MOST]))
        told = f"step {step.index + 1} of {step.num_steps}{': ' * bool(trace)}{losses(trace)}"
        data = {"text/html": f"{html}<p>{escape(told)}</p>", "text/plain": told}
        if self._place is None:
            self._place = display(data, raw=True, display_id=True)
        else:
            self._place.update(data, raw=True)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, which can show pictures."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return hasattr(shell, "kernel")


def sampler_line(sampler: Any) -> str:
    """Family, device, number format and usual size."""
    model = sampler.model
    height, width = model.size
    dtype = str(model.dtype).removeprefix("torch.")
    return f"Sampler({type(model).__name__}, {dtype} on {model.device}, {width}x{height})"


def sampler_html(sampler: Any) -> str:
    """What is on the line, and what a run takes where it says nothing."""
    defaults = vars(sampler.model.defaults).items()
    rows = [(escape(k), escape(str(v))) for k, v in defaults if v is not None and k != "scheduler"]
    return f"<p>{escape(sampler_line(sampler))}</p>{_table(('option', 'usual'), rows)}"


def _row(trace: Any, name: str) -> tuple[str, ...]:
    own, values = trace.of(name), trace.losses(name)
    share = mean_share(trace, name)
    errors = [record.error for record in own if record.error]
    told = f"failed at {counted(len(errors))}: {errors[0]}" if errors else ""
    return (
        escape(name),
        f"{values[0]:.4g} &rarr; {values[-1]:.4g}" if values else "",
        _curve(values),
        "" if share is None else f"{share:.0%}",
        str(len(values)),
        escape(told),
    )


def _curve(values: Sequence[float]) -> str:
    """A line over the steps."""
    if len(values) < 2:
        return ""
    (width, height), low, high = CURVE, min(values), max(values)
    across, span = (width - 2) / (len(values) - 1), (high - low) or 1
    points = " ".join(
        f"{1 + i * across:.1f},{1 + (height - 2) * (high - value) / span:.1f}"
        for i, value in enumerate(values)
    )
    line = f'<polyline points="{points}" fill="none" stroke="currentColor"/>'
    return f'<svg width="{width}" height="{height}" role="img">{line}</svg>'


def counted(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'s' * (steps != 1)}"


def _picture(picture: Image.Image) -> str:
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" style="margin: 2px">'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{''.join(lines)}</table>"


def _short(prompt: Any, most: int = 60) -> str:
    text = str(prompt)
    return text if len(text) <= most else f"{text[: most - 3]}..."
