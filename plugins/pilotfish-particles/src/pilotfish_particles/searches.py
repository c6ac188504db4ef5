"""The best of several: whole runs, or next latents at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pilotfish import InputError, Plugin, Setting, strength_at

from .lineage import Lineage, Scales, drawn

if TYPE_CHECKING:
    from pilotfish import Run, Step


class Search(Plugin):
    """What all searches have: `particles` candidates of each picture, in one batch.

    The candidates of picture i are the pictures that the seeds `seed + i * particles` and following
    would give. Their reward is minus the sum of the guides' losses, each times its scale, of x0
    before the guides' move.

    Raises:
        InputError: the run has no such guide, or one of them is not asked at the last step.
    """

    heading = "search among particles"

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
