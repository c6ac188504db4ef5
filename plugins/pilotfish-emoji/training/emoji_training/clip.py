"""A small CLIP of the emoji world, to guide pictures by text: `python -m emoji_training.clip`.

It is written as open_clip reads models: `open_clip.create_model("local-dir:FOLDER")`.
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
from pilotfish_emoji.names import BACKGROUNDS, FOLDER, OBJECTS, STYLES
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from emoji_training.judge import judged_labels
from emoji_training.loop import Run, train
from emoji_training.predictions import MEAN, SIDE, STD, against, show, with_predictions
from emoji_training.tokenizer import build_tokenizer, token_ids, write_clip_files
from emoji_training.world import ALL_STYLES, Dataset, dataset

SEED: Final = 50_001  # neither the pictures of the model (0) nor of the judge (90,001 and 90,002)
PICTURES, FRESH = 16_384, 2_048
READ = 16  # tokens that training computes; the longest text has 12
SMALLEST = 0.5  # part of a picture's side that is shown at least, as in the guide's cutouts
PEAKS = (2e-3, 1e-3)  # of the learning rate, in each cycle
NAMES = (*OBJECTS, "thing")


def configuration(vocabulary: int) -> dict[str, Any]:
    """The model as open_clip describes it: a ResNet with attention pooling, and a transformer."""
    vision = {"image_size": SIDE, "layers": [2, 2, 2, 2], "width": 16, "head_width": 64}
    text = {
        "context_length": 77,
        "vocab_size": vocabulary,
        "width": 128,
        "heads": 4,
        "layers": 2,
        "hf_tokenizer_name": "the files beside this one",
    }
    return {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}


@dataclass(frozen=True)
class Texts:
    """Every text of the training.

    Attributes:
        tokens: (N, READ).
        says: (N, 3), the object, background and style that a text names; -1 where it names none.
    """

    tokens: Tensor
    says: Tensor

    def index(self, chosen: Tensor) -> Tensor:
        """The numbers of the texts that say what is chosen (B, 3), -1 for nothing."""
        places = torch.remainder(chosen, torch.tensor(SIZES))  # -1 is the last
        return (places * torch.tensor([SIZES[1] * SIZES[2], SIZES[2], 1])).sum(1)


SIZES = (len(NAMES) + 1, len(BACKGROUNDS) + 1, len(STYLES) + 2)  # 0 is plain, the last is nothing


def all_texts() -> Texts:
    """All combinations of object or none, background or none, and named style or none."""
    says = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    says = torch.where(says == torch.tensor(SIZES) - 1, -1, says)
    rows = token_ids(build_tokenizer(), [sentence(*row) for row in says.tolist()])
    tokens = torch.tensor(rows)
    if (tokens[:, READ - 1] != tokens.max()).any():
        raise ValueError(f"a text has more than {READ} tokens; raise READ")
    return Texts(tokens[:, :READ], says)


def sentence(name: int, background: int, style: int) -> str:
    """A caption that leaves out what is -1."""
    noun = f"a {NAMES[name]}" if name >= 0 else "a picture"
    look = f"a {ALL_STYLES[style]} of " if style > 0 else ""
    place = f" on a {BACKGROUNDS[background]} background" if background >= 0 else ""
    return f"{look}{noun}{place}"


def choose(truths: Tensor, generator: torch.Generator) -> Tensor:
    """What a text says of each picture (B, 3): some of what is true; never of an unnamed style."""
    told = torch.rand(truths.shape, generator=generator) < torch.tensor([0.9, 0.6, 0.7])
    named = (truths[:, 2] >= 1) & (truths[:, 2] <= len(STYLES))
    told &= torch.stack([truths[:, 0] >= 0, truths[:, 1] >= 0, named], dim=1)
    return torch.where(told, truths, -1)


def read(model: Any, tokens: Tensor) -> Tensor:
    """`model.encode_text` of short texts (N, T), without the positions after them.

    A position sees only those before it, so what comes after the end token changes nothing.
    """
    count = tokens.shape[1]
    hidden = model.token_embedding(tokens) + model.positional_embedding[:count]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:count, :count])
    ends = model.ln_final(hidden)[torch.arange(len(tokens)), tokens.argmax(-1)]
    projected: Tensor = ends @ model.text_projection
    return projected


def contrast(
    data: Dataset, truths: Tensor, texts: Texts, batch: int, model: Any, _: int, generator: Any
) -> Tensor:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020) on a random batch."""
    return batch_loss(model, *draw(data, truths, texts, batch, generator))


