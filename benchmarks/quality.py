"""How good are guided pictures? Every preset over its scale: adherence, fidelity and realism.

    python benchmarks/quality.py --minutes 45         # run it again to go on
    python benchmarks/quality.py --model emoji-flow   # the flow model that ships
    python benchmarks/quality.py --quick              # 16 pictures a point, one scale

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

import pilotfish_emoji
import pilotfish_emoji_flow
import torch
from curves import drawings
from curves.pictures import Lab
from curves.points import BATCHES, RUNS, TASKS, Point, Series, Wish, all_series, plan
from curves.scores import Scores

HERE = Path(__file__).parent
KEPT, PAGE = HERE / ".work" / "quality", "guidance.md"
MODELS = {
    "emoji": (pilotfish_emoji.FOLDER, "quality"),  # and the name of its results
    "emoji-flow": (pilotfish_emoji_flow.FOLDER, "quality-flow"),
}


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


def run(scores: Scores, series: Sequence[Series], args: argparse.Namespace) -> None:
    """Make what is missing, in the plan's order as it is known by then; nothing after the end."""
    end = time.monotonic() + args.minutes * 60
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(args.workers, context, Worker.start, (scores.lab.folder,)) as pool:
        running: dict[Future[None], Wish] = {}
        while True:
            for wish in missing(scores, series, set(running.values()), args.quick):
                if len(running) == args.workers or time.monotonic() > end:
                    break
                running[pool.submit(Worker.measure, *wish)] = wish
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                point, batch = running.pop(done)
                print(f"{point.series.task}, {point.series.name}, {point.scale:g}: {batch}")


def missing(
    scores: Scores, series: Sequence[Series], running: set[Wish], quick: bool
) -> list[Wish]:
    """The batches to make next, as far as the plan is known."""
    wishes = dict.fromkeys(plan(series, scores.merit, quick=quick))
    return [w for w in wishes if w not in running and not scores.lab.file(*w).exists()]


def report(scores: Scores, series: Sequence[Series], args: argparse.Namespace) -> None:
    """Numbers in a file, tables in the page, a plot and the sheets."""
    points = dict.fromkeys(point for point, _ in plan(series, scores.merit, quick=args.quick))
    rows = [row for point in points if (row := scores.row(point))]
    least = {task: scores.least_distance(task) for task in TASKS}
    result = {"weights": scores.lab.weights, "least_distance": least, "points": rows}
    name = MODELS[args.model][1]
    args.out.mkdir(parents=True, exist_ok=True)
    part = args.out / f"{name}.part"
    part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    part.replace(args.out / f"{name}.json")
    args.docs.mkdir(parents=True, exist_ok=True)
    if (args.docs / PAGE).exists():
        drawings.fill(args.docs / PAGE, drawings.tables(result), name)
    drawings.plot(rows, args.docs / f"{name}.png")
    for task in TASKS:
        if lines := drawings.lines(rows, series, task):
            drawings.sheet(scores.lab, lines, args.docs / f"{name}-{task}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RUNS, default="emoji")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing later")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="16 pictures a point, one scale")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="a folder for numbers")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="page and pictures")
    args = parser.parse_args(arguments)
    series = all_series(args.model)
    scores = Scores(Lab(MODELS[args.model][0], KEPT), 1 if args.quick else BATCHES)
    run(scores, series, args)
    report(scores, series, args)


if __name__ == "__main__":
    main()
