"""The guides of one run: who acts at a step, their losses, and the move they make together."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import PluginError
from .guidance import (
    End,
    Leaves,
    LossFault,
    Pull,
    Trunk,
    combine,
    leaf_gradients,
)
from .plugin import Guide
from .presets import Preset
from .run import Run
from .stack import Call, Stack
from .step import Moment, Step
from .trace import Record, Trace


@dataclass
class Guides:
    """All guides of a run; what they did goes into the trace."""

    stack: Stack
    run: Run
    preset: Preset
    trace: Trace
    disabled: set[str] = field(default_factory=set)

    def active(self, index: int, num_steps: int) -> list[Call]:
        """The guides that act at this step."""
        return [
            call
            for call in self.stack.calls["loss_guidance"]
            if call.name not in self.disabled
            and (not isinstance(call.plugin, Guide) or call.plugin.acts_at(index, num_steps))
        ]

    def end(self, guide: Call) -> End:
        """Where its gradient ends."""
        own = getattr(getattr(guide.plugin, "settings", None), "gradient", None)
        return own or self.preset.gradient

    def move(self, moment: Moment, guides: list[Call], trunk: Trunk, pull: Tensor) -> None:
        """Move the latents, or the prediction, against the guides' gradients.

        Args:
            pull: the prompt's own, see `guidance.prompt_pull`.
        """
        pulls = [p for guide in guides if (p := self._pull(moment, guide, trunk)) is not None]
        if not pulls:
            return
        move = combine(trunk, pulls, self.preset, moment.level, pull)
        if self.preset.applied_to == "latents":
            moment.latents = moment.latents + move.to(moment.latents.dtype)
        else:
            moment.change_x0(moment.x0() + move)
        self.trace += [self._record(moment, p, pulls) for p in pulls]

    def _record(self, moment: Moment, own: Pull, pulls: list[Pull]) -> Record:
        cosines = {p.name: own.cosine(p) for p in pulls if p is not own}
        return Record(
            moment.index,
            moment.level.sigma,
            own.name,
            loss=_values(own.loss),
            gradient_norm=_values(own.norm),
            share=_values(own.share),
            cosine={name: _values(c) for name, c in cosines.items() if c is not None},
            seconds=own.seconds,
        )

    def _pull(self, moment: Moment, guide: Call, trunk: Trunk) -> Pull | None:
        """One guide's gradient at its leaves; what is wrong with it is dealt with by `on_error`."""
        leaves = Leaves(trunk)
        start = time.perf_counter() - trunk.seconds
        try:
            with torch.enable_grad():
                loss = self.stack.call(
                    guide, {"step": Step(moment, guide.name, leaves)}, moment.where
                )
                if loss is None:
                    return None
                try:
                    gradients = leaf_gradients(loss, leaves, self.run.num_images)
                except LossFault as fault:
                    self.stack.blame(guide.name, guide.hook, str(fault), moment.where)
        except PluginError as error:
            self._tolerate(error, moment, guide.name)
            return None
        settings = getattr(guide.plugin, "settings", None)
        return Pull(
            name=guide.name,
            scale=getattr(settings, "scale", 1.0),
            end=self.end(guide),
            loss=loss.detach().reshape(self.run.num_images).float(),
            gradients=gradients,
            seconds=time.perf_counter() - trunk.seconds - start,
        )

    def _tolerate(self, error: PluginError, moment: Moment, name: str) -> None:
        """Raise, or write the guide's failure into the trace and go on without it."""
        if self.run.on_error == "raise":
            raise error
        if self.run.on_error == "disable":
            self.disabled.add(name)
        self.trace.append(Record(moment.index, moment.level.sigma, name, error=str(error)))


def _values(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.tolist())
