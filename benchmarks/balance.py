"""How strong should a guide be? Adherence against fidelity over `scale`, for the preset "balanced".

    python benchmarks/balance.py --minutes 6    # the emoji model: docs/balance.png and the sheet
    python benchmarks/balance.py --quick        # 16 pictures a point, fewer points

A point is one guide at one scale: the same prompts (64, every object once, backgrounds spread, no
pair that training left out) and the same seeds. **Adherence** is the guide's own loss on the
finished pictures. **Fidelity** is how often the judge, a classifier trained apart, sees the
prompt's object; of the background too, but that is what a colour guide is asked to change.

Also measured: `UNPROMPTED_PULL` of `pilotfish.guidance`, what stands in for the prompt's own pull.

Scale 1 and no guide are measured on all 64 pictures first, then every other point on 16 before any
is measured on 32, so a run can stop at any time. What is finished is kept in `benchmarks/.work` and
not measured again, until the weights change.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import BACKGROUNDS, FOLDER, OBJECTS, judge
from torch import Tensor

import pilotfish
from pilotfish import guidance, registry

HERE = Path(__file__).parent
GUIDES: dict[str, dict[str, Any]] = {
    "blue": {"use": "blue"},
    "palette": {"use": "palette", "colors": ["#14213d", "#fca311", "#e5e5e5"]},
}
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
USUAL, STRONG = 4.0, 7.5  # guidance_scale: of the emoji model's own tests, and pilotfish's default
STEPS, BATCH, BATCHES = 25, 16, 4
SHOWN = (2, 5, 10)  # of the first batch, on the sheet: campfire, penguin, boat
TILE = 64


@dataclass(frozen=True)
class Point:
    """One guide at one strength; scale 0 stands for no guide."""

    guide: str
    gradient: str
    scale: float
    guidance_scale: float
    floored: bool = True  # whether the prompt's pull never counts as less than UNPROMPTED_PULL

    @property
    def name(self) -> str:
        """For files and people."""
        if not self.scale:
            return f"unguided-cfg{self.guidance_scale:g}"
        name = f"{self.guide}-{self.gradient}-{self.scale:g}-cfg{self.guidance_scale:g}"
        return name if self.floored else f"{name}-nofloor"


class Prompts(pilotfish.Plugin):
    """Gives each image of a batch its own prompt."""

    def __init__(self, model: Any, prompts: Sequence[str]) -> None:
        super().__init__()
        tokenizer, encoder = model.tokenizer, model.text_encoder
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(list(prompts), max_length=tokenizer.model_max_length, **options).input_ids
        with torch.no_grad():
            self._values = encoder(ids.to(encoder.device))[0]  # (B, T, D)

    def embedding_transform(self, embedding: pilotfish.Embedding) -> pilotfish.Embedding | None:
        """The positive prompts."""
        if (embedding.stage, embedding.role) != ("prompt", "positive"):
            return None
        return dataclasses.replace(embedding, values=self._values)


class Watch(pilotfish.Plugin):
    """Notes RMS(cond - uncond) / RMS(cond) of every step and image; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ratios: list[list[float]] = []
        self.alphas: list[float] = []

    def combine_predictions(self, cond: Tensor, uncond: Tensor | None, step: Any) -> None:
        """The core's answer."""
        if uncond is not None:
            self.alphas.append(round(step.alpha, 5))  # DDIM's: variance preserving
            ratio = _rms(cond - uncond) / _rms(cond)  # (B,)
            self.ratios.append([round(r, 5) for r in ratio.tolist()])


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(dim=(1, 2, 3)).sqrt()


