"""Particle filters: candidates have weights, and are drawn anew by them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pilotfish import InputError, Setting, find_preset

from .lineage import Proposed, Weighed, drawn, identity, systematic
from .searches import Search

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Filter(Search):
    """Candidates with weights, which are drawn anew by them where few weigh most."""

    class Settings(Search.Settings):
        strength: float = Setting(
            10.0,
            gt=0,
            description="pictures follow the model's distribution times exp(strength * reward)",
        )
        ess: float = Setting(
            0.5, ge=0, le=1, description="draw anew below this part of the effective sample size"
        )
        pick: Literal["best", "weighted"] = Setting(
            "best",
            description="the candidate that becomes the picture: that of the highest reward, or "
            "drawn by the weights, which is a sample of the distribution",
        )

    def _drawn_anew(self, step: Step, state: Weighed) -> Tensor | None:
        """Where few weigh most, candidates go on by their weights."""
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


class FeynmanKac(Filter):
    """A particle filter: pictures follow the model's distribution times `exp(strength * reward)`.

    Singhal et al. 2025, arXiv 2501.06848, algorithm 1. Candidates have weights, the products of
    potentials along their way; where the effective sample size of a picture's candidates,
    `1 / sum(w^2)`, falls below a part of their number, they are drawn anew by their weights
    (systematically, in place of the paper's multinomial draw) and all weigh the same. The
    last potential makes each product `exp(strength * reward)` of the finished picture. Needs a
    scheduler that draws noise at each step.
    """

    class Settings(Filter.Settings):
        potential: Literal["difference", "max", "sum"] = Setting(
            "difference",
            description="what a step's potential is the exponential of: how much the reward rose, "
            "the highest so far, or the sum so far",
        )
        every: int = Setting(1, ge=1, description="weigh on every n-th step, and the last")

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
        return self._drawn_anew(step, state)


class Das(Filter):
    """A particle filter whose candidates the guides' gradients move: tempered, and weighed for it.

    Kim et al. 2025, arXiv 2501.05803, "Test-time Alignment of Diffusion Models without Reward
    Over-optimization", algorithm 1. The guides' moves of x0 or latents propose; a candidate's
    weight is multiplied by p / q of its way from step to step, of the model's own step to the moved
    one, and by exp(strength * (lambda_i reward_i - lambda_(i-1) reward_(i-1))) with lambda rising
    from 0 to 1: `min(1, (1 + gamma)^i - 1)`. So pictures follow the model's distribution times
    `exp(strength * reward)` whatever the guides' scale; one of `strength` under the preset
    "clip-guided" wastes the fewest candidates. The step is the ancestral one (DDIM's with eta = 1),
    whose density is known, in place of the scheduler's, whichever it is. The last step, which draws
    no noise, ignores the guides.

    Raises:
        InputError: the preset moves what a step leads to, or repeats steps: there p / q is not
            known.
    """

    class Settings(Filter.Settings):
        gamma: float | None = Setting(
            None,
            gt=0,
            description="how fast the reward comes to count; where not given, fully at the end",
        )

    def setup(self, run: Run) -> Proposed:
        preset = find_preset(run.preset)
        if preset.applied_to == "after_step" or preset.recurrence > 1:
            raise InputError(
                "das weighs what guides do to x0 or the latents, and the preset "
                f"{preset.name!r} changes what a step leads to: take 'clip-guided' or 'balanced'"
            )
        return Proposed(self.scales(run))

    def on_predicted_x0(self, x0: Tensor, step: Step, state: Proposed) -> None:
        state.model = step.latents, x0.detach()

    def resample(self, step: Step, state: Proposed) -> Tensor | None:
        order = self._order(step, state)
        if order is not None:
            state.model = tuple(values[order.to(values.device)] for values in state.model)
        return order

    def _order(self, step: Step, state: Proposed) -> Tensor | None:
        if step.last:
            return self.first(self._picked(step, state))
        reward = state.scales.reward(step, self.particles)
        if reward is None:
            return None
        gamma = self.settings.gamma or 2 ** (1 / step.num_steps) - 1
        tempered = min(1.0, (1 + gamma) ** (step.index + 1) - 1)
        state.weigh(self.settings.strength * tempered * reward, "difference")
        return self._drawn_anew(step, state)

    def advance(self, step: Step, state: Proposed) -> Tensor:
        alpha, sigma = step.alpha, step.sigma
        next_alpha, next_sigma = step.next_alpha, step.next_sigma
        variance = next_sigma**2 * (1 - (alpha * next_sigma / (next_alpha * sigma)) ** 2)

        def mean(latents: Tensor, x0: Tensor) -> Tensor:
            noise = (latents.to(x0.dtype) - alpha * x0) / sigma
            return next_alpha * x0 + math.sqrt(next_sigma**2 - variance) * noise

        model = mean(*state.model)
        if step.last:
            return model.to(step.latents.dtype)
        shift = mean(step.latents, step.x0) - model
        noise: Tensor = step.run.model.noise(shift.shape, step.generator, shift.dtype)
        drawn = math.sqrt(variance) * noise.to(shift.device)
        # log N(x; model, v) - log N(x; model + shift, v) of x = model + shift + drawn.
        ratio = -(shift * (2 * drawn + shift)).flatten(1).sum(dim=1) / (2 * variance)
        state.travel(ratio.cpu().view(-1, self.particles))
        return (model + shift + drawn).to(step.latents.dtype)
