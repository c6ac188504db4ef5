"""Measure all five plugins on a trained model: is it what the prompt says, and a good picture?

64 prompts, one of each object, a picture each, in batches of 16, with the model's own steps and
guidance, in bfloat16; each plugin at three scales. A judge apart from the model says whether object
and background are right. The Frechet distance is taken in its features to 512 fresh pictures of the
same prompts; its floor is that of 64 other fresh ones.

    python docs/measure.py --model emoji --out work

Writes emoji.json and emoji.png. Finished pictures are kept in the working folder, so that a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import COLORS, FOLDER
from torch import Tensor

import pilotfish
from pilotfish import Plugin

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji-flow" / "training"))
from emoji_training.score import Wish, frechet_distance, plain_wishes, rates
from emoji_training.world import EMOJI, World, pixels, render, sheet

COUNT, BATCH, REPEATS = 64, 16, 8
# Three scales of each, the usual one first.
SCALES = {
    "slg": (2.8, 1, 5),
    "pag": (1, 0.3, 3),
    "autoguidance": (0.3, 0.1, 1),
    "seg": (1, 0.3, 3),
    "sag": (0.75, 0.25, 1.5),
}
# The emoji model's middle block changes nothing: what it says without is 0.002 of c - u away.
LAYERS = {"emoji": ",layers=[down_blocks.1]", "emoji-flow": ""}


class Each(Plugin):
    """Gives each image of a run a prompt of its own."""

    def __init__(self, prompts: Sequence[str]) -> None:
        super().__init__()
        self.prompts = prompts

    def embedding_transform(self, embedding: Any, encode: Any) -> Any:
        if embedding.stage == "token" or embedding.role == "negative":
            return None
        own = [encode(prompt) for prompt in self.prompts]
        pooled = None if embedding.pooled is None else torch.cat([e.pooled for e in own])
        values = torch.cat([e.values for e in own])
        return dataclasses.replace(embedding, values=values, pooled=pooled)


class Calls(Plugin):
    """Counts how often the network is asked for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def around_network(self, step: Any) -> None:
        self.count += len(step.network_latents) // step.run.num_images


def drawn(sampler: Any, wishes: Sequence[Wish], plugins: list[str], path: Path, **run: Any) -> Any:
    """Pictures (64, 3, 64, 64) in [0, 1], and the network's calls for each: kept in a file."""
    if not path.exists():
        parts, calls = [], Calls()
        for first in range(0, COUNT, BATCH):
            prompts = [wish.prompt for wish in wishes[first : first + BATCH]]
            run |= {"num_images": BATCH, "seed": 1000 + first}
            result = sampler(prompts[0], plugins=[Each(prompts), *plugins, calls], **run)
            parts += [pixels(image) for image in result.images]
        kept = {"images": torch.stack(parts), "calls": calls.count * BATCH // COUNT}
        torch.save(kept, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    kept = torch.load(path, weights_only=True)
    return kept["images"].float() / 255, kept["calls"]


def renders(world: World, wishes: Sequence[Wish], seed: int) -> Tensor:
    """Fresh pictures (N, 3, 64, 64) in [0, 1] of what is wished."""
    random = Random(seed)
    drawn = [render(world.glyphs[w.object], COLORS[w.background], w.style, random) for w in wishes]
    return torch.stack([pixels(image) for image in drawn]).float() / 255


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """The first 16 pictures of each, four by four."""
    sheets = {name: sheet(images[:16], columns=4) for name, images in panels.items()}
    (width, height), line = next(iter(sheets.values())).size, 18
    size = ((width + line) * len(sheets) - line, height + line)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for index, (name, drawing) in enumerate(sheets.items()):
        pen.text((index * (width + line) + 2, 1), name, fill="black", font=font)
        canvas.paste(drawing, (index * (width + line), line))
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def setting(model: str) -> tuple[World, judges.Judge]:
    """What the model draws, and who judges it."""
    if model == "emoji":
        return EMOJI, judges.load(FOLDER)
    from flow_training.pictures import WORLD
    from pilotfish_emoji_flow.names import FOLDER as PLACE
    from pilotfish_emoji_flow.names import OBJECTS

    return WORLD, judges.load(PLACE, objects=OBJECTS)


@torch.no_grad()
def main() -> None:
    """Make what is missing, print a line for each point, write the table and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["emoji", "emoji-flow"], default="emoji")
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    options = parser.parse_args()
    out, place = options.out / options.model, Path(__file__).with_name(options.model)
    out.mkdir(parents=True, exist_ok=True)
    world, judge = setting(options.model)
    sampler, wishes = pilotfish.load(options.model, dtype="bfloat16"), plain_wishes(COUNT, 1, world)
    known = judge.features(renders(world, wishes * REPEATS, 4))
    rows: list[dict[str, Any]] = []

    def measured(name: str, images: Tensor, **more: Any) -> float:
        distance = frechet_distance(judge.features(images), known)
        right = rates(judge, images, wishes)
        row = {"name": name, **more, "object": right["object"], "background": right["background"]}
        rows.append(row | {"distance": round(distance, 1)})
        print(json.dumps(rows[-1]), flush=True)
        table = json.dumps({"prompts": COUNT, "points": rows}, indent=1)
        place.with_suffix(".json").write_text(table + "\n", encoding="utf-8")
        return distance

    measured("fresh pictures", renders(world, wishes, 5))
    steps = sampler.model.defaults.steps
    best: dict[str, tuple[float, Tensor]] = {}
    scaled = [(name, scales[i], steps) for i in range(3) for name, scales in SCALES.items()]
    # Three calls a step are as many as two of half as many steps more.
    plain, longer = ("plain", None, steps), ("plain, more steps", None, 3 * steps // 2)
    for name, scale, count in [plain, *scaled[:5], longer, *scaled[5:]]:
        use = [] if scale is None else [f"{name}:scale={scale}{LAYERS[options.model]}"]
        images, calls = drawn(sampler, wishes, use, out / f"{name} {scale}.pt", steps=count)
        distance = measured(name, images, scale=scale, calls=calls)
        if name not in best or distance < best[name][0]:
            best[name] = distance, images
        draw({name: images for name, (_, images) in best.items()}, place.with_suffix(".png"))


if __name__ == "__main__":
    main()
