"""The guides of one run: who acts at a step, their losses, and the move they make together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError, ModelError, PluginError
from ..guidance import moves as rules
from ..guidance.gradients import (
    End,
    Leaves,
    LossFault,
    Pull,
    Trunk,
    all_finite,
    averaged,
    cosines,
    leaf_gradients,
)
from ..guidance.noise import CLEAN, at_least_float32
from ..guidance.presets import find_preset
from ..guidance.regions import Region
from ..hooks.plugin import Guide
from ..hooks.stack import Call, Stack
from ..runs.pictures import read_region
from ..runs.run import Run
from . import clock
from .generators import Generators, draw
from .schedule import Schedule
from .step import Moment, Step
from .trace import Record, Trace

# The host's own draws, under names that no plugin can have: they change nobody else's.
RECURRENCE, SAMPLES = "host recurrence", "host samples"


class Guides:
    """All guides of a run; what they did goes into the trace.

    Raises:
        InputError: a guide's mask cannot be read, or the preset does not fit the scheduler.
        ModelError: no gradient can be taken here.
    """

    def __init__(
        self, run: Run, stack: Stack, schedule: Schedule, generators: Generators, trace: Trace
    ) -> None:
        self.preset = find_preset(run.preset)
        self._run, self._stack, self._trace = run, stack, trace
        self._schedule, self._generators = schedule, generators
        self._decode = run.model.decoder(run.decoder)
        self._disabled: set[str] = set()
        self._regions: dict[str, Region] = {}
        for call in stack.calls["loss_guidance"]:
            if isinstance(call.plugin, Guide) and call.plugin.settings.mask is not None:
                settings, owner = call.plugin.settings, stack.label(call.name)
                self._regions[call.name] = read_region(
                    owner, settings.mask, settings.soft_edge, settings.mask_edge
                )
        if stack.calls["loss_guidance"]:
            self._refuse_what_cannot_work()
        self._strengths = schedule.strengths(self.preset.schedule)

    def _refuse_what_cannot_work(self) -> None:
        if torch.is_inference_mode_enabled():
            raise ModelError(
                "guides need gradients, and torch.inference_mode() allows none; "
                "call the sampler outside of it (it switches gradients off by itself)"
            )
        if reason := self._run.model.refuse_gradients():
            raise ModelError(f"no gradient can be taken: {reason}")
        if self.preset.recurrence > 1 and not self._schedule.can_repeat():
            raise InputError(
                f"preset {self.preset.name!r} takes steps more than once, and "
                f"{self._schedule.name} goes back to latents that it kept from the step "
                "before: use recurrence=1, or a scheduler such as ddim, euler, euler-ancestral or "
                "dpmsolver-multistep"
            )

    def active(self, index: int) -> list[Call]:
        """The guides that act at this step."""
        num_steps = self._schedule.num_steps
        if not self.preset.acts_at(index / num_steps):
            return []
        return [
            call
            for call in self._stack.calls["loss_guidance"]
            if call.name not in self._disabled
            and (not isinstance(call.plugin, Guide) or call.plugin.acts_at(index, num_steps))
        ]

    def repeats(self, index: int) -> int:
        """How often the step is taken: noise is put back only where a guide acts."""
        if not self.active(index):
            return 1
        return self.preset.repeats(index / self._schedule.num_steps)

    def ends(self, guide: Call) -> tuple[End, ...]:
        """Where its gradient ends."""
        own = getattr(getattr(guide.plugin, "settings", None), "gradient", None)
        end = own or self.preset.gradient
        return ("latents", "x0") if end == "both" else (end,)

    def guide(
        self, moment: Moment, guides: list[Call], cond: Tensor, uncond: Tensor | None
    ) -> None:
        """Let the active guides move the moment, which keeps no graph.

        Args:
            cond, uncond: the network's two predictions.
        """
        start = moment.latents if moment.latents.requires_grad else None
        trunk = Trunk(moment.x0(), self._decode, self._run.model.rgb, start)
        moment.detach()
        pull = rules.prompt_pull(moment.level, cond, uncond, self._run.guidance_scale)
        following, strength = self._schedule.following(moment.index), self._strengths[moment.index]
        place = rules.Place(moment.level, following, pull, strength)
        move = self._move(moment, guides, trunk, place)
        if move is None:
            return
        if self.preset.applied_to == "latents":
            moment.latents = moment.latents + move.to(moment.latents.dtype)
        elif self.preset.applied_to == "prediction":
            moment.change_x0(moment.x0() + move)
        else:
            moment.after_step = move

    def judge(self, moment: Moment, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> None:
        """Write the loss of each guide that acted into the trace, on the finished latents.

        Args:
            moment: the last step; the guides see it once more, at noise level zero.
            decode: the VAE.
        """
        x0 = at_least_float32(latents)
        done = dataclasses.replace(moment, latents=latents, known_x0=x0, level=CLEAN, views={})
        trunk, acted = Trunk(x0, decode, self._run.model.rgb), set(self._trace.plugins)
        guides = [g for g in self._stack.calls["loss_guidance"] if g.name in acted - self._disabled]
        for pull in self._pulls(done, guides, trunk, [])[1]:
            loss, norm = torch.stack([pull.loss, pull.norm]).tolist()
            self._trace.append(
                Record(
                    done.index,
                    done.level.sigma,
                    pull.name,
                    loss=tuple(loss),
                    gradient_norm=tuple(norm),
                    seconds=pull.seconds(),
                    repeat=done.repeat,
                    final=True,
                )
            )

    def after_step(self, moment: Moment, latents: Tensor) -> Tensor:
        """The step's result, moved where the preset says so."""
        if moment.after_step is None or self.preset.rule == "sphere":
            return latents
        return latents + moment.after_step.to(latents.dtype)

    def noised_again(self, moment: Moment) -> Tensor:
        """The latents of a step that is taken once more: "recurrence", "time travel".

        A step of the DDIM formula (Song et al. 2021, arXiv 2010.02502, equation 12, without noise)
        to the next noise level, then fresh noise back to this one. The scheduler, whose `step`
        counts and remembers, knows nothing of it.
        """
        level, following = moment.level, self._schedule.following(moment.index)
        if moment.output is None:
            raise ValueError("no prediction to go on from")
        x0 = level.x0(moment.latents, moment.output)
        cleaner = following.alpha * x0 + following.sigma * level.eps(moment.latents, x0)
        cleaner = self.after_step(moment, cleaner)
        latents, model = moment.latents, self._run.model
        noise = draw(latents.shape, self._generators.of(RECURRENCE), model.dtype)
        return level.noised(cleaner, following, noise.to(model.device)).to(latents.dtype)

    def _move(
        self, moment: Moment, guides: list[Call], trunk: Trunk, place: rules.Place
    ) -> Tensor | None:
        """The move against the guides' gradients, see `rules.combine`; None if none answered."""
        offsets = self._offsets(moment)
        trunks, pulls = self._pulls(moment, guides, trunk, offsets)
        if not pulls:
            return None

        def descend(move: Tensor) -> tuple[list[Trunk], list[Pull]]:
            to_x0 = [guide for guide in guides if "x0" in self.ends(guide)]
            return self._pulls(moment, to_x0, trunk.shifted(move), offsets)

        move = rules.combine(trunks, pulls, self.preset, place, descend)
        self._trace += records(moment, pulls)
        return move

    def _offsets(self, moment: Moment) -> list[Tensor]:
        """What is added to x0 for each sample of a loss; nothing where the preset asks for none."""
        size = self.preset.smoothing * moment.level.sigma / moment.level.norm
        if not size:
            return []
        generators, like = self._generators.of(SAMPLES), moment.x0()
        noise = [draw(like.shape, generators, like.dtype) for _ in range(self.preset.samples)]
        return [size * n.to(like.device) for n in noise]

    def _pulls(
        self, moment: Moment, guides: list[Call], trunk: Trunk, offsets: list[Tensor]
    ) -> tuple[list[Trunk], list[Pull]]:
        """Each guide's gradient, over all samples of x0, and the trunks to pull them back."""
        trunks = [trunk.shifted(offset) for offset in offsets] or [trunk]
        asked = [[self._pull(moment, guide, t) for t in trunks] for guide in guides]
        answered = [[pull for pull in pulls if pull] for pulls in asked if all(pulls)]
        if not all_finite([pull for pulls in answered for pull in pulls]):
            answered = [pulls for pulls in answered if self._is_finite(moment, pulls)]
        return trunks, [averaged(pulls) if offsets else pulls[0] for pulls in answered]

    def _pull(self, moment: Moment, guide: Call, trunk: Trunk) -> Pull | None:
        """One guide's gradient at its leaves; what is wrong with it is dealt with by `on_error`."""
        leaves, start, built = Leaves(trunk), clock.mark(trunk.device), len(trunk.spans)
        try:
            with torch.enable_grad():
                loss = self._stack.call(
                    guide, {"step": Step(moment, guide.name, leaves)}, moment.where
                )
                if loss is None:
                    return None
                gradients = leaf_gradients(loss, leaves, self._run.num_images)
        except LossFault as fault:
            self._blame(moment, guide.name, str(fault))
            return None
        except PluginError as error:
            self._tolerate(error, moment, guide.name)
            return None
        own, shared = (start, clock.mark(trunk.device)), trunk.spans[built:]
        area = 1.0
        if region := self._regions.get(guide.name):
            masks = {leaf: region.of(g.shape[-2:]).to(g) for leaf, g in gradients.items()}
            gradients = {leaf: g * masks[leaf] for leaf, g in gradients.items()}
            area = region.area
        return Pull(
            name=guide.name,
            scale=getattr(getattr(guide.plugin, "settings", None), "scale", 1.0),
            ends=self.ends(guide),
            loss=at_least_float32(loss.detach()).reshape(self._run.num_images).to(trunk.device),
            gradients=gradients,
            area=area,
            seconds=lambda: clock.seconds([own]) - clock.seconds(shared),
        )

    def _is_finite(self, moment: Moment, pulls: list[Pull]) -> bool:
        """Whether one guide's pulls are; if not, it is blamed for it."""
        fault = next((fault for pull in pulls if (fault := pull.fault())), None)
        if fault:
            self._blame(moment, pulls[0].name, fault)
        return fault is None

    def _blame(self, moment: Moment, name: str, what: str) -> None:
        """Deal with a fault of a guide's loss by `on_error`."""
        try:
            self._stack.blame(name, "loss_guidance", what, moment.where)
        except PluginError as error:
            self._tolerate(error, moment, name)

    def _tolerate(self, error: PluginError, moment: Moment, name: str) -> None:
        """Raise, or write the guide's failure into the trace and go on without it."""
        final = moment.level is CLEAN  # what a report cannot tell must not cost the picture
        if self._run.on_error == "raise" and not final:
            raise error
        if self._run.on_error == "disable":
            self._disabled.add(name)
        sigma = moment.level.sigma
        self._trace.append(Record(moment.index, sigma, name, error=str(error), final=final))


def records(moment: Moment, pulls: list[Pull]) -> list[Record]:
    """What each guide did at this step."""
    own = torch.stack([torch.stack([pull.loss, pull.norm, pull.share]) for pull in pulls])
    between = cosines(pulls).permute(1, 2, 0)
    # All numbers are read at once: a GPU must be waited for each time.
    values = torch.cat([own, between], dim=1).tolist()  # (k, 3 + k, B)
    return [
        Record(
            moment.index,
            moment.level.sigma,
            pull.name,
            loss=tuple(loss),
            gradient_norm=tuple(norm),
            share=tuple(share),
            cosine={
                other.name: tuple(cosine)
                for other, cosine in zip(pulls, others, strict=True)
                if other is not pull and other.gradients.keys() & pull.gradients.keys()
            },
            seconds=pull.seconds(),
            repeat=moment.repeat,
        )
        for pull, (loss, norm, share, *others) in zip(pulls, values, strict=True)
    ]
