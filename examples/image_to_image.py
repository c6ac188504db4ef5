"""Image to image: start from a drawing with noise, not from noise alone.

Left: a boat of three shapes, drawn with a few lines of Pillow. Then what the prompt makes of it.
At strength 0.2 it is redrawn in place, with the drawing's colours; up to 0.6 the sails stay where
they were drawn; from 0.8 on the boat stands where the noise puts it, and at 1 nothing of the
drawing is left.

8 seconds and 0.5 GB on two CPU cores.
"""

import sys
from pathlib import Path

import pilotfish_view as view
from PIL import Image, ImageDraw

import pilotfish

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def drawing() -> Image.Image:
    """A boat of three shapes."""
    picture = Image.new("RGB", (256, 256), (60, 170, 170))
    pen = ImageDraw.Draw(picture)
    pen.polygon([(30, 150), (226, 150), (190, 220), (70, 220)], fill=(140, 70, 40))
    pen.polygon([(120, 30), (120, 140), (40, 140)], fill=(250, 240, 220))
    pen.polygon([(132, 50), (132, 140), (210, 140)], fill=(230, 80, 60))
    return picture


def main(model: str | None = None, *, out: str = "out", steps: int = 25, seed: int = 1) -> Path:
    """Make the picture; returns where it is."""
    sampler = pilotfish.load(model)
    file = pilotfish.save_picture(drawing(), f"{out}/drawing.png")
    pictures, labels = [drawing()], ["the drawing"]
    for strength in STRENGTHS:
        result = sampler(
            "a boat on a teal background",
            plugins=[{"use": "img2img", "image": file, "strength": strength}],
            steps=steps,
            seed=seed,
        )
        pictures += result.images
        labels.append(f"strength {strength}")
    return pilotfish.save_picture(view.strip(pictures, labels), f"{out}/image_to_image.png")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
