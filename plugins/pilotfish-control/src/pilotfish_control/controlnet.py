"""The plugin `controlnet`: a picture that says where things are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from PIL import Image
from pydantic import field_serializer, field_validator
from torch import Tensor, nn

from pilotfish import Plugin, Setting, SettingsError, pixels, read_picture

from .networks import Control, added, kind_of, load

if TYPE_CHECKING:
    from pilotfish import Run, Step

PYTHON = "python:"  # of what a run file holds of a network that was passed in Python


class ControlNet(Plugin):
    """Let a picture of edges, depth, a pose ... say where things are.

    A second network looks at the picture and adds to what the model's own blocks compute (Zhang et
    al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543). Any
    number of them add up. Latents equal those of the family's own ControlNet pipeline of diffusers
    to the bit. We differ for Stable Diffusion 3 and FLUX.1: the picture's latents are the mean of
    what the VAE deems likely, where the pipelines draw them, that of Stable Diffusion 3 by torch's
    global generator.
    """

    heading = "networks that steer"

    class Settings(Plugin.Settings):
        model: Any = Setting(
            description="the ControlNet: a folder or hub id, in Python also a network of diffusers",
            examples=["lllyasviel/sd-controlnet-canny"],
        )
        image: Path = Setting(
            title="a path to a picture",
            description="what the ControlNet was trained on, of the run's shape",
            examples=["edges.png"],
        )
        detect: Literal["canny"] | None = Setting(
            None,
            description="what to look for in image first, where it is an ordinary picture: canny, "
            "its edges, white on black",
        )
        scale: float = Setting(1.0, description="strength; 0 is off")
        start: float = Setting(0.0, ge=0, le=1, description="first moment, a fraction of the run")
        stop: float = Setting(1.0, ge=0, le=1, description="last moment, a fraction of the run")
        mode: int | None = Setting(
            None,
            ge=0,
            description="of a union ControlNet of FLUX.1: the number of what image shows",
        )

        @field_validator("model")
        @classmethod
        def _known(cls, model: Any) -> Any:
            if isinstance(model, str) and model.startswith(PYTHON):
                raise ValueError(
                    "the network itself: a run file holds only its name, and it must be passed "
                    "again in Python"
                )
            if not isinstance(model, str | Path | nn.Module):
                raise ValueError("a folder, a hub id or a network of diffusers")
            return str(model) if isinstance(model, Path) else model

        @field_serializer("model", when_used="json")
        def _named(self, model: Any) -> str:
            return model if isinstance(model, str) else f"{PYTHON}{type(model).__name__}"

    def setup(self, run: Run) -> Control:
        network = run.model.denoiser
        kind = kind_of(network)
        controlnet = load(self.settings.model, kind, network, run)
        picture = kind.see(controlnet, run, self._picture(run))
        more = self._mode(controlnet, run.model.device)
        return Control(kind, controlnet, run, picture.to(run.model.device, run.model.dtype), more)

    def network_inputs(
        self, inputs: Mapping[str, Any], step: Step, state: Control
    ) -> Mapping[str, Any] | None:
        settings, ends = self.settings, (step.index + 1) / step.num_steps
        if not settings.scale or step.progress < settings.start or ends > settings.stop:
            return None
        came = state.residuals(
            step.network_latents, step.timestep, step.conditioning, settings.scale
        )
        keys = state.kind.keys
        return {**inputs, **{k: added(inputs.get(k), c) for k, c in zip(keys, came, strict=True)}}

    def combine_predictions(self, state: Control) -> None:
        """Let go of the residuals: both predictions are there."""
        state.kept = None

    def _picture(self, run: Run) -> Tensor:
        """(1, 3, 8H, 8W) in [0, 1]."""
        height, width = cast("tuple[int, int]", (run.height, run.width))  # known in a run
        picture = read_picture(self.settings.image, "ControlNet: image")
        if picture.width * height != picture.height * width:
            raise SettingsError(
                f"ControlNet: image must have the shape of the run's picture, {width} x {height} "
                f"pixels or as many times more or fewer; {self.settings.image} has "
                f"{picture.width} x {picture.height}"
            )
        # Laid out in memory as in the pipelines: convolutions round differently for others.
        shown = pixels(picture.resize((width, height), Image.Resampling.LANCZOS)).contiguous()
        return edges(shown) if self.settings.detect == "canny" else shown

    def _mode(self, controlnet: Any, device: torch.device) -> dict[str, Tensor]:
        """The mode (1, 1) of a union ControlNet of FLUX.1."""
        mode, modes = self.settings.mode, getattr(controlnet.config, "num_mode", None)
        if (mode is None) != (modes is None) or (modes is not None and mode >= modes):
            takes = f"below {modes}, for" if modes else "left out, for"
            raise SettingsError(f"ControlNet: mode must be {takes} this ControlNet; got {mode}")
        return {} if mode is None else {"controlnet_mode": torch.tensor([[mode]], device=device)}


def edges(picture: Tensor) -> Tensor:
    """Edges of a picture (1, 3, H, W) in [0, 1], white on black, as large: Canny 1986.

    By kornia, at its own thresholds of 0.1 and 0.2 of the gradient of the blurred grey picture.
    """
    from kornia.filters import canny  # half a second, for those who ask

    found: Tensor = canny(picture)[1]  # (1, 1, H, W)
    return found.expand_as(picture).contiguous()
