"""ImageReward: a text encoder that reads the prompt while it looks at the picture, and a head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pilotfish import mend_torchvision

from .clips import Head
from .files import Published, fill, read_tensors
from .networks import Looks, Network, shared, wide

if TYPE_CHECKING:
    from pilotfish import Run

# The head's answer for the training's pictures has this mean and deviation (ImageReward.py of the
# authors' repository): scores of about mean 0 and deviation 1 come out.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_WIDTH = 64  # of an attention head, in every ViT and BERT that BLIP is made of

# BLIP's names in the published file (timm's for the picture), and those of transformers.
PICTURE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
}
BLOCK = {"attn.proj": "self_attn.projection", "attn.": "self_attn.", "norm": "layer_norm"}


class BlipReward(Network):
    """The two encoders of BLIP in transformers, and the head, which is at least float32."""

    head: Head

    @classmethod
    def of(cls, published: Published, given: str | None, run: Run) -> BlipReward:
        """The one that is given, or published: loaded once for all guides of the same.

        Raises:
            ModelError: it cannot be read, or is not whole.
        """
        path = published.path(given)
        device, dtype = run.model.device, run.model.dtype

        def make() -> BlipReward:
            mend_torchvision()
            with published.told(given):
                parts = built(read_tensors(path))
            head, side = parts.pop("head"), parts["vision"].config.image_size
            network = cls(nn.ModuleDict(parts), Looks((side, side)), device, dtype)
            network.head = head.requires_grad_(False).to(device, wide(dtype))
            return network

        return shared((cls, str(path), str(device), dtype), make)

    def score(self, images: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in about [0, 1] for a text in ids and mask (1, T)."""
        raw: Tensor = self.head(self.see(images, partial(self._read, tokens=tokens)))
        return (raw - MEAN) / STD

    def _read(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        seen = self.module["vision"](pixels).last_hidden_state  # (B, patches + 1, D)
        ids, mask = (
            tokens[name].to(self.device).expand(len(pixels), -1)
            for name in ("input_ids", "attention_mask")
        )
        read = self.module["text"](
            ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=self.device, dtype=mask.dtype),
        )
        first: Tensor = read.last_hidden_state[:, 0]
        return first


def built(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Both encoders and the head, as wide and deep as the published file's tensors say.

    Raises:
        ModelError: a tensor is missing or of another shape.
        KeyError: so much is missing that its sizes cannot be told.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    picture = {renamed(name): value for name, value in under("blip.visual_encoder.", tensors)}
    text = dict(under("blip.text_encoder.", tensors))
    head = dict(under("mlp.", tensors))
    patches = picture["embeddings.patch_embedding.weight"]  # (D, 3, patch, patch)
    places = picture["embeddings.position_embedding"].shape[1] - 1
    vision_config = BlipVisionConfig(
        **sizes(len(patches), picture, "encoder.layers", "mlp.fc1"),
        patch_size=patches.shape[-1],
        image_size=round(places**0.5) * patches.shape[-1],
        layer_norm_eps=1e-6,  # timm's; that of transformers is 1e-5
    )
    words = text["embeddings.word_embeddings.weight"]  # (words, D)
    text_config = BlipTextConfig(
        **sizes(words.shape[1], text, "encoder.layer", "intermediate.dense"),
        vocab_size=len(words),
        encoder_hidden_size=len(patches),
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        bos_token_id=None,  # of generation, which nobody asks for
        eos_token_id=None,
        sep_token_id=None,
        pad_token_id=0,
    )
    parts = {
        "vision": BlipVisionModel(vision_config),
        "text": BlipTextModel(text_config, add_pooling_layer=False),
        "head": Head(words.shape[1], head),
    }
    files = {"vision": picture, "text": text, "head": head}
    for name, part in parts.items():
        fill(part, files[name], f"{name} part of ImageReward")
    return parts


def under(prefix: str, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors whose names begin so, by the rest of their names."""
    return [(n.removeprefix(prefix), t) for n, t in tensors.items() if n.startswith(prefix)]


def renamed(name: str) -> str:
    """A tensor of BLIP's picture encoder, as transformers calls it."""
    for old, new in PICTURE.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.startswith("encoder."):
        for old, new in BLOCK.items():
            if f".{old}" in name:
                return name.replace(f".{old}", f".{new}", 1)
    return name


def sizes(width: int, tensors: Mapping[str, Tensor], layers: str, wide: str) -> dict[str, int]:
    """What a configuration says of an encoder's layers."""
    depth = 1 + max(
        (int(name.split(".")[2]) for name in tensors if name.startswith(f"{layers}.")), default=0
    )
    return {
        "hidden_size": width,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "num_hidden_layers": depth,
        "intermediate_size": len(tensors[f"{layers}.0.{wide}.weight"]),
    }
