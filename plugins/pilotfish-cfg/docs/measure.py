"""Measure the plugins on the emoji model, each over scales, against plain guidance over scales.

Eight objects, eight pictures each, DDIM, 12 steps. A judge, a network apart, says whether object
and background are as the prompt says; the Frechet distance is taken in the judge's features to
fresh pictures of the same objects and backgrounds. The best of a method is its lowest distance
among the scales at which the judge sees both in at least `RIGHT` of the pictures.

    python docs/measure.py --out work

Prints all rows and the best of each method, and draws cfg.png of those. Finished pictures are kept
in the working folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import BACKGROUNDS, COLORS, GLYPHS
from torch import Tensor

import pilotfish

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
from emoji_training.score import Wish, frechet_distance, rates
from emoji_training.world import pixels, random_style, render, sheet

OBJECTS = ("fox", "cat", "frog", "campfire", "owl", "car", "tree", "rocket")
WISHES = [Wish(name, BACKGROUNDS[index]) for index, name in enumerate(OBJECTS)]
EACH, FRESH = 8, 64  # pictures of a wish, and fresh ones to compare with
RUN: dict[str, Any] = {"steps": 12, "scheduler": "ddim"}
RIGHT = 0.95
SCALES = (2, 8)


@dataclass(frozen=True)
class Point:
    """One method at one scale."""

    method: str
    scale: str
    guidance_scale: float
    plugins: tuple[dict[str, Any], ...] = ()

    @property
    def file(self) -> str:
        """Where its pictures are kept."""
        return f"{self.method}-{self.scale}.pt".replace(" ", "")


def points() -> Iterator[Point]:
    """All methods, each at all of its scales."""
    settings: dict[str, dict[str, Any]] = {
        "threshold": {},
        "cfg-interval": {},
        "cfg-rescale": {},
        "cfg-zero-star": {"zero_steps": 0},
        "cfg-zero-star, zero_steps 1": {"zero_steps": 1},
        "apg": {"threshold": 2.5},
        "mambo": {},
        "tcfg": {},
        "cfg-norm": {},
    }
    for scale in (1.5, 2, 4, 8):
        yield Point("none", f"{scale:g}", scale)
    for method, setting in settings.items():
        plugin = {"use": method.partition(",")[0], **setting}
        for scale in SCALES:
            yield Point(method, f"{scale:g}", scale, (plugin,))
    for bands in ([4, 2], [2, 4]):
        scale = " and ".join(f"{band:g}" for band in bands)
        yield Point("fdg", scale, 2, ({"use": "fdg", "scales": bands},))
    for part in (0.2, 0.6):
        yield Point("cfg-plus-plus", f"{part:g}", 2, ({"use": "cfg-plus-plus", "scale": part},))


def drawn(sampler: pilotfish.Sampler, point: Point) -> Tensor:
    """Pictures (64, 3, 64, 64), the objects in turn, seeds apart."""
    parts = []
    for index, wish in enumerate(WISHES):
        result = sampler(
            wish.prompt,
            plugins=point.plugins,
            guidance_scale=point.guidance_scale,
            num_images=EACH,
            seed=1000 * index,
            **RUN,
        )
        parts += [pixels(image) for image in result.images]
    return torch.stack(parts)


def fresh() -> Tensor:
    """Pictures of the world with these objects on these backgrounds, as often each."""
    random, parts = Random(2), []
    for wish in WISHES:
        for _ in range(FRESH):
            style = random_style(random)
            picture = render(GLYPHS[wish.object], COLORS[wish.background], style, random)
            parts.append(pixels(picture))
    return torch.stack(parts)


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """What lies in the file, (N, 3, 64, 64) in [0, 1]; made and written there if nothing does."""
    if not path.exists():
        part = path.with_suffix(".part")
        torch.save(make(), part)
        part.rename(path)
    images: Tensor = torch.load(path, weights_only=True).float() / 255
    return images


def row(judge: judges.Judge, images: Tensor, world: Tensor) -> tuple[float, float]:
    """The share of pictures with the right object and background, and the Frechet distance."""
    wishes = [wish for wish in WISHES for _ in range(EACH)]
    with torch.no_grad():
        distance = frechet_distance(judge.features(images), judge.features(world))
    return rates(judge, images, wishes)["both"], distance


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """A row for each method, of two pictures of each wish, with its name above it."""
    strips = {}
    for name, images in pictures.items():
        strips[name] = sheet(images.unflatten(0, (-1, EACH))[:, :2].flatten(0, 1), 16)
    width, height = next(iter(strips.values())).size
    canvas = Image.new("RGB", (width, (height + 18) * len(strips)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for number, (name, strip) in enumerate(strips.items()):
        top = number * (height + 18)
        pen.text((2, top + 1), name, fill="black", font=font)
        canvas.paste(strip, (0, top + 18))
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Make what is missing, print the tables, draw the best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sampler, judge = pilotfish.load(), judges.load()
    world = kept(out / "world.pt", fresh)
    print("| plugin | scale | both right | Frechet distance |\n|---|---|---:|---:|")
    best: dict[str, tuple[float, float, Point, Tensor]] = {}
    for point in points():
        images = kept(out / point.file, lambda p=point: drawn(sampler, p))
        right, distance = row(judge, images, world)
        print(f"| {point.method} | {point.scale} | {right:.0%} | {distance:.1f} |", flush=True)
        before = best.get(point.method)
        if right >= RIGHT and (before is None or distance < before[1]):
            best[point.method] = (right, distance, point, images)
    print("\nThe best of each:\n")
    for method, (right, distance, point, _) in best.items():
        print(f"| {method} | {point.scale} | {right:.0%} | {distance:.1f} |")
    shown = {f"{m}, {p.scale}: {r:.0%}, {d:.1f}": t for m, (r, d, p, t) in best.items()}
    draw(shown, Path(__file__).with_name("cfg.png"))


if __name__ == "__main__":
    main()
