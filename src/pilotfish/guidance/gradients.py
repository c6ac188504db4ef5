"""From several losses to one move.

The graph is split at leaves. What all guides of a step share is `latents -> x0 -> image`; each
guide sees detached leaves (`x0`, `rgb`, `image`) and has its own small graph behind them. Its
gradient at its leaves is cheap, is checked and weighed there, and the weighted sum is pulled back
through the shared graph once. The result is the gradient of the weighted sum of the losses,
exactly; a broken guide is caught at its leaf and touches nobody else's gradient.

How far the sum then moves what, is `moves.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import is_out_of_memory, told
from .graph import Leaves, SharedGraph
from .noise import at_least_float32
from .presets import Preset

End = Literal["x0", "latents"]
Leaf = tuple[int, str]  # which sample of x0, and the form in which a guide read it
Gradients = dict[Leaf, Tensor]

# Two gradients with a cosine below -0.87 are so opposed that hardly anything is left but rounding
# and chance. On the emoji model, blue against dim, 0.2 to 1 of a gradient's square is left.
LONGER = 4.0


class LossFault(Exception):
    """What is wrong with a guide's loss, for the host to blame on the guide."""


@dataclass(frozen=True, eq=False)
class Pull:
    """One guide's wish at one step.

    Attributes:
        ends: where its gradient ends.
        loss: (B,).
        gradients: its own gradient at each leaf that it read, unweighted, divided by `size`.
        size: a power of two for each image, about the loss's: that gradients of the smallest
            losses and of the largest are numbers still.
        area: the part of the picture that it acts in, 0 to 1.
        seconds: that its loss and gradient took, when the device has done them.
    """

    name: str
    scale: float
    ends: tuple[End, ...]
    loss: Tensor
    gradients: Gradients
    size: Tensor = field(default_factory=lambda: torch.ones(1))
    area: float = 1.0
    seconds: Callable[[], float] = lambda: 0.0

    @cached_property
    def length(self) -> Tensor:
        """L2 norm of `gradients` over all leaves, (B,)."""
        if not self.gradients:  # measured only
            return torch.zeros_like(self.loss)
        norms = [torch.linalg.vector_norm(g, dim=(1, 2, 3)) for g in self.gradients.values()]
        length: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return length

    def times(self, factor: Tensor) -> Gradients:
        """`gradients` times a number for each image, (B,)."""
        return {leaf: factor.view(-1, 1, 1, 1) * g for leaf, g in self.gradients.items()}

    def fault(self) -> str | None:
        """What is not finite in it, or None."""
        if not self.loss.isfinite().all():
            return f"returned a loss that is not finite: {self.loss.tolist()}"
        for (_, leaf), gradient in self.gradients.items():
            if bad := int((~gradient.isfinite()).sum()):
                values = f"{bad} of {gradient.numel()} values of step.{leaf}"
                return f"has a gradient that is not finite in {values}"
        return None

    def unit(self) -> Tensor:
        """What makes the root mean square 1 where the guide acts, over all its leaves, (B,)."""
        count = self.area * sum(g[0].numel() for g in self.gradients.values())
        return inverse(self.length / count**0.5)


def averaged(samples: Sequence[Pull]) -> Pull:
    """The pull of `-log mean exp(-loss)` over the same guide's losses on several samples of x0.

    Song et al. 2023, "Loss-Guided Diffusion", algorithm 1: its gradient is the mean of the
    samples' own, weighted by `softmax(-loss)`.
    """
    losses = torch.stack([pull.loss for pull in samples])  # (samples, B)
    weights = losses.neg().softmax(dim=0)
    gradients = {
        (k, name): gradient
        for k, (weight, pull) in enumerate(zip(weights, samples, strict=True))
        for (_, name), gradient in pull.times(weight * pull.size.to(weight)).items()
    }
    return replace(
        samples[0],
        size=torch.ones_like(samples[0].size),
        loss=math.log(len(samples)) - losses.neg().logsumexp(dim=0),
        gradients=gradients,
        seconds=lambda: sum(pull.seconds() for pull in samples),
    )


def cosines(pulls: Sequence[Pull]) -> Tensor:
    """Of the angles between each two guides' gradients times their scales' signs, (B, k, k).

    -1: they pull against each other. 0 where they read no leaf in common.
    """
    products = pulls[0].length.new_zeros(len(pulls[0].loss), len(pulls), len(pulls))
    if len(pulls) == 1:
        return products
    units = [pull.times(math.copysign(1, pull.scale) * inverse(pull.length)) for pull in pulls]
    for leaf in _leaves_of(units):
        nothing = torch.zeros_like(next(unit[leaf] for unit in units if leaf in unit))
        stacked = torch.stack([unit.get(leaf, nothing).flatten(1) for unit in units], dim=1)
        products = products + stacked @ stacked.mT  # (B, k, N) @ (B, N, k)
    return products


