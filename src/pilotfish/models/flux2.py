"""FLUX.2 Klein: what `Flux2KleinPipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .packed import PackedFamily, places
from .protocol import Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .sites import block_sites, joint_sites
from .text import QwenText, chat

LAYERS = (9, 18, 27)  # of the text encoder, stacked


class Flux2Klein(PackedFamily):
    """FLUX.2 Klein: two by two of the VAE's cells are one cell of the latents here.

    As the network has them: normalised by the VAE's batch norm, which knows no smaller cells.
    """

    pipeline_class = "Flux2KleinPipeline"

    cells = 2
    heeds_flow_sigmas = True

    transformer: Any
    text_encoder: Any

    @property
    def _side(self) -> int:
        return int(self._pipeline.default_sample_size) // self.cells

    @property
    def _multiple(self) -> int:
        return self.factor

    @property
    def _channels(self) -> int:
        return int(self.transformer.config.in_channels)

    def _encoders(self) -> Sequence[TextEncoder]:
        tokenizer = self._pipeline.tokenizer
        ask = chat(tokenizer, enable_thinking=False)
        encoder = QwenText(
            "text_encoder",
            tokenizer,
            self.text_encoder,
            ask,
            layers=LAYERS,
            padded=True,
            whole=True,
        )
        return (encoder,)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The joint attention of its double blocks, then of single ones, where text is first."""
        image, single = slice(-self._tokens, None), "single_transformer_blocks"
        return (
            *joint_sites(self.transformer),
            *block_sites(self.transformer, single, "attn", "joint", image),
        )

    def cfg_scale(self, run: Any) -> float | None:
        """`guidance_scale` above 1, where the model is not distilled."""
        return None if self._pipeline.config.is_distilled else super().cfg_scale(run)

    def _shift(self, config: Mapping[str, Any], steps: int, shape: Sequence[int]) -> float:
        """Fitted by the model's makers for 10 and for 200 steps, with a line between."""
        tokens = shape[1] * shape[2]
        many = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333
        slope = (many - few) / 190.0
        return slope * steps + (many - 200.0 * slope)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """The encoder's output, padding and all."""
        return Conditioning({"values": embeddings[0].values.to(self.dtype)})

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The transformer's velocity."""
        batch, channels, height, width = latents.shape
        values = conditioning["values"]
        output: Tensor = self.transformer(
            hidden_states=latents.reshape(batch, channels, -1).mT.to(self.dtype),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=values,
            txt_ids=places(1, 1, 1, values.shape[1]).expand(batch, -1, -1).to(values.device),
            img_ids=places(1, height, width, 1).expand(batch, -1, -1).to(values.device),
            return_dict=False,
            **inputs,
        )[0]
        return output.mT.reshape(latents.shape)

    def _to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        batch, channels, height, width = latents.shape
        cells = (latents * std + mean).reshape(batch, channels // 4, 2, 2, height, width)
        return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)

    def _from_vae(self, encoded: Tensor) -> Tensor:
        batch, channels, height, width = encoded.shape
        cells = encoded.reshape(batch, channels, height // 2, 2, width // 2, 2)
        latents = cells.permute(0, 1, 3, 5, 2, 4).reshape(
            batch, 4 * channels, height // 2, width // 2
        )
        mean, std = self._moments(latents)
        return (latents - mean) / std

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean = norm.running_mean.view(1, -1, 1, 1).to(like)
        return mean, torch.sqrt(norm.running_var.view(1, -1, 1, 1) + eps).to(like)


if TYPE_CHECKING:

    def _held(model: Flux2Klein) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
