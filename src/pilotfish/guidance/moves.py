"""How far the guides' gradients move what: the rules of the presets.

Two kinds of moves, `-size * gradient`: one of the latents, with the gradient taken through the
network, and one of x0. In coordinates `latents = alpha * x0 + sigma * eps` of any family, with
`norm = hypot(alpha, sigma)` (1 where latents are variance preserving, so that papers' formulas
stand as they are) and g, g0 a guide's gradient at the latents and at x0:

| rule     | latents                      | x0                         | source               |
|----------|------------------------------|----------------------------|----------------------|
| sigma2   | sigma^2 g                    | (sigma / alpha)^2 g0       | Whitaker 2022        |
| plain    | norm^2 g                     | g0                         | TFG, 2409.15761      |
| residual | norm^2 g / (2 sqrt(loss))    | g0 / (2 sqrt(loss))        | DPS, 2209.14687      |
| rms      | norm * pull * g / RMS(g)     | pull * g0 / RMS(g0)        | FreeDoM, 2303.09833  |
| sphere   | turns the step's own noise   |                            | DSG, 2402.03201      |

each times the guide's scale and the preset's rho (latents) or mu (x0). Under `rms` and `sphere`
each guide is normalised on its own, at its leaf, before they are summed. Under a `variance` the
gradient of `sigma2` allows for the spread of x0, see `_settled`. At alpha 0 (zero terminal SNR,
sigma 1 of a flow) latents hold nothing of x0, and the rules with an alpha below the line move
nothing; `rms` moves x0 there as everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .gradients import End, Gradients, Pull, Sum, dot, inverse, resized, rms, sum_at_x0, total_of
from .graph import SharedGraph
from .noise import CLEAN, NoiseLevel, at_least_float32
from .presets import Preset

# What stands in for the prompt's pull where there is no prompt to pull (no classifier-free
# guidance, or an empty prompt), as a fraction of the predicted noise's root mean square.
# Measured: docs/guidance.md, "Without a prompt".
UNPROMPTED_PULL = 0.1
# The sigma / alpha up to which noise counts there: the schedule of Stable Diffusion, on which it
# was measured, begins at 14.6. Flows begin at infinity, and x0 is moved by what noise does to it.
NOISIEST = 15.0
ENDS: tuple[End, ...] = ("latents", "x0")

# By how much x0 is moved to see a loss bend, root mean square: latents are of size 1.
PROBE = 0.1

Again = Callable[[Tensor], Tensor | None]
Descent = Callable[[Tensor, End], tuple[list[SharedGraph], list[Pull]]]


@dataclass(frozen=True)
class Place:
    """Where in a run a move is made.

    Attributes:
        level, following: the noise levels of this step and of the next.
        pull: (B, 1, 1, 1), how far the prompt moves x0, see `prompt_pull`.
        schedule: multiplies rho and mu at this step.
    """

    level: NoiseLevel
    following: NoiseLevel
    pull: Tensor
    schedule: float = 1.0

    def pull_in(self, units: str) -> Tensor:
        """The prompt's pull as it moves "x0", or "eps"."""
        return self.pull * (1 if units == "x0" else self.level.alpha / self.level.sigma)


@dataclass(frozen=True)
class Move:
    """What all guides do together at one step.

    Attributes:
        value: what to add to what `preset.applied_to` says: the latents, x0, or the next latents.
            Under the rule "sphere" a direction instead, see `spherical`.
        shares: (k, B), each guide's part of it; they add up to 1.
    """

    value: Tensor
    shares: Tensor


def combine(
    graphs: Sequence[SharedGraph],
    pulls: Sequence[Pull],
    preset: Preset,
    place: Place,
    descend: Descent = lambda *_: ([], []),
) -> Move:
    """One move from all guides' gradients.

    Args:
        graphs: one for each sample of x0; the pulls are at their leaves.
        descend: the graphs, and the pulls of the guides that end there, at x0 plus a move.
    """
    sums = _sums(graphs, pulls, preset)
    asked = partial(_asked_again, pulls, preset, descend)
    moves = [
        _move_of(found.gradient, end, partial(asked, end), graphs[0], preset, place)
        for end, found in sums.items()
    ]
    move = total_of(moves)
    if preset.trust is not None:
        longest = preset.trust * place.pull * _per_x0(preset, place)
        move = move * (longest * inverse(rms(move))).clamp(max=1)
    parts = total_of(s.parts for s in sums.values())
    return Move(move, parts * inverse(parts.sum(dim=0)))


