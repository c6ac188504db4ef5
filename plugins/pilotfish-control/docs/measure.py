"""What a ControlNet adds to a call of the network, by count: `python docs/measure.py`.

Networks of the published sizes without weights; nothing is downloaded, and no number is timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pilotfish import mend_torchvision

mend_torchvision()

import diffusers  # noqa: E402

CLIP, XL = 768, 2048  # widths of the prompts' embeddings of Stable Diffusion 1.x and XL
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": XL,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}


def main() -> None:
    """A line for each family: share of the network's operations, and gigabytes in bfloat16."""
    with torch.device("meta"):
        for name, network, controlnet, told, picture in cases():
            share = operations(controlnet, **told, **picture) / operations(network, **told)
            size = sum(p.numel() for p in controlnet.parameters()) * 2 / 1e9
            print(f"{name:22}{share:6.0%} of the network's operations, {size:.1f} GB")


def cases() -> list[tuple[str, Any, Any, dict[str, Any], dict[str, Any]]]:
    """Network, ControlNet, what both are told, and what the ControlNet alone is."""
    step = {"timestep": torch.ones(1)}
    sd = {"sample": torch.ones(1, 4, 64, 64), "encoder_hidden_states": torch.ones(1, 77, CLIP)}
    extra = {"text_embeds": torch.ones(1, 1280), "time_ids": torch.ones(1, 6)}
    xl = {"sample": torch.ones(1, 4, 128, 128), "encoder_hidden_states": torch.ones(1, 77, XL)}
    flux = {
        "hidden_states": torch.ones(1, 4096, 64),
        "encoder_hidden_states": torch.ones(1, 512, 4096),
        "pooled_projections": torch.ones(1, 768),
        "img_ids": torch.ones(4096, 3),
        "txt_ids": torch.ones(512, 3),
    }
    return [
        (
            "Stable Diffusion 1.5",
            diffusers.UNet2DConditionModel(cross_attention_dim=CLIP),
            diffusers.ControlNetModel(cross_attention_dim=CLIP),
            {**sd, **step},
            {"controlnet_cond": torch.ones(1, 3, 512, 512)},
        ),
        (
            "Stable Diffusion XL",
            diffusers.UNet2DConditionModel(**SDXL, **UP),
            diffusers.ControlNetModel(**SDXL),
            {**xl, **step, "added_cond_kwargs": extra},
            {"controlnet_cond": torch.ones(1, 3, 1024, 1024)},
        ),
        (
            "FLUX.1, 6 blocks",
            diffusers.FluxTransformer2DModel(),
            diffusers.FluxControlNetModel(num_layers=6, num_single_layers=0),
            {**flux, **step},
            {"controlnet_cond": torch.ones(1, 4096, 64)},
        ),
    ]


def operations(network: Any, **told: Any) -> int:
    """Of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**told)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
