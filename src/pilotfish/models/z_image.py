"""Z-Image, base and turbo: what `ZImagePipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .packed import PackedFamily
from .protocol import Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .sites import block_sites
from .text import QwenText, chat


class ZImage(PackedFamily):
    """Z-Image: its `guidance_scale` counts from 0, where that of others counts from 1."""

    pipeline_class = "ZImagePipeline"
    together = masked = True

    transformer: Any
    text_encoder: Any

    @property
    def latents_dtype(self) -> torch.dtype:
        """The pipeline keeps latents in float32, whatever the network is in."""
        return torch.float32

    @property
    def _side(self) -> int | Sequence[int]:
        return 1024 // self.factor  # pixels, in its pipeline's code

    @property
    def _channels(self) -> int:
        return int(self.transformer.config.in_channels)

    def _encoders(self) -> Sequence[TextEncoder]:
        tokenizer = self._pipeline.tokenizer
        ask = chat(tokenizer, enable_thinking=True)
        return (QwenText("text_encoder", tokenizer, self.text_encoder, ask, padded=True),)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The attention that sees image tokens: alone at first, then with text tokens behind."""
        image = slice(self._tokens)
        return (
            *block_sites(self.transformer, "noise_refiner", "attention", "self", image),
            *block_sites(self.transformer, "layers", "attention", "joint", image),
        )

    def cfg_scale(self, run: Any) -> float | None:
        """`guidance_scale` above 0."""
        scale: float = run.guidance_scale
        return scale if scale > 0 else None

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance from the prompt's prediction on."""
        return cond + scale * (cond - uncond)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """The encoder's output for the prompt's own tokens."""
        return Conditioning({"values": embeddings[0].values.to(self.dtype)})

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The transformer's answer with its sign turned: a velocity, float32."""
        values = conditioning["values"]
        mask = conditioning.tensors.get("mask", torch.ones_like(values[..., 0], dtype=torch.bool))
        outputs = self.transformer(
            list(latents.to(self.dtype).unsqueeze(2).unbind(0)),
            (1000 - timestep.expand(len(latents))) / 1000,
            [told[kept] for told, kept in zip(values, mask, strict=True)],
            return_dict=False,
            **inputs,
        )[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)


if TYPE_CHECKING:

    def _held(model: ZImage) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
