"""What weights make of a text encoder's output, in two dialects."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from .chunks import Chunk

LEAST = 1e-5  # what compel takes for a weight of 0, whose share would be infinite
ROUNDING = 1e-6  # of the mean size: a mean below is that of numbers that cancel out

# The encoder's output once more: for a chunk without a part of the text, or for no text at all.
Again = Callable[[int | None], Tensor]
Weigh = Callable[[Tensor, Chunk, Sequence[float], Collection[int], Again], Tensor]


def automatic1111(
    values: Tensor, chunk: Chunk, weights: Sequence[float], low: Collection[int], again: Again
) -> Tensor:
    """The output times the weights, brought back to its mean over all tokens and channels.

    As `EmphasisOriginal` of AUTOMATIC1111's stable-diffusion-webui. We differ where the output has
    no mean, as that of a layer norm without bias: there it stays as it is, not divided by rounding.
    """
    weighed = values * chunk.each(weights, values)
    before, after = values.float().mean(), weighed.float().mean()
    if after.abs() <= ROUNDING * weighed.float().abs().mean():
        return weighed
    return weighed * (before / after).to(weighed)


def compel(
    values: Tensor, chunk: Chunk, weights: Sequence[float], low: Collection[int], again: Again
) -> Tensor:
    """The output, led away from that of no text by each token's weight, and from low parts.

    As compel 2 has it (`DownweightMode.MASK`, its default): a part of weight w < 1 adds, in the
    share tan((1 - w) pi / 2) to 1, the output without it, its tokens masked where they stand.

    Args:
        low: the parts below 1, also those that have no token in this chunk.
    """
    each, empty = chunk.each(weights, values), again(None)

    def weighed(values: Tensor) -> Tensor:
        return torch.where(each == 1, values, empty + (values - empty) * each)

    whole = weighed(values)
    mean, total = whole, 1.0
    for part in low:
        share = math.tan((1 - max(weights[part], LEAST)) * math.pi / 2)
        mean = mean + share * (weighed(again(part)) if part in chunk.part else whole)
        total += share
    return mean / total


WEIGH: Final[Mapping[str, Weigh]] = {"automatic1111": automatic1111, "compel": compel}
"""What weighs in each dialect."""
