"""Draw this package's pictures on the emoji model, and measure what a step costs.

    python docs/pictures.py
    python docs/pictures.py edges gate  # some of them

Only what needs no download is drawn: `edges`, `sharpness`, `symmetry`, `clip-style` (by the CLIP
that the emoji model brings) and `gate`, whose detector here finds what is bright. Above the run
without the plugin, below with it. `perceptual` is timed with random weights.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pilotfish_reward import Gate, Perceptual

import pilotfish

HERE = Path(__file__).parent
SEED, COUNT, SIDE = 3, 4, 64


def stamp() -> Image.Image:
    """A ring in a square, whose edges are drawn along."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((10, 10, 54, 54), "black")
    pen.ellipse((22, 22, 42, 42), "white")
    return picture


def stripes() -> Image.Image:
    """A style: red and yellow stripes."""
    places = np.indices((SIDE, SIDE)).sum(axis=0) // 6 % 2
    return Image.fromarray(np.array([[200, 30, 30], [250, 220, 60]], np.uint8)[places])


def brightest(picture: Image.Image) -> list[dict[str, object]]:
    """A detector: a box around what is warm and bright."""
    values = np.asarray(picture, int)
    warm = (values[..., 0] > 200) & (values[..., 2] < 120)
    if not warm.any():
        return []
    rows, columns = np.nonzero(warm)
    size = np.ptp(columns) + 1, np.ptp(rows) + 1
    box = [int(n) for n in (columns.min(), rows.min(), *size)]
    return [{"class": "WARM", "score": 0.9, "box": box}]


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures in rows."""
    canvas = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            canvas.paste(picture, (SIDE * across, SIDE * down))
    return canvas


def drawn(sampler: pilotfish.Sampler, prompt: str, plugins: list[object]) -> list[Image.Image]:
    """As many pictures as a row has."""
    return list(sampler(prompt, plugins=plugins, seed=SEED, num_images=COUNT).images)


def milliseconds(sampler: pilotfish.Sampler, plugins: list[object]) -> float:
    """Of the processor, a step: the least of three runs of 10 steps."""
    best = float("inf")
    for _ in range(3):
        begun = time.process_time()
        sampler("a fox on a white background", plugins=plugins, steps=10, seed=SEED)
        best = min(best, time.process_time() - begun)
    return 100 * best


def main() -> None:
    """Draw and measure."""
    torch.set_num_threads(1)
    sampler = pilotfish.load()
    from torchvision import models  # only now: next to a CPU-only torch, pilotfish mends it

    with tempfile.TemporaryDirectory() as folder:
        files = {"stamp": stamp(), "stripes": stripes()}
        paths = {name: Path(folder) / f"{name}.png" for name in files}
        for name, picture in files.items():
            picture.save(paths[name])
        trunk = Path(folder) / "squeezenet.pth"
        torch.save(models.squeezenet1_1(weights=None).state_dict(), trunk)
        table: dict[str, tuple[str, object]] = {
            "edges": (
                "an owl on a gray background",
                {"use": "edges", "image": str(paths["stamp"])},
            ),
            "sharpness": ("a cat on a gray background", "sharpness:scale=-1"),
            "symmetry": ("a rocket on a purple background", "symmetry:scale=0.5"),
            "clip-style": ("a fox", {"use": "clip-style", "image": str(paths["stripes"])}),
            "gate": ("a campfire on a black background", Gate(detector=brightest)),
        }
        for name in sys.argv[1:] or table:
            prompt, plugin = table[name]
            picture = sheet([drawn(sampler, prompt, p) for p in ([], [plugin])])
            quantized = picture.quantize(128, dither=Image.Dither.NONE)
            quantized.save(HERE / f"{name}.png", optimize=True)
        timed = {name: plugin for name, (_, plugin) in table.items()}
        timed["perceptual"] = Perceptual(image=paths["stamp"], net="squeeze", model=str(trunk))
        plain = milliseconds(sampler, [])
        print(f"no plugin: {plain:.0f} ms a step", flush=True)
        for name, plugin in timed.items():
            print(f"{name}: {milliseconds(sampler, [plugin]) / plain:.2f} times that", flush=True)


if __name__ == "__main__":
    main()
