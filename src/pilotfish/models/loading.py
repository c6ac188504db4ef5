"""A model's networks by name: where they lie, on which device they go, in which number format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import InputError, ModelError, PluginError, is_out_of_memory, told
from ..hooks import registry
from .hub import load_config
from .places import check_offload, dtype_name, find_family, locate
from .protocol import LatentDiffusion
from .schedulers import diffusers
from .single_file import Checkpoint
from .weights import broken_file, check_index, load_networks

import transformers  # isort: skip  # after torchvision is mended

# Those options of `from_pretrained` that say where to find a model.
PLACE = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def load(
    model: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    config: str | Path | None = None,
    offload: str | None = None,
    **options: Any,
) -> LatentDiffusion:
    """Load the networks; see `pilotfish.load`."""
    check_offload(offload)
    device, target, number_format = parse_device(device), locate(model), parse_dtype(dtype)
    name, single = str(model or target), os.path.isfile(target)
    if config is not None and not single:
        raise InputError(f"config goes with one file of a whole checkpoint; {name} is none")
    source = None if config is None else locate(config)
    with _quiet():
        try:
            # The model's index alone: what cannot be used is not downloaded.
            place = {key: options[key] for key in PLACE if key in options}
            if single:
                checkpoint = Checkpoint.of(target)
                index = checkpoint.index(source, **place)
            else:
                index = load_config(diffusers.DiffusionPipeline, target, **place)
            kind = index.get("_class_name", "") if isinstance(index, Mapping) else ""
            family = family_of(str(kind), f"model {name!r}")
            # diffusers must be told of what a model does without, such as the T5 of SD3.
            without = [n for n in getattr(family, "optional", ()) if index.get(n) == [None, None]]
            options = {**dict.fromkeys(without), **family.pipeline_options, **options}
            if single:
                source = source or checkpoint.usual
                pipeline = checkpoint.pipeline(source, index, number_format, options)
            else:
                pipeline = _of_folder(target, index, number_format, options)
            pipeline.set_progress_bar_config(disable=True)
            if offload is None:
                pipeline.to(device)
            for part_name, part in pipeline.components.items() if offload else ():
                if isinstance(part, nn.Module) and not part_name.startswith("text_encoder"):
                    part.to(device)
            loaded = adapt(pipeline, str(model) if model else "emoji", offload)
        except Exception as error:  # whatever libraries make of a broken folder
            if isinstance(error, PluginError) or is_out_of_memory(error):
                raise
            plain = isinstance(error, OSError | ValueError | ModelError)
            raise ModelError(
                f"cannot load the model {name!r}: {error if plain else told(error)}"
            ) from error
    loaded.config = None if config is None else str(config)
    return loaded


def _of_folder(
    target: str, index: Mapping[str, Any], dtype: torch.dtype, options: Mapping[str, Any]
) -> Any:
    """The pipeline of a folder or hub id."""
    kind, folder = diffusers.DiffusionPipeline, Path(target)
    if not folder.is_dir():
        folder = Path(kind.download(target, **options))
    check_index(folder, index, options)
    parts = load_networks(folder, index, dtype, options)
    try:
        return kind.from_pretrained(str(folder), **{"dtype": dtype, **options, **parts})
    except Exception as error:
        if (file := broken_file(folder)) is None:
            raise
        raise ModelError(f"the {file.parent.name} cannot be read: {file} is no JSON") from error


def adapt(pipeline: Any, id: str | None = None, offload: str | None = None) -> LatentDiffusion:
    """The networks of a pipeline as the engine uses them.

    Raises:
        InputError: `offload` is neither None nor "text".
        ModelError: no family takes pipelines of this kind, or it refuses this one.
    """
    check_offload(offload)
    known = registry.installed(registry.FAMILY_GROUP)
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    name = next((name for name in names if name in known), names[0])
    adapted: Any = family_of(name, "this pipeline")(pipeline, id)
    if offload:
        if adapted.offloads:
            raise ModelError("offload='text': hooks of the pipeline offload its networks already")
        for encoder in adapted.text_encoders:
            encoder.network.to("cpu")
        adapted.offload = offload  # from the next run on
    return cast("LatentDiffusion", adapted)


def family_of(name: str, owner: str) -> Any:
    """The adapter for pipelines of that class name; see `find_family`."""
    return registry.load_object(find_family(name, owner).target, f"family {name}")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A number format from its name; see `dtype_name`."""
    return cast("torch.dtype", getattr(torch, dtype_name(dtype)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from diffusers and transformers; downloads keep their bars."""
    with contextlib.ExitStack() as afterwards:
        for log in (diffusers.utils.logging, transformers.utils.logging):
            afterwards.callback(log.set_verbosity, log.get_verbosity())
            if log.is_progress_bar_enabled():
                afterwards.callback(log.enable_progress_bar)
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device from its name; None is the accelerator that there is, or the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)  # a driver says only now that it has no such device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"no device {str(device)!r} here; expected cpu, cuda, cuda:1 or mps. "
            "`pilotfish doctor` lists what there is."
        ) from error
    return parsed
