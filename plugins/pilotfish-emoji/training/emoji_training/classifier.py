"""A small classifier of the emoji world, to guide by: `python -m emoji_training.classifier`.

It is written as transformers reads models: `AutoModelForImageClassification.from_pretrained(...)`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from pilotfish_emoji.names import FOLDER, OBJECTS
from torch import Tensor
from torch.nn.functional import cross_entropy

from emoji_training.judge import IGNORED, judged_labels
from emoji_training.loop import Run, train
from emoji_training.networks import ResNetConfig, ResNetForImageClassification
from emoji_training.predictions import MEAN, SIDE, STD, show, with_predictions
from emoji_training.world import Dataset, dataset

SEED: Final = 60_001  # not the model's pictures (0), CLIP's (50,001) or the judge's (90,001)
PICTURES, FRESH = 16_384, 2_048
SMALLEST = 0.6  # part of a picture's side that is shown at least
LOOKS: Final = {
    "image_processor_type": "ViTImageProcessor",  # a plain resize; ResNet's own also crops
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}


def configuration() -> Any:
    """A residual network; the judge is a plain one. SiLU, because guidance needs a smooth slope."""
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 192],
        depths=[2, 2, 2, 1],
        layer_type="basic",
        hidden_act="silu",
        id2label=dict(enumerate(OBJECTS)),
        label2id={name: index for index, name in enumerate(OBJECTS)},
    )


@dataclass(frozen=True)
class Lesson:
    """Pictures and the objects (N,) that they show, negative where there is none to name."""

    images: Tensor
    objects: Tensor

    def loss(self, batch: int, model: Any, _: int, generator: torch.Generator) -> Tensor:
        """Cross-entropy on a random batch."""
        rows = torch.randint(len(self.objects), (batch,), generator=generator)
        pixels = show(self.images[rows].float() / 255, SMALLEST, generator)
        return cross_entropy(model(pixels).logits, self.objects[rows], ignore_index=IGNORED)


def train_classifier(*, num_steps: int, batch: int, pictures: int, out: Path, target: Path) -> Any:
    """Trains the classifier on pictures of its own and writes it to `target`."""
    torch.manual_seed(SEED)
    model: Any = ResNetForImageClassification(configuration())
    model.to(memory_format=torch.channels_last)  # two thirds of the time on a CPU
    data = with_predictions(dataset(pictures, SEED, held_out=True, workers=2), SEED)
    lesson = Lesson(data.images, judged_labels(data.labels)[:, 0])
    loss = partial(lesson.loss, batch)
    train(Run(model, loss, num_steps, 2e-3, out / "classifier.pt", SEED, weight_decay=0.05))
    save(model.eval(), target)
    return model


def save(model: Any, folder: Path) -> None:
    """Writes configuration, fp16 weights and pictures' preparation; replaces what was there."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.to(memory_format=torch.contiguous_format).half().save_pretrained(fresh)
    (fresh / "preprocessor_config.json").write_text(json.dumps(LOOKS, indent=2) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@torch.no_grad()
def accuracy(folder: Path, data: Dataset) -> float:
    """How often the shipped classifier names the object of a picture that has one to name."""
    model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = (data.images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / STD[0]
    answers = torch.cat([model(part).logits.argmax(1) for part in pixels.split(256)])
    truths = judged_labels(data.labels)[:, 0]
    return float((answers == truths)[truths != IGNORED].float().mean())


def main() -> None:
    """Trains, writes and scores the classifier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--target", type=Path, default=FOLDER / "classifier", help="where to write")
    parser.add_argument("--steps", type=int, default=1_450)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--fresh", type=int, default=FRESH, help="pictures to score it on")
    options = parser.parse_args()
    train_classifier(
        num_steps=options.steps,
        batch=options.batch,
        pictures=options.pictures,
        out=options.out,
        target=options.target,
    )
    fresh = dataset(options.fresh, SEED + 1, held_out=True)
    print(f"object: {accuracy(options.target, fresh):.4f}")


if __name__ == "__main__":
    main()
