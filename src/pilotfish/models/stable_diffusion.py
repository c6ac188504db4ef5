"""Stable Diffusion 1.x and 2.x: what `StableDiffusionPipeline` of diffusers holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, ModelError
from ..guidance.noise import at_least_float32, draw
from . import decoders, schedulers
from .checkpointing import checkpoint_layers
from .clip_text import ClipText
from .copies import offload_hook, own_copy
from .protocol import (
    Again,
    Conditioning,
    Defaults,
    Embedding,
    Generators,
    LatentDiffusion,
    Role,
    Site,
    TextEncoder,
)
from .schedulers import diffusers

TAKES = "pilotfish takes Stable Diffusion 1.x and 2.x"


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x.

    Args:
        pipeline: a `StableDiffusionPipeline`; its networks are used as they are when a run begins,
            with LoRAs and textual inversions, and are not changed.
        id: the folder or hub id it came from.

    Attributes:
        folder: the pipeline's own, where it came from one; a plugin may find there what was trained
            along with the model.

    Raises:
        ModelError: the pipeline is of another kind, or its parts do not fit together.
    """

    pipeline_options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }
    guidance = frozenset({"cfg"})

    def __init__(self, pipeline: Any, id: str | None = None) -> None:
        self._pipeline, self.id = pipeline, id
        # None where the pipeline was put together in Python.
        origin = getattr(pipeline, "name_or_path", None)
        self.folder = Path(origin) if origin and Path(origin).is_dir() else None
        self._made: dict[Any, Any] = {}  # from these networks, for all runs
        self._read()

    def _read(self) -> None:
        """Take the pipeline's parts as they are now."""
        pipeline = self._pipeline
        if problem := _problem(pipeline):
            raise ModelError(problem)
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.scheduler = pipeline.scheduler
        self.device = torch.device(pipeline._execution_device)
        self.dtype = self.text_encoder.dtype
        self.factor = int(pipeline.vae_scale_factor)
        side = self.unet.config.sample_size or 64  # as the first of this family had
        sides = (side, side) if isinstance(side, int) else side
        self.defaults = Defaults.of(pipeline, self.folder, *(int(s) * self.factor for s in sides))
        self._set_encoder()

    def _set_encoder(self) -> None:
        clip = ClipText("text_encoder", self.tokenizer, self.text_encoder, self._spell)
        self.text_encoders: Sequence[TextEncoder] = (clip,)

    def _spell(self, prompt: str) -> str:
        """Write out words of several vectors that the pipeline has loaded."""
        loader = diffusers.loaders.TextualInversionLoaderMixin()
        return str(loader.maybe_convert_prompt(prompt, self.tokenizer))

    @property
    def denoiser(self) -> Any:
        """The UNet."""
        return self.unet

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its attention: `attn1` among image tokens, `attn2` from image to text."""
        kinds = {"attn1": "self", "attn2": "cross"}
        return tuple(
            Site(name, module, kinds[name.rpartition(".")[2]], slice(None))  # type: ignore[arg-type]
            for name, module in self.unet.named_modules()
            if name.rpartition(".")[2] in kinds
        )

    def new_scheduler(self, spec: Any) -> Any:
        """A fresh scheduler: the model's own where `spec` is None; see `schedulers.new`."""
        return schedulers.new(spec, self.scheduler)

    def describe_scheduler(self, spec: Any) -> str | dict[str, Any]:
        """A scheduler as a run file holds it: its name, and what differs from the model's."""
        return schedulers.describe(spec, self.scheduler)

    def set_timesteps(self, scheduler: Any, steps: int, shape: Sequence[int]) -> None:
        """The scheduler's own choice."""
        scheduler.set_timesteps(steps, device=self.device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) for a size in pixels.

        Raises:
            InputError: the size is no multiple of the VAE's factor.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.factor:
                below = pixels // self.factor * self.factor
                raise InputError(
                    f"{name} must be a multiple of {self.factor}, the VAE's factor; got {pixels}. "
                    f"Nearest: {max(below, self.factor)} or {below + self.factor}"
                )
        return int(self.unet.config.in_channels), height // self.factor, width // self.factor

    def noise(self, shape: Sequence[int], generators: Generators, dtype: torch.dtype) -> Tensor:
        """Noise (B, C, H, W) on the CPU."""
        return draw(shape, generators, dtype)

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

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Ho & Salimans 2022, arXiv 2207.12598, in diffusers' convention."""
        return uncond + scale * (cond - uncond)

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents -> image (B, 3, 8H, 8W), at least float32, in [0, 1] but not clamped."""
        return _decoded(self.vae, latents)

    def decode_float32(self, latents: Tensor) -> Tensor:
        """As `decode`, with the VAE in float32: half precision can overflow there."""
        return _decoded(self._vae_float32(), latents)

    def _vae_float32(self) -> Any:
        return copy.deepcopy(self.vae).float()

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """`decode`, or what stands in for it where guides look; see `Run.decoder`.

        Raises:
            InputError, ModelError: see `decoders`.
        """
        kind, _, place = name.partition(":")
        if kind != "tiny":
            return self.decode if kind == "vae" else self._enlarged_rgb
        target = decoders.locate_tiny(place, self.folder)
        if target not in self._made:
            channels = int(self.unet.config.in_channels)
            tiny = decoders.load_tiny(target, channels, self.factor, self.dtype)
            self._made[target] = tiny.to(self.device)
        return partial(decoders.decode_tiny, self._made[target])

    def _enlarged_rgb(self, latents: Tensor) -> Tensor:
        return decoders.enlarged(self.rgb(latents), self.factor)

    def encode(self, image: Tensor, generator: Generators | None = None) -> Tensor:
        """Image (B, 3, 8H, 8W) in [0, 1] -> clean latents: the mean of the VAE's posterior.

        Once more in float32 where half precision overflows.

        Args:
            generator: draws from the posterior instead; of one picture as many latents as there are
                generators.
        """
        image = image.to(self.device) * 2 - 1
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        if self.vae.dtype == torch.float16 and not posterior.parameters.isfinite().all():
            posterior = self._vae_float32().encode(image.float()).latent_dist
        draws = [posterior.sample(g) for g in generator or ()]
        unscaled = torch.cat(draws) if draws else posterior.mean
        latents: Tensor = unscaled * self.vae.config.scaling_factor
        return latents

    def rgb(self, latents: Tensor) -> Tensor:
        """Linear estimate of the colours at latent size (B, 3, H, W), float32."""
        key = "rgb", id(self._pipeline.vae), self.vae.dtype
        if key not in self._made:
            self._made[key] = decoders.fit_rgb(self.encode, self.factor).to(self.device)
        return decoders.linear(self._made[key], latents)

    def differentiable(
        self, checkpointing: str, again: Again | None = nullcontext
    ) -> StableDiffusion:
        """The model as the pipeline is now, on copies of its networks; see `LatentDiffusion`."""
        model = copy.copy(self)
        model._read()
        if again is None:
            return model
        model.unet, model.vae = own_copy(model.unet), own_copy(model.vae)
        model.text_encoder = own_copy(model.text_encoder)
        model._set_encoder()
        if not model.refuse_gradients():
            for network in (model.unet, model.vae):
                checkpoint_layers(network, checkpointing, again)
        return model

    def refuse_gradients(self) -> str | None:
        """CPU offloading moves weights between forward and backward: no gradient survives it."""
        if offload_hook(self._pipeline.unet) or offload_hook(self._pipeline.vae):
            return (
                "the pipeline offloads its networks to the CPU, which moves weights between "
                "forward and backward. Call pipeline.remove_all_hooks() and move it to one "
                "device to use guides."
            )
        return None


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    scaled = latents.to(decoders.dtype_of(vae)) / vae.config.scaling_factor
    image: Tensor = vae.decode(scaled, return_dict=False)[0]  # (B, 3, 8H, 8W)
    return at_least_float32(image) / 2 + 0.5


def _problem(pipeline: Any) -> str | None:
    """Why the parts of a pipeline are no Stable Diffusion that a prompt alone can drive."""
    if not isinstance(pipeline, diffusers.StableDiffusionPipeline):
        return f"expected a StableDiffusionPipeline; got {type(pipeline).__name__}"
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if missing := [name for name in parts if getattr(pipeline, name) is None]:
        return f"the pipeline has no {' and no '.join(missing)}"
    unet, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if unet.time_cond_proj_dim is not None:
        return f"this UNet takes the guidance scale as an input (a distilled LCM); {TAKES}"
    # diffusers loads a folder of another family's pipeline as one of this kind.
    if unet.addition_embed_type is not None or unet.in_channels != channels:
        return (
            "this UNet takes more than latents and a prompt, as those of Stable Diffusion XL and "
            f"of inpainting do; {TAKES}"
        )
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        return f"this UNet takes a class or an image's embedding beside the prompt; {TAKES}"
    if unet.encoder_hid_dim_type not in (None, "text_proj"):
        return (
            f"this UNet takes image embeddings beside the prompt ({unet.encoder_hid_dim_type}: an "
            "IP-Adapter is loaded); call pipeline.unload_ip_adapter() first"
        )
    if unet.out_channels != channels:
        return f"this UNet has learned a variance: {unet.out_channels} channels out; {TAKES}"
    takes, width = unet.encoder_hid_dim or unet.cross_attention_dim, _width(pipeline.text_encoder)
    if isinstance(takes, int) and takes != width:
        return (
            f"this UNet takes text embeddings of width {takes}, and the text encoder gives width "
            f"{width}: they are of two models"
        )
    ours, text = pipeline.unet.dtype, pipeline.text_encoder.dtype
    if ours != text:
        return (
            f"the UNet is in {ours} and the text encoder in {text}; they must be in one number "
            "format: pipeline.to(torch.bfloat16), say"
        )
    return None


def _width(encoder: Any) -> int:
    return int(encoder.get_input_embeddings().weight.shape[1])


if TYPE_CHECKING:

    def _held(model: StableDiffusion) -> LatentDiffusion:
        """To the protocol, by mypy."""
        return model
