"""Coordinates that make every scheduler alike: `latents = alpha * x0 + sigma * eps`.

Three families, one pair each: sigma-space (alpha = 1), variance preserving
(alpha^2 + sigma^2 = 1), flow matching (alpha = 1 - sigma). What a network predicts is an affine
function of x0, whatever its prediction type: `x0 = skip * latents + out * output`.

Nothing here calls `scheduler.step`, which would change the scheduler's state and, in most of
diffusers' schedulers, not tell x0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ModelError


@dataclass(frozen=True)
class NoiseLevel:
    """The noise level of one step, and how a network's output gives x0 there.

    Attributes:
        alpha, sigma: `latents = alpha * x0 + sigma * eps`.
        skip, out: `x0 = skip * latents + out * output`.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow", as in diffusers.
    """

    alpha: float
    sigma: float
    skip: float
    out: float
    prediction_type: str

    @property
    def norm(self) -> float:
        """What latents of this level are divided by to be variance preserving."""
        return math.hypot(self.alpha, self.sigma)

    def x0(self, latents: Tensor, output: Tensor) -> Tensor:
        """Predicted clean latents, in float32 or finer, from noisy latents and the output."""
        return self.skip * at_least_float32(latents) + self.out * at_least_float32(output)

    def output(self, latents: Tensor, x0: Tensor) -> Tensor:
        """The output that would have given this x0: the inverse of `x0`, in x0's precision."""
        return (x0 - self.skip * latents.to(x0.dtype)) / self.out

    def eps(self, latents: Tensor, x0: Tensor) -> Tensor:
        """The noise that belongs to this x0: `(latents - alpha * x0) / sigma`."""
        return (latents.to(x0.dtype) - self.alpha * x0) / self.sigma

    def noised(self, cleaner: Tensor, level: NoiseLevel, noise: Tensor) -> Tensor:
        """Latents of this level from cleaner ones of another `level`, by adding noise.

        The forward process between the two levels: Sohl-Dickstein et al. 2015, arXiv 1503.03585.
        """
        ratio = self.alpha / level.alpha
        added = math.sqrt(max(0.0, self.sigma**2 - (ratio * level.sigma) ** 2))
        return ratio * cleaner + added * noise.to(cleaner)


CLEAN = NoiseLevel(1.0, 0.0, 0.0, 1.0, "sample")  # what a run ends with


def noise_level(scheduler: Any, index: int) -> NoiseLevel:
    """The noise level at which `scheduler` expects the latents of step `index`.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`. Two-stage schedulers are asked for
            their present stage, so the level of a step is known only when that step is next.
        index: position in `scheduler.timesteps`.

    Raises:
        ModelError: the prediction type is unknown, or the scheduler fits none of the families.
    """
    alpha, sigma = _alpha_sigma(scheduler, index)
    prediction_type = "flow" if _is_flow(scheduler) else scheduler.config.prediction_type
    if hasattr(scheduler, "precondition_outputs"):
        skip, out = _edm(sigma, scheduler.config.sigma_data, prediction_type)
    else:
        skip, out = _affine(alpha, sigma, prediction_type)
    return NoiseLevel(alpha, sigma, skip, out, prediction_type)


def _alpha_sigma(scheduler: Any, index: int) -> tuple[float, float]:
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver, UniPC, DEIS, SA-Solver
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        return float(alpha), float(sigma)
    if hasattr(scheduler, "sigmas"):
        sigma = _stage_sigma(scheduler, index)
        return (1 - sigma if _is_flow(scheduler) else 1.0), sigma
    if hasattr(scheduler, "alphas_cumprod"):  # DDIM, DDPM, PNDM, LCM, TCD
        abar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
        return math.sqrt(abar), math.sqrt(1 - abar)
    raise ModelError(
        f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod; "
        "pilotfish cannot tell its noise levels. Use another scheduler."
    )


def _stage_sigma(scheduler: Any, index: int) -> float:
    """Sigma of the current stage: KDPM2 and DPM-Solver-SDE have their second stage in between."""
    if getattr(scheduler, "state_in_first_order", True) or not (
        hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "mid_point_sigma")
    ):
        return float(scheduler.sigmas[index])
    if hasattr(scheduler, "mid_point_sigma"):
        return float(scheduler.mid_point_sigma)
    ancestral = hasattr(scheduler, "sigmas_up")  # there the list starts one earlier
    return float(scheduler.sigmas_interpol[index - 1 if ancestral else index])


def _is_flow(scheduler: Any) -> bool:
    """Whether the latents are a straight line from x0 to noise."""
    if scheduler.config.get("use_flow_sigmas", False):
        return True
    return not hasattr(scheduler, "alphas_cumprod") and "shift" in scheduler.config


def _affine(alpha: float, sigma: float, prediction_type: str) -> tuple[float, float]:
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        # v = alpha' * eps - sigma' * x0 in variance-preserving coordinates (Salimans & Ho 2022,
        # arXiv 2202.00512); norm takes sigma-space there, and is 1 where we are there already.
        norm = math.hypot(alpha, sigma)
        return alpha / norm**2, -sigma / norm
    if prediction_type in ("flow", "flow_prediction"):
        return 1.0, -sigma  # v = noise - x0 (Lipman et al. 2022, arXiv 2210.02747)
    raise ModelError(
        f"prediction type {prediction_type!r} is unknown; "
        "expected epsilon, v_prediction, sample or flow_prediction"
    )


def _edm(sigma: float, sigma_data: float, prediction_type: str) -> tuple[float, float]:
    """Karras et al. 2022, arXiv 2206.00364, table 1."""
    variance = sigma**2 + sigma_data**2
    sign = -1 if prediction_type == "v_prediction" else 1
    return sigma_data**2 / variance, sign * sigma * sigma_data / math.sqrt(variance)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return tensor.float() if tensor.element_size() < 4 else tensor
