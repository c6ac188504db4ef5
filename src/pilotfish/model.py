"""The networks of a latent diffusion model; the only module that knows diffusers and transformers.

`StableDiffusion` is the adapter for Stable Diffusion 1.x and 2.x. The sampler needs of an adapter
what `LatentDiffusion` lists, so another family is another adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import registry
from .errors import InputError, ModelError, unknown
from .noise import at_least_float32
from .text import Conditioning, Embedding, TextEncoder
from .torchvision_fakes import mend_torchvision

mend_torchvision()

import diffusers  # noqa: E402  # after the declaration, because it imports torchvision
from diffusers.loaders import TextualInversionLoaderMixin  # noqa: E402
from diffusers.schedulers import KarrasDiffusionSchedulers  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, 8H, 8W) in [0, 1] -> clean latents."""

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
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.scheduler = pipeline.scheduler
        self.id = id
        origin = pipeline.name_or_path  # None where the pipeline was put together in Python
        self.folder = Path(origin) if origin and Path(origin).is_dir() else None
        self.device = torch.device(pipeline._execution_device)
        self.dtype = self.text_encoder.dtype
        self.factor = int(pipeline.vae_scale_factor)
        self.text_encoders: tuple[TextEncoder, ...] = (
            TextEncoder("text_encoder", self.tokenizer, self.text_encoder, self._spell),
        )

    def _spell(self, prompt: str) -> str:
        """Write out words of several vectors that the pipeline has loaded."""
        spelled: str = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)
        return spelled

    def new_scheduler(self, spec: Any) -> Any:
        """A fresh scheduler, made from a configuration; nothing is shared with another run.

        Args:
            spec: None for the model's own, a short name ("lms"), a class name, a diffusers
                scheduler, or a mapping with `name` and configuration.

        Raises:
            InputError: there is no such scheduler, or its own package is missing.
        """
        if spec is None:
            return type(self.scheduler).from_config(self.scheduler.config)
        if isinstance(spec, str | Mapping):
            config = {"name": spec} if isinstance(spec, str) else dict(spec)
            scheduler = scheduler_class(config.pop("name", ""))
            if "clip_sample" in inspect.signature(scheduler).parameters:
                # Some schedulers clip where the model's configuration is silent; latents never are.
                config.setdefault("clip_sample", self.scheduler.config.get("clip_sample", False))
            return scheduler.from_config(self.scheduler.config, **config)
        if isinstance(spec, diffusers.SchedulerMixin):
            return type(spec).from_config(spec.config)
        raise InputError(f"scheduler must be a name or a diffusers scheduler; got {spec!r}")

    def describe_scheduler(self, spec: Any) -> str | dict[str, Any]:
        """A scheduler as a run file holds it: its name, and what differs from the model's."""
        if spec is None:
            return short_name(type(self.scheduler).__name__)
        if isinstance(spec, str):
            return short_name(scheduler_class(spec).__name__)
        scheduler = self.new_scheduler(spec)
        name = short_name(type(scheduler).__name__)
        if isinstance(spec, Mapping):
            return {**spec, "name": name}
        usual = type(scheduler).from_config(self.scheduler.config).config
        changed = {
            key: value
            for key, value in scheduler.config.items()
            if value != usual.get(key) and not key.startswith("_")
        }
        return {"name": name, **changed} if changed else name

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
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
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

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, 8H, 8W) in [0, 1] -> clean latents: the mean of the VAE's posterior."""
        scaled = (image * 2 - 1).to(self.device, self.vae.dtype)
        latents: Tensor = self.vae.encode(scaled).latent_dist.mean * self.vae.config.scaling_factor
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
        return matrix

    def differentiable(self, checkpointing: str) -> contextlib.AbstractContextManager[None]:
        """UNet and VAE frozen, and checkpointed if asked, each time the context is entered."""
        networks = (self.unet, self.vae)
        parameters = [list(network.parameters()) for network in networks]
        big = [sum(p.numel() for p in ps) > AUTO_CHECKPOINTING_PARAMETERS for ps in parameters]
        chosen = {"on": networks, "auto": itertools.compress(networks, big), "off": ()}
        return _Differentiable([*itertools.chain(*parameters)], tuple(chosen[checkpointing]))

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
    """No parameter asks for a gradient, and networks are checkpointed, while the context lasts.

    It is entered at every step, so what it needs is looked up once: to walk through the modules of
    a network takes milliseconds.
    """

    def __init__(self, parameters: list[Tensor], checkpointed: Sequence[Any]) -> None:
        self._parameters, self._checkpointed = parameters, checkpointed

    def __enter__(self) -> None:
        with contextlib.ExitStack() as undo:
            for network in self._checkpointed:
                undo.enter_context(_checkpointed(network))
            for parameter in [p for p in self._parameters if p.requires_grad]:
                parameter.requires_grad_(False)
                undo.callback(parameter.requires_grad_, True)
            self._undo = undo.pop_all()

    def __exit__(self, *_: object) -> None:
        self._undo.close()