def _sums(graphs: Sequence[SharedGraph], pulls: Sequence[Pull], preset: Preset) -> dict[End, Sum]:
    """The guides' weighted gradients in one, at x0, for each of the ends where any of them ends."""
    ends = [end for end in ENDS if any(end in pull.ends for pull in pulls)]
    if all(len(pull.ends) == len(ENDS) for pull in pulls):
        return dict.fromkeys(ends, _sum(graphs, pulls, preset, "x0", retain=False))
    return {end: _sum(graphs, pulls, preset, end, retain=end != ends[-1]) for end in ends}


def _sum(
    graphs: Sequence[SharedGraph], pulls: Sequence[Pull], preset: Preset, end: End, retain: bool
) -> Sum:
    """Of the guides whose gradients end there."""
    weighted = [_weighted(pull, preset) if end in pull.ends else {} for pull in pulls]
    return sum_at_x0(graphs, weighted, preset, retain)


def _weighted(pull: Pull, preset: Preset) -> Gradients:
    """A guide's gradient times its scale and what the rule asks for."""
    factor = torch.full_like(pull.length, pull.scale)
    if preset.normalizes:
        return pull.times(factor * pull.unit())
    factor = factor * pull.size.to(factor)
    if preset.rule == "residual":  # the gradient of the loss's root
        factor = factor * inverse(2 * pull.loss.clamp(min=0).sqrt()).to(factor.dtype)
    return pull.times(factor)


def _asked_again(
    pulls: Sequence[Pull], preset: Preset, descend: Descent, end: End, move: Tensor
) -> Tensor | None:
    """The gradient of the guides that end there, at x0 plus a move; None where one fails."""
    graphs, further = descend(move, end)
    if len(further) < sum(end in pull.ends for pull in pulls):
        return None
    return _sum(graphs, further, preset, end, retain=False).gradient


def _move_of(
    gradient: Tensor, end: End, again: Again, graph: SharedGraph, preset: Preset, place: Place
) -> Tensor:
    """The move from a gradient at x0 that ends there, or goes on to the latents."""
    strength = (preset.mu if end == "x0" else preset.rho) * place.schedule

    def moved(gradient: Tensor) -> Tensor:
        if end == "x0":
            return strength * _of_x0(gradient, preset, place)
        pulled = graph.to_latents(gradient, retain_graph=preset.variance != "none")
        if preset.normalizes:
            pulled = resized(pulled, rms(gradient))
        return strength * _of_latents(pulled, preset, place)

    def spread(gradient: Tensor) -> Tensor:
        if preset.variance == "unit":
            return strength * (place.level.sigma / place.level.norm) ** 2 * gradient
        return -moved(gradient)

    allowed = preset.variance != "none"
    move = moved(_settled(gradient, spread, again, preset.iterations) if allowed else gradient)
    if end == "latents":
        return move
    for _ in range(1, 1 if allowed else preset.iterations):
        further = again(move)
        move = move if further is None else move + moved(further)
    return move * (place.level.time if preset.blended else 1.0) * _per_x0(preset, place)


def _of_latents(gradient: Tensor, preset: Preset, place: Place) -> Tensor:
    """The move from a gradient at the latents, as `preset.applied_to` takes it."""
    level, following = place.level, place.following
    if preset.rule == "sphere":
        return -gradient
    if preset.rule == "rms" and preset.units == "x0":
        return -place.pull * gradient * _per_x0(preset, place)
    if preset.rule == "rms":
        move = -level.norm * place.pull_in("eps") * gradient
    else:
        move = -(level.sigma**2 if preset.rule == "sigma2" else level.norm**2) * gradient
    if preset.applied_to == "latents":
        return move
    if preset.applied_to == "prediction":
        return move * level.per_alpha
    # The papers add the move to the next latents as it is; TFG lets it shrink with their noise.
    kept = preset.rule in ("rms", "residual")
    return move * (following.norm / level.norm if kept else following.alpha * level.per_alpha)


def _of_x0(gradient: Tensor, preset: Preset, place: Place) -> Tensor:
    """The move of x0 from a gradient there."""
    if preset.rule == "rms":
        return -place.pull_in(preset.units) * gradient
    if preset.rule == "sigma2":
        return -((place.level.sigma * place.level.per_alpha) ** 2) * gradient
    return -gradient


