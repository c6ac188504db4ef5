"""What the families that diffusers has a pipeline for have in common."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError
from ..guidance.noise import at_least_float32, draw
from . import decoders, places, schedulers
from .checkpointing import checkpoint_layers
from .copies import float32, has_hooks, offload_hook, own_copy
from .fingerprint import Fingerprint
from .protocol import Again, Defaults, Generators, TextEncoder
from .schedulers import diffusers
from .text import ClipText


class PipelineFamily:
    """A model in a pipeline of diffusers.

    Args:
        pipeline: its networks are used as they are when a run begins, with LoRAs and textual
            inversions, and are not changed.
        id: the folder or hub id it came from.

    Attributes:
        pipeline_class: the name of diffusers' class.
        network: the name of the part that predicts.
        pipeline_options: what its `from_pretrained` shall be told.
        optional: parts that it may do without.
        upcasts: whether the pipeline runs a half-precision VAE in float32 where that asks for it.
        cells: how many of the VAE's cells are one of the latents, along a side.
        offload: "text" where the text encoders wait on the CPU.
        folder: the pipeline's own, if any; a plugin may find there what was trained with it.

    Raises:
        ModelError: the pipeline is of another kind, or its parts do not fit together.
    """

    pipeline_class: ClassVar[str]
    network: ClassVar[str] = "transformer"
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    optional: ClassVar[frozenset[str]] = frozenset({"image_encoder", "feature_extractor"})
    upcasts: ClassVar[bool] = False
    cells: ClassVar[int] = 1
    guidance = frozenset({"cfg"})
    together, masked = True, False
    config: str | None = None
    offload: str | None = None
    vae: Any

    def __init__(self, pipeline: Any, id: str | None = None) -> None:
        self._pipeline, self.id = pipeline, id
        origin = getattr(pipeline, "name_or_path", None)  # None if it was put together in Python
        self.folder = Path(origin) if origin and Path(origin).is_dir() else None
        self._made: dict[Any, Any] = {}  # from these networks, for all runs
        self.fingerprint = Fingerprint(pipeline)
        self._read()

    # ---- what a family says of itself ----

    def _problem(self, pipeline: Any) -> str | None:
        """Why the pipeline's parts are no model that a prompt alone can drive; or None."""
        return None

    def _encoders(self) -> Sequence[TextEncoder]:
        """The text encoders, over the networks as they are now."""
        raise NotImplementedError

    def _spell(self, tokenizer: Any, prompt: str) -> str:
        """Write out words of several vectors that the pipeline has loaded."""
        loader = diffusers.loaders.TextualInversionLoaderMixin()
        return str(loader.maybe_convert_prompt(prompt, tokenizer))

    def _clip(self, suffix: str = "", layer: int | None = None) -> ClipText:
        """One of the pipeline's text encoders: "", "_2" ..."""
        tokenizer = getattr(self._pipeline, f"tokenizer{suffix}")
        name = f"text_encoder{suffix}"
        return ClipText(
            name, tokenizer, getattr(self, name), partial(self._spell, tokenizer), layer
        )

    @property
    def _channels(self) -> int:
        """Of the latents."""
        return int(self.denoiser.config.in_channels)

    @property
    def _multiple(self) -> int:
        """What a size in pixels must be a multiple of."""
        return self.factor

    @property
    def _side(self) -> int | Sequence[int]:
        """The usual size, in cells of the latents."""
        side: int | Sequence[int] = self.denoiser.config.sample_size
        return side

    # ---- the pipeline's parts ----

    def _read(self) -> None:
        """Take the pipeline's parts as they are now."""
        pipeline = self._pipeline
        self._refuse()
        parts = {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}
        vars(self).update(parts)
        self._networks = list(parts)
        self.scheduler = pipeline.scheduler
        self.device = next(self.denoiser.parameters()).device
        if self.device.type in ("cpu", "meta") and any(map(has_hooks, parts.values())):
            self.device = torch.device(pipeline._execution_device)  # where weights wait for a call
        self.dtype = decoders.dtype_of(self.denoiser)
        self.factor = int(pipeline.vae_scale_factor) * self.cells
        self.offloads = any(map(offload_hook, parts.values()))
        if self.upcasts and self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae = self._vae_float32()
        sides = (self._side, self._side) if isinstance(self._side, int) else self._side
        self.defaults = Defaults.of(pipeline, self.folder, *(int(s) * self.factor for s in sides))
        self.size = self.defaults.height, self.defaults.width
        self.text_encoders = self._text()

    def _text(self) -> Sequence[TextEncoder]:
        return [replace(e, waits=self.offload == "text") for e in cast("Any", self._encoders())]

    def _refuse(self) -> None:
        pipeline = self._pipeline
        kind = getattr(diffusers, self.pipeline_class)
        if not isinstance(pipeline, kind):
            raise ModelError(f"expected a {kind.__name__}; got {type(pipeline).__name__}")
        parts = pipeline.components
        if missing := [n for n, p in parts.items() if p is None and n not in self.optional]:
            raise ModelError(f"the pipeline has no {' and no '.join(missing)}")
        if problem := self._problem(pipeline):
            raise ModelError(problem)
        ours = decoders.dtype_of(parts[self.network])
        for name, part in parts.items():
            if not name.startswith("text_encoder") or part is None:
                continue
            if (theirs := decoders.dtype_of(part)) != ours:
                raise ModelError(
                    f"the {self.network} is in {ours} and the {name} in {theirs}; they must be in "
                    "one number format: pipeline.to(torch.bfloat16), say"
                )

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of the latents: mostly the network's own."""
        return self.dtype

    @property
    def denoiser(self) -> Any:
        """The network that predicts."""
        return getattr(self, self.network)

    def pipeline(self) -> Any:
        """A pipeline of diffusers over these networks, for its loaders; see `LatentDiffusion`."""
        pipeline = copy.copy(self._pipeline)
        vars(pipeline).update({name: getattr(self, name) for name in self._networks})
        return pipeline

    def differentiable(self, checkpointing: str, again: Again | None = nullcontext) -> Self:
        """The model as the pipeline is now, on copies of its networks; see `LatentDiffusion`."""
        model = copy.copy(self)
        model._read()
        if again is None:
            return model
        for name in model._networks:
            setattr(model, name, own_copy(getattr(model, name)))
        model.text_encoders = model._text()
        if not model.refuse_gradients():
            for network in (model.denoiser, model.vae):
                checkpoint_layers(network, checkpointing, again)
        return model

    def refuse_gradients(self) -> str | None:
        """CPU offloading moves weights between forward and backward: no gradient survives it."""
        if self.offloads:
            return (
                "the pipeline offloads its networks to the CPU, which moves weights between "
                "forward and backward. Call pipeline.remove_all_hooks() and move it to one "
                "device to use guides."
            )
        return None

    # ---- schedule, size, noise ----

    def new_scheduler(self, spec: Any) -> Any:
        """A fresh scheduler: the model's own where `spec` is None; see `schedulers.new`."""
        return schedulers.new(spec, self.scheduler)

    def describe_scheduler(self, spec: Any) -> str | dict[str, Any]:
        """A scheduler as a run file holds it: its name, and what differs from the model's."""
        return schedulers.describe(spec, self.scheduler)

    def set_timesteps(self, scheduler: Any, steps: int, shape: Sequence[int]) -> None:
        """The scheduler's own choice; shifted by the size where it asks for that."""
        own = self._sigmas(steps, scheduler.config)
        options: dict[str, Any] = {"num_inference_steps": steps}
        if own is not None and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            options = {"sigmas": own}
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self._shift(scheduler.config, steps, shape)
        scheduler.set_timesteps(device=self.device, **options)

    def _sigmas(self, steps: int, config: Mapping[str, Any]) -> Any:
        """The levels that the pipeline asks the scheduler for; None are the scheduler's own."""
        return None

    def _shift(self, config: Mapping[str, Any], steps: int, shape: Sequence[int]) -> float:
        """`mu` for latents (C, H, W), of which two by two cells are a token."""
        return schedulers.linear_shift(config, (shape[1] // 2) * (shape[2] // 2))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) for a size in pixels.

        Raises:
            InputError: the size is no multiple of what it must be.
        """
        multiple = self._multiple
        for name, pixels in (("height", height), ("width", width)):
            if pixels % multiple:
                below = pixels // multiple * multiple
                raise InputError(
                    f"{name} must be a multiple of {multiple} for this model; got {pixels}. "
                    f"Nearest: {max(below, multiple)} or {below + multiple}"
                )
        return self._channels, height // self.factor, width // self.factor

    def noise(self, shape: Sequence[int], generators: Generators, dtype: torch.dtype) -> Tensor:
        """Noise (B, C, H, W) on the CPU."""
        return draw(shape, generators, dtype)

    # ---- classifier-free guidance ----

    def cfg_scale(self, run: Any) -> float | None:
        """`guidance_scale` above 1, as diffusers has it."""
        scale: float = run.guidance_scale
        return scale if scale > 1 else None

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Ho & Salimans 2022, arXiv 2207.12598, in diffusers' convention."""
        return uncond + scale * (cond - uncond)

    # ---- pictures ----

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents -> image (B, 3, 8H, 8W), at least float32, in [0, 1] but not clamped."""
        return self._decoded(self.vae, latents)

    def decode_float32(self, latents: Tensor) -> Tensor:
        """As `decode`, with the VAE in float32: half precision can overflow there."""
        return self._decoded(self._vae_float32(), latents)

    def _decoded(self, vae: Any, latents: Tensor) -> Tensor:
        scaled = self._to_vae(latents.to(decoders.dtype_of(vae)))
        return at_least_float32(self._picture(vae.decode(scaled, return_dict=False)[0])) / 2 + 0.5

    def _vae_float32(self) -> Any:
        return float32(self._pipeline.vae, self._made)

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """`decode`, or what stands in for it where guides look; see `Run.decoder`.

        Raises:
            InputError, ModelError: see `decoders`.
        """
        kind, _, place = name.partition(":")
        if kind != "tiny":
            return self.decode if kind == "vae" else self._enlarged_rgb
        target = places.locate_tiny(place, self.folder)
        if target not in self._made:
            tiny = decoders.load_tiny(target, self._channels, self.factor, self.dtype)
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
        image = self._film(image.to(self.device) * 2 - 1)
        dtype = decoders.dtype_of(self.vae)
        # Whose pipeline upcasts encodes in float32 even where it decodes in bfloat16.
        upcast = self.upcasts and dtype != torch.float32 and self.vae.config.force_upcast
        vae = self._vae_float32() if upcast else self.vae
        posterior = vae.encode(image.to(dtype).to(decoders.dtype_of(vae))).latent_dist
        if dtype == torch.float16 and not posterior.parameters.isfinite().all():
            posterior = self._vae_float32().encode(image.float()).latent_dist
        draws = [posterior.sample(g) for g in generator or ()]
        encoded = torch.cat(draws) if draws else posterior.mean
        return self._from_vae(encoded.to(dtype) if upcast else encoded)

    def rgb(self, latents: Tensor) -> Tensor:
        """Linear estimate of the colours at latent size (B, 3, H, W), float32."""
        key = "rgb", id(self._pipeline.vae), self.vae.dtype
        if key not in self._made:
            self._made[key] = decoders.fit_rgb(self.encode, self.factor).to(self.device)
        return decoders.linear(self._made[key], latents)

    def _to_vae(self, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them."""
        config = self.vae.config
        if self._has_moments:
            mean, std = self._moments(latents)
            return latents.mul(std).div(config.scaling_factor).add(mean)
        return latents.div(config.scaling_factor).add(config.shift_factor or 0)

    def _from_vae(self, encoded: Tensor) -> Tensor:
        """What the encoder gives, as latents: `_to_vae` backwards."""
        config = self.vae.config
        if self._has_moments:
            mean, std = self._moments(encoded)
            return encoded.sub(mean).mul(config.scaling_factor).div(std)
        return encoded.sub(config.shift_factor or 0).mul(config.scaling_factor)

    def _film(self, image: Tensor) -> Tensor:
        """A picture as the VAE's encoder takes it."""
        return image

    def _picture(self, decoded: Tensor) -> Tensor:
        """The picture in what the VAE's decoder gives."""
        return decoded

    @property
    def _has_moments(self) -> bool:
        config = self.vae.config
        return None not in (config.get("latents_mean"), config.get("latents_std"))

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (C, 1, 1), of a VAE that has them."""
        found = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (torch.tensor(values).view(-1, 1, 1).to(like) for values in found)
        return mean, std
