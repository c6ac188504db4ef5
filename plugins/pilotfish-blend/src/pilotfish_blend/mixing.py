"""Weighted means of embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROUNDING = 1e-9  # weights that sum to 1 but for this leave nothing
ROUNDS = 20  # of the spherical mean; two vectors need one, four random ones twelve in float32


def rest(weights: Iterable[float]) -> float:
    """What weights leave up to 1."""
    left = 1 - math.fsum(weights)
    return left if left > ROUNDING else 0.0


def mixed(values: Sequence[Tensor], weights: Sequence[float], mode: str = "lerp") -> Tensor:
    """The weighted mean of embeddings (B or 1, ..., D); what alone has a weight is given back."""
    total = math.fsum(weights)
    used = [(v, w / total) for v, w in zip(values, weights, strict=True) if w > 0]
    if len(used) == 1:
        return used[0][0]
    batch = max(len(v) for v, _ in used)  # 1, or the images' where a plugin gave each its own
    stack = torch.stack([v.expand(batch, *v.shape[1:]) for v, _ in used]).float()  # (n, ..., D)
    shares = stack.new_tensor([share for _, share in used])
    shares = shares.view(-1, *[1] * (stack.ndim - 1))
    mean = (shares * stack).sum(0) if mode == "lerp" else spherical_mean(stack, shares)
    return mean.to(values[0].dtype)


def spherical_mean(values: Tensor, shares: Tensor) -> Tensor:
    """The mean of vectors (n, ..., D) in direction and, apart from it, in length.

    Directions: Buss & Fillmore 2001, "Spherical averages and applications to spherical splines and
    interpolation", algorithm A1: go to the mean in the tangent plane, until it is the origin. For
    two vectors it is Shoemake's slerp (1985); for more it does not depend on their order.
    """
    lengths: Tensor = values.norm(dim=-1, keepdim=True)
    units = values / lengths.clamp(min=1e-12)
    mean: Tensor = normalize((shares * units).sum(0), dim=-1)
    for _ in range(ROUNDS):
        along = (units * mean).sum(-1, keepdim=True)
        across = units - along * mean
        sine = across.norm(dim=-1, keepdim=True)
        bent = torch.atan2(sine, along) / sine.clamp(min=1e-12)  # an angle by its sine
        move = (shares * bent * across).sum(0)
        angle = move.norm(dim=-1, keepdim=True)
        mean = normalize(angle.cos() * mean + torch.sinc(angle / torch.pi) * move, dim=-1)
    return mean * (shares * lengths).sum(0)