def _per_x0(preset: Preset, place: Place) -> float:
    """By how much what is moved changes with x0."""
    level, following = place.level, place.following
    kept = following.sigma if preset.keeps == "v" else 0.0
    after = {"prediction": 1.0, "latents": level.alpha, "after_step": following.alpha + kept}
    return after[preset.applied_to]


def _settled(
    gradient: Tensor, spread: Callable[[Tensor], Tensor], again: Again, iterations: int
) -> Tensor:
    """A loss's gradient g where x0 has spread: u of `(1 + H V) u = g`, H the loss's Hessian.

    For `norm(y - A x0)^2 / (2 r^2)` that is `A^T (r^2 + A V A^T)^-1 (A x0 - y)`: the gradient of a
    likelihood with V as x0's variance (Rozet et al. 2024, arXiv 2405.13712), or g at the point that
    the move by it leads to. Conjugate gradients in the inner product of V, in which `1 + H V` is
    symmetric. H is seen in how the gradient changes along a direction: exactly where the loss is a
    square. Where that bends downwards, an image's iterations end; before the first, with g itself.

    Args:
        gradient: (B, C, H, W).
        spread: multiplies by V.
        again: the gradient at x0 plus a move; None where it cannot be told.
    """
    solution, residual, direction = torch.zeros_like(gradient), gradient, gradient
    spreading = spread(direction)
    energy = dot(residual, spreading)
    going = energy > 0
    for i in range(iterations):
        length = PROBE * inverse(rms(spreading))
        changed = again(length * spreading)
        if changed is None:
            return solution if i else gradient
        bent = direction + (changed - gradient) * inverse(length)
        curvature = dot(spreading, bent)
        step = energy * inverse(curvature)
        going = going & (curvature > 0) & step.isfinite()  # not where a residual is as good as 0
        step = torch.where(going, step, 0.0 if i else 1.0)
        moved = solution + step * direction
        solution = torch.where(going, moved, solution) if i else moved
        residual = residual - step * bent
        if i + 1 < iterations:
            spread_residual = spread(residual)
            before, energy = energy, dot(residual, spread_residual)
            going = going & (energy > 0)
            direction = residual + energy * inverse(before) * direction
            spreading = spread_residual + energy * inverse(before) * spreading
    return solution


def spherical(mean: Tensor, noise: Tensor, deviation: Tensor, direction: Tensor) -> Tensor:
    """A step's result with its noise turned towards a direction: the rule "sphere".

    Yang et al. 2024, "Guidance with Spherical Gaussian Constraint", arXiv 2402.03201, algorithm 1,
    with the direction's root mean square, at most 1, as its g_r.

    Args:
        mean: what the step gives without noise.
        noise: what it adds.
        deviation: (B, 1, 1, 1), the standard deviation that the noise was drawn with.
        direction: see `combine`.
    """
    rate = rms(direction).clamp(max=1)
    mixed = noise + rate * (resized(direction, deviation) - noise)
    return mean + resized(mixed, deviation)


def prompt_pull(
    level: NoiseLevel, latents: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float
) -> Tensor:
    """How far classifier-free guidance itself moves x0 at this step, root mean square per image.

    `guidance_scale * RMS(cond - uncond)` (FreeDoM's own), in x0's units. Never less than
    `UNPROMPTED_PULL` of what the noise in `cond` moves x0 by, whatever it is that the network
    predicts: that stands in where nothing pulls, and the two meet without a jump.

    Returns:
        (B, 1, 1, 1).
    """
    eps = level.eps(latents, level.x0(latents, cond))
    noisiness = min(level.sigma / level.alpha, NOISIEST) if level.alpha else NOISIEST
    pull = UNPROMPTED_PULL * noisiness * rms(eps)
    if uncond is not None:
        prompted = guidance_scale * abs(level.out) * rms(at_least_float32(cond - uncond))
        pull = torch.maximum(pull, prompted)
    return pull


def schedule(levels: Sequence[NoiseLevel], kind: str) -> list[float]:
    """What rho and mu are multiplied by at each step, 1 on average: "increase" or "decrease".

    The ratio of two steps' abar, or one minus it: Ye et al. 2024, "TFG", arXiv 2409.15761.
    """
    abar = [(level.alpha / level.norm) ** 2 for level in (*levels, CLEAN)]
    ratios = [now / after if after else 1.0 for now, after in itertools.pairwise(abar)]
    values = ratios if kind == "increase" else [1 - ratio for ratio in ratios]
    mean = math.fsum(values) / len(values)
    return [value / mean for value in values]
