"""What is added to which prediction: `cfg-zero-star`, `apg`, `mambo`, `tcfg` and `cfg-norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from pilotfish import InputError, Setting

from .predictions import Predictions, Spaced, inner, norm, positive, projected

if TYPE_CHECKING:
    from pilotfish import Step


class CfgZeroStar(Spaced):
    """Guide from the part of the negative prompt's prediction that fits the prompt's: CFG-Zero*.

    Fan et al. 2025, arXiv 2503.18886: with s = <c, u> / |u|^2 for each image the prediction is
    s u + w (c - s u), and for the first steps 0, which leaves the latents of a flow where they are.
    """

    class Settings(Spaced.Settings):
        zero_steps: int = Setting(
            1, ge=0, description="for so many steps at the start the network's output counts as 0"
        )

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: Step, state: Any
    ) -> Tensor | None:
        if uncond is not None and step.index < self.settings.zero_steps:
            return torch.zeros_like(prediction)
        return super().combine_predictions(prediction, cond, uncond, step, state)

    def _combined(self, both: Predictions, state: Any) -> Tensor:
        return both.instead_of_uncond(projected(both.cond, both.uncond))


class Apg(Spaced):
    """Leave out what of the guidance only makes colours stronger: adaptive projected guidance.

    Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in
    Diffusion Models", arXiv 2410.02416: d = c - u gets momentum, is shortened to a threshold, and
    its part parallel to c counts `eta` times; the prediction is c + (w - 1) d. diffusers adds w d
    to u unless told `use_original_formulation`: what is cut short then ends near u.
    """

    class Settings(Spaced.Settings):
        eta: float = Setting(
            0.0, ge=0, description="what counts of the part parallel to the prompt's prediction"
        )
        threshold: float = Setting(
            15.0,
            ge=0,
            description="the largest norm of what is added once, over all latents of an image; "
            "0 is none",
        )
        momentum: float = Setting(
            -0.5, gt=-1, lt=1, description="what stays of the steps before; below 0 it is taken off"
        )
        space: Literal["x0", "output"] = Setting(
            "x0", description="act on the network's own output, or on the x0 that it means"
        )

    def setup(self) -> dict[str, Tensor]:
        return {}

    def _combined(self, both: Predictions, state: dict[str, Tensor]) -> Tensor:
        settings, direction = self.settings, both.direction
        if settings.momentum:
            direction = direction + settings.momentum * state.get("running", 0.0)
            state["running"] = direction.detach()
        if settings.threshold:
            direction = direction * (settings.threshold / norm(direction)).clamp(max=1)
        parallel = projected(direction, both.cond)
        return both.beyond_cond(direction + (settings.eta - 1) * parallel)


class Mambo(Spaced):
    """Guide less where guidance would change much: magnitude-aware guidance, MAMBO-G.

    Zhu et al. 2025, arXiv 2508.03442: w' = 1 + (w - 1) exp(-alpha |c - u| / |u|), for each image.
    """

    class Settings(Spaced.Settings):
        alpha: float = Setting(8.0, ge=0, description="how fast a large change is damped; 0 is off")

    def _combined(self, both: Predictions, state: Any) -> Tensor:
        change = norm(both.cond - both.uncond) / norm(both.uncond)
        damping: Tensor = (-self.settings.alpha * change).exp()
        return both.cond + damping * (both.guided - both.cond)


class Tcfg(Spaced):
    """Guide from what the two predictions agree in: tangential damping guidance.

    Kwon et al. 2025, arXiv 2503.18137: in u's place stands its projection on the first right
    singular vector of [c, u], for each image. That vector lies in the plane of c and u, at an angle
    which the 2 x 2 matrix of their inner products gives (principal axis), so no decomposition is
    needed.
    """

    def _combined(self, both: Predictions, state: Any) -> Tensor:
        cond, uncond = both.cond, both.uncond
        squares = inner(cond, cond), inner(uncond, uncond)
        angle = torch.atan2(2 * inner(cond, uncond), squares[0] - squares[1]) / 2
        axis = angle.cos() * cond + angle.sin() * uncond
        return both.instead_of_uncond(projected(uncond, axis))


class CfgNorm(Spaced):
    """Bring the guided prediction back to the norm of the prompt's own.

    What diffusers' pipelines of Qwen-Image (by token) and Lumina 2 (by row) do after guidance.
    """

    class Settings(Spaced.Settings):
        over: Literal["image", "token", "cell"] = Setting(
            "image", description="a norm for each image, each two by two cells, or each cell"
        )

    def _combined(self, both: Predictions, state: Any) -> Tensor:
        own, guided = (positive(self._squares(t)).sqrt() for t in (both.cond, both.guided))
        return both.guided * (own / guided)

    def _squares(self, prediction: Tensor) -> Tensor:
        """Squared norms, of the prediction's own shape but for one channel, or one number."""
        squares = prediction.square().sum(dim=1, keepdim=True)  # (B, 1, H, W)
        if self.settings.over == "image":
            return squares.sum(dim=(2, 3), keepdim=True)
        if self.settings.over == "cell":
            return squares
        size = squares.shape[2:]
        if size[0] % 2 or size[1] % 2:
            raise InputError(
                f"cfg-norm: over = 'token' takes two by two cells, and the latents have "
                f"{size[0]} x {size[1]}; use over = 'cell', or another size of the picture"
            )
        return interpolate(4 * avg_pool2d(squares, 2), scale_factor=2.0)
