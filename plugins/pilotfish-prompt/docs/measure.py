"""Measure `regions` on the emoji model: does a judge see each half's own object?

Pictures of 128 x 64 pixels, each with two different objects on one background, one in each half:
64 by the default way, 8 by the others. A half is as large as the pictures that the judge, a
network apart, was trained on, and is judged by itself. In pictures of the model's own 64 x 64
pixels a half is half as wide as that; it is judged with its edges repeated at both sides.

    python docs/measure.py --out work

Prints a table and draws regions.png. Finished pictures are kept in the working folder, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import BACKGROUNDS, OBJECTS
from torch import Tensor
from torch.nn.functional import pad

import pilotfish

MANY, FEW = 64, 8  # pictures
AREAS = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
SIDE = 64  # pixels, of the judge's pictures


@dataclass(frozen=True)
class Way:
    """One row of the table: how regions are drawn."""

    name: str
    regions: dict[str, object]
    count: int = FEW
    width: int = 2 * SIDE


WAYS = (
    Way("crop", {"by": "crop"}, MANY),
    Way("attention", {"by": "attention"}),
    Way("whole", {"by": "whole"}),
    Way("crop, 64 x 64 pixels", {"by": "crop"}, width=SIDE),
)


def asked() -> list[tuple[str, str, str]]:
    """The left object, the right one and the background of each picture."""
    random = Random(4)
    return [(*random.sample(OBJECTS, 2), random.choice(BACKGROUNDS)) for _ in range(MANY)]


def drawn(sampler: pilotfish.Sampler, way: Way, folder: Path) -> Tensor:
    """Pictures (N, 3, 64, W) in [0, 1]; those that are not in the folder are made."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for seed, (left, right, background) in enumerate(asked()[: way.count]):
        file = folder / f"{seed}.png"
        if not file.exists():
            place = f"on a {background} background"
            prompts = [f"a {left} {place}", f"a {right} {place}"]
            regions = {"use": "regions", "prompts": prompts, "areas": AREAS, **way.regions}
            result = sampler(place, plugins=[regions], height=SIDE, width=way.width, seed=seed)
            result.save(file)
        pictures.append(pilotfish.pixels(pilotfish.read_picture(file, "measure")))
    return torch.cat(pictures)


def halves(pictures: Tensor) -> Sequence[Tensor]:
    """Left and right half of each picture, (N, 3, 64, 64)."""
    missing = SIDE - pictures.shape[3] // 2
    edges = (missing // 2, missing - missing // 2, 0, 0)
    return [pad(half, edges, mode="replicate") for half in pictures.chunk(2, dim=3)]


def seen(judge: judges.Judge, pictures: Tensor) -> list[tuple[bool, bool]]:
    """Whether left and right show what was asked for, by the judge's likeliest object."""
    names = [[name for name, _, _ in judge.judge(half).names] for half in halves(pictures)]
    return [
        (left == found, right == other)
        for (left, right, _), found, other in zip(asked()[: len(pictures)], *names, strict=True)
    ]


def draw(rows: dict[str, Tensor], path: Path, count: int = 8) -> None:
    """The first pictures of each way, a row for each."""
    line, margin = 6, 110
    size = (margin + count * (2 * SIDE + line), len(rows) * (SIDE + line))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for row, (name, pictures) in enumerate(rows.items()):
        top = row * (SIDE + line)
        pen.text((2, top + SIDE / 3), name.replace(", ", ",\n"), fill="black", font=font)
        for column, image in enumerate(pilotfish.to_pil(pictures[:count])):
            canvas.paste(image, (margin + column * (2 * SIDE + line), top))
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Make what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    out = parser.parse_args().out
    sampler, judge = pilotfish.load(), judges.load()
    print("| regions | pictures | both right | left | right |\n|---|---:|---:|---:|---:|")
    shown = {}
    for index, way in enumerate(WAYS):
        pictures = drawn(sampler, way, out / str(index))
        right = torch.tensor(seen(judge, pictures)).double()
        both = right.prod(1).mean()
        left, other = right.mean(0)
        print(f"| {way.name} | {way.count} | {both:.0%} | {left:.0%} | {other:.0%} |", flush=True)
        if way.width == 2 * SIDE:
            shown[way.name] = pictures
    draw(shown, Path(__file__).with_name("regions.png"))


if __name__ == "__main__":
    main()