def hard_contrast(
    data: Dataset, truths: Tensor, texts: Texts, batch: int, model: Any, _: int, generator: Any
) -> Tensor:
    """The same where each picture has moved against the model."""
    pixels, *rest = draw(data, truths, texts, batch, generator)
    pixels = against(pixels, lambda moved: batch_loss(model, moved, *rest), generator)
    return batch_loss(model, pixels, *rest)


def draw(
    data: Dataset, truths: Tensor, texts: Texts, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch: pixels, the tokens of its texts, whose text is which, and which is true of which."""
    rows = torch.randint(len(truths), (batch,), generator=generator)
    chosen, which = texts.index(choose(truths[rows], generator)).unique(return_inverse=True)
    says = texts.says[chosen][which]  # (B, 3)
    true = ((says == truths[rows].unsqueeze(1)) | (says < 0)).all(-1).float()  # (pictures, texts)
    pixels = show(data.images[rows].float() / 255, SMALLEST, generator)
    return pixels, texts.tokens[chosen], which, true


def batch_loss(model: Any, pixels: Tensor, tokens: Tensor, which: Tensor, true: Tensor) -> Tensor:
    """The cross-entropies of a batch, by pictures and by texts.

    We differ from the paper: texts are true of several pictures of a batch, so each picture's
    target is spread over all texts that are true of it, and each text's over all its pictures.
    """
    seen = normalize(model.encode_image(pixels), dim=-1)
    words = normalize(read(model, tokens), dim=-1)[which]
    logits = model.logit_scale.exp().clamp(max=100) * seen @ words.T
    by_picture = cross_entropy(logits, true / true.sum(1, keepdim=True))
    by_text = cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))
    return (by_picture + by_text) / 2


def true_labels(labels: Tensor) -> Tensor:
    """Labels (N, 3) with things as an object, and negative where a picture cannot tell."""
    truths = judged_labels(labels)
    truths[:, 0] = labels[:, 0]
    return truths


def train_clip(*, num_steps: tuple[int, int], batch: int, out: Path, target: Path) -> Any:
    """Trains the model on pictures of its own and writes it to `target`.

    In two cycles: as they are for the first number of steps, then against the model.
    """
    import open_clip  # here, after torchvision is mended

    torch.manual_seed(SEED)
    texts = all_texts()
    model: Any = open_clip.CLIP(**configuration(len(build_tokenizer())))
    model.to(memory_format=torch.channels_last)  # two thirds of the time on a CPU
    data = with_predictions(dataset(PICTURES, SEED, workers=2), SEED)
    given = data, true_labels(data.labels), texts, batch
    for cycle, (count, peak, kind) in enumerate(
        zip(num_steps, PEAKS, (contrast, hard_contrast), strict=True)
    ):
        checkpoint, loss = out / f"clip-{cycle + 1}.pt", partial(kind, *given)
        train(Run(model, loss, count, peak, checkpoint, SEED + cycle, weight_decay=0.05))
    save(model.eval(), target)
    return model


def save(model: Any, folder: Path) -> None:
    """Writes configuration, fp16 weights and tokenizer; replaces what was there."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(fresh)
    write_clip_files(fresh)
    looks = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": configuration(len(tokenizer)), "preprocess_cfg": looks}
    (fresh / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    halves = {n: v.half() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    state = {name: value.contiguous() for name, value in halves.items()}
    save_file(state, fresh / "open_clip_model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@torch.no_grad()
def accuracies(folder: Path, data: Dataset) -> dict[str, float]:
    """How often the nearest of all objects' texts, and of all backgrounds', is the true one."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = (data.images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / STD[0]
    seen = normalize(torch.cat([model.encode_image(part) for part in pixels.split(256)]))
    texts = {
        "object": [f"a {name}" for name in OBJECTS],
        "background": [f"a picture on a {name} background" for name in BACKGROUNDS],
    }
    rates = {}
    for (name, asked), truth in zip(texts.items(), judged_labels(data.labels).T, strict=False):
        nearest = (seen @ normalize(model.encode_text(tokenizer(asked))).T).argmax(1)
        rates[name] = float((nearest == truth)[truth >= 0].float().mean())
    return rates


def main() -> None:
    """Trains, writes and scores the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--target", type=Path, default=FOLDER / "clip", help="where to write it")
    parser.add_argument("--steps", type=int, nargs=2, default=(4_000, 2_000), help="of each cycle")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    train_clip(
        num_steps=tuple(options.steps),
        batch=options.batch,
        out=options.out,
        target=options.target,
    )
    print(accuracies(options.target, dataset(FRESH, SEED + 1, held_out=True)))


if __name__ == "__main__":
    main()
