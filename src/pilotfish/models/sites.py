"""Where the networks of diffusers have attention, for plugins that change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from .protocol import Site


def unet_sites(unet: Any) -> tuple[Site, ...]:
    """The attention of a UNet: `attn1` among image tokens, `attn2` from image to text."""
    kinds: dict[str, Literal["self", "cross"]] = {"attn1": "self", "attn2": "cross"}
    return tuple(
        Site(name, module, kinds[name.rpartition(".")[2]], slice(None))
        for name, module in unet.named_modules()
        if name.rpartition(".")[2] in kinds
    )


def joint_sites(transformer: Any, text_first: bool = True) -> tuple[Site, ...]:
    """The attention of blocks to which image tokens and text tokens come apart."""
    sites = block_sites(transformer, "transformer_blocks", "attn", "joint", slice(None))
    return tuple(replace(site, text_first=text_first) for site in sites)


def block_sites(
    transformer: Any, blocks: str, attention: str, kind: Literal["self", "joint"], image: slice
) -> tuple[Site, ...]:
    """The attention of those of a list of blocks that have it, each with the same tokens."""
    return tuple(
        Site(f"{blocks}.{i}.{attention}", module, kind, image)
        for i, block in enumerate(getattr(transformer, blocks))
        if (module := getattr(block, attention)) is not None
    )


def ip_adapter_problem(transformer: Any) -> str | None:
    """Why a transformer whose attention sees a further image cannot be driven by a prompt alone."""
    if any("IPAdapter" in type(p).__name__ for p in transformer.attn_processors.values()):
        return (
            "an IP-Adapter is loaded, whose image no run gives; call pipeline.unload_ip_adapter() "
            "first"
        )
    return None