def all_finite(pulls: Sequence[Pull]) -> bool:
    """Whether losses and gradients are: asked once, since a GPU must be waited for to answer."""
    tensors = [tensor for pull in pulls for tensor in (pull.loss, *pull.gradients.values())]
    # aminmax, because NaN wins every comparison in it, and it takes one pass.
    extremes = [extreme for tensor in tensors for extreme in tensor.aminmax()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def check_loss(loss: Tensor, num_images: int) -> None:
    """Refuse what is no loss.

    Raises:
        LossFault: it is no tensor of real numbers with values, or has not one value per image.
    """
    if not isinstance(loss, Tensor):
        kind = f"{type(loss).__module__}.{type(loss).__qualname__}".removeprefix("builtins.")
        raise LossFault(
            f"returned {kind}; expected a tensor of shape (B,), "
            "made by torch from step.x0, step.rgb or step.image, or None"
        )
    if loss.shape != (num_images,) and not (loss.ndim == 0 and num_images == 1):
        raise LossFault(
            f"returned shape {tuple(loss.shape)}; expected one value per image, shape "
            f"({num_images},): reduce over all axes but the first, never over the batch"
        )
    if not loss.is_floating_point() or loss.layout != torch.strided or loss.is_meta:
        kind = f"{loss.dtype}, {loss.layout}, on {loss.device}".replace("torch.", "")
        raise LossFault(
            f"returned a tensor of {kind}; expected floating-point values, dense, made by torch "
            "from step.x0, step.rgb or step.image"
        )


def leaf_gradients(loss: Tensor, leaves: Leaves) -> Gradients:
    """The gradient of a guide's loss, of which `check_loss` is right, at each leaf that it read.

    Raises:
        LossFault: the loss has no graph, or none that gives a gradient.
    """
    if not loss.requires_grad or not leaves.read:
        raise LossFault(
            "returned a loss without a graph; compute it from step.x0, step.rgb or step.image "
            "with torch operations, without detach(), no_grad() or numpy"
        )
    total = at_least_float32(loss).sum()
    try:
        found = torch.autograd.grad(total, list(leaves.read.values()), allow_unused=True)
    except (Exception, SystemExit) as error:  # whatever an operation's own backward raises
        if is_out_of_memory(error):
            raise
        raise LossFault(f"has a loss whose gradient cannot be taken: {told(error)}") from error
    gradients = {(0, name): g for name, g in zip(leaves.read, found, strict=True) if g is not None}
    if not gradients:
        raise LossFault("returned a loss that does not depend on step.x0, step.rgb or step.image")
    return gradients


class Sum(NamedTuple):
    """Weighted gradients in one.

    Attributes:
        gradient: at x0, (B, C, H, W).
        parts: how large each guide's part of it is, (k, B), root mean squares.
    """

    gradient: Tensor
    parts: Tensor


def sum_at_x0(
    graphs: Sequence[SharedGraph], weighted: Sequence[Gradients], preset: Preset, retain: bool
) -> Sum:
    """The guides' weighted gradients, pulled back to x0 in one: one product for each leaf.

    Under "project" each guide's is pulled back on its own: only there, where the move is made,
    shows who pulls against whom. What is harmless in the picture may not be in the latents.

    Args:
        graphs: one for each sample of x0.
        weighted: one for each guide; empty where it has no part in this.
        retain: whether the graphs are needed once more.
    """
    if preset.combine == "sum":
        return _pulled_to_x0(graphs, weighted, preset, retain)
    alone = [[w if w is own else {} for w in weighted] for own in weighted if own]
    sums = [_pulled_to_x0(graphs, w, preset, retain or w is not alone[-1]) for w in alone]
    gradients = without_conflicts([s.gradient for s in sums])
    return Sum(total_of(gradients), total_of(s.parts for s in sums))


def _pulled_to_x0(
    graphs: Sequence[SharedGraph], weighted: Sequence[Gradients], preset: Preset, retain: bool
) -> Sum:
    pulled, to_x0 = [], {}
    for leaf in _leaves_of(weighted):
        sample, name = leaf
        total = total_of(w[leaf] for w in weighted if leaf in w)
        at_x0 = graphs[sample].to_x0(name, total, retain)
        pulled.append(resized(at_x0, rms(total)) if preset.normalizes else at_x0)
        to_x0[leaf] = rms(pulled[-1]) * inverse(rms(total))  # from the leaf's units to those of x0
    gradient = total_of(pulled)
    none = gradient.new_zeros(len(gradient), 1, 1, 1)
    parts = [sum((rms(g) * to_x0[leaf] for leaf, g in w.items()), start=none) for w in weighted]
    return Sum(gradient, torch.stack(parts).flatten(1))


def without_conflicts(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Each gradient (B, C, H, W) without what it has against another's: "project".

    Yu et al. 2020, "Gradient Surgery" (PCGrad), arXiv 2001.06782, algorithm 1, for each image. We
    differ: the others are taken in the list's order, not at random; and what is left is made
    longer, at most `LONGER` times, so that it lowers its guide's own loss as fast as all of it
    would have. Of two opposed guides, each then comes as far as alone.
    """
    kept = []
    for own in gradients:
        left = own
        for other in (g for g in gradients if g is not own):
            left = left - dot(left, other).clamp(max=0) * inverse(dot(other, other)) * other
        longer = dot(own, own) * inverse(dot(left, own))
        kept.append(left * longer.clamp(max=LONGER))
    return kept


def _leaves_of(gradients: Iterable[Gradients]) -> list[Leaf]:
    """All of them, each once."""
    return list(dict.fromkeys(leaf for found in gradients for leaf in found))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per image, (B, 1, 1, 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


def total_of(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum."""
    first, *rest = tensors
    return sum(rest, start=first)


def rms(tensor: Tensor) -> Tensor:
    """Root mean square per image, (B, 1, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=(1, 2, 3), keepdim=True)
    return norm / math.sqrt(tensor[0].numel())


def resized(tensor: Tensor, size: Tensor) -> Tensor:
    """The same direction with that root mean square; zero stays zero."""
    return tensor * (size * inverse(rms(tensor)))


def inverse(tensor: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: no gradient, no move."""
    return torch.where(tensor > 0, 1 / torch.where(tensor > 0, tensor, 1), 0)
