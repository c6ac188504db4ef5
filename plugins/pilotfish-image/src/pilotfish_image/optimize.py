"""The plugin `optimize`: sampling as optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from torch import Tensor

from pilotfish import Plugin, Setting

if TYPE_CHECKING:
    from pilotfish import Run, Step

Beta = Annotated[float, Setting(ge=0, lt=1)]

# The noise level, sigma / alpha, from which on an image may be done. Measured on the emoji model:
# at twice the schedule's pace, images that were done earlier were blurs, later ones are not.
SETTLED = 1.5


class Optimize(Plugin):
    """Sampling as optimisation: every step is an optimiser's, down the predicted noise.

    The latents are the parameter and the predicted noise is their gradient: the way in which the
    distance to clean pictures grows (Permenter & Yuan 2023, arXiv 2306.04848). A learning rate of 1
    takes away as much noise as the schedule asks for at this step: with plain SGD that is Euler's
    method, which is DDIM. Momentum is damped (torch's `dampening`), so that it does not raise the
    rate.

    The network is told the scheduler's timesteps as always, and what an optimiser leaves is not of
    that level: Adam steps equally far in all directions, momentum in old ones. So every step ends
    with a projection: where more noise is left around the predicted picture than Euler's method
    would have left, it is scaled down to that. Less stays as it is. With a rate above 1 the latents
    get cleaner than the level that the network is told, and it predicts less noise than that level
    has. Where that is less than `tolerance` of it, and the level no more than `SETTLED`, the image
    is what was predicted, and the run ends when all are.
    """

    heading = "start and steps"

    class Settings(Plugin.Settings):
        optimizer: Literal["sgd", "adam", "adamw"] = Setting(
            "sgd", description="of torch.optim; sgd may end before the last step, the others hardly"
        )
        lr: float = Setting(1.3, gt=0, description="learning rate; 1 is the schedule's own pace")
        schedule: Literal["constant", "linear", "cosine"] = Setting(
            "constant", description="how the learning rate falls to 0 over the run"
        )
        momentum: float = Setting(0.0, ge=0, lt=1, description="of sgd; 0 is none")
        betas: tuple[Beta, Beta] = Setting(
            (0.9, 0.999), description="of adam and adamw, for the gradient's mean and its square's"
        )
        weight_decay: float = Setting(
            0.0, ge=0, description="pulls the latents towards 0: paler pictures"
        )
        tolerance: float = Setting(
            0.5,
            ge=0,
            description="an image is done where its predicted noise is less, as a fraction of its "
            "level's; 0 takes all steps",
        )

    def setup(self, run: Run) -> Descent:
        model, size = run.model, cast("tuple[int, int]", (run.height, run.width))
        dtype = torch.promote_types(model.dtype, torch.float32)  # as predictions are
        parameter = torch.zeros(
            run.num_images, *model.latent_shape(*size), dtype=dtype, device=model.device
        )
        none_done = torch.zeros_like(parameter[:, :1, :1, :1], dtype=torch.bool)
        return Descent(self._optimizer(parameter), parameter, none_done, parameter.clone())

    def advance(self, step: Step, state: Descent) -> Tensor:
        small = rms(step.eps) < self.settings.tolerance  # (B, 1, 1, 1)
        state.finish(small & (step.sigma <= SETTLED * step.alpha) | step.last, step.x0)
        if state.done.all():
            step.stop(state.result)
        # What the noise must fall by, in the coordinates of this step's latents.
        fall = step.sigma - step.next_sigma / growth(step)
        latents = state.stepped(step.latents, step.eps, self._rate(step.progress) * fall)
        return projected(latents, step).to(step.latents.dtype)

    def _optimizer(self, parameter: Tensor) -> torch.optim.Optimizer:
        settings = self.settings
        decay = {"lr": 0.0, "weight_decay": settings.weight_decay}
        if settings.optimizer == "sgd":
            momentum = {"momentum": settings.momentum, "dampening": settings.momentum}
            return torch.optim.SGD([parameter], **decay, **momentum)
        kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
        return kind([parameter], betas=settings.betas, **decay)

    def _rate(self, progress: float) -> float:
        """The learning rate at a moment of the run, 0 to 1."""
        falls = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }
        return float(self.settings.lr * falls[self.settings.schedule])


@dataclass
class Descent:
    """An optimiser under way.

    Attributes:
        parameter: the latents (B, C, H, W), as the optimiser holds them.
        done: for each image whether it is (B, 1, 1, 1), and `result` what it is then.
    """

    optimizer: torch.optim.Optimizer
    parameter: Tensor
    done: Tensor
    result: Tensor

    def finish(self, images: Tensor, x0: Tensor) -> None:
        """Keep what these images (B, 1, 1, 1) are, unless they are done already."""
        self.result = torch.where(images & ~self.done, x0, self.result)
        self.done = self.done | images

    def stepped(self, latents: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """The latents after one step."""
        self.parameter.copy_(latents)
        self.parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return self.parameter


def projected(latents: Tensor, step: Step) -> Tensor:
    """The latents at the next step's level, with no more noise than Euler's method would leave.

    Args:
        latents: in the coordinates of this step's.
    """
    noise = latents - step.alpha * step.x0
    size, most = rms(noise), step.next_sigma * rms(step.eps)
    factor = torch.where(size > 0, most / size, 0).clamp(max=growth(step))
    return step.next_alpha * step.x0 + factor * noise


def growth(step: Step) -> float:
    """What brings latents of this step into the coordinates of the next: 1 for nothing but noise,
    as flows and zero terminal SNR begin, which holds no x0 to be kept."""
    return step.next_alpha / step.alpha if step.alpha else 1.0


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of each image, (B, 1, 1, 1)."""
    return tensor.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
