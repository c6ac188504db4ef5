"""The plugin `lora`: a low-rank change of the networks' weights, for one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn

from pilotfish import InputError, ModelError, Plugin, Setting, Strength, strength_at

from .loading import fitting

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Lora(Plugin):
    """Add a LoRA to the networks, for one run: a style, a subject, fewer steps.

    Hu et al. 2021, "LoRA", arXiv 2106.09685: to some layers' weights a product of two small
    matrices is added. Loaded by PEFT through diffusers' own pipeline, into the run's own copies of
    the networks; the model itself, and other runs, never have it. Several add up.
    """

    heading = "networks that steer"

    class Settings(Plugin.Settings):
        file: Path = Setting(
            description="the LoRA: .safetensors of diffusers, PEFT or kohya's trainer",
            examples=["style.safetensors"],
        )
        weight: Strength = Setting(
            1.0,
            description="strength, 0 is off; or a curve over the run, [[progress, strength], ...], "
            "with straight lines between the points. Text encoders take that of the beginning",
        )

    def setup(self, run: Run) -> Adapter:
        model, file = run.model, self.settings.file
        if reason := model.refuse_gradients():
            raise ModelError(f"plugin 'lora' cannot change these networks: {reason}")
        pipeline = model.pipeline()
        if not hasattr(pipeline, "load_lora_weights"):
            raise ModelError(f"diffusers loads no LoRA into a {type(pipeline).__name__}")
        held = count(file)
        networks = [model.denoiser, *(encoder.network for encoder in model.text_encoders)]
        active = {layer: adapters(layer) for layer in layers(networks)}
        name = f"pilotfish_{len({a for n in networks for a in getattr(n, 'peft_config', {})})}"
        with fitting(f"the LoRA {file}", model.denoiser), loading_by_peft(networks[1:]):
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        placed = sum(f".{name}." in key for n in networks for key, _ in n.named_parameters())
        if placed < held:
            raise InputError(
                f"the LoRA {file} does not fit this model: of its {held} matrices {placed} have a "
                "place there. It was made for another model family"
            )
        for layer in layers(networks):
            own = [name] if name in layer.scaling else []
            layer.set_adapter([*active.get(layer, ()), *own])
            layer.enable_adapters(True)
        for network in networks:
            network.requires_grad_(False)
        adapter = Adapter(name, [layer for layer in layers(networks) if name in layer.scaling])
        adapter.weigh(strength_at(self.settings.weight, 0.0))
        return adapter

    def before_step(self, step: Step, state: Adapter) -> None:
        state.weigh(strength_at(self.settings.weight, step.progress))


@dataclass(frozen=True)
class Adapter:
    """A LoRA in one run: its name among others, and the layers that have it."""

    name: str
    layers: Sequence[Any]

    def weigh(self, weight: float) -> None:
        """Let it count so much, from now on."""
        for layer in self.layers:
            layer.set_scale(self.name, weight)


@contextlib.contextmanager
def loading_by_peft(text_encoders: Sequence[Any]) -> Iterator[None]:
    """Let diffusers load into a run's text encoders by PEFT itself.

    It asks transformers, which from 5.24 on asks for a PEFT 0.22 that is not out. To be removed
    when it is, and this package may ask for it.
    """

    def load(
        network: Any, peft_config: Any, adapter_name: str, adapter_state_dict: Any, **options: Any
    ) -> None:
        inject_adapter_in_model(peft_config, network, adapter_name, **options)
        set_peft_model_state_dict(network, adapter_state_dict, adapter_name, **options)

    try:
        for encoder in text_encoders:
            encoder.load_adapter = partial(load, encoder)
        yield
    finally:
        for encoder in text_encoders:
            del encoder.load_adapter


def adapters(layer: Any) -> list[str]:
    """Those that count in a layer.

    Raises:
        ModelError: one is fused with its weights; no other would count beside it.
    """
    if layer.merged:
        raise ModelError(
            "plugin 'lora' cannot add to layers with which a LoRA is fused and still loaded; call "
            "pipeline.unload_lora_weights(), which leaves the fused weights, or unfuse_lora()"
        )
    return [] if layer.disable_adapters else list(layer.active_adapters)


def layers(networks: Sequence[nn.Module]) -> list[Any]:
    """All layers with a LoRA."""
    every = (module for network in networks for module in network.modules())
    return [module for module in every if isinstance(module, BaseTunerLayer)]


def count(file: Path) -> int:
    """How many matrices a LoRA holds.

    Raises:
        InputError: there is no such file, or it is none.
    """
    if not file.is_file() or file.suffix != ".safetensors":
        raise InputError(f"no LoRA file {file}; expected .safetensors")
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
    except Exception as error:  # a damaged file makes the loader raise anything
        raise InputError(f"cannot read the LoRA {file}: {error}") from error
    matrices = [name for name in names if "lora" in name and not name.endswith("alpha")]
    if not matrices:
        raise InputError(f"{file} is no LoRA: no tensor in it is named so")
    return len(matrices)
