"""Scores the shipped model with its judge: `python -m emoji_training.score`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import FOLDER, STYLES
from torch import Tensor

from emoji_training.export import sample
from emoji_training.networks import DDIMScheduler, StableDiffusionPipeline
from emoji_training.world import EMOJI, World, caption, sheet

PROMPTS = 512
SETTINGS = "DDIM, 25 steps, guidance 4"
FILE = "scores.json"


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for."""

    object: str
    background: str
    style: str = "plain"

    @property
    def prompt(self) -> str:
        """The caption of such a picture."""
        return caption(self.object, self.background, self.style)


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """What lies in the file, (N, 3, 64, 64) in [0, 1]; made and written there if nothing does."""
    if not path.exists():
        part = path.with_suffix(".part")
        torch.save(make(), part)
        part.rename(path)
    images: Tensor = torch.load(path, weights_only=True).float() / 255
    return images


def plain_wishes(count: int, seed: int, world: World = EMOJI) -> list[Wish]:
    """Every object equally often, on random backgrounds of the pairs seen in training."""
    random = Random(seed)
    wishes = []
    for index in range(count):
        name = world.objects[index % len(world.objects)]
        wishes.append(Wish(name, random.choice(world.trained_backgrounds(name))))
    return wishes


def styled_wishes(count: int, seed: int) -> list[Wish]:
    """The named styles in turn, each with every object."""
    return [
        Wish(wish.object, wish.background, STYLES[index % len(STYLES)])
        for index, wish in enumerate(plain_wishes(count, seed))
    ]


def held_out_wishes(count: int, world: World = EMOJI) -> list[Wish]:
    """The pairs that are never in the training pictures, in turn."""
    pairs = world.held_out_pairs
    return [Wish(*pairs[index % len(pairs)]) for index in range(count)]


def rates(judge: judges.Judge, images: Tensor, wishes: list[Wish]) -> dict[str, float]:
    """The shares of pictures whose object, background, both, and style are as wished."""
    hits = [
        (name == wish.object, color == wish.background, style == wish.style)
        for (name, color, style), wish in zip(judge.judge(images).names, wishes, strict=True)
    ]
    right = np.array(hits)
    return {
        "object": float(right[:, 0].mean()),
        "background": float(right[:, 1].mean()),
        "both": float(right[:, :2].all(1).mean()),
        "style": float(right[:, 2].mean()),
    }


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features (N, D), each taken as a Gaussian."""
    means = first.mean(0).double().numpy(), second.mean(0).double().numpy()
    covariances = np.cov(first.double().numpy().T), np.cov(second.double().numpy().T)
    # The root's trace by eigenvalues: few pictures have a singular covariance, and that no root.
    squares = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    between = float(np.square(means[0] - means[1]).sum())
    return between + float(np.trace(sum(covariances)) - 2 * np.sqrt(squares).sum())


def score(folder: Path = FOLDER, *, count: int = PROMPTS) -> tuple[dict[str, object], Tensor]:
    """The scores of a model folder, and a few of the judged pictures."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # half as long on a CPU
    judge = judges.load(folder)
    groups = {
        "seen": plain_wishes(count, 1),
        "held_out": held_out_wishes(count // 4),
        "styled": styled_wishes(3 * count // 8, 3),
    }
    scores: dict[str, object] = {"settings": SETTINGS}
    shown = []
    for seed, (group, wishes) in enumerate(groups.items()):
        images = sample(pipe, [wish.prompt for wish in wishes], seed=seed)
        scores[group] = {"prompts": len(wishes), **rates(judge, images, wishes)}
        shown.append(images[:64])
    return scores, torch.cat(shown)


Score = Callable[..., tuple[dict[str, Any], Tensor]]


def write(score: Score, folder: Path, description: str | None) -> None:
    """The command: writes scores.json and a contact sheet of the judged pictures.

    Args:
        score: gives the scores of a model folder, of so many plain prompts, and the pictures.
        folder: the model's, where the command line names none.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=folder)
    parser.add_argument("--out", type=Path, help="where to write; the model's folder if left out")
    parser.add_argument("--count", type=int, default=PROMPTS, help="plain prompts; others follow")
    options = parser.parse_args()
    out: Path = options.out or options.model
    scores, images = score(options.model, count=options.count)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    sheet(images).save(out / "sheet.png")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    write(score, FOLDER, __doc__)
