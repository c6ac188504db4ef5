"""Scores the flow model with two judges: `python -m flow_training.score`."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from emoji_training.score import (
    Wish,
    frechet_distance,
    held_out_wishes,
    plain_wishes,
    rates,
    write,
)
from emoji_training.world import pixels, render
from pilotfish_emoji import judge as judges
from pilotfish_emoji.judge import Judge
from pilotfish_emoji.names import COLORS
from pilotfish_emoji.names import OBJECTS as KNOWN
from pilotfish_emoji_flow.names import FOLDER, OBJECTS
from torch import Tensor

from flow_training.export import GUIDANCE, STEPS, load, sample
from flow_training.pictures import WORLD

PROMPTS: Final = 512
SETTINGS: Final = f"Euler, {STEPS} steps, guidance {GUIDANCE:g}, bfloat16"
REPEATS: Final = 8  # fresh pictures of every wish that stand for the world


def renders(wishes: list[Wish], seed: int) -> Tensor:
    """Fresh pictures (N, 3, 64, 64) in [0, 1] of what is wished."""
    random = Random(seed)
    drawn = [render(WORLD.glyphs[w.object], COLORS[w.background], w.style, random) for w in wishes]
    return torch.stack([pixels(image) for image in drawn]).float() / 255


def distances(judge: Judge, images: Tensor, wishes: list[Wish]) -> dict[str, float]:
    """Frechet distances to many fresh pictures of the wishes: of the images, of as many fresh ones,
    and their ratio.
    """
    world = judge.features(renders(wishes * REPEATS, 4))
    drawn, fresh = (
        frechet_distance(judge.features(part), world) for part in (images, renders(wishes, 5))
    )
    return {"drawn": drawn, "fresh": fresh, "ratio": drawn / fresh}


def score(folder: Path = FOLDER, *, count: int = PROMPTS) -> tuple[dict[str, Any], Tensor]:
    """The scores of a model folder, and a few of the judged pictures.

    Under `emoji` is what the emoji model's judge, which took no part in this model, says of the
    objects that it knows.
    """
    pipe = load(folder)
    judge, other = judges.load(folder, objects=OBJECTS), judges.load()
    groups = {"seen": plain_wishes(count, 1, WORLD), "held_out": held_out_wishes(count // 4, WORLD)}
    scores: dict[str, Any] = {"settings": SETTINGS}
    shown = []
    for seed, (group, wishes) in enumerate(groups.items()):
        with torch.autocast("cpu", torch.bfloat16):  # half as long as float32
            images = sample(pipe, [wish.prompt for wish in wishes], seed=seed)
        known = [index for index, wish in enumerate(wishes) if wish.object in KNOWN]
        old, theirs = [wishes[index] for index in known], images[known]
        scores[group] = {
            "prompts": len(wishes),
            **rates(judge, images, wishes),
            "emoji": {"prompts": len(old), **rates(other, theirs, old)},
        }
        if group == "seen":
            scores["frechet"] = {
                **distances(judge, images, wishes),
                "emoji": distances(other, theirs, old),
            }
        shown.append(images[: len(OBJECTS)])
    return scores, torch.cat(shown)


if __name__ == "__main__":
    with torch.no_grad():
        write(score, FOLDER, __doc__)
