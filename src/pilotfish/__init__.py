"""Plugin-based guidance and conditioning for latent diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    DefinitionError,
    GuideWarning,
    InputError,
    ModelError,
    NonFiniteError,
    OutOfMemoryError,
    PilotfishError,
    PluginError,
    SettingsError,
)
from .guidance.presets import PRESETS, Preset, find_preset
from .hooks.area import Area
from .hooks.plugin import Guide, Plugin, Setting, guide
from .hooks.specs import hookimpl
from .hooks.strength import Strength, strength_at

if TYPE_CHECKING:
    from .cli.changes import changed, with_value
    from .cli.listing import installed_plugins, value_text
    from .cli.places import save_new
    from .cli.trust import foreign_run, offline
    from .cli.wording import takes
    from .guidance.cutouts import cutouts
    from .guidance.noise import NoiseLevel, at_least_float32, draw
    from .hooks.registry import load_class
    from .hooks.use import parse_value, split_values
    from .models.protocol import Conditioning, Embedding
    from .models.torchvision import mend_torchvision
    from .runs.metadata import read_run
    from .runs.pictures import (
        area_weights,
        check_folder,
        check_writable,
        is_finite,
        pixels,
        read_picture,
        save_picture,
        to_pil,
        whole_file,
    )
    from .runs.run import Run
    from .sampling.outside import keep_outside
    from .sampling.sampler import Result, Sampler, Stream
    from .sampling.schedule import Schedule, Start
    from .sampling.step import Step
    from .sampling.trace import Record, Trace

__all__ = [
    "PRESETS",
    "Area",
    "Conditioning",
    "DefinitionError",
    "Embedding",
    "Guide",
    "GuideWarning",
    "InputError",
    "ModelError",
    "NoiseLevel",
    "NonFiniteError",
    "OutOfMemoryError",
    "PilotfishError",
    "Plugin",
    "PluginError",
    "Preset",
    "Record",
    "Result",
    "Run",
    "Sampler",
    "Schedule",
    "Setting",
    "SettingsError",
    "Start",
    "Step",
    "Stream",
    "Strength",
    "Trace",
    "area_weights",
    "at_least_float32",
    "changed",
    "check_folder",
    "check_writable",
    "cutouts",
    "draw",
    "find_preset",
    "foreign_run",
    "guide",
    "hookimpl",
    "installed_plugins",
    "is_finite",
    "keep_outside",
    "load",
    "load_class",
    "make_plugin",
    "mend_torchvision",
    "offline",
    "parse_value",
    "pixels",
    "read_picture",
    "read_run",
    "save_new",
    "save_picture",
    "split_values",
    "strength_at",
    "takes",
    "to_pil",
    "value_text",
    "whole_file",
    "with_value",
]

# Loaded when they are asked for, so that `pilotfish --help` needs no torch.
_LAZY = {
    "Conditioning": "models.protocol",
    "Embedding": "models.protocol",
    "NoiseLevel": "guidance.noise",
    "Record": "sampling.trace",
    "Result": "sampling.sampler",
    "Run": "runs.run",
    "Sampler": "sampling.sampler",
    "Schedule": "sampling.schedule",
    "Start": "sampling.schedule",
    "Step": "sampling.step",
    "Stream": "sampling.sampler",
    "Trace": "sampling.trace",
    "area_weights": "runs.pictures",
    "cutouts": "guidance.cutouts",
    "changed": "cli.changes",
    "check_folder": "runs.pictures",
    "check_writable": "runs.pictures",
    "at_least_float32": "guidance.noise",
    "draw": "guidance.noise",
    "is_finite": "runs.pictures",
    "keep_outside": "sampling.outside",
    "mend_torchvision": "models.torchvision",
    "pixels": "runs.pictures",
    "read_picture": "runs.pictures",
    "save_picture": "runs.pictures",
    "split_values": "hooks.use",
    "to_pil": "runs.pictures",
    "whole_file": "runs.pictures",
    "with_value": "cli.changes",
    "installed_plugins": "cli.listing",
    "value_text": "cli.listing",
    "parse_value": "hooks.use",
    "load_class": "hooks.registry",
    "read_run": "runs.metadata",
    "foreign_run": "cli.trust",
    "offline": "cli.trust",
    "save_new": "cli.places",
    "takes": "cli.wording",
}


def load(
    model: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    config: Any = None,
    offload: str | None = None,
    **options: Any,
) -> Sampler:
    """A sampler for a model.

    Args:
        model: a folder in the diffusers layout, a hub id, an installed model's name, or one
            .safetensors file of a whole checkpoint; None is the emoji model that ships.
        device: None is the accelerator that torch has here (CUDA, MPS ...), or the CPU.
        dtype: torch.float32 (None), float16 or bfloat16, or its name.
        config: of one file: the folder or hub id of a model with its configuration and tokenizers,
            and with the text encoders and VAE that the file lacks; None downloads what diffusers
            has for its layout.
        offload: "text": text encoders stay on the CPU, and are on the device only while a run's
            prompts are encoded, on copies that end with that.
        options: passed on to the pipeline's `from_pretrained` (`variant`, `revision`) or
            `from_single_file`. With a `quantization_config`, what is missing is not looked for.

    Raises:
        InputError: the model, its folder or the dtype does not exist.
        ModelError: the model cannot be loaded, or no model family takes it.
    """
    from .models import loading
    from .sampling.sampler import Sampler

    how = {"device": device, "dtype": dtype, "config": config, "offload": offload}
    return Sampler(loading.load(model, **how, **options))


def make_plugin(item: Any) -> Any:
    """The plugin that an item of a run's `plugins` names: `"blue:scale=2"`, or a table.

    Raises:
        InputError, SettingsError, PluginError: nothing is named so, or it cannot be made.
    """
    from .hooks.registry import resolve

    return resolve(item).plugin


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module 'pilotfish' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
