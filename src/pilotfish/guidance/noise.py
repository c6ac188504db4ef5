"""Coordinates that make every scheduler alike: `latents = alpha * x0 + sigma * eps`.

Three kinds of schedule, one pair each: sigma-space (alpha = 1), variance preserving
(alpha^2 + sigma^2 = 1), flow matching (alpha = 1 - sigma). What a network predicts is an affine
function of x0, whatever its prediction type: `x0 = skip * latents + out * output`.

Alpha may be 0: zero terminal SNR, and sigma 1 of a flow. Nothing here divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ModelError


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

    @classmethod
    def of(cls, alpha: float, sigma: float, prediction_type: str) -> NoiseLevel:
        """The level of these coordinates, for a network that predicts so.

        Raises:
            InputError: x0 cannot be told from that prediction there.
            ModelError: the prediction type is unknown.
        """
        if prediction_type == "epsilon":
            if alpha == 0:
                raise InputError(
                    "a model that predicts the noise (epsilon) cannot begin at pure noise, alpha = "
                    "0: its prediction says nothing of x0 there. Leave out rescale_betas_zero_snr, "
                    "or use a model that predicts v"
                )
            skip, out = 1 / alpha, -sigma / alpha
        elif prediction_type == "sample":
            skip, out = 0.0, 1.0
        elif prediction_type == "v_prediction":
            # v = alpha' * eps - sigma' * x0 in variance-preserving coordinates (Salimans & Ho
            # 2022, arXiv 2202.00512); norm takes sigma-space there, and is 1 where we are there.
            norm = math.hypot(alpha, sigma)
            skip, out = alpha / norm**2, -sigma / norm
        elif prediction_type in ("flow", "flow_prediction"):
            skip, out = 1.0, -sigma  # v = noise - x0 (Lipman et al. 2022, arXiv 2210.02747)
        else:
            known = "epsilon, v_prediction, sample or flow_prediction"
            raise ModelError(f"prediction type {prediction_type!r} is unknown; expected {known}")
        return cls(alpha, sigma, skip, out, prediction_type)

    @property
    def norm(self) -> float:
        """What latents of this level are divided by to be variance preserving."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def time(self) -> float:
        """Of a flow that has as much noise: `sigma / (alpha + sigma)`, 0 to 1."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def per_alpha(self) -> float:
        """`1 / alpha`; 0 where alpha is 0: latents that hold nothing of x0 move nothing of it."""
        return 1 / self.alpha if self.alpha else 0.0

    def x0(self, latents: Tensor, output: Tensor) -> Tensor:
        """Predicted clean latents, in float32 or finer, from noisy latents and the output."""
        return self.skip * at_least_float32(latents) + self.out * at_least_float32(output)

    def output(self, latents: Tensor, x0: Tensor) -> Tensor:
        """The output that would have given this x0: the inverse of `x0`, in x0's precision.

        Not at sigma 0, where every output gives the same x0.
        """
        return (x0 - self.skip * latents.to(x0.dtype)) / self.out

    def eps(self, latents: Tensor, x0: Tensor) -> Tensor:
        """The noise that belongs to this x0: `(latents - alpha * x0) / sigma`; 0 at sigma 0."""
        noise = latents.to(x0.dtype) - self.alpha * x0
        return noise / self.sigma if self.sigma else torch.zeros_like(noise)

    def noised(self, cleaner: Tensor, level: NoiseLevel, noise: Tensor) -> Tensor:
        """Latents of this level from cleaner ones of another `level`, by adding noise.

        The forward process between the two levels: Sohl-Dickstein et al. 2015, arXiv 1503.03585.
        """
        ratio = self.alpha * level.per_alpha
        added = math.sqrt(max(0.0, self.sigma**2 - (ratio * level.sigma) ** 2))
        return ratio * cleaner + added * noise.to(cleaner)


CLEAN = NoiseLevel(1.0, 0.0, 0.0, 1.0, "sample")  # what a run ends with


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def draw(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """Noise of shape (B, ...), each image from its own generator, so neighbours do not matter."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators])
