"""From several losses to one move.

The graph is split at leaves. All guides of a step share one trunk, `latents -> x0 -> image`; each
guide sees detached leaves (`x0`, `rgb`, `image`) and has its own small head behind them. Its
gradient at its leaves is cheap, is checked and weighed there, and the weighted sum is pulled back
through the trunk once. The result is the gradient of the weighted sum of the losses, exactly; a
broken guide is caught at its leaf and touches nobody else's gradient.

`gradient` per image is written g below, and a guide's move is `-size * g`.

* Rule "sigma2" (the Deep Dive talk): `size = scale * sigma^2` on the latents, with
  `g = dL/dlatents`; in these coordinates the same picture in every scheduler family.
* Rule "rms" (after FreeDoM, Yu et al. 2023, arXiv 2303.09833): `g` is scaled to the root mean
  square of the prompt's own pull, so scale 1 means "as strong as the prompt", whatever the loss.
  We differ: each guide is normalised on its own, at its leaf, before they are summed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .noise import NoiseLevel, at_least_float32
from .presets import Preset

End = Literal["x0", "latents"]

# What stands in for the prompt's pull where there is no prompt to pull (no classifier-free
# guidance, or an empty prompt), as a fraction of the prediction's own root mean square.
# Measured: docs/guidance.md, "Without a prompt".
UNPROMPTED_PULL = 0.1


class LossFault(Exception):
    """What is wrong with a guide's loss, for the host to blame on the guide."""


class Trunk:
    """What all guides of one step share: latents -> x0 -> rgb and image, each built at most once.

    Args:
        x0: predicted clean latents (B, C, H, W), with a graph to `latents` where that is given.
        decode: x0 -> image (B, 3, 8H, 8W).
        to_rgb: x0 -> rgb (B, 3, H, W).
        latents: the leaf that the graph of x0 starts from, if any guide's gradient goes there.
    """

    def __init__(
        self,
        x0: Tensor,
        decode: Callable[[Tensor], Tensor],
        to_rgb: Callable[[Tensor], Tensor],
        latents: Tensor | None = None,
    ) -> None:
        self._predicted, self._latents = x0, latents
        self._x0 = x0.detach().requires_grad_()
        self._build = {"x0": lambda x0: x0, "rgb": to_rgb, "image": decode}
        self._nodes: dict[str, Tensor] = {}
        self.seconds = 0.0  # spent building

    def node(self, name: str) -> Tensor:
        """The trunk's own value of that name, built on first use."""
        if name not in self._nodes:
            start = time.perf_counter()
            with torch.enable_grad():
                self._nodes[name] = self._build[name](self._x0)
            self.seconds += time.perf_counter() - start
        return self._nodes[name]

    def to_x0(self, name: str, cotangent: Tensor, retain_graph: bool) -> Tensor:
        """Pull a gradient at one leaf back to x0: one vector-Jacobian product."""
        if name == "x0":
            return cotangent
        return _pull_back(self.node(name), self._x0, cotangent, retain_graph)

    def to_latents(self, cotangent: Tensor) -> Tensor:
        """Pull a gradient at x0 back to the latents, through the network."""
        if self._latents is None:
            raise ValueError("this trunk's x0 has no graph to the latents")
        return _pull_back(self._predicted, self._latents, cotangent, retain_graph=False)


def _pull_back(output: Tensor, source: Tensor, cotangent: Tensor, retain_graph: bool) -> Tensor:
    """A vector-Jacobian product, scaled per image to magnitude one on the way.

    It is linear in the cotangent, and powers of two are exact, so this changes nothing but saves a
    half-precision trunk from underflow: pixel gradients of a CLIP loss at 512 pixels lie below the
    smallest normal float16.
    """
    _, exponents = cotangent.abs().amax(dim=(1, 2, 3)).frexp()
    powers = [2.0 ** -max(-120, min(120, e)) for e in exponents.tolist()]  # normal in float32
    scale = cotangent.new_tensor(powers).view(-1, 1, 1, 1)
    (pulled,) = torch.autograd.grad(
        output, source, (cotangent * scale).to(output.dtype), retain_graph
    )
    return pulled.to(cotangent.dtype) / scale


