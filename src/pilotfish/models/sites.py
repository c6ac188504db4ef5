"""Where a network's attention is, for plugins that change it."""

from __future__ import annotations

from typing import Any

from .protocol import Site


def joint_sites(transformer: Any) -> tuple[Site, ...]:
    """The attention of blocks to which image tokens and text tokens come apart."""
    return tuple(
        Site(f"transformer_blocks.{i}.attn", block.attn, "joint", slice(None))
        for i, block in enumerate(transformer.transformer_blocks)
    )


def unet_sites(unet: Any) -> tuple[Site, ...]:
    """The attention of a UNet of diffusers."""
    kinds = {"attn1": "self", "attn2": "cross"}
    return tuple(
        Site(name, module, kinds[name.rpartition(".")[2]], slice(None))  # type: ignore[arg-type]
        for name, module in unet.named_modules()
        if name.rpartition(".")[2] in kinds
    )


def ip_adapter_problem(transformer: Any) -> str | None:
    """Why a transformer whose attention sees a further image cannot be driven by a prompt alone."""
    if any("IPAdapter" in type(p).__name__ for p in transformer.attn_processors.values()):
        return (
            "an IP-Adapter is loaded, whose image no run gives; call pipeline.unload_ip_adapter() "
            "first"
        )
    return None
