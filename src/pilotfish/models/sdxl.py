"""Stable Diffusion XL, base and turbo: what `StableDiffusionXLPipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .family import PipelineFamily
from .protocol import Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .sites import unet_sites
from .stable_diffusion import unet_problem
from .text import side_by_side


class StableDiffusionXL(PipelineFamily):
    """Stable Diffusion XL, see `PipelineFamily`."""

    pipeline_class = "StableDiffusionXLPipeline"
    network = "unet"
    upcasts = True
    optional = PipelineFamily.optional | {"text_encoder", "tokenizer"}

    unet: Any
    text_encoder: Any
    text_encoder_2: Any

    def _encoders(self) -> Sequence[TextEncoder]:
        return self._clip("", -2), self._clip("_2", -2)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its attention: `attn1` among image tokens, `attn2` from image to text."""
        return unet_sites(self.unet)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """Both encoders' outputs side by side, the second's pooled one, and the picture's size.

        Without a negative prompt all is zero where the model asks for that.
        """
        values = side_by_side([e.values for e in embeddings])
        pooled = embeddings[-1].pooled
        assert pooled is not None  # CLIP with a projection gives one
        untold = role == "negative" and run.negative_prompt is None
        if untold and self._pipeline.config.force_zeros_for_empty_prompt:
            values, pooled = torch.zeros_like(values), torch.zeros_like(pooled)
        # Original size, upper left corner of the crop, target size: arXiv 2307.01952, section 2.2.
        size = (run.height, run.width)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=self.dtype, device=self.device)
        told = {"values": values.to(self.dtype), "pooled": pooled.to(self.dtype), "ids": ids}
        return Conditioning.alike(told)

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The UNet's output."""
        told = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["ids"]}
        told |= inputs.pop("added_cond_kwargs", {})  # an image's embeddings, of a plugin
        output: Tensor = self.unet(
            latents,
            timestep,
            conditioning["values"],
            added_cond_kwargs=told,
            return_dict=False,
            **inputs,
        )[0]
        return output

    def _problem(self, pipeline: Any) -> str | None:
        if pipeline.text_encoder is None or pipeline.tokenizer is None:
            return (
                "this is the refiner, which has no first text encoder: it goes on from another "
                "model's picture. pilotfish takes Stable Diffusion XL base and turbo"
            )
        if pipeline.unet.config.addition_embed_type != "text_time":
            return "this UNet is not one of Stable Diffusion XL: it takes no text_time embedding"
        return unet_problem(pipeline, "pilotfish takes Stable Diffusion XL base and turbo")


if TYPE_CHECKING:

    def _held(model: StableDiffusionXL) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
