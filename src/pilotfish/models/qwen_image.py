"""Qwen-Image (1.x): what `QwenImagePipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from .packed import PackedFamily, pack, true_cfg_scale, unpack
from .protocol import Again, Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .sites import joint_sites
from .text import QwenText


class QwenImage(PackedFamily):
    """Qwen-Image: `true_cfg_scale` needs a negative prompt."""

    pipeline_class = "QwenImagePipeline"
    masked = True

    transformer: Any
    text_encoder: Any

    def _encoders(self) -> Sequence[TextEncoder]:
        pipeline = self._pipeline
        encoder = QwenText(
            "text_encoder",
            pipeline.tokenizer,
            self.text_encoder,
            pipeline.prompt_template_encode.format,
            layers=(-1,),
            dropped=pipeline.prompt_template_encode_start_idx,
            most=pipeline.tokenizer_max_length,
        )
        return (encoder,)

    def differentiable(self, checkpointing: str, again: Again | None = nullcontext) -> Self:
        """See `LatentDiffusion`; its VAE keeps no frames, so that layers can be computed again."""
        model = super().differentiable(checkpointing, again)
        if again is not None and not model.refuse_gradients():
            for part in (model.vae.encoder, model.vae.decoder):
                vars(part)["forward"] = partial(_one_frame, part.forward)
        return model

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its joint attention: image tokens and text tokens come apart."""
        return joint_sites(self.transformer)

    def cfg_scale(self, run: Any) -> float | None:
        """`true_cfg_scale` above 1, with a negative prompt."""
        return true_cfg_scale(run)

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, each token brought back to the norm of the prompt's own."""
        told, combined = pack(cond), pack(uncond + scale * (cond - uncond))
        norms = [torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (told, combined)]
        return unpack(combined * (norms[0] / norms[1]), cond.shape)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """The encoder's output for the prompt's own tokens."""
        values = embeddings[0].values[:, : run.max_sequence_length].to(self.dtype)
        told = {"values": values}
        if self.transformer.config.guidance_embeds:
            if run.guidance_scale is None:
                raise ValueError("this Qwen-Image is told its guidance_scale; give one")
            told["guidance"] = torch.full([len(values)], run.guidance_scale, device=self.device)
        return Conditioning(told)

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The transformer's velocity."""
        batch, _, height, width = latents.shape
        output: Tensor = self.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=conditioning.tensors.get("guidance"),
            encoder_hidden_states_mask=conditioning.tensors.get("mask"),
            encoder_hidden_states=conditioning["values"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
            **inputs,
        )[0]
        return unpack(output, latents.shape)

    def _to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        return (latents / (1.0 / std) + mean).unsqueeze(2)  # a film of one picture

    def _from_vae(self, encoded: Tensor) -> Tensor:
        mean, std = self._moments(encoded)
        return ((encoded - mean.unsqueeze(1)) * (1.0 / std.unsqueeze(1))).squeeze(2)

    def _film(self, image: Tensor) -> Tensor:
        return image.unsqueeze(2)

    def _picture(self, decoded: Tensor) -> Tensor:
        return decoded[:, :, 0]


def _one_frame(forward: Callable[[Tensor], Tensor], frame: Tensor, **kept: Any) -> Tensor:
    """What a part of the VAE makes of a film's only frame, without what it keeps for a next one."""
    return forward(frame)


if TYPE_CHECKING:

    def _held(model: QwenImage) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
