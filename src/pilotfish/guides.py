"""The guides of one run: who acts at a step, their losses, and the move they make together."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import PluginError
from .guidance import End, Leaves, LossFault, Pull, Trunk, averaged, leaf_gradients
from .plugin import Guide
from .presets import Preset
from .regions import Region
from .rules import Place, combine
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
    regions: dict[str, Region] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for call in self.stack.calls["loss_guidance"]:
            if isinstance(call.plugin, Guide) and call.plugin.settings.mask is not None:
                settings, owner = call.plugin.settings, self.stack.label(call.name)
                self.regions[call.name] = Region(owner, settings.mask, settings.soft_edge)

    def active(self, index: int, num_steps: int) -> list[Call]:
        """The guides that act at this step."""
        if not self.preset.acts_at(index / num_steps):
            return []
        return [
            call
            for call in self.stack.calls["loss_guidance"]
            if call.name not in self.disabled
            and (not isinstance(call.plugin, Guide) or call.plugin.acts_at(index, num_steps))
        ]

    def ends(self, guide: Call) -> tuple[End, ...]:
        """Where its gradient ends."""
        own = getattr(getattr(guide.plugin, "settings", None), "gradient", None)
        end = own or self.preset.gradient
        return ("latents", "x0") if end == "both" else (end,)

    def move(
        self, moment: Moment, guides: list[Call], trunk: Trunk, place: Place, offsets: list[Tensor]
    ) -> Tensor | None:
        """The move against the guides' gradients, see `rules.combine`; None if none answered.

        Args:
            offsets: what is added to x0 for each sample of a loss; empty for x0 itself.
        """
        trunks, pulls = self._pulls(moment, guides, trunk, offsets)
        if not pulls:
            return None

        def descend(move: Tensor) -> tuple[list[Trunk], list[Pull]]:
            to_x0 = [guide for guide in guides if "x0" in self.ends(guide)]
            return self._pulls(moment, to_x0, trunk.shifted(move), offsets)

        move = combine(trunks, pulls, self.preset, place, descend)
        self.trace += [self._record(moment, p, pulls) for p in pulls]
        return move

    def _pulls(
        self, moment: Moment, guides: list[Call], trunk: Trunk, offsets: list[Tensor]
    ) -> tuple[list[Trunk], list[Pull]]:
        """Each guide's gradient, over all samples of x0, and the trunks to pull them back."""
        if not offsets:
            return [trunk], [p for guide in guides if (p := self._pull(moment, guide, trunk))]
        trunks = [trunk.shifted(offset) for offset in offsets]
        sampled = [[self._pull(moment, guide, t) for t in trunks] for guide in guides]
        return trunks, [averaged([p for p in s if p]) for s in sampled if all(s)]

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
            repeat=moment.repeat,
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
        area = 1.0
        if region := self.regions.get(guide.name):
            masks = {leaf: region.of(g.shape[-2:]).to(g) for leaf, g in gradients.items()}
            gradients = {leaf: g * masks[leaf] for leaf, g in gradients.items()}
            area = region.area
        return Pull(
            name=guide.name,
            scale=getattr(settings, "scale", 1.0),
            ends=self.ends(guide),
            loss=loss.detach().reshape(self.run.num_images).float(),
            gradients=gradients,
            area=area,
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
