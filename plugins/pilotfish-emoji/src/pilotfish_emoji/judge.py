"""A classifier trained apart from the model, to judge its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pilotfish_emoji.names import BACKGROUNDS, FOLDER, OBJECTS, STYLES, UNNAMED_STYLES

FILE: Final = "judge.safetensors"
JUDGED_STYLES: Final = ("plain", *STYLES, *UNNAMED_STYLES)
WIDTHS = (32, 64, 128, 192)


@dataclass(frozen=True)
class Verdict:
    """Probabilities for each picture: objects (B, 64), backgrounds (B, 10) and styles (B, 8).

    `objects` are the names of the first; a judge of another model may know others.
    """

    object: Tensor
    background: Tensor
    style: Tensor
    objects: tuple[str, ...] = OBJECTS

    @property
    def names(self) -> list[tuple[str, str, str]]:
        """The likeliest object, background and style of each picture."""
        indices = (self.object.argmax(1), self.background.argmax(1), self.style.argmax(1))
        rows = torch.stack(indices, 1).tolist()
        return [(self.objects[o], BACKGROUNDS[b], JUDGED_STYLES[s]) for o, b, s in rows]


class Judge(nn.Module):
    """A plain convolutional network with three heads."""

    def __init__(
        self, widths: tuple[int, ...] = WIDTHS, *, objects: tuple[str, ...] = OBJECTS
    ) -> None:
        super().__init__()
        self.objects = objects
        self.body = nn.Sequential(
            *(_block(*pair) for pair in zip((3, *widths), widths, strict=False))
        )
        last = widths[-1]
        self.head = nn.Linear(2 * last, len(objects) + len(BACKGROUNDS) + len(JUDGED_STYLES))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 384) of pictures (B, 3, 64, 64) in [0, 1], for Frechet distances."""
        maps = self.body(images * 2 - 1)  # (B, 192, 4, 4)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits for objects, backgrounds and styles."""
        logits = self.head(self.features(images))
        objects, backgrounds, styles = logits.split(
            [len(self.objects), len(BACKGROUNDS), len(JUDGED_STYLES)], 1
        )
        return objects, backgrounds, styles

    @torch.no_grad()
    def judge(self, images: Tensor) -> Verdict:
        """What pictures (B, 3, 64, 64) in [0, 1] show."""
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(f"images must have shape (B, 3, 64, 64); got {tuple(images.shape)}")
        objects, backgrounds, styles = (logits.softmax(1) for logits in self(images.float()))
        return Verdict(objects, backgrounds, styles, self.objects)


def load(folder: Path = FOLDER, *, objects: tuple[str, ...] = OBJECTS) -> Judge:
    """The judge that ships with a model which draws these objects, in evaluation mode."""
    judge = Judge(objects=objects)
    state = load_file(folder / FILE)
    judge.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    return judge.eval().requires_grad_(False)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
