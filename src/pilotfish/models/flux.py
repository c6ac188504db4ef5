"""FLUX.1, dev and schnell: what `FluxPipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .packed import PackedFamily, pack, places, true_cfg_scale, unpack
from .protocol import Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .sites import block_sites, joint_sites
from .text import T5Text


class Flux(PackedFamily):
    """FLUX.1: `guidance_scale` is told to the network, `true_cfg_scale` needs a negative prompt."""

    pipeline_class = "FluxPipeline"
    guidance = frozenset({"cfg", "embedded"})
    heeds_flow_sigmas = True

    transformer: Any
    text_encoder_2: Any

    def _encoders(self) -> Sequence[TextEncoder]:
        tokenizer = self._pipeline.tokenizer_2
        spell = partial(self._spell, tokenizer)
        return self._clip(), T5Text("text_encoder_2", tokenizer, self.text_encoder_2, spell)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The joint attention of its double blocks, then of single ones, where text is first."""
        image, single = slice(-self._tokens, None), "single_transformer_blocks"
        return (
            *joint_sites(self.transformer),
            *block_sites(self.transformer, single, "attn", "joint", image),
        )

    def cfg_scale(self, run: Any) -> float | None:
        """`true_cfg_scale` above 1, with a negative prompt."""
        return true_cfg_scale(run)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """The T5's tokens, what the CLIP pools, and the guidance scale where the network asks."""
        clip, t5 = embeddings
        assert clip.pooled is not None  # a CLIP gives one
        told = {"values": t5.values.to(self.dtype), "pooled": clip.pooled.to(self.dtype)}
        if self.transformer.config.guidance_embeds:
            told["guidance"] = torch.full([1], run.guidance_scale, device=self.device)
        return Conditioning.alike(told)

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The transformer's velocity."""
        batch, _, height, width = latents.shape
        values = conditioning["values"]
        output: Tensor = self.transformer(
            hidden_states=pack(latents),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=conditioning.tensors.get("guidance"),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=values,
            txt_ids=values.new_zeros(values.shape[1], 3),
            img_ids=places(1, height // 2, width // 2).to(values),
            return_dict=False,
            **inputs,
        )[0]
        return unpack(output, latents.shape)

    def _problem(self, pipeline: Any) -> str | None:
        takes, gives = pipeline.transformer.config.in_channels, pipeline.vae.config.latent_channels
        if takes != 4 * gives:
            return (
                f"this transformer takes {takes} channels, and {4 * gives} are in a token of this "
                "VAE's latents: it takes more than latents and a prompt (Fill, Depth, Canny, "
                "Kontext), or the two are of two models"
            )
        return None


if TYPE_CHECKING:

    def _held(model: Flux) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
