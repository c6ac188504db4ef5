"""The pictures of a point: made once, kept under a fingerprint of all that they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pilotfish_emoji import FOLDER
from pilotfish_likeness.networks import load
from timing.measure import counted
from torch import Tensor

import pilotfish
from pilotfish.errors import NonFiniteError

from .points import BATCH, Point, labels, texts


class Prompts(pilotfish.Plugin):
    """Gives each image of a batch its own prompt."""

    def __init__(self, prompts: Sequence[str]) -> None:
        super().__init__()
        self._prompts = prompts

    def embedding_transform(
        self, embedding: pilotfish.Embedding, encode: Callable[[str], pilotfish.Embedding]
    ) -> pilotfish.Embedding | None:
        """The positive prompts, of every text encoder."""
        if (embedding.stage, embedding.role) != ("prompt", "positive"):
            return None
        each = [encode(prompt) for prompt in self._prompts]
        pooled = [e.pooled for e in each if e.pooled is not None]
        return dataclasses.replace(
            embedding,
            values=torch.cat([e.values for e in each]),  # (B, T, D)
            pooled=torch.cat(pooled) if pooled else None,
        )


class Turned:
    """A classifier with another order of classes for each image: the wanted one comes first.

    So a guide `classifier` with label 0 asks each image of a batch for something else, with the
    same loss as a guide of its own.

    Args:
        network: images (N, 3, H, W) -> logits (N, classes).
        wanted: a class for each image of a batch.
    """

    def __init__(self, network: Any, wanted: Sequence[int]) -> None:
        self._network, self._wanted = network, torch.tensor(wanted)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the images and their cutouts, image by image."""
        logits = self._network(images)
        first = self._wanted.repeat_interleave(len(logits) // len(self._wanted))
        columns = first.unsqueeze(1) + torch.arange(logits.shape[1])
        return logits.gather(1, columns % logits.shape[1])


class Lab:
    """Makes pictures with one model, and keeps them.

    Args:
        model: a folder with its networks; the classifier is the emoji model's.
        kept: where finished batches lie.
    """

    def __init__(self, model: Path, kept: Path) -> None:
        self.folder, self.kept = model, kept
        kept.mkdir(parents=True, exist_ok=True)

    @cached_property
    def sampler(self) -> pilotfish.Sampler:
        """Loaded when the first picture is made."""
        sampler = pilotfish.load(self.folder)
        for network in (sampler.model.denoiser, sampler.model.vae):
            network.to(memory_format=torch.channels_last)  # three quarters of the time on a CPU
        return sampler

    @cached_property
    def classifier(self) -> Any:
        """The one that guides: images -> logits."""
        return load(str(FOLDER / "classifier"), torch.device("cpu"), torch.float32)

    @cached_property
    def weights(self) -> dict[str, str]:
        """Fingerprints of what pictures depend on."""
        return {
            "model": digest(self.folder, "unet", "transformer", "vae", "text_encoder*"),
            "classifier": digest(FOLDER, "classifier"),
        }

    def file(self, point: Point, batch: int) -> Path:
        """Where the pictures of a batch are kept."""
        guided = point.series.task == "label" and point.scale
        used = self.weights["model"] + (self.weights["classifier"] if guided else "")
        return self.kept / point.file(used, batch)

    def measure(self, point: Point, batch: int) -> None:
        """Make and keep the pictures of a batch; none where the run breaks."""
        network = self.sampler.model.denoiser  # loaded before the clock starts
        start = time.process_time()  # of one thread: another program's work hardly disturbs it
        with counted(network) as calls:
            pictures = self.pictures(point, batch)
        seconds = (time.process_time() - start) / BATCH
        file = self.file(point, batch)
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as opened:
            np.savez_compressed(opened, pictures=pictures, seconds=seconds, calls=len(calls))
        part.replace(file)

    def pictures(self, point: Point, batch: int) -> np.ndarray:
        """(B, 64, 64, 3) as bytes; (0, 64, 64, 3) where latents or pictures are not finite."""
        seed, count = batch * BATCH, BATCH
        options = {**point.options, "seed": seed, "num_images": count}
        try:
            result = self.sampler(plugins=self.plugins(point, batch), **options)
        except NonFiniteError:
            return np.zeros((0, 64, 64, 3), np.uint8)
        return np.stack([np.asarray(picture) for picture in result.images])

    def plugins(self, point: Point, batch: int) -> list[Any]:
        """What gives each image its prompt or its label."""
        plugins: list[Any] = []
        if point.series.prompted:
            plugins.append(Prompts(texts(point.series, batch)))
        if guide := point.guide:
            if point.series.task == "label":
                wanted = [o for o, _ in labels(point.series, batch)]
                guide["model"] = Turned(self.classifier, wanted)
            plugins.append(guide)
        return plugins

    def read(self, point: Point, batch: int) -> dict[str, np.ndarray] | None:
        """A finished batch: its `pictures`, `seconds` for each of them, `calls` of the network."""
        file = self.file(point, batch)
        return dict(np.load(file)) if file.exists() else None


def digest(folder: Path, *parts: str) -> str:
    """A fingerprint of a model's parts: names or patterns in its folder, those there are."""
    digest = hashlib.sha256()
    for file in sorted(f for part in parts for f in folder.glob(f"{part}/**/*") if f.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
