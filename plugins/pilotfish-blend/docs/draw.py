"""Draw blends.png: puppy to skunk and mouse to leopard, by `blend` and by `token-blend`.

One seed; from left to right the second animal's weight grows from 0 to 1, so the ends are the plain
prompts. Between 0.4 and 0.6 you see a puppy in a skunk's colours and a mouse with a leopard's coat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import pilotfish

PAIRS = (("puppy", "skunk"), ("mouse", "leopard"))
WEIGHTS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
SIDE, GAP, MARGIN, LINE = 96, 6, 104, 22  # pixels


def prompt(animal: str) -> str:
    """What the picture is asked for."""
    return f"a {animal} on a teal background"


def plugins(first: str, second: str, weight: float) -> dict[str, dict[str, Any]]:
    """Both ways of mixing, by the row's label."""
    return {
        "blend": {"use": "blend", "prompts": {prompt(second): weight}},
        "token-blend": {"use": "token-blend", "word": first, "mix": {second: weight}},
    }


def rows(steps: int, seed: int) -> dict[str, list[Image.Image]]:
    """One row of pictures for each pair and each way."""
    sampler = pilotfish.load()
    pictures: dict[str, list[Image.Image]] = {}
    for first, second in PAIRS:
        for weight in WEIGHTS:
            for way, plugin in plugins(first, second, weight).items():
                result = sampler(
                    prompt(first), plugins=[plugin], steps=steps, guidance_scale=4, seed=seed
                )
                label = f"{first} to\n{second},\n{way}"
                pictures.setdefault(label, []).append(result.images[0])
    return pictures


def sheet(pictures: dict[str, list[Image.Image]]) -> Image.Image:
    """The rows with their labels at the left and the weights on top."""
    size = (MARGIN + len(WEIGHTS) * (SIDE + GAP), LINE + len(pictures) * (SIDE + GAP))
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for column, weight in enumerate(WEIGHTS):
        left = MARGIN + column * (SIDE + GAP)
        draw.text((left + SIDE / 2, LINE / 2), f"{weight:g}", fill="black", font=font, anchor="mm")
        for row, (label, line) in enumerate(pictures.items()):
            top = LINE + row * (SIDE + GAP)
            canvas.paste(line[column].resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
            draw.text((GAP, top + SIDE / 4), label, fill="black", font=font)
    return canvas


def main(out: str | None = None, steps: int = 25, seed: int = 32) -> Path:
    """Make the picture; returns where it is."""
    path = Path(out) if out else Path(__file__).with_name("blends.png")
    small = sheet(rows(steps, seed)).quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return path


if __name__ == "__main__":
    print(main())
