"""The guides of one run: who acts at a step, what each of them asks for, and what it came to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import InputError, ModelError, PluginError
from ..guidance import moves
from ..guidance.gradients import (
    End,
    Gradients,
    LossFault,
    Pull,
    all_finite,
    averaged,
    check_loss,
    cosines,
    leaf_gradients,
)
from ..guidance.graph import Leaves, SharedGraph, mark, power_of_two, seconds
from ..guidance.noise import CLEAN, at_least_float32, draw
from ..guidance.presets import find_preset
from ..hooks.plugin import Guide
from ..hooks.stack import Call, Stack
from ..runs.pictures import read_region
from ..runs.run import Run
from .generators import Generators
from .schedule import Schedule
from .step import Step, StepState
from .trace import Record, Trace

# The host's own draws, under names that no plugin can have: they change nobody else's.
RECURRENCE, RENEWAL, SAMPLES = "host recurrence", "host renewal", "host samples"


class Guides:
    """All guides of a run; what they did goes into the trace.

    Args:
        measuring: their losses alone are asked for, and no gradient.

    Raises:
        InputError: a guide's mask cannot be read, or the preset does not fit the scheduler.
        ModelError: no gradient can be taken here.
    """

    def __init__(
        self,
        run: Run,
        stack: Stack,
        schedule: Schedule,
        generators: Generators,
        trace: Trace,
        measuring: bool = False,
    ) -> None:
        self.preset = find_preset(run.preset)
        self._run, self._stack, self._trace = run, stack, trace
        self._schedule, self._generators, self._measuring = schedule, generators, measuring
        self._decode = run.model.decoder(run.decoder)
        self._disabled: set[str] = set()
        self._calls = stack.calls["loss_guidance"]
        # A plugin that is no guide, and has a loss, acts as one of the usual settings.
        self._guides = {
            c.name: c.plugin if isinstance(c.plugin, Guide) else Guide() for c in self._calls
        }
        self._settings = {name: guide.settings for name, guide in self._guides.items()}
        self.regions = {
            name: read_region(stack.label(name), s.mask, s.soft_edge, s.mask_edge)
            for name, s in self._settings.items()
            if s.mask is not None
        }
        if self._calls and not measuring:
            self._refuse_what_cannot_work()
        self._strengths = schedule.strengths(self.preset.schedule)

    def _refuse_what_cannot_work(self) -> None:
        preset = self.preset
        if torch.is_inference_mode_enabled():
            raise ModelError(
                "guides need gradients, and torch.inference_mode() allows none: call the sampler "
                "outside of it (it switches gradients off by itself)"
            )
        if reason := self._run.model.refuse_gradients():
            raise ModelError(f"no gradient can be taken: {reason}")
        if (preset.recurrence > 1 or preset.renoise) and not self._schedule.can_repeat:
            what = "takes steps more than once" if preset.recurrence > 1 else "puts noise back"
            raise InputError(
                f"preset {preset.name!r} {what}, and {self._schedule.name} goes back to latents "
                "that it kept from the step before: use recurrence=1 and renoise=0, or a "
                "scheduler such as ddim, euler, euler-ancestral or dpmsolver-multistep"
            )
        if (preset.rule == "sphere" or preset.renoise) and self._stack.calls["advance"]:
            raise InputError(
                f"preset {preset.name!r} turns the noise of a step, or draws it anew, and a plugin "
                "takes the step in its place; use another preset"
            )

    def active(self, index: int) -> list[Call]:
        """The guides that act at this step."""
        num_steps = self._schedule.num_steps
        if not self.preset.acts_at(index / num_steps):
            return []
        calls = [c for c in self._calls if c.name not in self._disabled]
        return [c for c in calls if self._guides[c.name].acts_at(index, num_steps)]

    def repeats(self, index: int) -> int:
        """How often the step is taken: noise is put back only where a guide acts."""
        progress = index / self._schedule.num_steps
        return self.preset.repeats(progress) if self.active(index) else 1

    def through_network(self, guides: list[Call]) -> bool:
        """Whether any gradient goes on to the latents."""
        return any("latents" in self._ends(guide) for guide in guides)

    def _ends(self, guide: Call) -> tuple[End, ...]:
        """Where its gradient ends."""
        end = self._settings[guide.name].gradient or self.preset.gradient
        if end == "none" or self._measuring:
            return ()
        return moves.ENDS if end == "both" else (end,)

    def move(
        self, state: StepState, guides: list[Call], cond: Tensor, uncond: Tensor | None
    ) -> None:
        """Move a step by what the guides make of it together. It keeps no graph then.

        Args:
            cond, uncond: the network's two predictions.
        """
        start = state.latents if state.latents.requires_grad else None
        graph = SharedGraph(state.x0, self._decode, self._run.model.rgb, start)
        state.detach()
        offsets = self._offsets(state)
        graphs, found = self._pulls(state, guides, graph, offsets)
        state.losses = {pull.name: pull.loss for pull in found}
        pulls = [pull for pull in found if pull.ends]
        self._trace += self._records(state, [pull for pull in found if not pull.ends])
        if not pulls:
            return

        def descend(move: Tensor, end: End) -> tuple[list[SharedGraph], list[Pull]]:
            those = [guide for guide in guides if end in self._ends(guide)]
            return self._pulls(state, those, graph.shifted(move), offsets)

        scale = self._run.cfg_scale or 0.0
        pull = moves.prompt_pull(state.level, state.latents, cond, uncond, scale)
        place = moves.Place(state.level, state.following, pull, self._strengths[state.index])
        move = moves.combine(graphs, pulls, self.preset, place, descend)
        self._trace += self._records(state, pulls, move)
        self._apply(state, move.value)

    def _apply(self, state: StepState, move: Tensor) -> None:
        """Move what the preset says."""
        share, following = self.preset.renoise, state.following
        state.renewed = 1 - following.time if share == "alpha" else share
        if self.preset.rule == "sphere":
            state.direction = move
        elif self.preset.applied_to == "latents":
            state.latents = state.latents + move.to(state.latents.dtype)
        elif self.preset.applied_to == "prediction":
            state.x0 = state.x0 + move
        else:
            state.after = move

    def judge(
        self, state: StepState, latents: Tensor, decode: Callable[[Tensor], Tensor], names: set[str]
    ) -> None:
        """Write the loss of the guides of these names into the trace, on the finished latents.

        Args:
            state: the last step; the guides see it once more, at noise level zero.
            decode: the VAE.
        """
        done = state.finished(latents)
        graph = SharedGraph(done.x0, decode, self._run.model.rgb)
        guides = [g for g in self._calls if g.name in names - self._disabled]
        self._trace += self._records(done, self._pulls(done, guides, graph, [])[1])

    def renoise(self, state: StepState) -> Tensor:
        """The latents of a step that is taken once more: "recurrence", "time travel".

        A step of the DDIM formula to the next noise level, then fresh noise back to this one. The
        scheduler, whose `step` counts and remembers, knows nothing of it.
        """
        cleaner, level = self.renewed(state), state.level
        if state.after is not None:
            cleaner = cleaner + state.after
        noise = self._noise(RECURRENCE, cleaner)
        return level.noised(cleaner, state.following, noise).to(state.latents.dtype)

    def renewed(self, state: StepState) -> Tensor:
        """A step of the DDIM formula, a part `state.renewed` of whose noise is drawn anew.

        Song et al. 2021, arXiv 2010.02502, equation 12, with its sigma_t^2 as that part of the
        next level's variance.
        """
        level, following, part = state.level, state.following, state.renewed
        if state.output is None:
            raise ValueError("no prediction to go on from")
        x0 = level.x0(state.latents, state.output)
        eps = level.eps(state.latents, x0)
        if part:
            eps = (1 - part) ** 0.5 * eps + part**0.5 * self._noise(RENEWAL, eps)
        return following.alpha * x0 + following.sigma * eps

    def _noise(self, name: str, like: Tensor) -> Tensor:
        model, generators = self._run.model, self._generators.of(name)
        noise: Tensor = model.noise(like.shape, generators, model.latents_dtype)
        return noise.to(like)

    def remarks(self) -> Iterator[str]:
        """The guides that did nothing in the whole run, or the opposite of what they are for."""
        for call in self._calls:
            guide, num_steps = self._guides[call.name], self._schedule.num_steps
            scale = sum(guide.scale_at(index, num_steps) for index in range(num_steps))
            records = [r for r in self._trace.of(call.name) if not r.final]
            losses = self._trace.losses(call.name)
            if scale == 0 or any(record.error for record in records):
                continue
            if not records:
                yield f"{call.name!r} never gave a loss: no step lies in its window, or it was None"
            elif not self._ends(call):
                continue
            elif not any(norm for record in records for norm in record.gradient_norm):
                yield f"{call.name!r} has a gradient of zero at every step: it moved nothing"
            elif (losses[-1] - losses[0]) * scale > 1e-3 * abs(losses[0] * scale):
                way = "rose" if scale > 0 else "fell, at a negative scale,"
                yield f"the loss of {call.name!r} {way} from {losses[0]:.4g} to {losses[-1]:.4g}"

    def _offsets(self, state: StepState) -> list[Tensor]:
        """What is added to x0 for each sample of a loss; nothing where the preset asks for none."""
        size = self.preset.smoothing * state.level.sigma / state.level.norm
        if not size:
            return []
        generators, like = self._generators.of(SAMPLES), state.x0
        noise = [draw(like.shape, generators, like.dtype) for _ in range(self.preset.samples)]
        return [size * n.to(like.device) for n in noise]

    def _pulls(
        self, state: StepState, guides: list[Call], graph: SharedGraph, offsets: list[Tensor]
    ) -> tuple[list[SharedGraph], list[Pull]]:
        """Each guide's gradient, over all samples of x0, and the graphs to pull them back."""
        graphs = [graph.shifted(offset) for offset in offsets] or [graph]
        asked = [[self._pull(state, guide, t) for t in graphs] for guide in guides]
        answered = [[pull for pull in pulls if pull] for pulls in asked if all(pulls)]
        if not all_finite([pull for pulls in answered for pull in pulls]):
            answered = [pulls for pulls in answered if self._is_finite(state, pulls)]
        return graphs, [averaged(pulls) if offsets else pulls[0] for pulls in answered]

    def _pull(self, state: StepState, guide: Call, graph: SharedGraph) -> Pull | None:
        """One guide's gradient at its leaves; what is wrong with it is dealt with by `on_error`."""
        leaves, start, built = Leaves(graph), mark(graph.device), len(graph.spans)
        gradients: Gradients | None = None
        with self._tolerant(state, guide.name), torch.enable_grad():
            loss = self._stack.call(guide, {"step": Step(state, guide.name, leaves)}, state.where)
            if loss is not None:
                check_loss(loss, self._run.num_images)
                loss = at_least_float32(loss)
                power = power_of_two(loss.detach().abs())
                gradients = leaf_gradients(loss * power, leaves) if self._ends(guide) else {}
        if gradients is None:
            return None
        own, shared = (start, mark(graph.device)), graph.spans[built:]
        if region := self.regions.get(guide.name):
            gradients = {leaf: g * region.of(g.shape[-2:]).to(g) for leaf, g in gradients.items()}
        return Pull(
            name=guide.name,
            scale=self._guides[guide.name].scale_at(state.index, state.num_steps),
            ends=self._ends(guide),
            loss=loss.detach().reshape(-1).to(graph.device),
            gradients=gradients,
            size=(1 / power).reshape(-1).to(graph.device),
            area=region.area if region else 1.0,
            seconds=lambda: seconds([own]) - seconds(shared),
        )

    def _is_finite(self, state: StepState, pulls: list[Pull]) -> bool:
        """Whether one guide's pulls are; if not, it is blamed for it."""
        faults = [fault for pull in pulls if (fault := pull.fault())]
        with self._tolerant(state, pulls[0].name):
            if faults:
                raise LossFault(faults[0])
        return not faults

    @contextlib.contextmanager
    def _tolerant(self, state: StepState, name: str) -> Iterator[None]:
        """By `on_error`, a guide's failure is raised, or goes into the trace."""
        try:
            try:
                yield
            except LossFault as fault:
                self._stack.blame(name, "loss_guidance", str(fault), state.where)
        except PluginError as error:
            final = state.level is CLEAN  # what a report cannot tell must not cost the picture
            if self._run.on_error == "raise" and not final:
                raise
            if self._run.on_error == "disable":
                self._disabled.add(name)
            sigma = state.level.sigma
            self._trace.append(Record(state.index, sigma, name, error=str(error), final=final))

    def _records(
        self, state: StepState, pulls: list[Pull], move: moves.Move | None = None
    ) -> Iterator[Record]:
        """What each guide did at this step; without a move, what it says of the result."""
        if not pulls:
            return
        found = [torch.stack([torch.stack([p.loss, p.length, p.size]) for p in pulls])]  # (k, 3, B)
        if move is not None:
            outside = torch.stack([self._outside(pull.name, move.value) for pull in pulls])
            found += [torch.stack([move.shares, outside], dim=1), cosines(pulls).permute(1, 2, 0)]
        # All numbers are read at once: a GPU must be waited for each time.
        rows = torch.cat([numbers.to(found[0]) for numbers in found], dim=1).tolist()
        for pull, row in zip(pulls, rows, strict=True):
            loss, lengths, sizes, *more = map(tuple, row)
            share, leak, *between = more or ((), ())
            yield Record(
                state.index,
                state.level.sigma,
                pull.name,
                loss=loss,
                gradient_norm=tuple(n * s for n, s in zip(lengths, sizes, strict=True)),
                share=share,
                outside=leak if pull.name in self.regions else (),
                cosine={
                    other.name: cosine
                    for other, cosine in zip(pulls, between, strict=False)
                    if other is not pull and other.gradients.keys() & pull.gradients.keys()
                },
                seconds=pull.seconds(),
                repeat=state.repeat,
                final=state.level is CLEAN,
            )

    def _outside(self, name: str, move: Tensor) -> Tensor:
        """What part of a move lies where a guide's mask is black, (B,): of its mean square."""
        if name not in self.regions:
            return move.new_zeros(len(move))
        squares = move.square().sum(dim=1)  # (B, H, W)
        black = self.regions[name].of(move.shape[-2:])[0].to(squares) == 0
        total = squares.sum(dim=(1, 2))
        return (black * squares).sum(dim=(1, 2)) / total.clamp(min=torch.finfo(total.dtype).tiny)
