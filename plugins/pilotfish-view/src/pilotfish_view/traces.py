"""What each guide did in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pilotfish import InputError

from .plots import new_figure, rendered

if TYPE_CHECKING:
    from PIL import Image

    from pilotfish import Trace


def losses(trace: Trace) -> Image.Image:
    """Loss and share of each guide over the steps, mean over the images: `losses(result.trace)`.

    Raises:
        InputError: nothing was traced.
        PilotfishError: matplotlib is missing.
    """
    figure = new_figure(height=5)
    if not trace:
        raise InputError("the trace is empty: no guide acted in this run")
    above, below = figure.subplots(2, 1, sharex=True)
    for plugin in trace.plugins:
        records = [r for r in trace.of(plugin) if r.loss and not r.final]
        steps = [r.index for r in records]
        above.plot(steps, trace.losses(plugin), marker=".", label=plugin)
        below.plot(steps, [sum(r.share) / len(r.share) for r in records], marker=".")
    above.set_ylabel("loss")
    above.legend()
    below.set(ylabel="share of the move", xlabel="step", ylim=(0, 1.05))
    return rendered(figure)
