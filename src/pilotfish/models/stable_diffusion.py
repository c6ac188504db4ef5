"""The networks of a latent diffusion model, from diffusers and transformers.

`StableDiffusion` is the adapter for Stable Diffusion 1.x and 2.x. The sampler needs of an adapter
what `LatentDiffusion` lists, so another family is another adapter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError, ModelError
from ..guidance.noise import at_least_float32
from . import decoders, schedulers
from .checkpointing import checkpointed, parts
from .text import Conditioning, Embedding, TextEncoder
from .torchvision import mend_torchvision

mend_torchvision()

import diffusers  # noqa: E402  # after the declaration, because it imports torchvision
from diffusers.loaders import TextualInversionLoaderMixin  # noqa: E402

AUTO_CHECKPOINTING_PARAMETERS = 100_000_000  # below, activations fit anyway and speed counts


class LatentDiffusion(Protocol):
    """What the sampler needs of a model."""

    id: str | None
    folder: Path | None
    device: torch.device
    dtype: torch.dtype
    text_encoders: tuple[TextEncoder, ...]

    def new_scheduler(self, spec: Any) -> Any:
        """A fresh scheduler (see `Run.scheduler`)."""

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, H, W) for a size in pixels; None for the model's own size."""

    def condition(self, embeddings: list[Embedding]) -> Conditioning:
        """One prompt's embeddings, one of each text encoder, as the network takes them."""

    def predict(self, latents: Tensor, timestep: Any, conditioning: Conditioning) -> Tensor:
        """The network's output for scaled latents (B, C, H, W)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents -> image (B, 3, 8H, 8W), at least float32, in [0, 1] but not clamped."""

    def decode_float32(self, latents: Tensor) -> Tensor:
        """As `decode`, with the decoder itself in float32."""

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """`decode`, or what stands in for it where guides look; see `Run.decoder`."""

    def encode(self, image: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        """Image (B, 3, 8H, 8W) in [0, 1] -> clean latents.

        Args:
            generator: draws from what the encoder deems likely, where it does so; of one picture as
                many latents as there are generators. None takes the mean.
        """

    def rgb(self, latents: Tensor) -> Tensor:
        """Clean latents -> linear estimate of the colours at latent size (B, 3, H, W)."""

    def differentiable(self, checkpointing: str) -> contextlib.AbstractContextManager[None]:
        """A context that can be entered again: networks frozen, and checkpointed if asked."""

    def refuse_gradients(self) -> str | None:
        """Why no gradient can go through the networks now, or None."""


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x.

    Args:
        pipeline: a `StableDiffusionPipeline`; its networks are used as they are, with LoRAs and
            textual inversions, and are not changed.
        id: the folder or hub id it came from.

    Attributes:
        folder: the pipeline's own, where it came from one; a plugin may find there what was trained
            along with the model.

    Raises:
        ModelError: the pipeline is of another kind.
    """

    def __init__(self, pipeline: Any, id: str | None = None) -> None:
        if not isinstance(pipeline, diffusers.StableDiffusionPipeline):
            raise ModelError(
                f"got {type(pipeline).__name__}; pilotfish takes a StableDiffusionPipeline "
                "(Stable Diffusion 1.x or 2.x)"
            )
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ModelError(
                "this UNet takes the guidance scale as an input (a distilled LCM); "
                "pilotfish takes models that are guided by two predictions"
            )
        # diffusers loads a folder of another family's pipeline as one of this kind.
        config, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
        if config.addition_embed_type is not None or config.in_channels != channels:
            raise ModelError(
                "this UNet takes more than latents and a prompt, as those of Stable Diffusion XL "
                "and of inpainting do; pilotfish takes Stable Diffusion 1.x and 2.x"
            )
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.scheduler = pipeline.scheduler
        self.id = id
        origin = pipeline.name_or_path  # None where the pipeline was put together in Python
        self.folder = Path(origin) if origin and Path(origin).is_dir() else None
        self.device = torch.device(pipeline._execution_device)
        self.dtype = self.text_encoder.dtype
        self.factor = int(pipeline.vae_scale_factor)
        self._tinies: dict[str, Any] = {}
        self.text_encoders: tuple[TextEncoder, ...] = (
            TextEncoder("text_encoder", self.tokenizer, self.text_encoder, self._spell),
        )

    def _spell(self, prompt: str) -> str:
        """Write out words of several vectors that the pipeline has loaded."""
        spelled: str = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)
        return spelled

    def new_scheduler(self, spec: Any) -> Any:
        """A fresh scheduler: the model's own where `spec` is None; see `schedulers.new`."""
        return schedulers.new(spec, self.scheduler)

    def describe_scheduler(self, spec: Any) -> str | dict[str, Any]:
        """A scheduler as a run file holds it: its name, and what differs from the model's."""
        return schedulers.describe(spec, self.scheduler)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, H, W) for a size in pixels.

        Raises:
            InputError: the size is no multiple of the VAE's factor.
        """
        own = self.unet.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        sides = []
        for name, pixels, default in (("height", height, own_height), ("width", width, own_width)):
            if pixels is not None and pixels % self.factor:
                below = pixels // self.factor * self.factor
                raise InputError(
                    f"{name} must be a multiple of {self.factor}, the VAE's factor; got {pixels}. "
                    f"Nearest: {max(below, self.factor)} or {below + self.factor}"
                )
            sides.append(default if pixels is None else pixels // self.factor)
        return int(self.unet.config.in_channels), sides[0], sides[1]

    def condition(self, embeddings: list[Embedding]) -> Conditioning:
        """The encoder's output in the network's number format."""
        return Conditioning(embeddings[0].values.to(self.dtype))

    def predict(self, latents: Tensor, timestep: Any, conditioning: Conditioning) -> Tensor:
        """The UNet's output."""
        output: Tensor = self.unet(
            latents, timestep, encoder_hidden_states=conditioning.values, return_dict=False
        )[0]
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents -> image (B, 3, 8H, 8W), at least float32, in [0, 1] but not clamped."""
        scaled = latents.to(decoders.dtype_of(self.vae)) / self.vae.config.scaling_factor
        image: Tensor = self.vae.decode(scaled, return_dict=False)[0]  # (B, 3, 8H, 8W)
        result: Tensor = at_least_float32(image) / 2 + 0.5
        return result

    def decode_float32(self, latents: Tensor) -> Tensor:
        """As `decode`, with the VAE in float32: half precision can overflow there."""
        dtype = self.vae.dtype
        self.vae.to(torch.float32)
        try:
            return self.decode(latents.float())
        finally:
            self.vae.to(dtype)  # exact: float32 holds every half-precision number

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """`decode`, or what stands in for it where guides look; see `Run.decoder`.

        Raises:
            InputError, ModelError: see `decoders`.
        """
        kind, _, place = name.partition(":")
        if kind != "tiny":
            return self.decode if kind == "vae" else self._enlarged_rgb
        target = decoders.locate_tiny(place, self.folder)
        if target not in self._tinies:
            channels = int(self.unet.config.in_channels)
            tiny = decoders.load_tiny(target, channels, self.factor, self.dtype)
            self._tinies[target] = tiny.to(self.device)
        return partial(decoders.decode_tiny, self._tinies[target])

    def _enlarged_rgb(self, latents: Tensor) -> Tensor:
        return decoders.enlarged(self.rgb(latents), self.factor)

    def encode(self, image: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        """Image (B, 3, 8H, 8W) in [0, 1] -> clean latents: the mean of the VAE's posterior.

        Args:
            generator: draws from the posterior instead; of one picture as many latents as there are
                generators.
        """
        scaled = (image * 2 - 1).to(self.device, self.vae.dtype)
        posterior = self.vae.encode(scaled).latent_dist
        draws = [posterior.sample(g) for g in generator or ()]
        unscaled = torch.cat(draws) if draws else posterior.mean
        latents: Tensor = unscaled * self.vae.config.scaling_factor
        return latents

    def rgb(self, latents: Tensor) -> Tensor:
        """Linear estimate of the colours at latent size (B, 3, H, W), float32."""
        matrix = self._rgb_matrix.to(latents.device)
        linear = torch.einsum("bchw,cr->brhw", latents.float(), matrix[:-1])
        return linear + matrix[-1].view(1, 3, 1, 1)

    @cached_property
    @torch.no_grad()
    def _rgb_matrix(self) -> Tensor:
        """(C + 1, 3): least squares from latents (and 1) to average-pooled pixels.

        Fitted once per VAE on smooth random colour fields, so that it needs no pictures.
        """
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(24, 3, 4, 4, generator=generator)
        size = 16 * self.factor
        image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        latents = self.encode(image.clamp(0, 1)).float().cpu()
        pooled = torch.nn.functional.avg_pool2d(image, self.factor)
        columns = latents.movedim(1, -1).flatten(0, 2)  # (pixels, C)
        columns = torch.cat([columns, torch.ones(len(columns), 1)], dim=1)
        colors = pooled.movedim(1, -1).flatten(0, 2)
        # A little ridge: latents are of size one, and an untrained VAE's carry next to nothing.
        ridge = 1e-3 * len(columns) * torch.eye(columns.shape[1])
        ridge[-1, -1] = 0
        matrix: Tensor = torch.linalg.solve(columns.T @ columns + ridge, columns.T @ colors)
        return matrix.to(self.device)  # once, not at every step

    def differentiable(self, checkpointing: str) -> contextlib.AbstractContextManager[None]:
        """UNet and VAE frozen, and checkpointed if asked, each time the context is entered."""
        networks = (self.unet, self.vae)
        parameters = [list(network.parameters()) for network in networks]
        big = [sum(p.numel() for p in ps) > AUTO_CHECKPOINTING_PARAMETERS for ps in parameters]
        chosen = {"on": networks, "auto": itertools.compress(networks, big), "off": ()}
        layers = [layer for network in chosen[checkpointing] for layer in parts(network)]
        return _Differentiable([*itertools.chain(*parameters)], layers)

    def refuse_gradients(self) -> str | None:
        """CPU offloading moves weights between forward and backward: no gradient survives it."""
        for module in (*self.unet.modules(), *self.vae.modules()):
            hook = getattr(module, "_hf_hook", None)
            if getattr(hook, "offload", False) or type(hook).__name__ == "CpuOffload":
                return (
                    "the pipeline offloads its networks to the CPU, which moves weights between "
                    "forward and backward. Call pipeline.remove_all_hooks() and move it to one "
                    "device to use guides."
                )
        return None


class _Differentiable(contextlib.AbstractContextManager[None]):
    """No parameter asks for a gradient, and layers are checkpointed, while the context lasts.

    It is entered at every step, so what it needs is looked up once: to walk through the modules of
    a network takes milliseconds.
    """

    def __init__(self, parameters: list[Tensor], layers: list[Any]) -> None:
        self._parameters, self._layers = parameters, layers

    def __enter__(self) -> None:
        with contextlib.ExitStack() as undo:
            undo.enter_context(checkpointed(self._layers))
            for parameter in [p for p in self._parameters if p.requires_grad]:
                parameter.requires_grad_(False)
                undo.callback(parameter.requires_grad_, True)
            self._undo = undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self._undo.close()