class Leaves:
    """The leaves that one guide has read: fresh, detached, and its own."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self.read: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self.read:
            self.read[name] = self._trunk.node(name).detach().requires_grad_()
        return self.read[name]


@dataclass
class Pull:
    """One guide's wish at one step.

    Attributes:
        end: where its gradient ends.
        loss: (B,).
        gradients: its own gradient at each leaf that it read, unweighted.
        share: (B,), its part of the step's move, set by `combine`; the parts add up to 1.
    """

    name: str
    scale: float
    end: End
    loss: Tensor
    gradients: dict[str, Tensor]
    seconds: float = 0.0
    share: Tensor = field(default_factory=lambda: torch.zeros(0))

    @cached_property
    def norm(self) -> Tensor:
        """L2 norm of the gradient over all leaves, (B,)."""
        squares = [g.square().sum(dim=(1, 2, 3)) for g in self.gradients.values()]
        return torch.stack(squares).sum(dim=0).sqrt()

    def cosine(self, other: Pull) -> Tensor | None:
        """Of the angle to another guide's gradient, both times their scales' signs, (B,).

        -1: they pull against each other. None where they read no leaf in common.
        """
        common = self.gradients.keys() & other.gradients.keys()
        if not common:
            return None
        products = _sum((self.gradients[c] * other.gradients[c]).sum((1, 2, 3)) for c in common)
        sign = math.copysign(1, self.scale * other.scale)
        return sign * products * _inverse(self.norm * other.norm)

    def weighted(self, unit: bool) -> dict[str, Tensor]:
        """The gradient times scale; with `unit`, of root mean square 1 over all leaves first."""
        if not unit:
            return {leaf: self.scale * g for leaf, g in self.gradients.items()}
        count = sum(g[0].numel() for g in self.gradients.values())
        factor = self.scale * _inverse(self.norm / count**0.5)
        return {leaf: factor.view(-1, 1, 1, 1) * g for leaf, g in self.gradients.items()}


def leaf_gradients(loss: Tensor, leaves: Leaves, num_images: int) -> dict[str, Tensor]:
    """The gradient of a guide's loss at each leaf that it read.

    Raises:
        LossFault: the loss is no tensor, has not one value per image, has no graph, or it or its
            gradient is not finite.
    """
    if not isinstance(loss, Tensor):
        raise LossFault(f"returned {type(loss).__name__}; expected a tensor of shape (B,) or None")
    if loss.shape != (num_images,) and not (loss.ndim == 0 and num_images == 1):
        axes = {2: "the last axis", 3: "the last two axes", 4: "the last three axes"}
        raise LossFault(
            f"returned shape {tuple(loss.shape)}; expected one value per image, shape "
            f"({num_images},): reduce over {axes.get(loss.ndim, 'all axes but the first')}, never "
            "over the batch"
        )
    if not loss.requires_grad or not leaves.read:
        raise LossFault(
            "returned a loss without a graph; compute it from step.x0, step.rgb or step.image "
            "with torch operations, without detach(), no_grad() or numpy"
        )
    if not loss.isfinite().all():
        raise LossFault(f"returned a loss that is not finite: {_listed(loss)}")
    total = at_least_float32(loss).sum()
    found = torch.autograd.grad(total, list(leaves.read.values()), allow_unused=True)
    gradients = {leaf: g for leaf, g in zip(leaves.read, found, strict=True) if g is not None}
    if not gradients:
        raise LossFault("returned a loss that does not depend on step.x0, step.rgb or step.image")
    for leaf, gradient in gradients.items():
        if bad := int((~gradient.isfinite()).sum()):
            raise LossFault(
                f"has a gradient that is not finite in {bad} of {gradient.numel()} values of "
                f"step.{leaf}"
            )
    return gradients


def combine(
    trunk: Trunk, pulls: Sequence[Pull], preset: Preset, level: NoiseLevel, prompt_pull: Tensor
) -> Tensor:
    """One move from all guides' gradients, and each guide's share of it.

    Args:
        prompt_pull: (B, 1, 1, 1), see `prompt_pull`; used by the rule "rms".

    Returns:
        What to add to the latents, or to x0 where `preset.applied_to` is "prediction".
    """
    unit = preset.rule == "rms"
    ends = [end for end in ("latents", "x0") if any(p.end == end for p in pulls)]
    moves = []
    for end in ends:
        group = [p for p in pulls if p.end == end]
        at_x0 = _sum_at_x0(trunk, group, unit, retain_graph=end != ends[-1])
        if unit:
            direction = (
                _resized(trunk.to_latents(at_x0), _rms(at_x0)) if end == "latents" else at_x0
            )
            moves.append(-prompt_pull * direction)
        else:
            g = trunk.to_latents(at_x0) if end == "latents" else at_x0 / level.alpha
            on_latents = -(level.sigma**2) * g
            moves.append(on_latents if preset.applied_to == "latents" else on_latents / level.alpha)
    _share(pulls)
    return sum(moves[1:], start=moves[0])


def _sum_at_x0(trunk: Trunk, pulls: Sequence[Pull], unit: bool, retain_graph: bool) -> Tensor:
    """The weighted sum of all guides' gradients, pulled back to x0: at most one product a leaf.

    With `unit`, each leaf's sum keeps the root mean square that it has at the leaf, so that a guide
    on the image and one on x0 weigh the same, and opposed guides cancel.
    """
    weighted = [pull.weighted(unit) for pull in pulls]
    parts = []
    for leaf in dict.fromkeys(name for w in weighted for name in w):
        total = _sum(w[leaf] for w in weighted if leaf in w)
        pulled = trunk.to_x0(leaf, total, retain_graph)
        if unit:
            pulled = _resized(pulled, _rms(total))
        parts.append(pulled)
        for pull, w in zip(pulls, weighted, strict=True):
            if leaf in w:  # its part of this leaf's sum, in x0's units
                part = _rms(pulled) * _rms(w[leaf]) * _inverse(_rms(total))
                pull.share = part.flatten() + (pull.share if len(pull.share) else 0)
    return _sum(parts)


def _share(pulls: Sequence[Pull]) -> None:
    total = _sum(p.share for p in pulls)
    for pull in pulls:
        pull.share = pull.share * _inverse(total)


def prompt_pull(
    level: NoiseLevel,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    applied_to: Literal["latents", "prediction"],
) -> Tensor:
    """How far classifier-free guidance itself moves this step, root mean square per image.

    `guidance_scale * RMS(cond - uncond)`, in x0's units for "prediction", in eps' for "latents"
    (FreeDoM's own). Never less than `UNPROMPTED_PULL * RMS(cond)`: that stands in where nothing
    pulls, and the two meet without a jump.

    Returns:
        (B, 1, 1, 1).
    """
    pull = UNPROMPTED_PULL * _rms(at_least_float32(cond))
    if uncond is not None:
        pull = torch.maximum(pull, guidance_scale * _rms(at_least_float32(cond - uncond)))
    size = abs(level.out)
    return pull * (size if applied_to == "prediction" else size * level.alpha / level.sigma)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    first, *rest = tensors
    return sum(rest, start=first)


def _rms(tensor: Tensor) -> Tensor:
    """Root mean square per image, (B, 1, 1, 1)."""
    return tensor.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _resized(tensor: Tensor, rms: Tensor) -> Tensor:
    """The same direction with that root mean square; zero stays zero."""
    return tensor * (rms * _inverse(_rms(tensor)))


def _inverse(tensor: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: no gradient, no move."""
    return torch.where(tensor > 0, 1 / torch.where(tensor > 0, tensor, 1), 0)


def _listed(values: Tensor) -> str:
    return ", ".join(f"{v:.3g}" for v in values.detach().flatten().tolist())
