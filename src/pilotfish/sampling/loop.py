"""The sampling loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError, PilotfishError
from ..hooks.stack import Call, Stack, tensor_problem
from ..models.text import Conditioning
from ..runs import pictures as images
from ..runs.run import Run
from .generators import Generators, draw
from .guides import Guides
from .prompts import Prompts
from .schedule import Schedule
from .start import Start
from .step import Moment, Step
from .trace import Trace

if TYPE_CHECKING:
    from ..models.stable_diffusion import LatentDiffusion


class Sampling:
    """One run under way.

    Attributes:
        described: the run with everything resolved, without the model.
        final: latents (B, C, H, W) at noise level zero, when the run is done.
    """

    def __init__(self, model: LatentDiffusion, run: Run, stack: Stack) -> None:
        self.model, self.stack, self.trace = model, stack, Trace()
        self.schedule = Schedule(model.new_scheduler(run.scheduler), run.steps, model.device)
        self.num_steps = self.schedule.num_steps
        self.described = run.resolved(model, stack.tables())
        self.run = dataclasses.replace(self.described, model=model)
        self.generators = Generators(self.run)
        self.guides = Guides(self.run, stack, self.schedule, self.generators, self.trace)
        self.final: Tensor | None = None
        self._networks = model.differentiable(run.checkpointing)

    @torch.no_grad()
    def steps(self) -> Generator[Step]:
        """The loop."""
        try:
            self.stack.notify("setup", self._for_run)
            prompts = Prompts(self.run, self.stack)
            latents, first = self._start()
            for index in range(first, self.num_steps):
                moment = self._predicted(index, latents, prompts)
                for repeat in range(1, self.guides.repeats(index)):
                    latents = self.guides.noised_again(moment)
                    moment = self._predicted(index, latents, prompts, repeat)
                latents = self._advance(moment)
                self._check_finite(latents, moment)
                self.stack.notify("after_step", self._for_step(moment), moment.where)
                yield Step(moment)
                if moment.stopped:
                    latents = moment.x0().to(latents.dtype)
                    break
            self.final = latents
            if self.run.decoder != "vae":
                self.guides.judge(moment, latents, lambda _: self.finished[1])
        finally:
            self.stack.teardown(self._for_run)

    @cached_property
    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Tensor]:
        """The final latents, and their image by the VAE: once more in float32 if not finite.

        Raises:
            NonFiniteError: it is not finite then either.
            PilotfishError: the run was ended by `close` or by an error before.
        """
        latents = self.final
        if latents is None:
            raise PilotfishError("this run was ended before it was done; it has no result")
        image = self.model.decode(latents)
        if not images.is_finite(image):
            image = self.model.decode_float32(latents)
        if not images.is_finite(image):
            raise NonFiniteError(
                f"the decoded picture is not finite (latents between {latents.min():.3g} and "
                f"{latents.max():.3g}); lower the guides' scale or guidance_scale"
            )
        return latents, image

    def _predicted(self, index: int, latents: Tensor, prompts: Prompts, repeat: int = 0) -> Moment:
        """A step up to its prediction, as the guides leave it."""
        moment, both = self._moment(index, latents, prompts, repeat)
        self._before_step(moment)
        guides = self.guides.active(index)
        with self._networks if guides else contextlib.nullcontext():
            cond, uncond = self._predict(moment, both, guides)
            if guides:
                self.guides.guide(moment, guides, cond, uncond)
        return moment

    def _start(self) -> tuple[Tensor, int]:
        """Latents and index of the first step: a plugin's, or pure noise."""
        shape = (self.run.num_images, *self.model.latent_shape(self.run.height, self.run.width))
        like = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        scheduler = self.schedule.scheduler
        start = Start(scheduler.order, self.generators.own, scheduler)
        answer = self.stack.first(
            "start_latents",
            lambda *_: {"run": self.run, "start": start},
            lambda new: _start_problem(new, like, self.num_steps),
        )
        if answer is None:
            noise = draw(shape, self.generators.own, like.dtype).to(like.device)
            return noise * scheduler.init_noise_sigma, 0
        latents, first = answer
        self.schedule.begin_at(first)
        return latents, first

    def _moment(
        self, index: int, latents: Tensor, prompts: Prompts, repeat: int
    ) -> tuple[Moment, Conditioning]:
        """The step as it begins, and what the network gets of both prompts."""
        moment = Moment(
            run=self.run,
            index=index,
            num_steps=self.num_steps,
            timestep=self.schedule.timesteps[index],
            level=self.schedule.level(index),
            latents=latents,
            conditioning=prompts.positive,
            generators=self.generators.of,
            following=lambda: self.schedule.following(index),
            repeat=repeat,
        )
        moment.conditioning, both = prompts.conditioning(
            lambda name: Step(moment, name), moment.where
        )
        return moment, both

    def _before_step(self, moment: Moment) -> None:
        def arguments(name: str, latents: Tensor) -> dict[str, Any]:
            moment.latents = latents
            return {"step": Step(moment, name)}

        moment.latents = self.stack.chain(
            "before_step", moment.latents, arguments, tensor_problem, moment.where
        )

    def _predict(
        self, moment: Moment, both: Conditioning, guides: list[Call]
    ) -> tuple[Tensor, Tensor | None]:
        """Both predictions; the moment gets the guided one, and x0.

        With a graph from the latents on if the gradient of an active guide ends there.
        """
        through = any("latents" in self.guides.ends(guide) for guide in guides)
        with torch.set_grad_enabled(through):
            if through:
                moment.latents = moment.latents.detach().requires_grad_()
            cond, uncond = self._network(moment, both)
            moment.output = self._combine(moment, cond, uncond)
            if self.stack.calls["on_predicted_x0"]:
                self._on_predicted_x0(moment)
            if guides:
                moment.x0()  # with its graph
        return cond.detach(), None if uncond is None else uncond.detach()

    def _network(self, moment: Moment, both: Conditioning) -> tuple[Tensor, Tensor | None]:
        """One call of the network: the prediction for the prompt, and for the negative prompt."""
        guided = self.run.guided_by_prompt
        latents = torch.cat([moment.latents] * 2) if guided else moment.latents
        latents = self.schedule.scheduler.scale_model_input(latents, moment.timestep)
        output = self.model.predict(latents, moment.timestep, both)  # (B or 2B, C, H, W)
        if not guided:
            return output, None
        uncond, cond = output.chunk(2)
        return cond, uncond

    def _combine(self, moment: Moment, cond: Tensor, uncond: Tensor | None) -> Tensor:
        answer: Tensor | None = self.stack.first(
            "combine_predictions",
            lambda name, _: {"cond": cond, "uncond": uncond, "step": Step(moment, name)},
            lambda new: tensor_problem(new, cond),
            moment.where,
        )
        if answer is not None:
            return answer
        if uncond is None:
            return cond
        return uncond + self.run.guidance_scale * (cond - uncond)

    def _on_predicted_x0(self, moment: Moment) -> None:
        before = moment.x0()
        after = self.stack.chain(
            "on_predicted_x0",
            before,
            lambda name, x0: {"x0": x0, "step": Step(moment, name)},
            tensor_problem,
            moment.where,
        )
        if after is not before:
            moment.change_x0(after)

    def _advance(self, moment: Moment) -> Tensor:
        latents: Tensor | None = self.stack.first(
            "advance",
            self._for_step(moment),
            lambda new: tensor_problem(new, moment.latents),
            moment.where,
        )
        generators, preset = self.generators.own, self.guides.preset
        direction = moment.after_step if preset.rule == "sphere" else None
        if latents is not None and direction is not None:
            raise InputError(
                f"preset {preset.name!r} turns the noise of the scheduler's step, and a plugin "
                "takes the step in its place; use another preset"
            )
        if latents is not None:
            self.schedule.pass_over(moment.index)
        elif direction is not None:
            return self.schedule.turned_step(moment, generators, direction)
        else:
            latents = self.schedule.step(moment, generators)
        return self.guides.after_step(moment, latents)

    def _check_finite(self, latents: Tensor, moment: Moment) -> None:
        if images.is_finite(latents):
            return
        where = f"after step {moment.index} of {moment.num_steps} (sigma {moment.level.sigma:.3g})"
        records = [r for r in self.trace if r.index == moment.index and r.gradient_norm]
        if records:
            worst = max(records, key=lambda r: max(r.gradient_norm))
            cause = (
                f"The largest gradient came from {worst.plugin!r}, norm "
                f"{max(worst.gradient_norm):.2g}; lower its scale."
            )
        else:
            cause = "No guide acted: the network's own output is not finite; try float32."
        raise NonFiniteError(f"latents became non-finite {where}. {cause}")

    def _for_run(self, *_: Any) -> dict[str, Any]:
        return {"run": self.run}

    def _for_step(self, moment: Moment) -> Callable[[str, Any], dict[str, Any]]:
        return lambda name, _: {"step": Step(moment, name)}


def _start_problem(answer: Any, like: Tensor, num_steps: int) -> str | None:
    """What is wrong with a `start_latents`' answer."""
    try:
        latents, first = answer
    except (TypeError, ValueError):
        return f"returned {type(answer).__name__}; expected (latents, index of the first step)"
    if problem := tensor_problem(latents, like):
        return problem
    if not isinstance(first, int) or not 0 <= first < num_steps:
        return f"starts at {first!r}; expected 0 to {num_steps - 1}"
    return None
