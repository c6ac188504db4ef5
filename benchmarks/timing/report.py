"""Results as tables: ratios of rows of the same round, what is aimed at, what FLOPs predict."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import measure

STAND_INS = "microseconds a step, networks replaced by stand-ins"
HOST = {
    "hooks": ("8 plugins that do nothing, all hooks", 100),
    "first guide": ("a guide, beyond the hand-written loop", None),
    "further guide": ("each further one, beyond the hand-written loop", None),
}


@dataclass(frozen=True)
class Goal:
    """A ratio of two rows to reach.

    Attributes:
        steps: of their steps alone: what every run has once (the row "S") is taken off.
        least: the bound is a lower one.
    """

    row: str
    other: str
    bound: float
    steps: bool = False
    least: bool = False


@dataclass(frozen=True)
class Aim:
    """What was measured of something, beside what it should be.

    Attributes:
        where: the scene.
        measured: median, min, max, and how many.
        by_flops: what floating-point operations predict.
        bound: of the median, an upper one unless `least`; None where nothing is aimed at.
    """

    where: str
    what: str
    measured: dict[str, float]
    bound: float | None = None
    least: bool = False
    by_flops: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the bound."""
        if self.bound is None:
            return None
        median = self.measured["median"]
        return median >= self.bound if self.least else median <= self.bound

    def verdict(self) -> str:
        """`<= 1.02, met`."""
        if self.bound is None:
            return ""
        met = "met" if self.met else "**missed**"
        return f"{'>=' if self.least else '<='} {self.bound:g}, {met}"


GOALS = (
    *(Goal(f"U1{how}", f"U0{how}", 1.01) for how in ("", " compiled", " channels last")),
    *(
        Goal(f"O{name}", f"H{name}", 1.02)
        for name in (*"1238", "1 x0", "3 mixed", "1 compiled", "1 channels last")
    ),
    Goal("N3", "O3", 3, steps=True, least=True),
    Goal("O1 rgb", "U0", 1.02, steps=True),
    Goal("O1 x0 tiny", "U0", 1.25, steps=True),
)
GUIDE_GOAL = 0.03  # of an unguided step, for each further guide of a batch of eight


class Scene:
    """One scene's result."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.name, self.rows = result["scene"]["name"], result["rows"]
        self.batch, self.work = result["work"]["batch"], result["work"]
        self.apart = result["largest_difference"]
        self.dtype = result["scene"]["dtype"]
        self.seconds = {
            name: {int(index): s for index, s in row["seconds"].items()}
            for name, row in self.rows.items()
        }

    def ratio(self, row: str, other: str, steps: bool) -> dict[str, float]:
        """Of seconds."""
        return measure.ratio(self.seconds, row, other, "S" if steps else None)

    def flops(self, row: str) -> float | None:
        """Floating-point operations of one of a row's steps, without what a run has once."""
        counted, once = (self.rows[name]["counted"] for name in (row, "S"))
        if counted["flops"] is None:
            return None
        return float(counted["flops"] - once["flops"]) / counted["steps"]

    def predicted(self, row: str, other: str, steps: bool) -> float | None:
        """The ratio of two rows by floating-point operations."""
        parts = [self.flops(row), self.flops(other)]
        if None in parts:
            return None
        once = 0 if steps else self.rows["S"]["counted"]["flops"] / self.work["steps"]
        return (parts[0] + once) / (parts[1] + once)

    def guides(self, letter: str) -> list[int]:
        """The numbers of guides for which there are rows, if there are two or more."""
        counts = sorted(int(n[1:]) for n in self.rows if re.fullmatch(f"{letter}[1-9]", n))
        return counts if len(counts) > 1 else []

    def aims(self) -> Iterator[Aim]:
        """What is to be reached by the rows that there are."""
        for goal in GOALS:
            if goal.row in self.rows and goal.other in self.rows:
                pair = (goal.row, goal.other, goal.steps)
                yield Aim(
                    self.name,
                    f"{goal.row} / {goal.other}" + (", steps alone" if goal.steps else ""),
                    self.ratio(*pair),
                    goal.bound,
                    goal.least,
                    self.predicted(*pair),
                )
        for letter in "HO":
            if counts := self.guides(letter):
                yield self._per_guide(letter, counts)

    def _per_guide(self, letter: str, counts: list[int]) -> Aim:
        operations = [self.flops(f"{letter}{count}") for count in counts]
        whose = "pilotfish" if letter == "O" else "by hand"
        return Aim(
            self.name,
            f"each further guide, {whose}, in unguided steps",
            measure.slope(self.seconds, letter, counts, "U0", "S"),
            GUIDE_GOAL if letter == "O" and self.batch == 8 else None,
            by_flops=statistics.linear_regression(counts, operations).slope / self.flops("U0"),
        )

    def table(self) -> list[str]:
        """Lines of a table with every row."""
        lines = [
            line("row", "what", "seconds", "run / U0", "step / U0", "by FLOPs", "peak MB"),
            line("---", "---", "---:", "---:", "---:", "---:", "---:"),
        ]
        for name, row in self.rows.items():
            seconds = statistics.median(self.seconds[name].values())
            lines.append(
                line(
                    name,
                    row["what"],
                    f"{seconds:.3f}",
                    shown(self.ratio(name, "U0", steps=False)),
                    number(self.ratio(name, "U0", steps=True)["median"]),
                    number(self.predicted(name, "U0", steps=True)),
                    f"{row['counted']['peak_bytes'] / 1e6:.0f}",
                )
            )
        return lines


