"""What a word is learned from: pictures as latents, with their captions, and draws from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pilotfish import InputError, pixels, read_picture

from .plan import Plan, check_caption


@dataclass(frozen=True)
class Batch:
    """One step's draw; all on the CPU, so that a device changes nothing.

    Attributes:
        x0: clean latents (B, C, H, W), float32.
        noise: like `x0`.
        timesteps: (B,).
        captions: of each picture, with "{token}" in it.
    """

    x0: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Lesson:
    """The pictures: as they are seen, as latents (N, C, H, W), and what each may be called."""

    pictures: tuple[Image.Image, ...]
    latents: Tensor
    captions: tuple[tuple[str, ...], ...]

    def draw(self, plan: Plan, index: int, num_timesteps: int) -> Batch:
        """The batch of step `index`: always the same, so a resumed training sees what it would."""
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + index)
        chosen = torch.randint(len(self.latents), (plan.batch,), generator=generator)
        x0 = self.latents[chosen]
        # Spread evenly over the range: the loss depends on the timestep more than on all else.
        places = torch.arange(plan.batch) + torch.rand(plan.batch, generator=generator)
        timesteps = (places / plan.batch * num_timesteps).long().clamp(max=num_timesteps - 1)
        texts = torch.rand(plan.batch, generator=generator).tolist()
        captions = (
            self.captions[picture][int(part * len(self.captions[picture]))]
            for picture, part in zip(chosen.tolist(), texts, strict=True)
        )
        noise = torch.randn(x0.shape, generator=generator)
        return Batch(x0, noise, timesteps, tuple(captions))


@torch.no_grad()
def read_lesson(model: Any, paths: Sequence[Path], plan: Plan) -> Lesson:
    """The pictures at the model's own size, with the plan's captions or those beside them.

    Raises:
        InputError: there are none, one cannot be read, or a caption has no "{token}".
    """
    if not paths:
        raise InputError("pictures must be one or more files; got none")
    size = (model.defaults.height, model.defaults.width)
    captions = tuple(captions_of(path, plan) for path in paths)
    pictures = tuple(read_picture(path, "a picture to learn from", size=size) for path in paths)
    latents = [model.encode(pixels(picture)).float().cpu() for picture in pictures]
    return Lesson(pictures, torch.cat(latents), captions)


def captions_of(path: Path, plan: Plan) -> tuple[str, ...]:
    """The lines of `cat.txt` for `cat.png`, where there is such a file; else the plan's."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return plan.captions
    try:
        lines = beside.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the captions {beside}: {error}") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise InputError(f"{beside} is empty; expected captions for {path.name}, one a line")
    for caption in captions:
        check_caption(caption, f"{beside}: caption")
    return captions
