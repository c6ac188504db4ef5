"""The plugin `img2img`: start from a picture instead of from pure noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import ValidationInfo, field_validator

from pilotfish import InputError, Plugin, Setting, draw, pixels, read_picture

if TYPE_CHECKING:
    from torch import Tensor

    from pilotfish import Run, Start

STRENGTH = 0.8  # as in diffusers


class Img2Img(Plugin):
    """Start from a picture with noise, at a later step: its layout stays, the prompt redraws it.

    Meng et al. 2021, "SDEdit", arXiv 2108.01073. Latents equal those of diffusers'
    `StableDiffusionImg2ImgPipeline` to the bit, which draws them from the encoder's posterior.
    """

    heading = "start and steps"

    class Settings(Plugin.Settings):
        image: Path = Setting(
            title="a path to a picture", description="what to start from", examples=["picture.png"]
        )
        strength: float | None = Setting(
            None,
            gt=0,
            le=1,
            description="the part of the steps that is taken, the last ones: near 0 the picture "
            f"stays, at 1 next to nothing of it; {STRENGTH} where not given",
        )
        start_step: int | None = Setting(
            None, ge=0, description="instead of strength: the first step that is taken, from 0"
        )

        @field_validator("start_step")
        @classmethod
        def _either(cls, start_step: int | None, info: ValidationInfo) -> int | None:
            if start_step is not None and info.data.get("strength") is not None:
                raise ValueError("left out where strength is given")
            return start_step

    def start_latents(self, run: Run, start: Start) -> tuple[Tensor, int]:
        known = (run.steps, run.height, run.width)  # once a run is set up
        steps, height, width = cast("tuple[int, int, int]", known)
        index = self._first_step(steps) * start.order
        size = (height, width)
        picture = pixels(read_picture(self.settings.image, "Img2Img: image", size=size))
        x0 = run.model.encode(picture, start.generator)  # (B, C, H, W)
        x0 = x0.to(run.model.latents_dtype)
        noise = draw(x0.shape, start.generator, x0.dtype).to(x0.device)
        return start.noised(x0, noise, index), index

    def _first_step(self, steps: int) -> int:
        """Of `steps`, as the user counts them; rounded as diffusers does."""
        settings = self.settings
        if settings.start_step is None:
            strength = settings.strength or STRENGTH
            taken = int(steps * strength)
            if not taken:
                raise InputError(
                    f"Img2Img: strength {strength} of {steps} steps is less than one step; "
                    f"take more steps, or strength >= {1 / steps:.2g}"
                )
            return steps - taken
        if settings.start_step >= steps:
            raise InputError(
                f"Img2Img: start_step must be below {steps}, the run's steps; "
                f"got {settings.start_step}"
            )
        return int(settings.start_step)
