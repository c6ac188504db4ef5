"""The plugin `inpaint`: draw anew inside a mask, and keep the picture around it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image, ImageOps
from pydantic import field_validator
from torch import Tensor
from torch.nn.functional import interpolate

from pilotfish import Plugin, Setting, SettingsError, draw, pixels, read_picture

if TYPE_CHECKING:
    from pilotfish import Run, Step

Box = tuple[float, float, float, float]


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

    class Settings(Plugin.Settings):
        image: Path = Setting(description="a picture file to keep", examples=["picture.png"])
        mask: Box | Path = Setting(
            description="where to draw anew: a picture file of the image's shape, white there, or "
            "a box [left, top, right, bottom] in fractions of the run's picture",
            examples=[[0.25, 0.25, 0.75, 0.75]],
        )

        @field_validator("mask", mode="before")
        @classmethod
        def _file_or_box(cls, mask: Any) -> Any:
            if isinstance(mask, str | Path):
                return mask
            with contextlib.suppress(TypeError, ValueError):
                left, top, right, bottom = map(float, mask)
                if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
                    return left, top, right, bottom
            raise ValueError(
                "a picture file, or [left, top, right, bottom] with 0 <= left < right <= 1 and "
                "0 <= top < bottom <= 1"
            )

    def setup(self, run: Run) -> Scene:
        height, width = cast("tuple[int, int]", (run.height, run.width))  # known in a run
        picture = read_picture(self.settings.image, "Inpaint: image")
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        image = pixels(fitted)  # (1, 3, 8H, 8W)
        known = run.model.encode(image).float()  # (1, C, H, W)
        drawn = drawn_part(self.settings.mask, picture.size, known.shape[2:])
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
            step.stop(state.corrected(state.result(step.x0), step.run.model))


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

    def corrected(self, latents: Tensor, model: Any) -> Tensor:
        """Latents whose picture is nearer to the known one around what is drawn.

        The decoder sees more than a cell, so what is drawn changes the picture around it too. What
        the encoder makes of that change is taken back, once: most of it, measured on the emoji
        model. An image that gains nothing stays.
        """
        kept = 1 - interpolate(self.drawn, self.image.shape[2:])  # (1, 1, 8H, 8W)

        def distance(image: Tensor) -> Tensor:
            return (kept * (image - self.image)).square().mean(dim=(1, 2, 3), keepdim=True)

        image = model.decode(latents).float().clamp(0, 1)
        changed = model.encode(image) - model.encode(torch.lerp(image, self.image, kept))
        nearer = latents - (1 - self.drawn).to(latents) * changed.to(latents)
        gains = distance(model.decode(nearer).float().clamp(0, 1)) < distance(image)
        return torch.where(gains, nearer, latents)


def drawn_part(mask: Box | Path, shape: tuple[int, int], cells: torch.Size) -> Tensor:
    """What part of each of the latents' cells the mask covers, (1, 1, *cells) in [0, 1].

    Args:
        shape: the picture's (width, height), which is cut to the cells' shape like the mask.

    Raises:
        SettingsError: the mask is no picture, of another shape, or covers nothing.
    """
    if isinstance(mask, Path):
        picture = read_picture(mask, "Inpaint: mask", mode="L")
        if picture.width * shape[1] != picture.height * shape[0]:
            raise SettingsError(
                f"Inpaint: mask must have the shape of image, {shape[0]} x {shape[1]} pixels or as "
                f"many times more or fewer; {mask} has {picture.width} x {picture.height}"
            )
        fitted = ImageOps.fit(picture, (cells[1], cells[0]), Image.Resampling.BOX)
        part = pixels(fitted)
    else:
        left, top, right, bottom = mask
        part = torch.outer(covered(top, bottom, cells[0]), covered(left, right, cells[1]))
        part = part[None, None]
    if not part.any():
        raise SettingsError(f"Inpaint: mask must be white where to draw; {mask} is all black")
    return part


def covered(start: float, end: float, cells: int) -> Tensor:
    """What part of each of `cells` lies between two fractions of a line."""
    edges = torch.arange(cells + 1, dtype=torch.float64).clamp(start * cells, end * cells)
    return edges.diff()
