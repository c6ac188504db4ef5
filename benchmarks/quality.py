"""How good are guided pictures? Every preset over its scale: adherence, fidelity and realism.

    python benchmarks/quality.py --minutes 45   # run it again to go on
    python benchmarks/quality.py --quick        # 16 pictures a point, one scale

Two questions. **A label without a prompt**: the guide `classifier` asks for eight objects; does a
judge apart from it see them, and are they good pictures? **Colours with a prompt**: the guides
`blue` and `palette` beside a prompt; do the colours come, and does the prompt's object stay?

Each worker takes one thread. What is finished is kept in `benchmarks/.work` and not made again
until weights or settings change, so a run can be killed at any time. The tables of
`docs/guidance.md`, the plot and the sheets are made of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch
from curves import drawings
from curves.pictures import Lab
from curves.points import BATCHES, TASKS, Point, Wish, all_series, plan
from curves.scores import Scores
from pilotfish_emoji import FOLDER

HERE = Path(__file__).parent
KEPT, PAGE = HERE / ".work" / "quality", "guidance.md"
SERIES = all_series()


class Worker:
    """One process with a lab of its own."""

    lab: Lab

    @classmethod
    def start(cls, model: Path) -> None:
        """Called once in each process."""
        torch.set_num_threads(1)
        cls.lab = Lab(model, KEPT)

    @classmethod
    def measure(cls, point: Point, batch: int) -> None:
        """One batch."""
        cls.lab.measure(point, batch)


def run(scores: Scores, model: Path, *, workers: int, end: float, quick: bool) -> None:
    """Make what is missing, in the plan's order as it is known by then; start nothing after `end`.

    Args:
        end: by `time.monotonic`.
    """
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, Worker.start, (model,)) as pool:
        running: dict[Future[None], Wish] = {}
        while True:
            for wish in missing(scores, set(running.values()), quick):
                if len(running) == workers or time.monotonic() > end:
                    break
                running[pool.submit(Worker.measure, *wish)] = wish
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                point, batch = running.pop(done)
                print(f"{point.series.task}, {point.series.name}, {point.scale:g}: {batch}")


def missing(scores: Scores, running: set[Wish], quick: bool) -> list[Wish]:
    """The batches to make next, as far as the plan is known."""
    wishes = dict.fromkeys(plan(SERIES, scores.merit, quick=quick))
    return [w for w in wishes if w not in running and not scores.lab.file(*w).exists()]


def report(scores: Scores, out: Path, docs: Path, quick: bool) -> None:
    """Numbers in a file, tables in the page, a plot and the sheets."""
    points = dict.fromkeys(point for point, _ in plan(SERIES, scores.merit, quick=quick))
    rows = [row for point in points if (row := scores.row(point))]
    least = {task: scores.least_distance(task) for task in TASKS}
    result = {"weights": scores.lab.weights, "least_distance": least, "points": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    part.replace(out)
    docs.mkdir(parents=True, exist_ok=True)
    if (docs / PAGE).exists():
        drawings.fill(docs / PAGE, drawings.tables(result))
    drawings.plot(rows, docs / "quality.png")
    for task in TASKS:
        if lines := drawings.lines(rows, SERIES, task):
            drawings.sheet(scores.lab, lines, docs / f"quality-{task}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=FOLDER, help="a folder with networks, classifier and judge"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing later")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="16 pictures a point, one scale")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="page and pictures")
    args = parser.parse_args(arguments)
    scores = Scores(Lab(args.model, KEPT), 1 if args.quick else BATCHES)
    end = time.monotonic() + args.minutes * 60
    run(scores, args.model, workers=args.workers, end=end, quick=args.quick)
    report(scores, args.out, args.docs, args.quick)


if __name__ == "__main__":
    main()
