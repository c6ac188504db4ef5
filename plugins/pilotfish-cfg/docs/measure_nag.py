"""Measure `nag` on the emoji models without classifier-free guidance.

Eight objects, eight pictures each, 12 steps (DDIM, Euler for the flow), guidance 1. The prompt says
the object alone, and the negative prompt names one background, the most frequent of the plain
pictures. A judge, a network apart, says how often it sees that background and the object.

    python docs/measure_nag.py --out work
    python docs/measure_nag.py --out work --model emoji-flow

Prints a row for each strength and draws nag.png, plain pictures above those with `nag`. Finished
pictures are kept in the working folder.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji_flow import names as flow
from torch import Tensor

import pilotfish

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
from emoji_training.score import kept
from emoji_training.world import sheet

OBJECTS = ("fox", "cat", "frog", "campfire", "owl", "car", "tree", "rocket")
EACH = 8  # pictures of an object
RUN: dict[str, Any] = {"steps": 12, "scheduler": "ddim"}
# Scale, tau and alpha: the defaults, and stronger.
STRENGTHS = ((5.0, 2.5, 0.25), (5.0, 2.5, 0.5))


def drawn(sampler: pilotfish.Sampler, run: dict[str, Any], plugins: list[dict[str, Any]]) -> Tensor:
    """Pictures (64, 3, 64, 64) in [0, 255], the objects in turn, seeds apart."""
    parts = []
    for index, name in enumerate(OBJECTS):
        options = {"guidance_scale": 1, "num_images": EACH, "seed": 1000 * index, **run}
        result = sampler(f"a {name}", plugins=plugins, **options)
        parts += [pilotfish.pixels(image) for image in result.images]
    return (torch.cat(parts) * 255).round().byte()


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
    """Make what is missing, print the table, draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--model", choices=("emoji", "emoji-flow"), default="emoji")
    out, model = vars(parser.parse_args()).values()
    out.mkdir(parents=True, exist_ok=True)
    sampler, judge, run = pilotfish.load(model), judges.load(), RUN
    if model == "emoji-flow":
        judge, run = judges.load(flow.FOLDER, objects=flow.OBJECTS), {"steps": RUN["steps"]}
    objects = [name for name in OBJECTS for _ in range(EACH)]
    plain = kept(out / f"{model}-plain.pt", lambda: drawn(sampler, run, []))
    seen = Counter(background for _, background, _ in judge.judge(plain).names)
    unwanted = seen.most_common(1)[0][0]
    print(f"without: {dict(seen)}; negative prompt: a {unwanted} background\n")
    print("| scale | tau | alpha | object | that background |\n|---:|---:|---:|---:|---:|")
    shown = {"guidance 1": plain}
    for strength in ((1.0, 2.5, 0.25), *STRENGTHS):
        plugin: dict[str, Any] = dict(zip(("scale", "tau", "alpha"), strength, strict=True))
        plugin |= {"use": "nag", "negative_prompt": f"a {unwanted} background"}
        images = plain
        if strength[0] > 1:
            path = out / f"{model}-{unwanted}-{strength}.pt".replace(" ", "")
            images = kept(path, lambda p=plugin: drawn(sampler, run, [p]))
            shown[f"nag, {strength}: not {unwanted}"] = images
        names = judge.judge(images).names
        right = sum(name == wish for (name, *_), wish in zip(names, objects, strict=True))
        there = sum(background == unwanted for _, background, _ in names)
        row = " | ".join(f"{value:g}" for value in strength)
        print(f"| {row} | {right / len(names):.0%} | {there / len(names):.0%} |", flush=True)
    if model == "emoji":
        draw(shown, Path(__file__).with_name("nag.png"))


if __name__ == "__main__":
    main()
