"""Measure `optimize`: how often does the judge see the prompt's object, after how many calls?

64 prompts, every object once, seeds 0 to 63, guidance 4. Prints a row of the README's table for
each setting and draws optimize.png, the first pictures of each row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges

import pilotfish

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
from emoji_training.score import plain_wishes

ROWS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "sgd, the default": (25, {}),
    "sgd, of 50 steps": (50, {}),
    "sgd, momentum=0.5": (25, {"momentum": 0.5}),
    "adam": (25, {"optimizer": "adam"}),
    "adamw, weight_decay=0.5": (25, {"optimizer": "adamw", "weight_decay": 0.5}),
    "DDIM, without optimize": (25, None),
}
SHOWN = 10  # pictures of each row
SIDE, MARGIN = 64, 170  # pixels


def measured(
    sampler: pilotfish.Sampler, steps: int, settings: dict[str, Any] | None, count: int
) -> tuple[list[Image.Image], float, float]:
    """The pictures, the share in which the judge sees the object, and calls a picture."""
    plugins = [] if settings is None else [{"use": "optimize", **settings}]
    judge, pictures, right, calls = judges.load(), [], 0, 0
    for seed, wish in enumerate(plain_wishes(count, 0)):
        run: dict[str, Any] = {"steps": steps, "scheduler": "ddim", "guidance_scale": 4}
        stream = sampler.stream(wish.prompt, plugins=plugins, seed=seed, **run)
        calls += sum(1 for _ in stream)
        result = stream.result()
        pictures += result.images
        with torch.no_grad():
            image = sampler.model.decode(result.latents).clamp(0, 1)
        right += judge.judge(image).names[0][0] == wish.object
    return pictures, right / count, calls / count


def sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """The first pictures of each row beside its name."""
    canvas = Image.new("RGB", (MARGIN + SHOWN * SIDE, len(rows) * SIDE), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for row, (name, pictures) in enumerate(rows.items()):
        pen.text((4, (row + 0.5) * SIDE), name, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures[:SHOWN]):
            canvas.paste(picture.resize((SIDE, SIDE)), (MARGIN + column * SIDE, row * SIDE))
    return canvas


def main(count: int = 64, out: Path | None = None) -> None:
    """Print the table and draw the sheet."""
    sampler, drawn = pilotfish.load(), {}
    print("| optimize | steps | calls | judge sees the object |\n|---|---:|---:|---:|")
    for name, (steps, settings) in ROWS.items():
        drawn[name], right, calls = measured(sampler, steps, settings, count)
        print(f"| {name} | {steps} | {calls:.1f} | {100 * right:.0f} % |", flush=True)
    picture = sheet(drawn).quantize(256, dither=Image.Dither.NONE)
    picture.save(out or Path(__file__).with_name("optimize.png"), optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    main(parser.parse_args().count)
