"""Measure `clip` on the emoji model: does a judge see what the text says, and is it a good picture?

Eight objects, eight pictures each: from no prompt, and from a prompt that says only the background.
The judge is a network apart from the CLIP. The Frechet distance is taken in the judge's features to
fresh pictures of the same objects; its floor is that of unguided pictures whose prompt says the
object.

    python docs/measure.py --out work

Prints a table and draws clip.png. Finished pictures are kept in the working folder, so that a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import BACKGROUNDS, COLORS, GLYPHS
from torch import Tensor

import pilotfish

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
from emoji_training.score import frechet_distance, kept
from emoji_training.world import pixels, random_style, render, sheet

OBJECTS = ("fox", "cat", "frog", "campfire", "owl", "car", "tree", "rocket")
EACH, FRESH = 8, 64  # pictures of an object, and fresh ones to compare with
RUN = {"steps": 25, "scheduler": "euler-ancestral"}
PRESET = {"base": "balanced", "recurrence": 5, "recurrence_stop": 0.5}
GUIDE = {"use": "clip", "scale": 4, "stop": 0.8, "cutouts": 4}


@dataclass(frozen=True)
class Point:
    """One row of the table; `guide` is None for none, or what it sets."""

    name: str
    guide: dict[str, object] | None
    prompt: str = ""
    guidance_scale: float = 1


POINTS = (
    Point("no prompt, latents", {"gradient": "latents"}),
    Point("no prompt, x0", {"gradient": "x0"}),
    Point(
        "background in the prompt, x0",
        {"gradient": "x0", "mask": [0.08, 0.08, 0.92, 0.92]},
        "on a {background} background",
        2,
    ),
    Point("no prompt, no guide", None),
    Point("background in the prompt, no guide", None, "on a {background} background", 2),
    Point("all in the prompt, no guide", None, "a {object} on a {background} background", 4),
)


def drawn(sampler: pilotfish.Sampler, point: Point) -> Tensor:
    """Pictures (64, 3, 64, 64), the objects in turn, seeds apart."""
    parts = []
    for index, (name, background) in enumerate(zip(OBJECTS, backgrounds(), strict=True)):
        result = sampler(
            point.prompt.format(object=name, background=background),
            plugins=[] if point.guide is None else [GUIDE | point.guide | {"text": f"a {name}"}],
            guidance_scale=point.guidance_scale,
            preset=PRESET,
            num_images=EACH,
            seed=1000 * index,
            **RUN,
        )
        parts += [pixels(image) for image in result.images]
    return torch.stack(parts)


def backgrounds() -> Sequence[str]:
    """The background that a prompt says beside each object."""
    return [BACKGROUNDS[index % len(BACKGROUNDS)] for index in range(len(OBJECTS))]


def fresh() -> Tensor:
    """Pictures of the world with these objects, as often each, in all styles and colours."""
    random, parts = Random(2), []
    for name in OBJECTS:
        for _ in range(FRESH):
            color = COLORS[random.choice(BACKGROUNDS)]
            parts.append(pixels(render(GLYPHS[name], color, random_style(random), random)))
    return torch.stack(parts)


def row(judge: judges.Judge, images: Tensor, world: Tensor) -> tuple[float, float, float]:
    """Shares of pictures with the right object and background, and the Frechet distance."""
    names = judge.judge(images).names
    objects = [name for name in OBJECTS for _ in range(EACH)]
    places = [name for name in backgrounds() for _ in range(EACH)]
    right = sum(n[0] == o for n, o in zip(names, objects, strict=True)) / len(names)
    placed = sum(n[1] == b for n, b in zip(names, places, strict=True)) / len(names)
    with torch.no_grad():
        return right, placed, frechet_distance(judge.features(images), judge.features(world))


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """A sheet for each point, side by side, a row for each object."""
    sheets = [sheet(images, columns=EACH) for images in pictures.values()]
    (width, height), line = sheets[0].size, 18
    canvas = Image.new("RGB", ((width + line) * len(sheets) - line, height + line), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for column, (name, drawing) in enumerate(zip(pictures, sheets, strict=True)):
        left = column * (width + line)
        pen.text((left + 2, 1), name, fill="black", font=font)
        canvas.paste(drawing, (left, line))
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Make what is missing, print the table, draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sampler, judge, world = pilotfish.load(), judges.load(), fresh().float() / 255
    print("| pictures | object | background | Frechet distance |\n|---|---:|---:|---:|")
    shown = {}
    for index, point in enumerate(POINTS):
        images = kept(out / f"{index}.pt", lambda p=point: drawn(sampler, p))
        right, placed, distance = row(judge, images, world)
        place = f"{placed:.0%}" if point.prompt else ""
        print(f"| {point.name} | {right:.0%} | {place} | {distance:.1f} |", flush=True)
        if point.guide:
            shown[point.name] = images
    draw(shown, Path(__file__).with_name("clip.png"))


if __name__ == "__main__":
    main()
