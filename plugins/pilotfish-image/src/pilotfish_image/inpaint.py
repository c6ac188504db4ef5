"""The plugin `inpaint`: draw anew inside a mask, and keep the picture around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from pilotfish import (
    Area,
    Plugin,
    Setting,
    area_weights,
    draw,
    keep_outside,
    pixels,
    read_picture,
)

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Inpaint(Plugin):
    """Draw anew inside a mask; around it keep a picture, at every step at that step's noise level.

    The run starts with the known part noised to its first level, and at every step the predicted
    clean latents are the picture's own there: the known part then goes down the levels by the
    scheduler's own arithmetic, whichever it is. Clean latents are replaced as in DDNM (Wang et al.
    2022, arXiv 2212.00490), the mask is applied to latents as in Blended Latent Diffusion (Avrahami
    et al. 2022, arXiv 2206.02779). RePaint (Lugmayr et al. 2022, arXiv 2201.09865) puts noisy
    latents back instead, each time with other noise, and goes back and forth. The result is the
    last prediction itself, because some schedulers end a little above noise level zero; around what
    is drawn it is corrected for what the decoder makes of its neighbours.
    """

    heading = "start and steps"

    class Settings(Plugin.Settings):
        image: Path = Setting(
            title="a path to a picture", description="what to keep", examples=["picture.png"]
        )
        mask: Area = Setting(
            description="where to draw anew: a picture file of the image's shape, white there, or "
            "a box [left, top, right, bottom] in fractions of the run's picture",
            examples=[[0.25, 0.25, 0.75, 0.75]],
        )

    def setup(self, run: Run) -> Scene:
        height, width = cast("tuple[int, int]", (run.height, run.width))  # known in a run
        picture = read_picture(self.settings.image, "Inpaint: image")
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        image = pixels(fitted)  # (1, 3, 8H, 8W)
        known = run.model.encode(image).float()  # (1, C, H, W)
        drawn = area_weights(
            self.settings.mask,
            (known.shape[2], known.shape[3]),
            what="Inpaint: mask",
            shape=(picture.height, picture.width),
        )
        return Scene(image.to(known.device), known, drawn.to(known))

    def before_step(self, step: Step, state: Scene) -> Tensor | None:
        if state.begun:
            return None
        state.begun, latents = True, step.latents
        noise = draw(latents.shape, step.generator, state.known.dtype).to(latents.device)
        noisy = (step.alpha * state.known + step.sigma * noise).to(latents.dtype)
        # One or the other: a mixture of two noises would be less than one.
        return torch.where(state.drawn > 0.5, latents, noisy)

    def on_predicted_x0(self, x0: Tensor, state: Scene) -> Tensor:
        return state.around(x0)

    def after_step(self, step: Step, state: Scene) -> None:
        if step.last:
            drawn = state.result(step.x0)
            step.stop(keep_outside(step.run.model, drawn, state.image, state.drawn))


@dataclass
class Scene:
    """What one run keeps.

    Attributes:
        image: the picture (1, 3, 8H, 8W).
        known: the picture's clean latents (1, C, H, W).
        drawn: what part of each is drawn anew, (1, 1, H, W) in [0, 1].
        begun: whether the first step has been prepared.
        latest: what `around` gave last.
    """

    image: Tensor
    known: Tensor
    drawn: Tensor
    begun: bool = False
    latest: Tensor | None = None

    def around(self, x0: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) with the known ones around what is drawn."""
        whole = torch.lerp(self.known.to(x0), x0, self.drawn.to(x0))
        self.latest = whole.detach()
        return whole

    def result(self, x0: Tensor) -> Tensor:
        """What became of the latest ones since, by guides and others, inside the mask only."""
        latest = x0 if self.latest is None else self.latest.to(x0)
        return torch.lerp(latest, x0, self.drawn.to(x0))
