"""How do time and memory grow with guides, images, steps, size and particles? The emoji model.

    python benchmarks/growth.py            # some three minutes on one core
    python benchmarks/growth.py --rounds 1

Seconds are processor time of one thread for a whole run, the least of several rounds in a shuffled
order, since what else runs can only add; peak is the most that tensors held at a time. The order is
the slope of a straight line through the three largest points of both, in logarithms: 1 is in
proportion, 0 is not at all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves.drawings import fill
from handwritten import Work
from timing import measure, models
from timing.rows import Answer, Row

import pilotfish

HERE = Path(__file__).parent
RESULT, PAGE, PLOT = HERE / "results/growth.json", HERE / "README.md", HERE / "growth.png"
CPU = torch.device("cpu")
WORK = Work("a fox on a teal background", 6, guidance_scale=4.0)
GUIDE = "blue:gradient=latents"

# What of a run grows, and how a run of such a number is made.
AXES: dict[str, tuple[tuple[int, ...], Callable[[int], dict[str, Any]]]] = {
    "guides": ((1, 2, 4, 8, 16), lambda n: {"plugins": [GUIDE] * n}),
    "images": ((1, 2, 4, 8), lambda n: {"num_images": n}),
    "steps": ((3, 6, 12, 24), lambda n: {"steps": n}),
    "side in pixels": ((32, 64, 128, 192), lambda n: {"height": n, "width": n}),
    "particles": (
        (2, 4, 8, 16),
        lambda n: {"plugins": ["blue:gradient=none", f"feynman-kac:particles={n}"]},
    ),
}


def rows_of(pipeline: Any) -> dict[str, Row]:
    """A row for each number on each axis, such as "guides 4"."""
    sampler = pilotfish.Sampler.from_pipeline(pipeline)

    def run(changed: Mapping[str, Any], work: Work) -> Answer:
        # The warm-up's single step counts but where steps are what grows.
        usual = {"steps": work.steps, "plugins": [GUIDE], "scheduler": "euler-ancestral"}
        more = {"guidance_scale": work.guidance_scale, "seed": work.seed}
        result = sampler(work.prompt, **{**usual, **more, **changed})
        return result.latents, result.images

    return {
        f"{axis} {number}": Row(f"{axis} {number}", partial(run, change(number)))
        for axis, (numbers, change) in AXES.items()
        for number in numbers
    }


def growth(rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of each number on each axis, and the orders."""
    rows = rows_of(models.load("emoji", CPU, torch.float32))
    with measure.clock_on(CPU) as clock:
        seconds = measure.measure(rows, WORK, rounds, clock=clock)
        peaks = {n: measure.peak_bytes(partial(row.run, WORK), CPU) for n, row in rows.items()}
    found: dict[str, dict[str, Any]] = {}
    for axis, (numbers, _) in AXES.items():
        names = [f"{axis} {number}" for number in numbers]
        spent = [min(seconds[name].values()) for name in names]
        held = [peaks[name] for name in names]
        found[axis] = {
            "numbers": numbers,
            "seconds": [round(value, 4) for value in spent],
            "peak_bytes": held,
            "order": {"time": order(numbers, spent), "memory": order(numbers, held)},
        }
    return found


def order(numbers: Sequence[int], values: Sequence[float]) -> float:
    """The power of the number by which the values grow at last."""
    last = np.log(np.asarray([numbers, values], dtype=float))[:, -3:]
    return round(float(np.polyfit(*last, deg=1)[0]), 2)


def table(result: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown."""
    heads = ("what grows", "numbers", "seconds of a run", "peak MB", "order of time", "of memory")
    lines = [heads, ("---", "---", "---", "---", "---:", "---:")]
    for axis, found in result.items():
        cells = (
            ", ".join(map(str, found["numbers"])),
            ", ".join(f"{value:.2f}" for value in found["seconds"]),
            ", ".join(f"{value / 1e6:.0f}" for value in found["peak_bytes"]),
        )
        orders = (f"{found['order'][name]:.2f}" for name in ("time", "memory"))
        lines.append((axis, *cells, *orders))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(result: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Time and memory beside their first point, in logarithms, beside a straight proportion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(result), 3), layout="constrained")
    for axes, (axis, found) in zip(figure.subplots(1, len(result)), result.items(), strict=True):
        numbers = np.asarray(found["numbers"], dtype=float)
        axes.plot(numbers, numbers / numbers[0], ":", color="gray", label="in proportion")
        for key, label in (("seconds", "time"), ("peak_bytes", "memory")):
            values = np.asarray(found[key], dtype=float)
            axes.plot(numbers, values / values[0], "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.set_xticks(numbers, [str(n) for n in found["numbers"]], minor=False)
        axes.minorticks_off()
        axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    figure.axes[0].set_ylabel("times the first")
    figure.axes[0].legend(frameon=False)
    figure.savefig(target, dpi=80)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    result = growth(parser.parse_args().rounds)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, PLOT)
    fill(PAGE, {"all": table(result)}, kind="growth")
    print(table(result))


if __name__ == "__main__":
    main()
