"""A network without some layers, or another one: the plugins `slg` and `autoguidance`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

import pilotfish
from pilotfish import ModelError, Setting

from .layers import Layer, PatchOf, Weakened, of_images, shadowed

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Slg(Weakened):
    """Lead away from a network that skips some layers: skip layer guidance.

    As Stable Diffusion 3.5 medium is sampled, `skip_guidance_layers` of diffusers' pipeline: better
    bodies and shapes, early in the run. We differ: the first step counts too.
    """

    class Settings(Weakened.Settings):
        scale: float = Setting(2.8, description="strength; 0 is off, below 0 leads to the weaker")
        stop: float = Setting(0.2, ge=0, le=1, description="last moment, a fraction of the run")

    def _patch(
        self, step: Step, state: tuple[Layer, ...], images: slice
    ) -> AbstractContextManager[Any]:
        return skipping(state, images)


class Autoguidance(Weakened):
    """Lead away from a weaker network of the same kind: autoguidance.

    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507:
    w D1 + (1 - w) D0 with w = 1 + scale, of a network D1 and one D0 that had less training or is
    smaller. Without a weaker one the network itself stands in, layers of it left out in all steps.
    """

    class Settings(Weakened.Settings):
        scale: float = Setting(1.0, description="strength; 0 is off, below 0 leads to the weaker")
        model: str | None = Setting(
            None,
            description="the weaker model, of the same family and with the same latents and text "
            "encoders: a folder, a hub id, one file, or an installed model's name; where not given "
            "the network itself without the layers",
        )

        @field_validator("model")
        @classmethod
        def _either(cls, model: str | None, info: ValidationInfo) -> str | None:
            if model is not None and info.data.get("layers") is not None:
                raise ValueError("left out where layers are given")
            return model

    def setup(self, run: Run) -> Any:
        if self.settings.model is None:
            return super().setup(run)
        own: Any = run.model
        dtype = None if own.dtype == torch.float64 else own.dtype  # which `load` does not know
        weaker = pilotfish.load(self.settings.model, device=own.device, dtype=dtype)
        network: Any = weaker.model.denoiser.to(own.dtype).requires_grad_(False)
        ours, theirs = kind(own.denoiser), kind(network)
        if ours != theirs:
            raise ModelError(
                f"autoguidance: expected a weaker network of the model's own kind, {ours}; "
                f"{self.settings.model} has {theirs}"
            )
        return network

    def further_prediction(self, step: Step, state: Any) -> PatchOf | None:
        # Another network's is a call of its own.
        return super().further_prediction(step, state) if self.settings.model is None else None

    def _weaker(self, step: Step, state: Any) -> Tensor:
        if self.settings.model is None:
            return super()._weaker(step, state)
        own: Any = step.run.model
        return step.predict(patch=partial(shadowed, {own.denoiser: state}, "forward"))

    def _patch(
        self, step: Step, state: tuple[Layer, ...], images: slice
    ) -> AbstractContextManager[Any]:
        return skipping(state, images)


def kind(network: Any) -> str:
    """What a network must have in common with another one to stand in for it."""
    return f"{type(network).__name__} of {network.config.in_channels} channels"


def skipping(layers: tuple[Layer, ...], images: slice) -> AbstractContextManager[None]:
    """These layers hand on what they are given, for some images of a call, for a while."""
    return shadowed({layer.block: handing_on(layer, images) for layer in layers}, "forward")


def handing_on(layer: Layer, images: slice) -> Callable[..., Any]:
    """A block's `forward` that gives back its input: text and image where they come apart."""
    takes, own = inspect.signature(type(layer.block).forward), layer.block.forward
    joint = any(site.kind == "joint" for site in layer.sites)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = takes.bind(layer.block, *args, **kwargs).arguments
        (_, image, *_), text = given.values(), given.get("encoder_hidden_states")
        taken: tuple[Any, ...] = (text, image) if joint and text is not None else (image,)
        if len(image) > images.stop - images.start:
            made = own(*args, **kwargs)
            made = made if isinstance(made, tuple) else (made,)
            both = zip(made, taken, strict=True)
            # The last block of some transformers makes nothing more of the text.
            taken = tuple(m if m is None else of_images(m, t[images], images) for m, t in both)
        return taken if len(taken) > 1 else taken[0]

    return forward
