"""How near does each preset come to a posterior that is known exactly?

    python benchmarks/closed_form.py            # three minutes on one core
    python benchmarks/closed_form.py --quick    # seconds: fewer scales, steps and pictures

Data are N(0, 1) in every value, the network is exact (`pilotfish.testing.GaussianModel`), and each
value of the red channel was measured as y = 1 with noise of standard deviation 0.5, so the
posterior is N(0.8, 0.2). The guide's loss is `-log p(y | x0)`. Every preset runs through the
real sampler over scales and numbers of steps, on a schedule that is variance preserving and on a
flow, and the mean and variance of its samples are compared with the posterior's. Prints the table
of `docs/guidance.md` and draws `docs/closed-form.png` and `docs/closed-form-flow.png`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pilotfish import PRESETS, Guide, PilotfishError, Plugin, Sampler, Setting
from pilotfish.testing import GaussianModel

HERE = Path(__file__).parent
STD, NOISE, NEAR, FAR = 1.0, 0.5, 1.0, 3.0  # of the data, of the measurement; two measured values
STEPS, USUAL, FINE = (10, 50), 50, 200  # in a sweep; at the best scale only
SIDE, IMAGES = 2, 200  # four measured values a picture, 800 in all
DIVERGED = 10.0  # times the measured value


@dataclass(frozen=True)
class Row:
    """A preset on a scheduler.

    Attributes:
        scheduler: of `SCHEDULERS`.
        lowest: its weakest scale is `10 ** (lowest / 3)`, and each next 10 ** (1 / 3) times that.
        count: of scales.
        uncertain: whether the guide knows how uncertain x0 is: the exact likelihood of the latents.
    """

    name: str
    preset: Any
    lowest: int
    scheduler: str = "ddim"
    count: int = 9
    uncertain: bool = False

    @property
    def scales(self) -> list[float]:
        """From weak to strong."""
        return [10 ** ((self.lowest + i) / 3) for i in range(self.count)]


SCHEDULERS = {
    "ddim": {"name": "ddim", "timestep_spacing": "trailing"},
    "ddpm": {"name": "ddpm", "timestep_spacing": "trailing"},
    "flow": {"name": "flowmatch-euler"},
    "flow, noisy": {"name": "flowmatch-euler", "stochastic_sampling": True},
}
PRESERVING = (
    Row("exact likelihood", "clip-guided", 0, count=1, uncertain=True),
    Row("mmps", "mmps", -6),
    Row("pgdm", "pgdm", -6),
    Row("diffpir", "diffpir", -6),
    Row("clip-guided", "clip-guided", -6),
    Row("clip-guided", "clip-guided", -6, "ddpm"),
    Row("clip-guided, recurrence 4", {"base": "clip-guided", "recurrence": 4}, -4, count=5),
    Row("lgd", "lgd", -5),
    Row("ugd", "ugd", -7),
    Row("deep-dive", "deep-dive", -12),
    Row("tfg", "tfg", -11),
    Row("flowchef", "flowchef", -11),
    Row("flowdps", "flowdps", -6),
    Row("dps", "dps", -8, "ddpm"),
    Row("freedom", "freedom", -4),
    Row("mpgd", "mpgd", -4),
    Row("balanced", "balanced", -3),
    Row("dsg", "dsg", -4, "ddpm"),
)
FLOWS = {"ddim": "flow", "ddpm": "flow, noisy"}
ROWS = PRESERVING + tuple(replace(row, scheduler=FLOWS[row.scheduler]) for row in PRESERVING)


class Measured(Guide):
    """`-log p(y | x0)` of a noisy look at the red channel."""

    class Settings(Guide.Settings):
        y: float = Setting(NEAR, description="what was measured, everywhere")
        uncertain: bool = Setting(False, description="`-log p(y | latents)` instead")

    def loss_guidance(self, step: Any) -> Tensor:
        """(B,)."""
        variance = NOISE**2 + (GaussianModel(STD).variance(step) if self.settings.uncertain else 0)
        squares = (step.x0[:, 0] - self.settings.y).square().sum(dim=(1, 2))
        return squares / (2 * variance)


class Start(Plugin):
    """Noise of mean 0 and variance 1 in every channel, exactly: a smaller error of the samples."""

    def start_latents(self, run: Any) -> tuple[Tensor, int]:
        """For latents that are pure noise, or nearly so."""
        shape = (run.num_images, *run.model.latent_shape(run.height, run.width))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(12345)).double()
        over = {"dim": (0, 2, 3), "keepdim": True}
        return (noise - noise.mean(**over)) / noise.std(**over, correction=0), 0


def posterior(y: float) -> tuple[float, float]:
    """Mean and variance of a measured value."""
    gain = STD**2 / (STD**2 + NOISE**2)
    return gain * y, gain * NOISE**2


def measure(row: Row, scale: float, steps: int, images: int, y: float = NEAR) -> dict[str, Any]:
    """Mean and variance of the samples' measured values; None where they diverge."""
    guide = Measured(scale=scale, y=y, uncertain=row.uncertain)
    point: dict[str, Any] = {"scale": round(scale, 6), "steps": steps}
    try:
        result = Sampler(GaussianModel(STD))(
            plugins=[Start(), guide],
            preset=row.preset,
            scheduler=SCHEDULERS[row.scheduler],
            steps=steps,
            guidance_scale=1,
            seed=0,
            num_images=images,
            height=SIDE,
            width=SIDE,
        )
    except PilotfishError:  # no longer finite
        return {**point, "mean": None, "variance": None}
    values = result.latents[:, 0]
    mean, variance = float(values.mean()), float(values.var(correction=0))
    if max(abs(mean), variance**0.5) > DIVERGED * y:
        return {**point, "mean": None, "variance": None}
    return {**point, "mean": round(mean, 3), "variance": round(variance, 3)}


