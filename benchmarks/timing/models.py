"""Pipelines and CLIPs of several sizes, most of them random and made where they are to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from pilotfish.models.loading import locate
from pilotfish.testing import random_pipeline

diffusers.utils.logging.set_verbosity_error()  # it advises on casts and old configurations
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Euler costs least beside the network. LMS, the talk's, integrates its coefficients numerically,
# milliseconds a step in every row, which hides what the loops themselves cost.
SCHEDULERS = {"euler": diffusers.EulerDiscreteScheduler, "lms": diffusers.LMSDiscreteScheduler}


@dataclass(frozen=True)
class Size:
    """The shape of a random model.

    Attributes:
        unet, vae: arguments of diffusers' classes.
        text: width and layers of the text encoder.
        clip: the model that guides: open_clip's name of it, or its configuration.
        tiny: channels of a tiny decoder; TAESD, the one for Stable Diffusion, has 64.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: tuple[int, int]
    clip: str | dict[str, Any]
    tiny: int = 64


@dataclass(frozen=True)
class FlowSize:
    """The shape of a random transformer; its text encoders and the rest are the tiny model's.

    Attributes:
        family: "sd3" or "flux".
        transformer, vae: where they differ from the tiny model's.
        clip, tiny: as a `Size` has them.
    """

    family: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    tiny: int = 12


def vae(channels: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """An AutoencoderKL's arguments."""
    return {
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        **options,
    }


def vit(image: int, patch: int, width: int, layers: int) -> dict[str, Any]:
    """A CLIP's configuration, with hardly a text encoder: only pictures are shown to it."""
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": image,
            "patch_size": patch,
            "width": width,
            "layers": layers,
            "head_width": 32,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 32, "heads": 1, "layers": 1},
    }


TINY_CLIP = vit(image=32, patch=8, width=32, layers=2)
# CLIP and tiny decoder are to the small UNet what ViT-B/32 and TAESD are to Stable Diffusion's:
# 0.6 % and 9 % of the operations of an unguided step.
SMALL_CLIP = vit(image=56, patch=8, width=64, layers=4)
SIDE = 16  # of the latents of small flows; with a VAE of factor 8, 128 pixels
SIZES: dict[str, Size | FlowSize] = {
    # Stable Diffusion 1.5's shape on 128 pixels.
    "small": Size(
        unet={
            "sample_size": 16,
            "block_out_channels": (64, 128, 256, 256),
            "cross_attention_dim": 128,
            "norm_num_groups": 16,
        },
        vae=vae((32, 64, 128, 128), norm_num_groups=8, sample_size=128),
        text=(128, 2),
        clip=SMALL_CLIP,
        tiny=12,
    ),
    # Some 50 ms a step on one core: 333 tokens of text for both prompts, and 512 for one.
    "small sd3": FlowSize(
        "sd3",
        transformer={"num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 32}
        | {"caption_projection_dim": 192},
        vae=vae((32, 64, 128, 128), norm_num_groups=8),
        clip=SMALL_CLIP,
    ),
    "small flux": FlowSize(
        "flux",
        transformer={"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 6}
        | {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
        vae=vae((32, 64, 128, 128), norm_num_groups=8),
        clip=SMALL_CLIP,
    ),
    "sd15": Size(
        unet={"sample_size": 64, "cross_attention_dim": 768},
        vae=vae((128, 256, 512, 512), sample_size=512),
        text=(768, 12),
        clip="ViT-B-32",
    ),
    # Without what SDXL adds to its time embedding (the second text encoder's pooled output and
    # the picture's size), which pilotfish does not serve: 5 of its 2,567 million parameters.
    "sdxl": Size(
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": None,
        },
        vae=vae((128, 256, 512, 512), sample_size=1024, scaling_factor=0.13025),
        text=(2048, 2),
        clip="ViT-B-32",
    ),
}


def load(name: str, device: torch.device, dtype: torch.dtype, scheduler: str = "euler") -> Any:
    """A pipeline: "emoji", "random" (tiny), "random sd3", a size, or a diffusers folder."""
    tiny, _, family = name.partition(" ")
    if name in SIZES:
        pipeline = (build if isinstance(SIZES[name], Size) else build_flow)(
            SIZES[name], device, dtype
        )
    elif tiny == "random":
        pipeline = random_pipeline(dtype=dtype, family=family or "stable-diffusion").to(device)
    else:
        folder = locate(None if name == "emoji" else name)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, dtype=dtype, safety_checker=None, requires_safety_checker=False
        ).to(device)
    if hasattr(pipeline, "unet"):
        pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    else:  # FLUX has no size of its own, and a flow's levels come with its scheduler
        pipeline.default_sample_size = SIDE
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of random weights. PyTorch's own initialisation keeps all numbers small."""
    tiny = random_pipeline()
    width, layers = size.text
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id,
        pad_token_id=tiny.tokenizer.pad_token_id,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(0)
        networks = {
            "unet": diffusers.UNet2DConditionModel(**size.unet),
            "vae": diffusers.AutoencoderKL(**size.vae),
            "text_encoder": CLIPTextModel(text),
        }
    return diffusers.StableDiffusionPipeline(
        **{name: network.to(device, dtype).eval() for name, network in networks.items()},
        tokenizer=tiny.tokenizer,
        scheduler=tiny.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_flow(size: FlowSize, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of random weights, as large as `size` says."""
    pipeline = random_pipeline(dtype=dtype, family=size.family).to(device)
    parts = pipeline.components
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        for name, changes in (("transformer", size.transformer), ("vae", size.vae)):
            network = type(parts[name]).from_config({**parts[name].config, **changes})
            parts[name] = network.to(device, dtype).eval()
    return type(pipeline)(**parts)


def load_clip(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The CLIP that guides a model of that name."""
    if name == "emoji":
        return make_clip(f"local-dir:{Path(locate(None)) / 'clip'}", device, dtype)
    return make_clip(SIZES[name].clip if name in SIZES else TINY_CLIP, device, dtype)


def save_tiny(name: str, vae: Any, folder: str) -> None:
    """Write a random `AutoencoderTiny` of TAESD's layout for a VAE's latents."""
    channels = SIZES[name].tiny if name in SIZES else 16
    stages = len(vae.config.block_out_channels)  # each but the last doubles
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        diffusers.AutoencoderTiny(
            latent_channels=vae.config.latent_channels,
            encoder_block_out_channels=(channels,) * stages,
            decoder_block_out_channels=(channels,) * stages,
            num_encoder_blocks=(1, *(3,) * (stages - 1)),
            num_decoder_blocks=(*(3,) * (stages - 1), 1),
        ).save_pretrained(folder)


def make_clip(what: str | dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """An open_clip model, random unless it is a folder's; from its name or its configuration."""
    if isinstance(what, dict):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return open_clip.CLIP(**what).to(device, dtype)
    return open_clip.create_model(
        what,
        load_weights=what.startswith("local-dir:"),
        precision=PRECISIONS[dtype],
        device=device,
    )
