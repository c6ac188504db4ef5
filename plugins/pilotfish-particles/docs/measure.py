"""Measure the searches on the emoji model: an object without a prompt, by a classifier's answer.

Eight objects, eight pictures each. The reward is the classifier's loss, whose gradient nobody
takes; the judge, whose answer counts, and the features of the Frechet distance are those of a
network apart. For comparison the same loss with its gradient, as `balanced` uses it.

    python docs/measure.py --out work

Prints a table and draws particles.png. Finished pictures are kept in the working folder, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random

import torch
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import BACKGROUNDS, COLORS, GLYPHS
from torch import Tensor

import pilotfish

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
from emoji_training.score import frechet_distance, kept
from emoji_training.world import pixels, random_style, render, sheet

OBJECTS = ("fox", "cat", "frog", "campfire", "owl", "car", "tree", "rocket")
EACH, FRESH = 8, 64  # pictures of an object, and fresh ones to compare with
RUN = {"steps": 25, "scheduler": "euler-ancestral", "guidance_scale": 1.0}
FOUR = {"particles": 4}
# What searches, the guide's own settings, the run's: calls of the network are steps x particles.
ROWS: dict[str, tuple[dict | None, dict, dict]] = {
    "nothing": (None, {"gradient": "none"}, {}),
    "best-of, 4": ({"use": "best-of", **FOUR}, {"gradient": "none"}, {}),
    "svdd, 4": ({"use": "svdd", **FOUR}, {"gradient": "none"}, {}),
    "feynman-kac, 4": ({"use": "feynman-kac", "strength": 4.0, **FOUR}, {"gradient": "none"}, {}),
    "gradient": (None, {"scale": 4, "stop": 0.8}, {}),
    "gradient, as many calls": (None, {"scale": 4, "stop": 0.8}, {"steps": 100}),
    "gradient and best-of, 4": ({"use": "best-of", **FOUR}, {"scale": 4}, {}),
    "gradient and das, 4": ({"use": "das", "strength": 4.0, **FOUR}, {"scale": 4}, {}),
}


def drawn(sampler: pilotfish.Sampler, row: str) -> Tensor:
    """Pictures (64, 3, 64, 64), the objects in turn, seeds apart."""
    search, settings, run = ROWS[row]
    parts = []
    for index, name in enumerate(OBJECTS):
        guide = {"use": "classifier", "label": name, **settings}
        result = sampler(
            "",
            plugins=[guide, *([search] if search else [])],
            num_images=EACH,
            seed=1000 * index,
            **{**RUN, **run},
        )
        parts += [pixels(image) for image in result.images]
    return torch.stack(parts)


def fresh() -> Tensor:
    """Pictures of the world with these objects, as often each, in all styles and colours."""
    random, parts = Random(2), []
    for name in OBJECTS:
        for _ in range(FRESH):
            color = COLORS[random.choice(BACKGROUNDS)]
            parts.append(pixels(render(GLYPHS[name], color, random_style(random), random)))
    return torch.stack(parts)


@torch.no_grad()
def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sampler, judge = pilotfish.load(), judges.load()
    world = judge.features(fresh().float() / 255)
    names, found, shown = [o for o in OBJECTS for _ in range(EACH)], {}, []
    for row, (search, _, run) in ROWS.items():
        images = kept(
            out / f"{row.replace(', ', '-').replace(' ', '-')}.pt", lambda r=row: drawn(sampler, r)
        )
        seen = [objects for objects, *_ in judge.judge(images).names]
        right = sum(s == n for s, n in zip(seen, names, strict=True)) / len(names)
        calls = run.get("steps", RUN["steps"]) * (search or {}).get("particles", 1)
        distance = frechet_distance(judge.features(images), world)
        found[row] = {"calls": calls, "object": right, "distance": distance}
        print(f"| {row} | {calls} | {right:.0%} | {distance:.0f} |", flush=True)
        shown.append(images[::EACH])
    Path(__file__).with_name("measured.json").write_text(json.dumps(found, indent=1) + "\n")
    sheet(torch.cat(shown), columns=len(OBJECTS)).save(Path(__file__).with_name("particles.png"))


if __name__ == "__main__":
    main()