def page(result: dict[str, Any]) -> str:
    """A result as Markdown, with every row."""
    lines = [summary(result)]
    for scene in [Scene(scene) for scene in result.get("scenes", ())]:
        work = scene.work
        lines += [
            "",
            f"**{scene.name}**: batch {work['batch']}, {work['steps']} steps, {scene.dtype}",
        ]
        lines += ["", *scene.table()]
    return "\n".join(lines)


def aims(result: dict[str, Any]) -> list[Aim]:
    """All that a result can be held to."""
    if "scenes" not in result:
        return _memory_aims(result)
    found = [aim for scene in result["scenes"] for aim in Scene(scene).aims()]
    for name, cost in result["host_microseconds_per_step"].items():
        what, bound = HOST.get(name, (f"{name}, without networks", None))
        found.append(Aim(STAND_INS, what, cost, bound))
    return found


def _memory_aims(result: dict[str, Any]) -> list[Aim]:
    kept, apart = (result["unet_graph"][name] for name in ("kept_bytes", "largest_difference"))
    measured = [measure.spread([value]) for value in (kept["on"] / kept["off"], apart)]
    return [
        Aim(result["model"], "kept by the UNet's graph, checkpointed / plain", measured[0], 0.1),
        Aim(result["model"], "gradients' largest difference", measured[1], 1e-5),
    ]


def reached(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The aims that have a bound, with whether they are met, as a result holds them."""
    return [{**asdict(aim), "met": aim.met} for aim in aims(result) if aim.bound is not None]


def summary(result: dict[str, Any]) -> str:
    """What was to be reached, and what was."""
    if "scenes" not in result:
        return memory(result)
    lines = [f"On {place(result['machine'])}.", ""]
    lines += [line("ratio", "median (min to max)", "by FLOPs", "to reach")]
    lines += [line("---", "---:", "---:", "---:")]
    where = None
    for aim in aims(result):
        if aim.where != where:
            where = aim.where
            lines.append(f"| **{where}** | | | |")
        digits = 0 if where == STAND_INS else 3
        lines.append(
            line(aim.what, shown(aim.measured, digits), number(aim.by_flops), aim.verdict())
        )
    return "\n".join(lines)


def memory(result: dict[str, Any]) -> str:
    """The aims and a table of runs."""
    kept = result["unet_graph"]["kept_bytes"]
    ratio, apart = _memory_aims(result)
    lines = [
        f"On {place(result['machine'])}: {result['model']}, {result['pixels']} pixels, float32, "
        f"batch 1, {result['steps']} steps with a gradient through decoder and UNet; weights "
        f"{gigabytes(result['weight_bytes'])}. The UNet's graph of a step keeps "
        f"{gigabytes(kept['off'])}, checkpointed {gigabytes(kept['on'])}: "
        f"{ratio.measured['median']:.3f} of it ({ratio.verdict()}), and the gradients are at most "
        f"{apart.measured['median']:.1e} of the largest apart ({apart.verdict()}).",
        "",
        line("checkpointing", "peak beyond the weights", "seconds"),
        line("---", "---:", "---:"),
    ]
    for name, run in result["runs"].items():
        lines.append(line(name, gigabytes(run["peak_bytes"]), f"{run['seconds']:.0f}"))
    return "\n".join(lines)


def gigabytes(count: int) -> str:
    """`3.44 GB`."""
    return f"{count / 1e9:.2f} GB"


def write_tables(readme: Path, results: Path) -> None:
    """Put what each result reached into the README, between its comments, and all of it beside it.

    Raises:
        SystemExit: the README has no such comments.
    """
    text = readme.read_text(encoding="utf-8")
    for path in sorted(results.glob("speed-*.json")):
        start, end = f"<!-- {path.stem} -->\n", f"<!-- {path.stem} ends -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{readme} has no place for {path.name}: {start.strip()} ... {end}")
        result = json.loads(path.read_text(encoding="utf-8"))
        text = f"{before}{start}\n{summary(result)}\n\n{end}{after}"
        path.with_suffix(".md").write_text(f"{page(result)}\n", encoding="utf-8")
    readme.write_text(text, encoding="utf-8")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "pilotfish")},
    }


def cpu_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def place(found: dict[str, Any]) -> str:
    """The machine in words."""
    where = found["gpu"] or f"{found['cpu']}, {found['cores']} cores"
    return f"{where}, torch {found['torch']}, diffusers {found['diffusers']}"


def shown(value: dict[str, float], digits: int = 3) -> str:
    """`1.004 (0.991 to 1.020)`."""
    median, low, high = (f"{value[k]:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def number(value: float | None, digits: int = 3) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def line(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
