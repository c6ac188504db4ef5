"""Measure all five plugins on a trained model: is it what the prompt says, and a good picture?

64 prompts, one of each object, a picture each, in batches of 16, the model's own steps and
guidance, and the same without classifier-free guidance; each plugin at three scales. A judge apart
from the model says whether object and background are right. The Frechet distance is taken in its
features to 512 fresh pictures of the same prompts; its floor is that of 64 other fresh ones.

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
SCALES = {
    "pag": (0.5, 1, 3),
    "seg": (0.5, 1, 3),
    "slg": (0.5, 1, 2.8),
    "sag": (0.25, 0.75, 1.5),
    "autoguidance": (0.5, 1, 2),
}


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
    """The first 16 pictures of each, four by four, six panels in a row."""
    sheets = {name: sheet(images[:16], columns=4) for name, images in panels.items()}
    (width, height), line, row = next(iter(sheets.values())).size, 18, 6
    size = ((width + line) * row - line, (height + line) * -(-len(sheets) // row))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for index, (name, drawing) in enumerate(sheets.items()):
        left, top = index % row * (width + line), index // row * (height + line)
        pen.text((left + 2, top + 1), name, fill="black", font=font)
        canvas.paste(drawing, (left, top + line))
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Make what is missing, print a line for each point, write the table and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["emoji", "emoji-flow"], default="emoji")
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    options = parser.parse_args()
    out = options.out / options.model
    out.mkdir(parents=True, exist_ok=True)
    if options.model == "emoji":
        world, judge = EMOJI, judges.load(FOLDER)
    else:
        from flow_training.pictures import WORLD as world
        from pilotfish_emoji_flow.names import FOLDER as folder
        from pilotfish_emoji_flow.names import OBJECTS

        judge = judges.load(folder, objects=OBJECTS)
    sampler, wishes = pilotfish.load(options.model), plain_wishes(COUNT, 1, world)
    with torch.no_grad():
        known = judge.features(renders(world, wishes * REPEATS, 4))
    rows: list[dict[str, Any]] = []

    def measured(name: str, images: Tensor, **more: Any) -> dict[str, Any]:
        with torch.no_grad():
            distance = frechet_distance(judge.features(images), known)
        right = rates(judge, images, wishes)
        row = {"name": name, "distance": round(distance, 1), **more}
        rows.append(row | {part: right[part] for part in ("object", "background")})
        print(json.dumps(rows[-1]), flush=True)
        return rows[-1]

    measured("fresh pictures", renders(world, wishes, 5))
    defaults, panels = sampler.model.defaults, {}
    for guidance in (defaults.guidance_scale, 1.0):
        # As many calls of the network as with a third prediction.
        longer = round(defaults.steps * (1.5 if guidance > 1 else 2))
        points = [("plain", None, defaults.steps), ("plain, more steps", None, longer)]
        points += [(n, s, defaults.steps) for n, scales in SCALES.items() for s in scales]
        best: dict[str, tuple[float, Tensor]] = {}
        for name, scale, steps in points:
            use = [] if scale is None else [f"{name}:scale={scale}"]
            path = out / f"{guidance:g} {name} {scale} {steps}.pt"
            run = {"steps": steps, "guidance_scale": guidance}
            images, calls = drawn(sampler, wishes, use, path, **run)
            row = measured(name, images, guidance=guidance, scale=scale, calls=calls)
            best[name] = min(
                best.get(name, (1e9, images)), (row["distance"], images), key=lambda b: b[0]
            )
        best.pop("plain, more steps")
        panels |= {f"{name}, guidance {guidance:g}": images for name, (_, images) in best.items()}
    place = Path(__file__).with_name(options.model)
    table = json.dumps({"prompts": COUNT, "points": rows}, indent=1)
    place.with_suffix(".json").write_text(table + "\n", encoding="utf-8")
    draw(panels, place.with_suffix(".png"))


if __name__ == "__main__":
    main()
