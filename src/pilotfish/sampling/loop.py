"""The sampling loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import GuideWarning, InputError, NonFiniteError, PilotfishError
from ..hooks.stack import Arguments, Stack, tensor_problem
from ..models.protocol import Conditioning
from ..runs import pictures as images
from ..runs.run import Run
from .generators import Generators, indices_problem, seeded
from .guides import Guides
from .memory import check_size, in_parts, own_errors
from .network import Network
from .outside import Outside
from .prompts import Prompts
from .schedule import Schedule, Start
from .step import Step, StepState
from .trace import Trace

if TYPE_CHECKING:
    from ..models.protocol import LatentDiffusion

# The hooks whose tensors become latents.
CHANGING = ("before_step", "network_inputs", "combine_predictions", "on_predicted_x0", "advance")

TURN = "host turn"  # a name that no plugin can have


class Sampling:
    """One run under way.

    Args:
        measuring: it is there for `judge` alone.

    Attributes:
        described: the run with everything resolved, without the model.
        latents: (B, C, H, W), as the latest step left them.
        final: the same at noise level zero, when the run is done.
    """

    def __init__(
        self, model: LatentDiffusion, run: Run, stack: Stack, *, measuring: bool = False
    ) -> None:
        if torch.get_default_device().type == "meta":
            raise InputError(
                "torch's default device is meta, on which nothing is computed; leave "
                "torch.device('meta'), or torch.set_default_device('cpu')"
            )
        self.stack, self.trace = stack, Trace()
        self.again: Callable[[Stack], Sampling] = lambda other: Sampling(model, run, other)
        self.network = Network(model, run.checkpointing, stack)
        self.model = self.network.model
        self.described = run.resolved(self.model, stack.tables())
        self.particles = stack.particles
        self.run = self.described.of_model(self.model, self.particles)
        known = self.run.height, self.run.width, self.run.steps
        height, width, steps = cast("tuple[int, int, int]", known)  # in a resolved run
        self.model.size = height, width
        self.shape = self.model.latent_shape(height, width)
        check_size(self.described, self.shape, self.model.device)
        # The user's own spec: what describes a scheduler is not what makes it.
        spec = self.model.defaults.scheduler if run.scheduler is None else run.scheduler
        set_timesteps = partial(self.model.set_timesteps, shape=self.shape)
        self.schedule = Schedule(self.model.new_scheduler(spec), steps, set_timesteps)
        self.num_steps = self.schedule.num_steps
        self.generators = Generators(self.run)
        self.guides = Guides(self.run, stack, self.schedule, self.generators, self.trace, measuring)
        self.latents: Tensor | None = None
        self.final: Tensor | None = None

    @torch.no_grad()
    def steps(self) -> Generator[Step]:
        """The loop."""
        with self._set_up(), contextlib.closing(Outside(self)) as outside:
            self.prompts = Prompts(self.run, self.stack)
            latents, first = self._start()
            for index in range(first, self.num_steps):
                repeats = self.guides.repeats(index)
                for repeat in range(repeats):
                    state = self.begin(index, latents, repeat)
                    cond, uncond = self.predict(state)
                    self.guide(state, cond, uncond)
                    if repeat + 1 < repeats:
                        latents = self.guides.renoise(state)
                if self.particles > 1:
                    self._choose(state)
                latents = outside.held(self.advance(state))
                self._check_finite(latents, state)
                self.stack.notify("after_step", state.arguments(), state.where)
                if self.particles == 1:
                    latents = self._resampled(state, latents)
                self.latents = latents
                yield Step(state)
                if state.stopped:
                    latents = outside.held_x0(state.x0).to(latents.dtype)
                    break
            self.final = outside.result(latents)[:: self.particles]
            self._sum_up(state)

    @torch.no_grad()
    def judge(self, latents: Tensor) -> Trace:
        """Every guide's loss on finished latents, in place of the loop; no step is taken."""
        with self.as_loaded(), self._set_up():
            self.prompts = Prompts(self.run, self.stack)
            state = self.begin(self.num_steps - 1, latents, 0)
            names = {call.name for call in self.stack.calls["loss_guidance"]}
            self.guides.judge(state, latents, self.model.decoder("vae"), names)
        return self.trace

    def as_loaded(self) -> contextlib.AbstractContextManager[Any]:
        """In the model's own dtype, also where the caller has autocast on."""
        return torch.autocast(self.model.device.type, enabled=False)

    def _own_errors(self) -> contextlib.AbstractContextManager[None]:
        return own_errors(self.described, lambda: (self.latents, self.final))

    @contextlib.contextmanager
    def _set_up(self) -> Iterator[None]:
        """All plugins set up; torn down whatever happens, and no error hides the first."""
        with self._own_errors(), self._torn_down():
            self.stack.setup(self._for_run)
            yield

    @contextlib.contextmanager
    def _torn_down(self) -> Iterator[None]:
        try:
            yield
        except BaseException as first:
            try:
                self.stack.teardown(self._for_run)
            except Exception as error:  # MemoryError too
                if isinstance(first, GeneratorExit):
                    raise
                notes = [f"and at teardown: {error}", *getattr(error, "__notes__", ())]
                first.add_note("\n".join(notes))
            raise
        self.stack.teardown(self._for_run)

    def begin(self, index: int, latents: Tensor, repeat: int) -> StepState:
        """The step as the network will find it."""
        state = StepState(
            run=self.run,
            index=index,
            num_steps=self.num_steps,
            timestep=self.schedule.timesteps[index],
            level=self.schedule.levels[index],
            following=self.schedule.following(index),
            latents=latents,
            conditioning=self.prompts.positive,
            generators=self.generators.of,
            predict=self._further_prediction,
            as_used=self.schedule.as_used,
            repeat=repeat,
        )

        def arguments(name: str, latents: Tensor) -> dict[str, Any]:
            state.latents = latents
            return {"step": Step(state, name)}

        state.conditioning, state.calls = self.prompts.conditioning(state)
        state.latents = self._chain("before_step", state, arguments, latents)
        return state

    def predict(self, state: StepState) -> tuple[Tensor, Tensor | None]:
        """Both predictions of the network; the state gets the guided one, and x0.

        With a graph from the latents on if the gradient of an active guide ends there.
        """
        guides = self.guides.active(state.index)
        through = self.guides.through_network(guides)
        with torch.set_grad_enabled(through):
            if through:
                state.latents = state.latents.detach().requires_grad_()
            cond, uncond = self.network.both(state, self.schedule.scaled)
            state.output = self._combine(state, cond, uncond)
            if guides or self.stack.calls["on_predicted_x0"]:
                state.x0 = self._chain("on_predicted_x0", state, state.arguments("x0"), state.x0)
        return cond.detach(), None if uncond is None else uncond.detach()

    def guide(self, state: StepState, cond: Tensor, uncond: Tensor | None) -> None:
        """The active guides are asked; they move the state together."""
        if guides := self.guides.active(state.index):
            self.guides.move(state, guides, cond, uncond)

    def advance(self, state: StepState) -> Tensor:
        """The next latents: a plugin's, or the scheduler's."""
        problem, own = partial(tensor_problem, old=state.latents), self.generators.own
        latents: Tensor | None = self.stack.first(
            "advance", state.arguments(), problem, state.where
        )
        if latents is not None:
            self.schedule.skip(state.index)
        elif state.direction is not None:
            others = partial(seeded, self.run, TURN)
            latents = self.schedule.spherical_step(state, own, others, state.direction)
        else:
            # The scheduler counts and remembers, also where its step is not taken.
            latents = self.schedule.step(state, own)
            latents = self.guides.renewed(state).to(latents) if state.renewed else latents
        return latents if state.after is None else latents + state.after.to(latents.dtype)

    @cached_property
    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Tensor]:
        """The final latents, and their image by the VAE: once more in float32 if not finite.

        Raises:
            NonFiniteError: it is not finite then either.
            OutOfMemoryError: memory is not enough for one of them alone.
            PilotfishError: the run was ended by `close` or by an error before.
        """
        latents = self.final
        if latents is None:
            raise PilotfishError("this run was ended before it was done; it has no result")
        with self._own_errors(), self.as_loaded():
            image = in_parts(self.model.decode, latents)
            if not images.is_finite(image):
                image = in_parts(self.model.decode_float32, latents)
        if not images.is_finite(image):
            raise NonFiniteError(
                f"the decoded picture is not finite (latents between {latents.min():.3g} and "
                f"{latents.max():.3g}); lower the guides' scale or guidance_scale"
            )
        return latents, image

    # ---- what the stages are made of ----

    def _start(self) -> tuple[Tensor, int]:
        """Latents and index of the first step: a plugin's, or pure noise."""
        shape = (self.run.num_images, *self.shape)
        like = torch.empty(shape, dtype=self.model.latents_dtype, device=self.model.device)
        start = Start(self.schedule.order, self.generators.own, self.schedule)
        problem = partial(_start_problem, like=like, num_steps=self.num_steps)
        arguments = {"run": self.run, "start": start}
        answer = self.stack.first("start_latents", lambda *_: dict(arguments), problem)
        if answer is None:
            noise = self.model.noise(shape, self.generators.own, like.dtype).to(like.device)
            return noise * self.schedule.initial_scale, 0
        latents, first = answer
        self.schedule.begin_at(first)
        return latents, first

    def _further_prediction(
        self, state: StepState, plugin: str, conditioning: Any, patch: Any, offset: Tensor | None
    ) -> Tensor:
        """See `Step.predict`."""
        if isinstance(conditioning, str):
            conditioning = self.prompts.of_text(conditioning)
        given = state.conditioning if conditioning is None else conditioning
        if not isinstance(given, Conditioning):
            what = f"takes a prompt or a Conditioning; got {type(given).__name__}"
            self.stack.blame(plugin, "step.predict", what, state.where)
        given = given.expand(self.run.num_images)
        latents = state.latents if offset is None else state.latents + offset.to(state.latents)
        latents = self.schedule.scaled(latents, state.timestep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            return self.network(state, latents, given, patch, plugin)

    def _combine(self, state: StepState, cond: Tensor, uncond: Tensor | None) -> Tensor:
        begun = cond
        if uncond is not None:
            begun = self.model.combine(cond, uncond, self.run.cfg_scale or 0.0)
        arguments = state.arguments("prediction", cond=cond, uncond=uncond)
        return self._chain("combine_predictions", state, arguments, begun)

    def _chain(self, hook: str, state: StepState, arguments: Arguments, value: Tensor) -> Tensor:
        answer: Tensor = self.stack.chain(hook, value, arguments, tensor_problem, state.where)
        return answer

    def _choose(self, state: StepState) -> None:
        """Let candidates go on in others' places, before the scheduler's noise parts them."""
        indices = self._indices(state, state.latents)
        if indices is not None:
            state.take(indices)

    def _resampled(self, state: StepState, latents: Tensor) -> Tensor:
        """The latents, where a plugin says which images go on in whose place."""
        indices = self._indices(state, latents)
        if indices is None:
            return latents
        self.generators.resample(indices.tolist())
        return latents[indices.to(latents.device)]

    def _indices(self, state: StepState, latents: Tensor) -> Tensor | None:
        """A plugin's answer, (B,) on the CPU; the scheduler's history has followed it."""
        problem = partial(indices_problem, count=len(latents))
        answer = self.stack.first("resample", state.arguments(), problem, state.where)
        if answer is None:
            return None
        indices = torch.as_tensor(answer).cpu()
        self.schedule.resample(indices, latents)
        return indices

    def _sum_up(self, state: StepState) -> None:
        """What the trace tells of the whole run."""
        if self.run.decoder != "vae" and self.final is not None and self.particles == 1:
            acted = set(self.trace.plugins)
            self.guides.judge(state, self.final, lambda _: self.finished[1], acted)
        self.trace.remarks = list(self.guides.remarks())
        if self.trace.remarks:
            warnings.warn("; ".join(self.trace.remarks), GuideWarning, stacklevel=2)

    def _check_finite(self, latents: Tensor, state: StepState) -> None:
        if images.is_finite(latents):
            return
        names = [f"{c.hook}() of {c.name!r}" for hook in CHANGING for c in self.stack.calls[hook]]
        own = " or ".join(["the network's own output", *(f"what comes from {n}" for n in names)])
        cause = f"No guide acted: {own} is not finite; try float32."
        if here := [r for r in self.trace if r.gradient_norm and r.index == state.index]:
            norm, plugin = max((max(r.gradient_norm), r.plugin) for r in here)
            cause = f"The largest gradient came from {plugin!r}, norm {norm:.2g}; lower its scale."
        where = f"step {state.index} of {state.num_steps} (sigma {state.level.sigma:.3g})"
        raise NonFiniteError(f"latents became non-finite after {where}. {cause}")

    def _for_run(self, *_: Any) -> dict[str, Any]:
        return {"run": self.run}


def _start_problem(answer: Any, like: Tensor, num_steps: int) -> str | None:
    """What is wrong with a `start_latents`' answer."""
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        return f"returned {type(answer).__name__}; expected (latents, index of the first step)"
    latents, first = answer
    if problem := tensor_problem(latents, like):
        return problem
    if not isinstance(first, int) or not 0 <= first < num_steps:
        return f"starts at {first!r}; expected 0 to {num_steps - 1}"
    return None
