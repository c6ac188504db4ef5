"""What is known of candidates: their rewards, where they come from, and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pilotfish import InputError, at_least_float32

if TYPE_CHECKING:
    from pilotfish import Step


@dataclass
class Scales:
    """The guides that a search goes by, and their scales."""

    of: dict[str, float]

    def reward(self, step: Step, particles: int) -> Tensor | None:
        """What is to be high, (pictures, particles); None where a guide was not asked."""
        if not self.of.keys() <= step.losses.keys():
            return None
        losses = [scale * at_least_float32(step.losses[name]) for name, scale in self.of.items()]
        return -torch.stack(losses).sum(dim=0).cpu().view(-1, particles)


@dataclass
class Lineage:
    """Who came from whom.

    Attributes:
        twins: two places that went on as one at that step; they must have parted two steps later.
    """

    scales: Scales
    twins: tuple[int, int, int] | None = None

    def check(self, step: Step) -> None:
        """Refuse a scheduler under which candidates of one origin stay the same."""
        if self.twins is None or step.index != self.twins[2] + 1:
            return
        one, other, _ = self.twins
        if torch.equal(step.latents[one], step.latents[other]):
            raise InputError(
                "candidates of one origin stay the same: this scheduler draws no noise. Use one "
                'that does at each step: ddpm, euler-ancestral, lcm ..., or {"name": '
                '"flowmatch-euler", "stochastic_sampling": true} for a flow'
            )

    def followed(self, step: Step, chosen: Tensor) -> Tensor:
        """The places of all candidates, (B,), from their choices within each picture's."""
        order = (chosen + chosen.shape[1] * torch.arange(len(chosen))[:, None]).flatten()
        counts = order.bincount(minlength=len(order))
        if (counts > 1).any():
            one, other, *_ = (order == counts.argmax()).nonzero().flatten().tolist()
            self.twins = (one, other, step.index)
        return order


@dataclass
class Weighed(Lineage):
    """What each candidate's way has come to, (pictures, particles); nothing before the first step.

    Attributes:
        log_weights: since they were last drawn anew.
        past: logarithm of the product of all its potentials.
        last, highest, total: of its rewards.
    """

    log_weights: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    past: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    last: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    highest: Tensor = field(default_factory=lambda: torch.full((1, 1), -torch.inf))
    total: Tensor = field(default_factory=lambda: torch.zeros(1, 1))

    def weigh(self, reward: Tensor, potential: str) -> None:
        """One more potential."""
        self.highest, self.total = torch.maximum(self.highest, reward), self.total + reward
        log = {"difference": reward - self.last, "max": self.highest, "sum": self.total}[potential]
        self.last = reward
        self.log_weights, self.past = self.log_weights + log, self.past + log

    def go_on(self, chosen: Tensor, anew: Tensor) -> None:
        """Let candidates go on as those that were chosen; those drawn anew weigh the same."""
        for name in ("log_weights", "past", "last", "highest", "total"):
            setattr(self, name, getattr(self, name).gather(1, chosen))
        self.log_weights = torch.where(anew[:, None], 0, self.log_weights)


@dataclass
class Proposed(Weighed):
    """With what the model says of a step before the guides move it.

    Attributes:
        model: latents and x0, (B, C, H, W) each.
    """

    model: tuple[Tensor, ...] = ()

    def travel(self, ratio: Tensor) -> None:
        """Weigh for a step that was proposed: logarithms of p / q."""
        self.log_weights = self.log_weights + ratio


def identity(like: Tensor) -> Tensor:
    """Everyone in their own place."""
    return torch.arange(like.shape[1]).expand_as(like)


def drawn(weights: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One candidate of each picture by its weights, (pictures,)."""
    rows = [w.multinomial(1, generator=g) for w, g in zip(weights, generators, strict=True)]
    return torch.cat(rows)


def systematic(weights: Tensor, generators: list[torch.Generator]) -> Tensor:
    """As many as there are, by their weights, from one random number for each picture.

    Kitagawa 1996, "Monte Carlo filter and smoother": a candidate of weight w is taken floor(n w) or
    ceil(n w) times.
    """
    count = weights.shape[1]
    starts = torch.stack([torch.rand(1, generator=g) for g in generators])
    marks = (starts + torch.arange(count)) / count
    return torch.searchsorted(weights.cumsum(dim=1).contiguous(), marks).clamp(max=count - 1)
