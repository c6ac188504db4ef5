"""Draw drawing.png, a house of a few shapes, and image.png, what the plugins do.

First the drawing, and `img2img` at two strengths: the layout stays while the prompt takes over.
Then `inpaint` in the upper half: the wall and the door stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pilotfish_view as view
from PIL import Image, ImageDraw

import pilotfish

HERE = Path(__file__).parent
HOUSE = HERE / "drawing.png"
GREEN = "a {} on a green background"
RUN: dict[str, Any] = {"scheduler": "ddim", "guidance_scale": 4}


def drawing(side: int = 64) -> Image.Image:
    """A house of a few shapes, drawn four times as large and then reduced."""
    picture = Image.new("RGB", (256, 256), (70, 170, 80))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((56, 110, 200, 226), fill=(240, 220, 180))
    pen.polygon([(36, 116), (128, 36), (220, 116)], fill=(190, 70, 50))
    pen.rectangle((108, 160, 148, 226), fill=(110, 70, 50))
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def reworked(sampler: pilotfish.Sampler, steps: int) -> dict[str, Image.Image]:
    """What becomes of the drawing."""
    uses = {
        "img2img 0.2": (f"img2img:image={HOUSE},strength=0.2", "house"),
        "img2img 0.6": (f"img2img:image={HOUSE},strength=0.6", "house"),
        "inpaint, castle": (f"inpaint:image={HOUSE},mask=[0,0,1,0.5]", "castle"),
        "inpaint, mushroom": (f"inpaint:image={HOUSE},mask=[0,0,1,0.5]", "mushroom"),
    }
    made = {
        label: sampler(GREEN.format(name), plugins=[use], steps=steps, seed=0, **RUN).images[0]
        for label, (use, name) in uses.items()
    }
    return {"drawing": drawing(), **made}


def main(out: str | None = None, steps: int = 25) -> Path:
    """Make the pictures; returns where the sheet is."""
    drawing().save(HOUSE, optimize=True)
    row = reworked(pilotfish.load(), steps)
    sheet = view.strip(list(row.values()), list(row), height=128)
    path = Path(out) if out else HERE / "image.png"
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


if __name__ == "__main__":
    print(main())
