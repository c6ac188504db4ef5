"""Stable Diffusion 3 and 3.5: what `StableDiffusion3Pipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .family import PipelineFamily
from .protocol import Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .schedulers import linear_shift
from .sites import joint_sites
from .text import T5Text, side_by_side


class StableDiffusion3(PipelineFamily):
    """Stable Diffusion 3 and 3.5, with or without a T5, see `PipelineFamily`."""

    pipeline_class = "StableDiffusion3Pipeline"
    optional = PipelineFamily.optional | {"text_encoder_3", "tokenizer_3"}

    transformer: Any
    text_encoder_3: Any = None

    @property
    def _multiple(self) -> int:
        return self.factor * int(self.transformer.config.patch_size)

    def _encoders(self) -> Sequence[TextEncoder]:
        clips = (self._clip("", -2), self._clip("_2", -2))
        if self.text_encoder_3 is None:
            return clips
        tokenizer = self._pipeline.tokenizer_3
        return (*clips, T5Text("text_encoder_3", tokenizer, self.text_encoder_3))

    def _shift(self, config: Mapping[str, Any], steps: int, shape: Sequence[int]) -> float:
        patch = int(self.transformer.config.patch_size)
        return linear_shift(config, (shape[1] // patch) * (shape[2] // patch), most=1.16)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its joint attention: image tokens and text tokens come apart."""
        return joint_sites(self.transformer)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """Both CLIPs side by side, then the T5's tokens, or as many zeros; and what CLIPs pool."""
        clips, t5 = embeddings[:2], embeddings[2:]
        values = side_by_side([e.values for e in clips])
        width = self.transformer.config.joint_attention_dim
        values = pad(values, (0, width - values.shape[2]))
        missing = values.new_zeros(len(values), run.max_sequence_length, width)
        last = t5[0].values.expand(len(values), -1, -1) if t5 else missing
        values = torch.cat([values, last.to(values.dtype)], dim=1)
        pooled = side_by_side([e.pooled for e in clips if e.pooled is not None])
        return Conditioning.alike(
            {"values": values.to(self.dtype), "pooled": pooled.to(self.dtype)}
        )

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The transformer's velocity."""
        output: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=conditioning["values"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
            **inputs,
        )[0]
        return output

    def _problem(self, pipeline: Any) -> str | None:
        channels = pipeline.vae.config.latent_channels
        if pipeline.transformer.config.in_channels != channels:
            return (
                f"this transformer takes {pipeline.transformer.config.in_channels} channels, and "
                f"the VAE has {channels}: they are of two models"
            )
        return None


if TYPE_CHECKING:

    def _held(model: StableDiffusion3) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
