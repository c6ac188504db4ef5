"""Writes the model as a complete diffusers folder with fp16 weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch

from emoji_training.networks import (
    AutoencoderKL,
    CLIPTokenizer,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from emoji_training.tokenizer import write_clip_files
from emoji_training.unet import NOISE, Denoiser

KEPT = (
    "README.md",
    "classifier",
    "clip",
    "judge.safetensors",
    "pilotfish.toml",
    "scores.json",
    "sheet.png",
)


def pipeline(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as diffusers' pipeline, with Stable Diffusion's noise.

    Its configuration must say that latents are not clipped: other schedulers are made from it.
    """
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=DDIMScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(folder: Path, vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Writes the model's folder with fp16 weights."""
    halves = copy.deepcopy(vae).cpu().half(), copy.deepcopy(denoiser).cpu().half()
    write(folder, pipeline(*halves, tokenizer))


def write(folder: Path, pipe: DiffusionPipeline) -> None:
    """Writes the pipeline beside its place and renames it, so that no reader meets half of it.

    What lies beside the networks (model card, judge, CLIP, classifier, scores) is kept.
    """
    fresh = folder.with_name(folder.name + ".new")
    stale = folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    for config in fresh.glob("*/config.json"):
        _tidy(config)
    for tokenizer in fresh.glob("tokenizer*"):
        write_clip_files(tokenizer)
    for name in KEPT:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, fresh / name)
        elif (folder / name).exists():
            shutil.copy2(folder / name, fresh / name)
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def _tidy(path: Path) -> None:
    """Without the place that a network came from, which means nothing elsewhere.

    transformers would load fp16 weights as fp16; alone, an encoder shall be float32.
    """
    config = json.loads(path.read_text("utf-8"))
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline, prompts: list[str], *, seed: int = 0, chunk: int = 64
) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) in [0, 1] by the pipeline's scheduler: 25 steps, guidance 4."""
    generator = torch.Generator().manual_seed(seed)
    parts = [prompts[start : start + chunk] for start in range(0, len(prompts), chunk)]
    images = [
        pipe(
            part,
            height=64,
            width=64,
            num_inference_steps=25,
            guidance_scale=4.0,
            generator=generator,
            output_type="pt",
        ).images
        for part in parts
    ]
    return torch.cat(images).float().cpu()
