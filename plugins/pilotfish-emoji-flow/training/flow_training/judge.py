"""The judge of the flow model: the emoji model's, which learns more objects on fresh pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from emoji_training.judge import accuracies, judge_run, save
from emoji_training.loop import train
from emoji_training.world import dataset
from pilotfish_emoji import judge as judges
from pilotfish_emoji.judge import Judge
from pilotfish_emoji.names import OBJECTS as KNOWN
from pilotfish_emoji_flow.names import OBJECTS

from flow_training.pictures import WORLD

SEED: Final = 120_001  # never the model's own pictures
FRESH: Final = 2_048


def build_judge() -> Judge:
    """The emoji model's judge with a head for more objects; what it knows it still knows."""
    known, judge = judges.load(), Judge(objects=OBJECTS)
    judge.body.load_state_dict(known.body.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(judge.head.parameters(), known.head.parameters(), strict=True):
            mine.zero_()
            mine[: len(KNOWN)] = theirs[: len(KNOWN)]
            mine[len(OBJECTS) :] = theirs[len(KNOWN) :]  # backgrounds and styles
    return judge


def train_judge(*, num_steps: int, out: Path, target: Path) -> dict[str, float]:
    """Trains the judge, writes it to `target`, and measures it on pictures of another seed."""
    judge = build_judge()
    run = judge_run(judge, num_steps, out / "judge.pt", SEED, learning_rate=1e-3, world=WORLD)
    train(run)
    save(judge.eval(), target)
    fresh = dataset(FRESH, SEED + 1, held_out=True, world=WORLD)
    return accuracies(judge, fresh.images, fresh.labels)