@contextlib.contextmanager
def _checkpointed(network: Any) -> Iterator[None]:
    """Gradient checkpointing on while the context lasts, then as it was."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    modules = [m for m in network.modules() if hasattr(m, names[0])]
    before = [{name: vars(m)[name] for name in names if name in vars(m)} for m in modules]
    network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(own)


def short_name(class_name: str) -> str:
    """A scheduler's name here: `EulerAncestralDiscreteScheduler` -> `euler-ancestral`."""
    name = re.sub("Scheduler|Discrete", "", class_name)
    return re.sub("(?<=.)(?=Multistep|Singlestep|Ancestral|SDE|Euler)", "-", name).lower()


def schedulers() -> dict[str, type[Any]]:
    """Every scheduler that `StableDiffusionPipeline` accepts and that can be used here, by name."""
    classes = [getattr(diffusers, member.name) for member in KarrasDiffusionSchedulers]
    # Where a scheduler's own package is missing, diffusers puts a stand-in that is no scheduler.
    return {short_name(c.__name__): c for c in classes if issubclass(c, diffusers.SchedulerMixin)}


def scheduler_class(name: str) -> type[Any]:
    """The scheduler of that short or class name, or of that unmistakable beginning.

    Raises:
        InputError: there is none, with the nearest name and all choices.
    """
    choices = schedulers()
    wanted = _letters(name)
    exact = [c for c in choices if _letters(c) == wanted]
    found = exact or [c for c in choices if wanted and _letters(c).startswith(wanted)]
    if len(found) != 1:
        raise unknown("scheduler", name, choices)
    return choices[found[0]]


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]|scheduler|discrete", "", name.lower())


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> StableDiffusion:
    """Load the networks; see `pilotfish.load`."""
    device = parse_device(device)
    target = locate(model)
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            target,
            dtype=parse_dtype(dtype),
            safety_checker=None,
            requires_safety_checker=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {str(model or target)!r}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    networks = StableDiffusion(pipeline.to(device), id=str(model) if model else "emoji")
    for network in (networks.unet, networks.vae, networks.text_encoder):
        network.requires_grad_(False)
    return networks


def locate(model: str | Path | None) -> str:
    """A folder or hub id: the one given, or an installed model's folder (default: "emoji").

    Raises:
        InputError: no model was named and the one that ships is not installed.
    """
    name = "emoji" if model is None else str(model)
    if name in registry.installed(registry.MODEL_GROUP):
        entry = registry.find(name, registry.MODEL_GROUP)
        return str(registry.load_object(entry.target, f"model {name!r}"))
    if model is None:
        raise InputError(
            "the model that ships is not installed: pip install pilotfish-emoji "
            "(or name another one: a diffusers folder or a hub id)"
        )
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise InputError(f"no model folder {name}; expected a folder in the diffusers layout")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A number format from its name; None is float32."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype}")
    return dtype


def quiet() -> None:
    """For programs: no bars and no advice from diffusers and transformers while they load.

    Downloads, which take long, keep their bars.
    """
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device from its name; None is the best there is.

    Raises:
        InputError: there is no such device here.
    """
    if device is None:
        return _best_device()
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)  # a driver says only now that it has no such device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"no device {str(device)!r} here; expected cpu, cuda, cuda:1 or mps. "
            "`pilotfish doctor` lists what there is."
        ) from error
    return parsed


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
