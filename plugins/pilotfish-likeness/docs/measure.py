"""Measure `classifier` without a prompt: does a judge see the object, and is it a good picture?

Eight objects, eight pictures each. The judge is a network apart from the guiding classifier.
The Frechet distance is taken in its features to fresh pictures of the same objects; the floor is
that of unguided pictures for prompts that say the object.

Prints a table and draws classifier.png. Finished pictures are kept in the working folder, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
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
from emoji_training.score import frechet_distance
from emoji_training.world import caption, pixels, random_style, render, sheet

OBJECTS = ("fox", "cat", "frog", "campfire", "owl", "car", "tree", "crown")
EACH, FRESH = 8, 128  # pictures of an object, and fresh ones to compare with
RUN: dict[str, Any] = {"steps": 25, "scheduler": "euler-ancestral"}
PRESET = {"base": "balanced", "recurrence": 3, "recurrence_stop": 0.8}
AGAIN = {**RUN, "preset": PRESET}  # 65 calls of the network
STRONG = {"scale": 4, "cutouts": 2, "stop": 0.8}
POINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "latents, three times": (AGAIN, {**STRONG, "gradient": "latents"}),
    "x0, three times": (AGAIN, {**STRONG, "gradient": "x0"}),
    "x0, once": ({**RUN, "steps": 65}, {**STRONG, "gradient": "x0"}),
    "unguided": (RUN, {"scale": 0}),
}
SHOWN = tuple(name for name in POINTS if name != "unguided")


def guided(sampler: pilotfish.Sampler, point: str, label: str) -> list[Image.Image]:
    """Pictures of one object, without a prompt."""
    run, settings = POINTS[point]
    guide = {"use": "classifier", "label": label, **settings}
    options = {**run, "guidance_scale": 1, "num_images": EACH, "seed": first_seed(label)}
    return sampler("", plugins=[guide], **options).images


def prompted(sampler: pilotfish.Sampler, label: str) -> list[Image.Image]:
    """Unguided pictures of one object, for captions of the world: the floor."""
    random, pictures = Random(label), []
    for seed in range(first_seed(label), first_seed(label) + EACH):
        prompt = caption(label, random.choice(BACKGROUNDS), random_style(random))
        pictures += sampler(prompt, guidance_scale=4, seed=seed, **RUN).images
    return pictures


def first_seed(label: str) -> int:
    """Far from the other objects' seeds."""
    return 1000 * OBJECTS.index(label)


def fresh() -> Tensor:
    """Pictures of the world with these objects, as often each, in all styles and colours."""
    random = Random(2)
    return torch.stack([pixels(picture) for picture in _renders(random)])


def _renders(random: Random) -> Iterator[Image.Image]:
    for name in OBJECTS:
        for _ in range(FRESH):
            color = COLORS[random.choice(BACKGROUNDS)]
            yield render(GLYPHS[name], color, random_style(random), random)


def kept(folder: Path, make: Callable[[str], list[Image.Image]]) -> Tensor:
    """Pictures (64, 3, 64, 64) in [0, 1], object by object, from the folder; made if not there."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for label in OBJECTS:
        path = folder / f"{label}.pt"
        if not path.exists():
            part = path.with_suffix(".part")
            torch.save(torch.stack([pixels(image) for image in make(label)]), part)
            part.rename(path)
        parts.append(torch.load(path, weights_only=True).float() / 255)
    return torch.cat(parts)


def row(judge: judges.Judge, images: Tensor, world: Tensor) -> tuple[float, float]:
    """The share of pictures in which the judge sees the object, and the Frechet distance."""
    wanted = [name for name in OBJECTS for _ in range(len(images) // len(OBJECTS))]
    seen = [names[0] for names in judge.judge(images).names]
    right = sum(map(str.__eq__, seen, wanted)) / len(wanted)
    with torch.no_grad():
        distance = frechet_distance(judge.features(images), judge.features(world))
    return right, distance


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """A sheet for each setting, side by side, a row for each object."""
    sheets = [sheet(images, columns=EACH) for images in pictures.values()]
    (width, height), line = sheets[0].size, 18
    canvas = Image.new("RGB", ((width + line) * len(sheets) - line, height + line), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for column, (name, drawn) in enumerate(zip(pictures, sheets, strict=True)):
        left = column * (width + line)
        pen.text((left + 2, 1), name, fill="black", font=font)
        canvas.paste(drawn, (left, line))
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main(out: Path) -> None:
    """Make what is missing, print a row for each point, draw the sheet."""
    sampler, judge, world = pilotfish.load(), judges.load(), fresh().float() / 255
    print("| point | judge sees the object | Frechet distance |\n|---|---:|---:|")
    pictures = {}
    for name in (*POINTS, "prompted"):
        make = partial(prompted, sampler) if name == "prompted" else partial(guided, sampler, name)
        pictures[name] = kept(out / name, make)
        right, distance = row(judge, pictures[name], world)
        print(f"| {name} | {right:.0%} | {distance:.1f} |", flush=True)
    draw({name: pictures[name] for name in SHOWN}, Path(__file__).with_name("classifier.png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    main(parser.parse_args().out)
