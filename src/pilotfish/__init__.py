"""Plugin-based guidance and conditioning for latent diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    InputError,
    ModelError,
    NonFiniteError,
    PilotfishError,
    PluginError,
    SettingsError,
)
from .guidance.presets import PRESETS, Preset
from .hooks.plugin import Guide, Plugin, Setting, guide
from .hooks.specs import hookimpl

if TYPE_CHECKING:
    from . import view
    from .models.text import Embedding
    from .models.torchvision import mend_torchvision
    from .runs.pictures import pixels, read_picture
    from .runs.run import Run
    from .sampling.generators import draw
    from .sampling.sampler import Result, Sampler, Stream
    from .sampling.start import Start
    from .sampling.step import Step
    from .sampling.trace import Record, Trace

__all__ = [
    "PRESETS",
    "Embedding",
    "Guide",
    "InputError",
    "ModelError",
    "NonFiniteError",
    "PilotfishError",
    "Plugin",
    "PluginError",
    "Preset",
    "Record",
    "Result",
    "Run",
    "Sampler",
    "Setting",
    "SettingsError",
    "Start",
    "Step",
    "Stream",
    "Trace",
    "draw",
    "guide",
    "hookimpl",
    "load",
    "make_plugin",
    "mend_torchvision",
    "pixels",
    "read_picture",
    "view",
]

# Loaded when they are asked for, so that `pilotfish --help` needs no torch.
_LAZY = {
    "Embedding": "models.text",
    "Record": "sampling.trace",
    "Result": "sampling.sampler",
    "Run": "runs.run",
    "Sampler": "sampling.sampler",
    "Start": "sampling.start",
    "Step": "sampling.step",
    "Stream": "sampling.sampler",
    "Trace": "sampling.trace",
    "draw": "sampling.generators",
    "mend_torchvision": "models.torchvision",
    "pixels": "runs.pictures",
    "read_picture": "runs.pictures",
}


def load(model: Any = None, *, device: Any = None, dtype: Any = None, **options: Any) -> Sampler:
    """A sampler for a model.

    Args:
        model: a folder in the diffusers layout, a hub id, or an installed model's name; None is
            the emoji model that ships.
        device: None picks CUDA, then MPS, then the CPU.
        dtype: torch.float32 (None), float16 or bfloat16, or its name.
        options: passed on to `StableDiffusionPipeline.from_pretrained` (`variant`, `revision`).

    Raises:
        InputError: the model, its folder or the dtype does not exist.
        ModelError: the model cannot be loaded, or is not Stable Diffusion 1.x or 2.x.
    """
    from .models import loading
    from .sampling.sampler import Sampler

    return Sampler(loading.load(model, device=device, dtype=dtype, **options))


def make_plugin(item: Any) -> Any:
    """The plugin that an item of a run's `plugins` names: `"blue:scale=2"`, or a table.

    Raises:
        InputError, SettingsError, PluginError: nothing is named so, or it cannot be made.
    """
    from .hooks.registry import resolve

    return resolve(item).plugin


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "view":
        return import_module(".view", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module 'pilotfish' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
