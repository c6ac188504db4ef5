"""Stable Diffusion 1.x and 2.x: what `StableDiffusionPipeline` of diffusers holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .family import PipelineFamily
from .protocol import Conditioning, Embedding, LatentDiffusion, Role, Site, TextEncoder
from .sites import unet_sites

TAKES = "pilotfish takes Stable Diffusion 1.x and 2.x"


class StableDiffusion(PipelineFamily):
    """Stable Diffusion 1.x and 2.x, see `PipelineFamily`."""

    pipeline_class = "StableDiffusionPipeline"
    network = "unet"
    pipeline_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}
    optional = PipelineFamily.optional | {"safety_checker"}

    unet: Any
    text_encoder: Any

    @property
    def tokenizer(self) -> Any:
        """The pipeline's."""
        return self._pipeline.tokenizer

    @property
    def _side(self) -> int | Sequence[int]:
        side: int | Sequence[int] = self.unet.config.sample_size or 64  # as the first of them had
        return side

    def _encoders(self) -> Sequence[TextEncoder]:
        return (self._clip(),)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its attention: `attn1` among image tokens, `attn2` from image to text."""
        return unet_sites(self.unet)

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """The encoder's output in the network's number format."""
        return Conditioning({"values": embeddings[0].values.to(self.dtype)})

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The UNet's output."""
        values = conditioning["values"]
        output: Tensor = self.unet(latents, timestep, values, return_dict=False, **inputs)[0]
        return output

    def _problem(self, pipeline: Any) -> str | None:
        # diffusers loads a folder of another family's pipeline as one of this kind.
        if pipeline.unet.config.addition_embed_type is not None:
            return (
                "this UNet takes more than latents and a prompt, as those of Stable Diffusion XL "
                f"do; {TAKES}"
            )
        return unet_problem(pipeline, TAKES) or _width_problem(pipeline)


def unet_problem(pipeline: Any, takes: str) -> str | None:
    """Why a pipeline's UNet cannot be driven by a prompt and latents alone.

    Args:
        takes: what is taken, for the message.
    """
    unet, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if unet.time_cond_proj_dim is not None:
        return f"this UNet takes the guidance scale as an input (a distilled LCM); {takes}"
    if unet.in_channels != channels:
        return f"this UNet takes more than latents and a prompt, as those of inpainting do; {takes}"
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        return f"this UNet takes a class or an image's embedding beside the prompt; {takes}"
    if unet.encoder_hid_dim_type not in (None, "text_proj"):
        return (
            f"this UNet takes image embeddings beside the prompt ({unet.encoder_hid_dim_type}: an "
            "IP-Adapter is loaded); call pipeline.unload_ip_adapter() first"
        )
    if unet.out_channels != channels:
        return f"this UNet has learned a variance: {unet.out_channels} channels out; {takes}"
    return None


def _width_problem(pipeline: Any) -> str | None:
    unet = pipeline.unet.config
    takes = unet.encoder_hid_dim or unet.cross_attention_dim
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    if isinstance(takes, int) and takes != width:
        return (
            f"this UNet takes text embeddings of width {takes}, and the text encoder gives width "
            f"{width}: they are of two models"
        )
    return None


if TYPE_CHECKING:

    def _held(model: StableDiffusion) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
