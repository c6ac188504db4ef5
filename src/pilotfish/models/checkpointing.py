"""Gradient checkpointing: the parts of a network that are computed again instead of kept.

Finer than diffusers' own, which keeps what lies between the parts of a UNet's attention, and
computes a VAE's blocks again whole. A part here is a layer: what the graph keeps is little more
than the layers' inputs, and what is in memory while one is computed again is little too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .protocol import Again

AUTO_PARAMETERS = 100_000_000  # below, activations fit anyway and speed counts

# diffusers' classes by name: a block without attention, and the layers of the others.
PARTS = {
    *("DownBlock2D", "UpBlock2D", "ResnetBlock2D", "Attention", "Upsample2D", "Downsample2D"),
    *("BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock"),
    *("FluxSingleTransformerBlock", "Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    *("ZImageTransformerBlock", "QwenImageTransformerBlock"),
    *("QwenImageResidualBlock", "QwenImageAttentionBlock", "QwenImageResample"),
}


def parts(network: Any) -> list[Any]:
    """The modules of a network that are computed again, none inside another."""
    kind = type(network).__name__
    # A transformer of one block, as Stable Diffusion 1.x and 2.x have, is a layer like another.
    if kind in PARTS or (kind == "Transformer2DModel" and len(network.transformer_blocks) == 1):
        return [network]
    return [part for child in network.children() for part in parts(child)]


def checkpoint_layers(network: Any, checkpointing: str, again: Again) -> None:
    """Let a network's layers keep only their inputs for the gradient, from now on.

    Args:
        network: a copy of one run's own.
        checkpointing, again: see `LatentDiffusion.differentiable`.
    """
    if checkpointing == "on" or (checkpointing == "auto" and _size(network) > AUTO_PARAMETERS):
        for module in parts(network):
            vars(module)["forward"] = _computed_again(module.forward, module.training, again)


def _size(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _computed_again(forward: Callable[..., Any], draws: bool, again: Again) -> Callable[..., Any]:
    """A module's `forward`; one that draws (dropout in training) must draw the same again."""

    layer = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=draws)

    def keeping_inputs(*args: Any, **kwargs: Any) -> Any:
        around = again() if torch.is_grad_enabled() else None
        if around is None:
            return forward(*args, **kwargs)
        return layer(*args, context_fn=lambda: (nullcontext(), around), **kwargs)

    return keeping_inputs