def labels_of(batch: int) -> list[tuple[int, int]]:
    """Object and background of each prompt of a batch; never a pair that training left out."""
    objects = range((batch + 2) % BATCHES, len(OBJECTS), BATCHES)
    return [(o, (7 * o + o // 10 + 5) % 10) for o in objects][:BATCH]


def usual() -> list[Point]:
    """No guide, and each guide as it is without any setting."""
    return [
        point
        for guidance_scale in (USUAL, STRONG)
        for point in (
            Point("", "", 0.0, guidance_scale),
            *(Point(guide, "x0", 1.0, guidance_scale) for guide in GUIDES),
        )
    ]


def grid(quick: bool) -> list[Point]:
    """All points, the ones that matter most first."""
    near, far = (0.5, 1.5, 2.0), () if quick else (0.25, 4.0)
    points = usual()
    points += [Point(guide, "x0", scale, USUAL) for scale in near for guide in GUIDES]
    points += [Point("", "", 0.0, 1.0)]
    points += [Point("blue", "x0", scale, 1.0) for scale in (1.0, 0.5, 2.0)]
    points += [Point("blue", "x0", 1.0, USUAL, floored=False)]
    points += [Point(guide, "x0", scale, USUAL) for scale in far for guide in GUIDES]
    points += [Point("blue", "latents", scale, USUAL) for scale in (1.0, 0.5, 2.0)]
    if not quick:
        points += [Point("palette", "latents", scale, USUAL) for scale in (1.0, 0.5, 2.0)]
    return points


class Lab:
    """Measures points with one model and keeps what is done.

    Args:
        the_judge: None leaves fidelity out.
        folder: of finished batches.
    """

    def __init__(self, sampler: Any, the_judge: Any, folder: Path) -> None:
        self.sampler, self.judge, self.folder = sampler, the_judge, folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, point: Point, batch: int) -> Path:
        """Where a finished batch is kept."""
        return self.folder / f"{point.name}-{batch}.npz"

    def finished(self, point: Point) -> list[tuple[int, dict[str, Any]]]:
        """All batches that are there, with their index."""
        files = [(batch, self.file(point, batch)) for batch in range(BATCHES)]
        return [(batch, dict(np.load(file))) for batch, file in files if file.exists()]

    def measure(self, point: Point, batch: int) -> None:
        """Make and keep the pictures of one batch of a point."""
        start = time.perf_counter()
        pictures, watch = self.pictures(point, batch)
        seconds = (time.perf_counter() - start) / len(pictures)
        part = self.folder / "part.npz"
        np.savez_compressed(
            part, pictures=pictures, seconds=seconds, ratios=watch.ratios, alphas=watch.alphas
        )
        part.replace(self.file(point, batch))

    def numbers(self, kept: dict[str, Any], batch: int) -> dict[str, list[float]]:
        """What is measured on each picture of a batch."""
        pictures = torch.from_numpy(kept["pictures"]).permute(0, 3, 1, 2).float() / 255
        numbers = self.adherence(pictures) | self.fidelity(pictures, batch)
        return {**numbers, "seconds": [float(kept["seconds"])]}

    def pictures(self, point: Point, batch: int) -> tuple[np.ndarray, Watch]:
        """(B, 64, 64, 3) as bytes, and what `Watch` saw where there is no guide."""
        texts = [f"a {OBJECTS[o]} on a {BACKGROUNDS[b]} background" for o, b in labels_of(batch)]
        watch = Watch()
        plugins: list[Any] = [Prompts(self.sampler.model, texts)]
        if point.scale:
            settings = {"scale": point.scale, "gradient": point.gradient}
            plugins.append({**GUIDES[point.guide], **settings})
        else:
            plugins.append(watch)
        # Without a guide "no guidance" is a hair above 1, so that the other prediction is known.
        no_guide_at_one = not point.scale and point.guidance_scale == 1
        with floor(guidance.UNPROMPTED_PULL if point.floored else 0.0):
            result = self.sampler(
                plugins=plugins,
                preset="balanced",
                scheduler="ddim",
                steps=STEPS,
                seed=batch * BATCH,
                num_images=len(texts),
                guidance_scale=1 + 1e-6 if no_guide_at_one else point.guidance_scale,
            )
        return np.stack([np.asarray(picture) for picture in result.images]), watch

    def adherence(self, pictures: Tensor) -> dict[str, list[float]]:
        """Every guide's own loss, guided by it or not."""
        step = SimpleNamespace(image=pictures)
        return {
            name: registry.resolve(use).plugin.loss_guidance(step).tolist()
            for name, use in GUIDES.items()
        }

    def fidelity(self, pictures: Tensor, batch: int) -> dict[str, list[float]]:
        """Whether the judge sees the prompt's object and background."""
        if self.judge is None:
            return {}
        verdict = self.judge.judge(pictures)
        objects, backgrounds = torch.tensor(labels_of(batch)).unbind(1)
        return {
            "object_right": (verdict.object.argmax(1) == objects).float().tolist(),
            "background_right": (verdict.background.argmax(1) == backgrounds).float().tolist(),
        }


@contextlib.contextmanager
def floor(value: float) -> Iterator[None]:
    """Another `UNPROMPTED_PULL` while the context lasts."""
    before = guidance.UNPROMPTED_PULL
    guidance.UNPROMPTED_PULL = value
    try:
        yield
    finally:
        guidance.UNPROMPTED_PULL = before


def run(lab: Lab, points: Sequence[Point], batches: int, end: float) -> None:
    """Measure what is missing, until the clock says `end`."""
    longest = 0.0
    for batch in range(batches):
        for point in points:
            start = time.perf_counter()
            if lab.file(point, batch).exists():
                continue
            if start + longest > end:
                return
            lab.measure(point, batch)
            longest = max(longest, time.perf_counter() - start)
            print(f"{point.name}: {time.perf_counter() - start:.0f} s", flush=True)


def summary(lab: Lab, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Each measured point: means over its pictures, with their standard errors."""
    rows = []
    for point in points:
        if kept := lab.finished(point):
            numbers = [lab.numbers(arrays, batch) for batch, arrays in kept]
            row: dict[str, Any] = dataclasses.asdict(point)
            row["count"] = sum(len(arrays["pictures"]) for _, arrays in kept)
            row |= {name: mean([*chain(*(n[name] for n in numbers))]) for name in numbers[0]}
            if not point.scale:
                row["ratios"] = np.concatenate([arrays["ratios"] for _, arrays in kept], axis=1)
                row["alphas"] = kept[0][1]["alphas"]
            rows.append(row)
    return rows


def mean(values: Sequence[float]) -> dict[str, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "error": round(error, 4)}


def write(file: Path, content: Any) -> None:
    """Never half a file."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n")
    part.replace(file)


def fingerprint(model: Any) -> str:
    """Changes with the weights."""
    digest = hashlib.sha256()
    for network in (model.unet, model.vae, model.text_encoder):
        for value in network.state_dict().values():
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# ---- the stand-in for the prompt's pull ----


def pull_table(points: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """guidance_scale * RMS(cond - uncond) / RMS(cond) over the run, as Markdown and data.

    The second row of each guidance scale is divided by sqrt(alpha) of the variance-preserving
    coordinates: where that is level, `constant * sqrt(alpha)` has the pull's own shape.
    """
    runs = {p["guidance_scale"]: p for p in points if "ratios" in p}
    places = [round(i * (STEPS - 1) / 8) for i in range(9)]
    lines = [
        f"| cfg | {' | '.join(f'{p / STEPS:.0%}' for p in places)} | mean | below the floor |",
        "|---:" * (len(places) + 3) + "|",
    ]
    data = {}
    for scale, point in sorted(runs.items()):
        pulls = scale * point["ratios"]  # (steps, images)
        means, raised = pulls.mean(axis=1), (pulls < guidance.UNPROMPTED_PULL).mean()
        shaped = means / point["alphas"] ** 0.5
        data[f"{scale:g}"] = {
            "by_step": means.round(4).tolist(),
            "by_step_over_root_alpha": shaped.round(4).tolist(),
            "mean": round(float(means.mean()), 4),
            "median": round(float(np.median(pulls)), 4),
            "share_of_steps_below_the_floor": round(float(raised), 4),
        }
        for name, row, end in ((f"{scale:g}", means, f"{raised:.0%}"), ("shaped", shaped, "")):
            cells = [f"{row[p]:.3f}" for p in places]
            lines.append(f"| {name} | {' | '.join(cells)} | {row.mean():.3f} | {end} |")
    return "\n".join(lines), data


def matching_constant(points: Sequence[dict[str, Any]]) -> float | None:
    """The constant that makes scale 1 pull as far without guidance as it does at `USUAL`.

    Without guidance the pull is the constant alone, so scale s stands for s times the constant.
    Both ends are measured by the part of the unguided loss that is left.
    """
    kinds = (("", ""), ("blue", "x0"))
    chosen = [p for p in points if p["floored"] and (p["guide"], p["gradient"]) in kinds]
    losses = {(p["guidance_scale"], p["scale"]): p["blue"]["mean"] for p in chosen}
    try:
        wanted = losses[USUAL, 1.0] / losses[USUAL, 0.0]
        left = sorted((s, v / losses[1.0, 0.0]) for (g, s), v in losses.items() if g == 1.0)
    except KeyError:
        return None
    for (low, more), (high, less) in pairwise(left):
        if less <= wanted <= more:
            scale = low + (high - low) * (more - wanted) / (more - less)
            return round(scale * guidance.UNPROMPTED_PULL, 3)
    return None


# ---- pictures and tables ----


def table(points: Sequence[dict[str, Any]]) -> str:
    """All points as Markdown."""
    lines = [
        "| guide | gradient | scale | cfg | count | blue | palette | object | background | s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for p in points:
        guide = (p["guide"] or "none") + ("" if p["floored"] else ", no floor")
        cells = [guide, p["gradient"], f"{p['scale']:g}", f"{p['guidance_scale']:g}"]
        cells.append(str(p["count"]))
        cells += [f"{p[name]['mean']:.3f}" if name in p else "" for name in ("blue", "palette")]
        for name in ("object_right", "background_right"):
            cells.append(f"{p[name]['mean']:.0%}" if name in p else "")
        cells.append(f"{p['seconds']['mean']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(
    points: Sequence[dict[str, Any]], guide: str, gradient: str, value: str
) -> list[tuple[float, float, float]]:
    """(scale, value, its error) at `USUAL`, the unguided point first."""
    kinds = (("", ""), (guide, gradient))
    return sorted(
        (p["scale"], p[value]["mean"], p[value]["error"])
        for p in points
        if p["floored"] and p["guidance_scale"] == USUAL and value in p
        if (p["guide"], p["gradient"]) in kinds
    )


def plot(points: Sequence[dict[str, Any]], target: Path) -> None:
    """Adherence above, fidelity below; one column a guide."""
    from matplotlib.figure import Figure

    places = {scale: place for place, scale in enumerate((0.0, *SCALES))}
    figure = Figure(figsize=(4.2 * len(GUIDES), 5.4), layout="constrained")
    axes = figure.subplots(2, len(GUIDES), squeeze=False, sharex=True)
    for column, guide in enumerate(GUIDES):
        for axis, value in zip(axes[:, column], (guide, "object_right"), strict=True):
            for gradient, color in (("x0", "tab:blue"), ("latents", "tab:orange")):
                rows = curve(points, guide, gradient, value)
                if len(rows) > 1:
                    scales, means, errors = zip(*rows, strict=True)
                    x = [places[scale] for scale in scales]
                    label = f"gradient at {gradient}"
                    axis.errorbar(x, means, errors, color=color, marker="o", label=label)
            axis.axvline(places[1.0], color="gray", linewidth=0.8, linestyle=":")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"{guide}: its loss on the finished pictures")
        axes[1, column].set_title("object right, by the judge")
        axes[1, column].set_xlabel("scale")
        axes[1, column].set_xticks(list(places.values()), [f"{scale:g}" for scale in places])
    axes[0, 0].legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)


def sheet(lab: Lab, target: Path) -> None:
    """The shown prompts (rows) over scale (columns), for every guide and gradient."""
    blocks = [("blue", "x0"), ("blue", "latents"), ("palette", "x0")]  # what `grid` measures
    scales, line, left = (0.0, *SCALES), 14, 96
    height = line + len(blocks) * (len(SHOWN) * TILE + 4)
    canvas = Image.new("RGB", (left + len(scales) * (TILE + 2), height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for column, scale in enumerate(scales):
        x = left + column * (TILE + 2)
        draw.text((x + TILE / 2, line / 2), f"scale {scale:g}", "black", font, anchor="mm")
        for block, (guide, gradient) in enumerate(blocks):
            y = line + block * (len(SHOWN) * TILE + 4)
            draw.text((4, y + 4), f"{guide}\ngradient at\n{gradient}", "black", font)
            point = Point(guide if scale else "", gradient if scale else "", scale, USUAL)
            if lab.file(point, 0).exists():
                pictures = np.load(lab.file(point, 0))["pictures"]
                for row, place in enumerate(SHOWN):
                    canvas.paste(Image.fromarray(pictures[place]), (x, y + row * TILE))
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def load_judge(folder: Path) -> Any:
    """The judge, or None where it is not trained yet."""
    return judge.load(folder) if (folder / judge.FILE).exists() else None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a diffusers folder; without it, the emoji model")
    parser.add_argument("--judge", type=Path, default=FOLDER, help="folder of the judge's weights")
    parser.add_argument("--quick", action="store_true", help="16 pictures a point, fewer points")
    parser.add_argument("--minutes", type=float, help="start no batch that would end later")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "balance.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="of the pictures")
    args = parser.parse_args(arguments)
    sampler = pilotfish.load(args.model)
    folder = HERE / ".work" / f"balance-{fingerprint(sampler.model)}-{guidance.UNPROMPTED_PULL:g}"
    lab, points = Lab(sampler, load_judge(args.judge), folder), grid(args.quick)
    end = time.perf_counter() + (args.minutes * 60 if args.minutes else float("inf"))
    if not args.quick:
        run(lab, usual(), BATCHES, end)
    run(lab, points, 1 if args.quick else BATCHES, end)
    report(lab, points, args.out, args.docs)


def report(lab: Lab, points: Sequence[Point], out: Path, docs: Path) -> None:
    """Tables on stdout, numbers in a file, a plot and a sheet."""
    rows = summary(lab, points)
    pulls, data = pull_table(rows)
    constant = matching_constant(rows)
    print(f"\n{table(rows)}\n\nguidance_scale * RMS(cond - uncond) / RMS(cond):\n\n{pulls}\n")
    print(
        f"UNPROMPTED_PULL is {guidance.UNPROMPTED_PULL}; for blue, scale 1 without guidance pulls "
        f"as far as at guidance_scale {USUAL:g} with {constant}"
    )
    plain = [{key: v for key, v in row.items() if key not in ("ratios", "alphas")} for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, {"points": plain, "prompt_pull": data, "matching_constant": constant})
    plot(rows, docs / "balance.png")
    sheet(lab, docs / "balance-sheet.png")


if __name__ == "__main__":
    main()
