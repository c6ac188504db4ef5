"""A model's networks by name: where they lie, on which device they go, in which number format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, ModelError, unknown
from ..hooks import registry
from .stable_diffusion import StableDiffusion

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> StableDiffusion:
    """Load the networks; see `pilotfish.load`."""
    import diffusers  # `model` has mended torchvision by now

    device, target, number_format = parse_device(device), locate(model), parse_dtype(dtype)
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            target,
            dtype=number_format,
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
    import diffusers
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
