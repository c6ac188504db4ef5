"""Trains the judge, on pictures of its own, and measures it on fresh ones."""

from __future__ import annotations

from pathlib import Path

import torch
from pilotfish_emoji import OBJECTS
from pilotfish_emoji.judge import FILE, JUDGED_STYLES, Judge
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from emoji_training.loop import Run, adamw, train
from emoji_training.muon import split_optimizers
from emoji_training.world import EMOJI, World, dataset

PICTURES = 16_384
SEED = 90_001  # never the model's own pictures
IGNORED = -100  # the label that cross entropy leaves out


def save(judge: Judge, folder: Path) -> None:
    """Writes the judge's weights as fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: v.half() for n, v in judge.state_dict().items() if v.is_floating_point()}
    save_file(state, folder / FILE)


def train_judge(*, num_steps: int, out: Path, target: Path) -> Judge:
    """A judge trained on pictures of its own, all pairs included, written to `target`.

    In two cycles on different pictures: AdamW for half of the steps, then Muon for the others.
    """
    torch.manual_seed(SEED)
    judge = Judge()
    for cycle, optimizers in enumerate((adamw, split_optimizers)):
        run = judge_run(judge, num_steps // 2, out / f"judge-{cycle + 1}.pt", SEED + cycle)
        run.optimizers = optimizers
        train(run)
    save(judge.eval(), target)
    return judge


def judge_run(
    judge: Judge,
    num_steps: int,
    checkpoint: Path,
    seed: int,
    *,
    batch: int = 64,
    learning_rate: float = 2e-3,
    world: World = EMOJI,
) -> Run:
    """One cycle on fresh pictures of that seed."""
    data = dataset(PICTURES, seed, held_out=True, workers=2, world=world)
    truths = judged_labels(data.labels, len(world.objects))

    def loss(module: Judge, step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(truths), (batch,), generator=generator)
        images = augment(data.images[chosen].float() / 255, generator)
        heads = zip(module(images), truths[chosen].unbind(1), strict=True)
        return torch.stack([functional.cross_entropy(*pair) for pair in heads]).sum()

    return Run(judge, loss, num_steps, learning_rate, checkpoint, seed, weight_decay=0.05)


def judged_labels(labels: Tensor, objects: int = len(OBJECTS)) -> Tensor:
    """Labels (N, 3) without what a picture cannot tell: things, and colors that a style removes.

    Args:
        objects: how many objects have a name; a thing's label comes after them.
    """
    truths = labels.clone()
    truths[labels[:, 0] == objects, 0] = IGNORED
    for name in ("blueprint", "sepia", "negative"):
        truths[labels[:, 2] == JUDGED_STYLES.index(name), 1] = IGNORED
    return truths


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Slight noise, blur, contrast and color casts, to judge generated pictures fairly."""
    count = len(images)

    def each(*shape: int) -> Tensor:
        return torch.rand((count, *shape, 1, 1), generator=generator)

    blurred = functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, blurred, each(1) * 0.8)
    images = (images - 0.5) * (0.9 + 0.2 * each(1)) + 0.5 + 0.06 * (each(3) - 0.5)
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.05 * each(1) * noise


@torch.no_grad()
def accuracies(judge: Judge, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of right answers on rendered uint8 pictures, for each head."""
    verdict = judge.judge(images.float() / 255)
    answers = verdict.object, verdict.background, verdict.style
    rates = {}
    for name, answer, truth in zip(
        ("object", "background", "style"),
        answers,
        judged_labels(labels, len(judge.objects)).unbind(1),
        strict=True,
    ):
        told = truth != IGNORED
        rates[name] = float((answer.argmax(1) == truth)[told].float().mean())
    return rates
