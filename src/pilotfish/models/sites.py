"""Where the networks of diffusers have attention, for plugins that change it."""

from __future__ import annotations

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


def joint_sites(transformer: Any) -> tuple[Site, ...]:
    """The attention of blocks to which image tokens and text tokens come apart."""
    return block_sites(transformer, "transformer_blocks", "attn", "joint", slice(None))


def block_sites(
    transformer: Any, blocks: str, attention: str, kind: Literal["self", "joint"], image: slice
) -> tuple[Site, ...]:
    """The attention of a list of blocks, each with the same tokens."""
    return tuple(
        Site(f"{blocks}.{i}.{attention}", getattr(block, attention), kind, image)
        for i, block in enumerate(getattr(transformer, blocks))
    )