def distance(point: dict[str, Any]) -> float:
    """From the posterior: the 2-Wasserstein distance of two normal distributions."""
    if point["mean"] is None:
        return math.inf
    mean, variance = posterior(NEAR)
    return math.hypot(point["mean"] - mean, point["variance"] ** 0.5 - variance**0.5)


def sweep(row: Row, quick: bool) -> dict[str, Any]:
    """A row over scales and steps; at scale 1; and at its best scale with another measurement."""
    images, scales, usual, fine = IMAGES, row.scales, USUAL, FINE
    steps: Sequence[int] = STEPS
    if quick:
        images, scales, steps, usual, fine = 20, row.scales[::8], (3, 6), 6, 9
    points = [measure(row, scale, n, images) for n in steps for scale in scales]
    best = min((p for p in points if p["steps"] == usual), key=distance)
    return {
        "name": row.name,
        "scheduler": row.scheduler,
        "points": points,
        "at_one": measure(row, 1.0, usual, images),
        "best": best,
        "far": measure(row, best["scale"], usual, images, y=FAR),
        "steps": [measure(row, best["scale"], n, images) for n in (*steps, fine) if n != usual],
    }


def table(result: dict[str, Any]) -> str:
    """All rows as Markdown, mean / variance in each cell."""
    exact, far = result["posterior"], result["posterior_far"]
    others = [point["steps"] for point in result["rows"][0]["steps"]]
    heads = ["preset", "scheduler", "at scale 1", "best scale", "there", f"there, y = {FAR:g}"]
    heads += [f"there, {steps} steps" for steps in others]
    wanted = ["the posterior", "", cell(exact), "", cell(exact), cell(far)]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], wanted + [cell(exact)] * 2]
    for row in result["rows"]:
        points = [row["best"], row["far"], *row["steps"]]
        start = [row["name"], row["scheduler"], cell(row["at_one"])]
        lines.append([*start, f"{row['best']['scale']:.2g}", *map(cell, points)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(point: dict[str, Any]) -> str:
    """Mean / variance."""
    if point["mean"] is None:
        return "diverges"
    return f"{point['mean']:.2f} / {point['variance']:.2f}"


def plot(result: dict[str, Any], target: Path, *, flow: bool) -> None:
    """A panel for each preset, on one kind of schedule: how far from prior to posterior."""
    from matplotlib.figure import Figure

    exact = result["posterior"]
    rows = [row for row in result["rows"] if row["name"] in PRESETS]
    rows = [row for row in rows if row["scheduler"].startswith("flow") == flow]
    rows = list({row["name"]: row for row in reversed(rows)}.values())[::-1]  # each once
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    for axis, row in zip(figure.subplots(3, 5, sharey=True).flat, rows, strict=True):
        for strength, steps in zip((0.4, 1.0), STEPS, strict=True):
            points = [p for p in row["points"] if p["steps"] == steps and p["mean"] is not None]
            scales = [p["scale"] for p in points]
            label = f"{steps} steps"
            means = [p["mean"] / exact["mean"] for p in points]
            variances = [(STD**2 - p["variance"]) / (STD**2 - exact["variance"]) for p in points]
            axis.plot(scales, means, color="tab:blue", alpha=strength, label=f"mean, {label}")
            axis.plot(
                scales, variances, "--", color="tab:red", alpha=strength, label=f"variance, {label}"
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{row['name']} ({row['scheduler']})", xscale="log", ylim=(-0.1, 2))
        axis.grid(alpha=0.3)
    figure.supxlabel("scale")
    figure.supylabel("from the prior (0) to the posterior (1)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer scales, steps and pictures")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "closed_form.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="of the plot")
    args = parser.parse_args(arguments)
    names = ("mean", "variance")
    result = {
        "posterior": dict(zip(names, posterior(NEAR), strict=True)),
        "posterior_far": dict(zip(names, posterior(FAR), strict=True)),
        "rows": [sweep(row, args.quick) for row in ROWS],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(table(result))
    if not args.quick:
        plot(result, args.docs / "closed-form.png", flow=False)
        plot(result, args.docs / "closed-form-flow.png", flow=True)


if __name__ == "__main__":
    main()
