"""Trains the shipped model: `python -m emoji_training.train vae|unet|decoder|judge|export|all`."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from pilotfish_emoji.names import BACKGROUNDS, FOLDER, OBJECTS, STYLES
from torch import nn

from emoji_training.export import export, pipeline, sample
from emoji_training.judge import train_judge
from emoji_training.networks import AutoencoderKL
from emoji_training.tokenizer import build_tokenizer
from emoji_training.unet import (
    Denoiser,
    Latents,
    build_text_encoder,
    build_unet,
    caption_ids,
    train_denoiser,
)
from emoji_training.vae import build_vae, encode, reconstructions, train_decoder, train_vae
from emoji_training.world import Dataset, caption, dataset, sheet

PICTURES = 32_768
SEED = 0


@dataclass(frozen=True)
class Options:
    """The command line; every stage keeps its work in `out` and goes on from its checkpoint."""

    out: Path
    vae_steps: int
    decoder_steps: int
    unet_steps: int
    judge_steps: int
    batch: int
    device: str
    workers: int
    target: Path


def pictures(options: Options) -> Dataset:
    """The training pictures: drawn once, then read from the folder."""
    path = options.out / "pictures.pt"
    if not path.exists():
        drawn = dataset(PICTURES, SEED, workers=2)
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save((drawn.images, drawn.captions, drawn.labels), path)
    return Dataset(*torch.load(path, weights_only=True))


def make_vae(options: Options) -> AutoencoderKL:
    """Trains the VAE in two cycles, the second on whole pictures, or reads the one that is done."""
    folder = options.out / "vae"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder).to(options.device).eval()
    torch.manual_seed(SEED)
    vae, images = build_vae(), pictures(options).images
    first, second = round(0.68 * options.vae_steps), round(0.32 * options.vae_steps)
    work = options.out / "vae-1.pt", options.out / "vae-2.pt"
    train_vae(vae, images, num_steps=first, checkpoint=work[0], device=options.device)
    train_vae(
        vae,
        images,
        num_steps=second,
        checkpoint=work[1],
        crops_until=0,
        learning_rate=1.5e-3,
        seed=1,
        device=options.device,
    )
    vae.save_pretrained(folder)
    print(f"L1 on [-1, 1]: {reconstructions(vae, images[-128:], options.out / 'vae.png'):.4f}")
    return vae


def make_decoder(options: Options) -> AutoencoderKL:
    """Trains the VAE's decoder on with the encoder frozen, or reads the one that is done."""
    folder = options.out / "vae-sharp"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder).to(options.device).eval()
    vae, data, latents = make_vae(options), pictures(options), cached_latents(options)
    train_decoder(
        vae,
        data.images,
        latents.means,
        num_steps=options.decoder_steps,
        checkpoint=options.out / "decoder.pt",
        workers=options.workers,
    )
    vae.save_pretrained(folder)
    error = reconstructions(vae, data.images[-128:], options.out / "vae-sharp.png")
    print(f"L1 on [-1, 1]: {error:.4f}")
    return vae


def cached_latents(options: Options) -> Latents:
    """The training pictures through the VAE's encoder, computed once."""
    path = options.out / "latents.pt"
    if not path.exists():
        data, tokenizer = pictures(options), build_tokenizer()
        means, stds = encode(make_vae(options), data.images)
        ids = caption_ids(tokenizer, data.captions)
        empty = caption_ids(tokenizer, [""])[0]
        torch.save((means.half(), stds.half(), ids, empty), path)
    return Latents(*torch.load(path, weights_only=True))


def make_denoiser(options: Options) -> Denoiser:
    """Trains the UNet and the text encoder; exports a folder and a sheet every ten minutes."""
    data, vae, tokenizer = cached_latents(options), make_vae(options), build_tokenizer()
    torch.manual_seed(SEED)
    denoiser = Denoiser(build_unet(), build_text_encoder(tokenizer))
    prompts = sheet_prompts()

    @torch.no_grad()
    def snapshot(step: int, module: nn.Module) -> None:
        module.eval()
        export(options.out / "model", vae, denoiser, tokenizer)
        images = sample(pipeline(vae, denoiser, tokenizer), prompts)
        sheet(images).save(options.out / f"samples-{step:05d}.png")

    train_denoiser(
        denoiser,
        data,
        num_steps=options.unet_steps,
        checkpoint=options.out / "unet.pt",
        batch=options.batch,
        device=options.device,
        workers=options.workers,
        snapshot=snapshot,
    )
    snapshot(options.unet_steps, denoiser)
    return denoiser


def sheet_prompts() -> list[str]:
    """Sixteen prompts of the sample sheets: plain ones, named styles, and the empty one."""
    random = Random(SEED)
    styles = ("plain",) * 9 + STYLES * 2
    named = [caption(random.choice(OBJECTS), random.choice(BACKGROUNDS), s) for s in styles]
    return [*named, ""]


def make_model(options: Options) -> None:
    """Writes the finished folder to its target."""
    denoiser = make_denoiser(options)
    export(options.target, make_decoder(options), denoiser, build_tokenizer())


def make_judge(options: Options) -> None:
    """Trains the judge on pictures of its own."""
    train_judge(num_steps=options.judge_steps, out=options.out, target=options.target)


def read_options() -> tuple[str, Options]:
    """The stage and its options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "unet", "decoder", "judge", "export", "all"])
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--target", type=Path, default=FOLDER, help="folder of the finished model")
    parser.add_argument("--vae-steps", type=int, default=2_500)
    parser.add_argument("--decoder-steps", type=int, default=500)
    parser.add_argument("--unet-steps", type=int, default=4_500)
    parser.add_argument("--judge-steps", type=int, default=1_400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="threads that share a batch")
    values = vars(parser.parse_args())
    stage: str = values.pop("stage")
    return stage, Options(**values)


def main() -> None:
    """Runs one stage, or all of them."""
    stage, options = read_options()
    stages = {
        "vae": make_vae,
        "unet": make_denoiser,
        "decoder": make_decoder,
        "judge": make_judge,
        "export": make_model,
    }
    for name in stages if stage == "all" else [stage]:
        stages[name](options)


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
