"""A classifier trained apart from the model, to judge its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pilotfish_emoji.loop import Run, adamw, train
from pilotfish_emoji.muon import split_optimizers
from pilotfish_emoji.names import BACKGROUNDS, FOLDER, OBJECTS, STYLES, UNNAMED_STYLES

FILE: Final = "judge.safetensors"
JUDGED_STYLES: Final = ("plain", *STYLES, *UNNAMED_STYLES)
WIDTHS = (32, 64, 128, 192)
PICTURES, FRESH = 16_384, 2_048
SEED = 90_001  # never the model's own pictures
IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Verdict:
    """Probabilities for each picture: objects (B, 64), backgrounds (B, 10) and styles (B, 8)."""

    object: Tensor
    background: Tensor
    style: Tensor

    @property
    def names(self) -> list[tuple[str, str, str]]:
        """The likeliest object, background and style of each picture."""
        indices = (self.object.argmax(1), self.background.argmax(1), self.style.argmax(1))
        rows = torch.stack(indices, 1).tolist()
        return [(OBJECTS[o], BACKGROUNDS[b], JUDGED_STYLES[s]) for o, b, s in rows]


class Judge(nn.Module):
    """A plain convolutional network with three heads."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(_block(*pair) for pair in zip((3, *widths), widths, strict=False))
        )
        last = widths[-1]
        self.head = nn.Linear(2 * last, len(OBJECTS) + len(BACKGROUNDS) + len(JUDGED_STYLES))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 384) of pictures (B, 3, 64, 64) in [0, 1], for Frechet distances."""
        maps = self.body(images * 2 - 1)  # (B, 192, 4, 4)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits for objects, backgrounds and styles."""
        logits = self.head(self.features(images))
        objects, backgrounds, styles = logits.split(
            [len(OBJECTS), len(BACKGROUNDS), len(JUDGED_STYLES)], 1
        )
        return objects, backgrounds, styles

    @torch.no_grad()
    def judge(self, images: Tensor) -> Verdict:
        """What pictures (B, 3, 64, 64) in [0, 1] show."""
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(f"images must have shape (B, 3, 64, 64); got {tuple(images.shape)}")
        return Verdict(*(logits.softmax(1) for logits in self(images.float())))


def load(folder: Path = FOLDER) -> Judge:
    """The judge that ships with the model, in evaluation mode."""
    judge = Judge()
    state = load_file(folder / FILE)
    judge.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    return judge.eval().requires_grad_(False)


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


def judge_run(judge: Judge, num_steps: int, checkpoint: Path, seed: int, *, batch: int = 64) -> Run:
    """One cycle on fresh pictures of that seed."""
    from pilotfish_emoji.world import dataset

    data = dataset(PICTURES, seed, held_out=True, workers=2)
    truths = judged_labels(data.labels)

    def loss(module: Judge, step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(truths), (batch,), generator=generator)
        images = augment(data.images[chosen].float() / 255, generator)
        heads = zip(module(images), truths[chosen].unbind(1), strict=True)
        return torch.stack([functional.cross_entropy(*pair) for pair in heads]).sum()

    return Run(judge, loss, num_steps, 2e-3, checkpoint, seed, weight_decay=0.05)


def judged_labels(labels: Tensor) -> Tensor:
    """Labels (N, 3) without what a picture cannot tell: things, and colors that a style removes."""
    truths = labels.clone()
    truths[labels[:, 0] == len(OBJECTS), 0] = IGNORED
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
        ("object", "background", "style"), answers, judged_labels(labels).unbind(1), strict=True
    ):
        told = truth != IGNORED
        rates[name] = float((answer.argmax(1) == truth)[told].float().mean())
    return rates


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
