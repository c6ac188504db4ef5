"""Search without gradients: several candidates of each picture, of which the better go on.

What is better the run's guides say, by their losses: those that move the run too, and those with
`gradient="none"`, which are measured only and need not be differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pilotfish import InputError, Plugin, Setting, at_least_float32, strength_at

if TYPE_CHECKING:
    from pilotfish import Run, Step

__all__ = ["BestOf", "FeynmanKac", "Search", "Svdd"]


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


class Search(Plugin):
    """What all searches have: `particles` candidates of each picture, in one batch.

    The candidates of picture i are the pictures that the seeds `seed + i * particles` and following
    would give. Their reward is minus the sum of the guides' losses, each times its scale, of x0
    before the guides' move.

    Raises:
        InputError: the run has no such guide, or one of them is not asked at the last step.
    """

    class Settings(Plugin.Settings):
        particles: int = Setting(4, ge=2, le=1024, description="candidates of each picture")
        guides: list[str] | None = Setting(
            None,
            description="the names of the guides whose losses are to be low; all that there are, "
            'where not given. With gradient = "none" a guide is measured only',
        )

    @property
    def particles(self) -> int:
        """How many candidates of each picture go along."""
        return int(self.settings.particles)

    def scales(self, run: Run) -> Scales:
        """Of the guides that the search goes by."""
        guides = [table for table in run.plugins if {"scale", "every"} <= table.keys()]
        found = {t["name"]: strength_at(t["scale"], 1.0) for t in guides}
        names = self.settings.guides or list(found)
        missing = [name for name in names if name not in found]
        if missing or not names:
            what = f"none is called {missing[0]!r}" if missing else "there is none"
            raise InputError(
                f"{type(self).__name__} chooses by the losses of guides, and {what}: add one, "
                '"blue:gradient=none" say, which is measured and moves nothing. '
                f"Guides of this run: {', '.join(found) or 'none'}"
            )
        return Scales({name: found[name] for name in names})

    def first(self, chosen: Tensor) -> Tensor:
        """The order that puts the chosen candidate of each picture, (pictures,), at its places."""
        starts = self.particles * torch.arange(len(chosen))
        return (starts + chosen).repeat_interleave(self.particles)

    def last_reward(self, scales: Scales, step: Step) -> Tensor:
        """The reward at the last step, which must be known."""
        reward = scales.reward(step, self.particles)
        if reward is None:
            unknown = ", ".join(scales.of.keys() - step.losses.keys())
            raise InputError(
                f"{type(self).__name__} chooses at the last step, where it needs the loss of "
                f"{unknown}: let stop be 1 and every 1"
            )
        return reward


class BestOf(Search):
    """The best of several runs: candidates go along untouched, and the best becomes the picture.

    What every other search has to beat at as many calls of the network.
    """

    def setup(self, run: Run) -> Scales:
        return self.scales(run)

    def resample(self, step: Step, state: Scales) -> Tensor | None:
        return self.first(self.last_reward(state, step).argmax(dim=1)) if step.last else None


class Svdd(Search):
    """The best of several next latents, at each step: soft value-based decoding.

    Li et al. 2024, arXiv 2408.08252, with the posterior mean for the value (its SVDD-PM): each step
    draws `particles` next latents, the loss of what the network expects behind each is its value,
    and all go on from the one that is chosen. Needs a scheduler that draws noise at each step.
    """

    class Settings(Search.Settings):
        temperature: float = Setting(
            0.0,
            ge=0,
            description="0 takes the best; above, one is drawn, with weights exp(reward / "
            "temperature)",
        )

    def setup(self, run: Run) -> Lineage:
        return Lineage(self.scales(run))

    def resample(self, step: Step, state: Lineage) -> Tensor | None:
        state.check(step)
        if step.last:
            return self.first(self.last_reward(state.scales, step).argmax(dim=1))
        reward = state.scales.reward(step, self.particles)
        if reward is None:
            return None
        if self.settings.temperature:
            weights = (reward / self.settings.temperature).softmax(dim=1)
            chosen = drawn(weights, step.generator[:: self.particles])
        else:
            chosen = reward.argmax(dim=1)
        return state.followed(step, chosen[:, None].expand(-1, self.particles))


class FeynmanKac(Search):
    """A particle filter: pictures follow the model's distribution times `exp(strength * reward)`.

    Singhal et al. 2025, arXiv 2501.06848, algorithm 1. Candidates have weights, the products of
    potentials along their way; where the effective sample size of a picture's candidates,
    `1 / sum(w^2)`, falls below a part of their number, they are drawn anew by their weights
    (systematically, in place of the paper's multinomial draw) and all weigh the same. The
    last potential makes each product `exp(strength * reward)` of the finished picture. Needs a
    scheduler that draws noise at each step.
    """

    class Settings(Search.Settings):
        strength: float = Setting(10.0, gt=0, description="the paper's lambda")
        potential: Literal["difference", "max", "sum"] = Setting(
            "difference",
            description="what a step's potential is the exponential of: how much the reward rose, "
            "the highest so far, or the sum so far",
        )
        every: int = Setting(1, ge=1, description="weigh on every n-th step, and the last")
        ess: float = Setting(
            0.5, ge=0, le=1, description="draw anew below this part of the effective sample size"
        )
        pick: Literal["best", "weighted"] = Setting(
            "best",
            description="the candidate that becomes the picture: that of the highest reward, or "
            "drawn by the weights, which is a sample of the distribution",
        )

    def setup(self, run: Run) -> Weighed:
        return Weighed(self.scales(run))

    def resample(self, step: Step, state: Weighed) -> Tensor | None:
        state.check(step)
        if step.last:
            return self.first(self._picked(step, state))
        reward = state.scales.reward(step, self.particles)
        if reward is None or step.index % self.settings.every:
            return None
        state.weigh(self.settings.strength * reward, self.settings.potential)
        weights = state.log_weights.softmax(dim=1)
        poor = weights.square().sum(dim=1) * self.settings.ess * self.particles > 1
        if not poor.any():
            return None
        generators = step.generator[:: self.particles]
        chosen = torch.where(poor[:, None], systematic(weights, generators), identity(weights))
        state.go_on(chosen, poor)
        return state.followed(step, chosen)

    def _picked(self, step: Step, state: Weighed) -> Tensor:
        reward = self.last_reward(state.scales, step)
        if self.settings.pick == "best":
            return reward.argmax(dim=1)
        # The product of all potentials is exp(strength * reward) then.
        final = self.settings.strength * reward - state.past
        weights = (state.log_weights + final).softmax(dim=1)
        return drawn(weights, step.generator[:: self.particles])


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
