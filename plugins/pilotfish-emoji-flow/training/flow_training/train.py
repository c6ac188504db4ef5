"""Trains the shipped model: `python -m flow_training.train transformer|judge|export|all`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from emoji_training.vae import encode
from emoji_training.world import Dataset, dataset, sheet
from pilotfish_emoji.names import FOLDER as EMOJI
from pilotfish_emoji_flow.names import BACKGROUNDS, FOLDER, OBJECTS
from torch import nn

from flow_training.export import export, pipeline, sample
from flow_training.judge import train_judge
from flow_training.networks import AutoencoderKL, SD3Transformer2DModel
from flow_training.pictures import WORLD
from flow_training.text import build_encoders, build_tokenizer
from flow_training.transformer import Latents, build_transformer, read_captions, train_transformer

PICTURES = 40_960
SEED = 110_001  # not the emoji model's pictures


@dataclass(frozen=True)
class Options:
    """The command line; every stage keeps its work in `out` and goes on from its checkpoint."""

    out: Path
    steps: int
    judge_steps: int
    batch: int
    device: str
    workers: int
    target: Path
    start: Path | None
    learning_rate: float
    seed: int


def pictures(options: Options) -> Dataset:
    """The training pictures: drawn once, then read from the folder."""
    path = options.out / "pictures.pt"
    if not path.exists():
        drawn = dataset(PICTURES, SEED, workers=2, world=WORLD)
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save((drawn.images, drawn.captions, drawn.labels), path)
    return Dataset(*torch.load(path, weights_only=True))


def cached_latents(options: Options) -> Latents:
    """The training pictures through the encoder of the emoji model's VAE, computed once."""
    path = options.out / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(EMOJI / "vae").eval()
        vae.to(memory_format=torch.channels_last)
        means, stds = encode(vae, pictures(options).images)
        torch.save((means.half(), stds.half()), path)
    return Latents(*torch.load(path, weights_only=True))


def make_transformer(options: Options) -> SD3Transformer2DModel:
    """Trains the transformer; leaves a sheet of samples every ten minutes."""
    latents, captions = cached_latents(options), pictures(options).captions
    torch.manual_seed(0)
    told = read_captions(build_encoders(), build_tokenizer(), captions)
    transformer = build_transformer()
    if options.start is not None:
        begun = SD3Transformer2DModel.from_pretrained(options.start, subfolder="transformer")
        transformer.load_state_dict(begun.state_dict())

    def snapshot(step: int, module: nn.Module) -> None:
        prompts = [
            f"a {name} on a {BACKGROUNDS[index % len(BACKGROUNDS)]} background"
            for index, name in enumerate(OBJECTS[::6])
        ]
        images = sample(pipeline(transformer.eval()), prompts)
        sheet(images).save(options.out / f"samples-{step:05d}.png")

    train_transformer(
        transformer,
        latents,
        told,
        num_steps=options.steps,
        checkpoint=options.out / "transformer.pt",
        learning_rate=options.learning_rate,
        seed=options.seed,
        batch=options.batch,
        device=options.device,
        workers=options.workers,
        snapshot=snapshot,
    )
    return transformer.eval()


def make_model(options: Options) -> None:
    """Writes the finished folder to its target."""
    export(options.target, make_transformer(options))


def make_judge(options: Options) -> None:
    """Trains the judge on pictures of its own."""
    print(train_judge(num_steps=options.judge_steps, out=options.out, target=options.target))


def read_options() -> tuple[str, Options]:
    """The stage and its options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["transformer", "judge", "export", "all"])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--target", type=Path, default=FOLDER, help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=2_200)
    parser.add_argument("--judge-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="threads that share a batch")
    parser.add_argument("--start", type=Path, help="a model folder whose weights are trained on")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the cycle's peak")
    parser.add_argument("--seed", type=int, default=0, help="of batches, noise and times")
    values = vars(parser.parse_args())
    stage: str = values.pop("stage")
    return stage, Options(**values)


def main() -> None:
    """Runs one stage, or all of them."""
    stage, options = read_options()
    stages = {"transformer": make_transformer, "judge": make_judge, "export": make_model}
    for name in stages if stage == "all" else [stage]:
        stages[name](options)


if __name__ == "__main__":
    main()
