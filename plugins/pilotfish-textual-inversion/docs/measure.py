"""Learn the emoji model's unnamed style "blueprint" from eight pictures; does a judge see it?

The style is in a few pictures of the model's training, but in no caption. The judge is a network
trained apart; it looks at 64 pictures of objects that are not among the eight, with the learned
word and with the words that it started from.

    python docs/measure.py --out work

Prints a table and draws blueprint.png. What is finished is kept in the working folder, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from PIL import Image
from pilotfish_emoji import OBJECTS
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import COLORS, GLYPHS
from pilotfish_textual_inversion import Plan, train

import pilotfish

sys.path.insert(0, str(Path(__file__).parents[2] / "pilotfish-emoji" / "training"))
from emoji_training.world import pixels, render, sheet

STYLE = "blueprint"
LEARNED = ("cat", "car", "tree", "castle", "fish", "guitar", "clock", "mushroom")
PLAN = Plan(
    token="<ink>",
    init="blue pencil sketch",
    vectors=6,
    steps=1600,
    batch=8,
    learning_rate=0.15,
    every=1600,
)
PROMPTS = 64
GUIDANCE = 6  # a learned word is weaker than those of the training


def lesson(folder: Path) -> list[Path]:
    """Eight pictures in the style, each with its caption beside it."""
    random, paths = Random(5), []
    for name, color in zip(LEARNED, COLORS.values(), strict=False):
        path = folder / f"{name}.png"
        render(GLYPHS[name], color, STYLE, random).save(path)
        path.with_suffix(".txt").write_text(f"a {{token}} of a {name}")
        paths.append(path)
    return paths


def samples(
    sampler: pilotfish.Sampler, word: str, plugins: Sequence[object], folder: Path
) -> torch.Tensor:
    """Pictures (64, 3, 64, 64) in [0, 1] of other objects, by a word for the style."""
    folder.mkdir(exist_ok=True)
    others = [name for name in OBJECTS if name not in LEARNED]
    for index in range(PROMPTS):
        path = folder / f"{index}.png"
        if not path.exists():
            prompt = f"a {word} of a {others[index % len(others)]}"
            run = {"scheduler": "ddim", "steps": 25, "guidance_scale": GUIDANCE}
            result = sampler(prompt, plugins=plugins, seed=100 + index, **run)
            result.images[0].save(path)
    images = [pixels(Image.open(folder / f"{index}.png")) for index in range(PROMPTS)]
    return torch.stack(images).float() / 255


def main() -> None:
    """Learn what is not learned yet, print the table, draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sampler, judge, file = pilotfish.load(), judges.load(), out / "ink.safetensors"
    if not file.exists() or file.with_suffix(".training").exists():
        train(sampler, lesson(out), file, PLAN)
    concept = {"use": "concept", "file": str(file)}
    rows = {
        PLAN.init: samples(sampler, PLAN.init, [], out / "before"),
        PLAN.token: samples(sampler, PLAN.token, [concept], out / "after"),
    }
    print(f"| word | judge sees {STYLE} |\n|---|---:|")
    for word, images in rows.items():
        seen = [style for _, _, style in judge.judge(images).names]
        print(f"| `{word}` | {seen.count(STYLE) / PROMPTS:.0%} |")
    pictures = torch.stack([pixels(Image.open(out / f"{name}.png")) for name in LEARNED]).float()
    shown = torch.cat([pictures / 255, rows[PLAN.init][:8], rows[PLAN.token]])
    drawn = sheet(shown).quantize(256, dither=Image.Dither.NONE)
    drawn.save(Path(__file__).with_name("blueprint.png"), optimize=True)


if __name__ == "__main__":
    main()
