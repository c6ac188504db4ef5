"""The sampler, and the sampling loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import Tensor

from . import images, rules
from .errors import InputError, ModelError, NonFiniteError, PilotfishError
from .guidance import Trunk, rms
from .guides import Guides
from .noise import NoiseLevel, noise_level
from .presets import find_preset
from .run import Options, Run
from .stack import Call, Stack, tensor_problem
from .step import Moment, Step
from .text import Conditioning, Prompt, collect_vocabulary
from .trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import LatentDiffusion

# The host's own draws, under names that no plugin can have: they change nobody else's.
RECURRENCE, SAMPLES, TURN = "host recurrence", "host samples", "host turn"


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
        images: one PIL picture per image.
        latents: (B, C, H, W), at noise level zero.
        trace: what each guide did at each step.
        run: the resolved run; `run.to_toml()` holds everything needed to repeat it.
    """

    images: list[Image]
    latents: Tensor
    trace: Trace
    run: Run


class Stream(Iterator[Step]):
    """The steps of a run, one at a time; leaving early tears the plugins down.

    Attributes:
        run, trace: as in `Result`; the trace grows with the steps.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._steps = sampling.steps()
        self.run, self.trace = sampling.described, sampling.trace

    def __next__(self) -> Step:
        return next(self._steps)

    def __len__(self) -> int:
        return self._sampling.num_steps

    def close(self) -> None:
        """End the run without a result."""
        self._steps.close()

    def result(self) -> Result:
        """Take the remaining steps and decode the pictures.

        Raises:
            NonFiniteError: the picture is not finite, in float32 neither.
            PilotfishError: the run was ended by `close` or by an error before.
        """
        for _ in self._steps:
            pass
        latents = self._sampling.final
        if latents is None:
            raise PilotfishError("this run was ended before it was done; it has no result")
        return Result(self._sampling.decode(latents), latents, self.trace, self.run)


class Sampler:
    """Samples pictures from a latent diffusion model with plugins.

    Args:
        model: the networks, usually from `pilotfish.load` or `Sampler.from_pipeline`.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> Sampler:
        """Use the networks of a `StableDiffusionPipeline`, with its LoRAs and textual inversions.

        The pipeline's safety checker is not run.

        Raises:
            ModelError: the pipeline is of another kind.
        """
        from .model import StableDiffusion

        return cls(StableDiffusion(pipeline))

    def __call__(
        self, prompt: str = "", *, plugins: Sequence[object] = (), **options: Unpack[Options]
    ) -> Result:
        """Make pictures.

        Args:
            plugins: in order; instances, strings `"blue:scale=2,every=5"`, or mappings
                `{"use": "blue", "scale": 2}`.
            options: see `pilotfish.Run`.

        Raises:
            InputError: a value or name is wrong; nothing has run then.
            PluginError: a plugin broke its contract; names plugin, hook and step.
            NonFiniteError: the latents or the picture became NaN or infinite.
        """
        return self.stream(prompt, plugins=plugins, **options).result()

    def stream(
        self, prompt: str = "", *, plugins: Sequence[object] = (), **options: Unpack[Options]
    ) -> Stream:
        """The same as an iterator over steps: watch, preview, or break when it is good enough.

        Everything is checked before the first step is asked for. Arguments as in `__call__`.
        """
        stack = Stack(plugins)
        if options.get("seed") is None:
            options.pop("seed", None)
        run = Run(prompt=prompt, **cast("dict[str, Any]", options))
        return Stream(Sampling(self.model, run, stack))


class Sampling:
    """One run under way."""

    def __init__(self, model: LatentDiffusion, run: Run, stack: Stack) -> None:
        self.model, self.stack, self.trace = model, stack, Trace()
        self.scheduler = model.new_scheduler(run.scheduler)
        self.scheduler.set_timesteps(run.steps, device=model.device)
        self.num_steps = len(self.scheduler.timesteps)
        self.shape = (run.num_images, *model.latent_shape(run.height, run.width))
        self.described = describe(model, run, stack)
        self.run = dataclasses.replace(self.described, model=model)
        self.generators = seeded(self.run, "")
        self.guides = Guides(stack, self.run, find_preset(run.preset), self.trace)
        self.final: Tensor | None = None
        self._plugin_generators: dict[str, list[torch.Generator]] = {}
        self._step_options = self._accepted_options()
        self._networks = model.differentiable(run.checkpointing)
        self._conditioned_by_step = any(
            "step" in call.arguments for call in stack.calls["embedding_transform"]
        )
        self._refuse_what_cannot_work()
        self._strengths = self._schedule()

    @torch.no_grad()
    def steps(self) -> Generator[Step]:
        """The loop."""
        try:
            self.stack.notify("setup", self._for_run)
            prompts = self._prompts()
            conditioned = self._condition(prompts)

            def condition(moment: Moment) -> tuple[Conditioning, Conditioning]:
                return self._condition(prompts, moment) if by_step else conditioned

            by_step = self._conditioned_by_step
            latents, first = self._start()
            for index in range(first, self.num_steps):
                moment = self._predicted(self._moment(index, latents, conditioned[0]), condition)
                for repeat in range(1, self._repeats(index)):
                    again = self._moment(index, self._noised_again(moment), conditioned[0], repeat)
                    moment = self._predicted(again, condition)
                latents = self._advance(moment)
                self._check_finite(latents, moment)
                self.stack.notify("after_step", self._for_step(moment), moment.where)
                yield Step(moment)
                if moment.stopped:
                    latents = moment.x0().to(latents.dtype)
                    break
            self.final = latents
        finally:
            self._teardown()

    def decode(self, latents: Tensor) -> list[Image]:
        """Pictures; a picture that is not finite is decoded once more in float32."""
        with torch.no_grad():
            image = self.model.decode(latents)
            if not images.is_finite(image):
                image = self.model.decode_float32(latents)
        if not images.is_finite(image):
            raise NonFiniteError(
                f"the decoded picture is not finite (latents between {latents.min():.3g} and "
                f"{latents.max():.3g}); lower the guides' scale or guidance_scale"
            )
        return images.to_pil(image)

    # ---- before the first step ----

    def _refuse_what_cannot_work(self) -> None:
        if not self.stack.calls["loss_guidance"]:
            return
        if torch.is_inference_mode_enabled():
            raise ModelError(
                "guides need gradients, and torch.inference_mode() allows none; "
                "call the sampler outside of it (it switches gradients off by itself)"
            )
        if reason := self.model.refuse_gradients():
            raise ModelError(f"no gradient can be taken: {reason}")
        if self.guides.preset.recurrence > 1 and not self._can_repeat():
            raise InputError(
                f"preset {self.guides.preset.name!r} takes steps more than once, and "
                f"{type(self.scheduler).__name__} goes back to latents that it kept from the step "
                "before: use recurrence=1, or a scheduler such as ddim, euler, euler-ancestral or "
                "dpmsolver-multistep"
            )

    def _can_repeat(self) -> bool:
        """Whether `scheduler.step` starts from the latents that it is given, at every step."""
        two_stages = self.num_steps != self.run.steps
        keeps = any(hasattr(self.scheduler, n) for n in ("sample", "last_sample", "cur_sample"))
        return not (two_stages or keeps)

    def _schedule(self) -> list[float]:
        """What the preset's strengths are multiplied by at each step."""
        kind = self.guides.preset.schedule
        if kind == "constant":
            return [1.0] * self.num_steps
        levels = [noise_level(self.scheduler, index) for index in range(self.num_steps)]
        return rules.schedule(levels, kind)

    def _accepted_options(self) -> dict[str, Any]:
        """What `scheduler.step` takes beside the rest; eta = 0 as in StableDiffusionPipeline."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": 0.0, "generator": None}
        return {name: value for name, value in options.items() if name in accepted}

    def _prompts(self) -> tuple[Prompt, Prompt]:
        """The prompt, rewritten by the plugins, and the negative prompt; nothing is encoded yet."""
        prompt = self.stack.chain(
            "prompt_transform",
            self.run.prompt,
            lambda _, value: {"prompt": value, "run": self.run},
            lambda new, _: None if isinstance(new, str) else f"returned {new!r}; expected text",
        )
        encoders = self.model.text_encoders
        words = collect_vocabulary(self.stack, self.run, encoders)
        return (
            Prompt(prompt, "positive", encoders, words, self.stack, self.run),
            Prompt(self.run.negative_prompt, "negative", encoders, words, self.stack, self.run),
        )

    def _condition(
        self, prompts: tuple[Prompt, Prompt], moment: Moment | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """The prompt's conditioning, and what the network gets: negative first under guidance."""

        def condition(prompt: Prompt) -> Conditioning:
            if moment is None:
                embeddings = prompt.embeddings()
            else:
                embeddings = prompt.embeddings(lambda name: Step(moment, name), moment.where)
            return self.model.condition(embeddings).expand(self.run.num_images)

        positive = condition(prompts[0])
        if not self.run.guided_by_prompt:
            return positive, positive
        return positive, condition(prompts[1]).cat(positive)

    def _start(self) -> tuple[Tensor, int]:
        """Latents and index of the first step: a plugin's, or pure noise."""
        answer = self.stack.first("start_latents", self._for_run)
        if answer is None:
            noise = draw(self.shape, self.generators, self.model.dtype).to(self.model.device)
            return noise * self.scheduler.init_noise_sigma, 0
        name, value = answer
        try:
            latents, first = value
        except (TypeError, ValueError):
            what = f"returned {type(value).__name__}; expected (latents, index of the first step)"
            self.stack.blame(name, "start_latents", what)
        like = torch.empty(self.shape, dtype=self.model.dtype, device=self.model.device)
        if problem := tensor_problem(latents, like):
            self.stack.blame(name, "start_latents", problem)
        if not isinstance(first, int) or not 0 <= first < self.num_steps:
            self.stack.blame(
                name, "start_latents", f"starts at {first!r}; expected 0 to {self.num_steps - 1}"
            )
        if first and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return latents, first

    # ---- one step ----

    def _repeats(self, index: int) -> int:
        """How often the step is taken: noise is put back only where a guide acts."""
        if not self.guides.active(index, self.num_steps):
            return 1
        return self.guides.preset.repeats(index / self.num_steps)

    def _moment(
        self, index: int, latents: Tensor, conditioning: Conditioning, repeat: int = 0
    ) -> Moment:
        return Moment(
            run=self.run,
            index=index,
            num_steps=self.num_steps,
            timestep=self.scheduler.timesteps[index],
            level=noise_level(self.scheduler, index),
            latents=latents,
            conditioning=conditioning,
            generators=self._generators_of,
            repeat=repeat,
        )

    def _predicted(
        self,
        moment: Moment,
        condition: Callable[[Moment], tuple[Conditioning, Conditioning]],
    ) -> Moment:
        """The moment with its prediction, as the guides leave it."""
        moment.conditioning, both = condition(moment)
        moment.latents = self._before_step(moment)
        active = self.guides.active(moment.index, self.num_steps)
        with self._networks if active else contextlib.nullcontext():
            cond, uncond = self._predict(moment, both, active)
            if active:
                self._guide(moment, active, cond, uncond)
        return moment

    def _noised_again(self, moment: Moment) -> Tensor:
        """The latents of a step that is taken once more: "recurrence", "time travel".

        A step of the DDIM formula (Song et al. 2021, arXiv 2010.02502, equation 12, without noise)
        to the next noise level, then fresh noise back to this one. The scheduler, whose `step`
        counts and remembers, knows nothing of it.
        """
        level, following = moment.level, self._following(moment.index)
        if moment.output is None:
            raise ValueError("no prediction to go on from")
        x0 = level.x0(moment.latents, moment.output)
        cleaner = following.alpha * x0 + following.sigma * level.eps(moment.latents, x0)
        cleaner = self._after_step(moment, cleaner)
        noise = draw(self.shape, self._generators_of(RECURRENCE), self.model.dtype)
        noised = level.noised(cleaner, following, noise.to(self.model.device))
        return noised.to(moment.latents.dtype)

    def _following(self, index: int) -> NoiseLevel:
        """The noise level after step `index`."""
        last = index + 1 == self.num_steps
        return rules.CLEAN if last else noise_level(self.scheduler, index + 1)

    def _before_step(self, moment: Moment) -> Tensor:
        def arguments(name: str, latents: Tensor) -> dict[str, Any]:
            moment.latents = latents
            return {"step": Step(moment, name)}

        latents: Tensor = self.stack.chain(
            "before_step", moment.latents, arguments, tensor_problem, moment.where
        )
        return latents

    def _predict(
        self, moment: Moment, both: Conditioning, active: list[Call]
    ) -> tuple[Tensor, Tensor | None]:
        """Both predictions; the moment gets the guided one, and x0.

        With a graph from the latents on if the gradient of an active guide ends there.
        """
        through = any("latents" in self.guides.ends(guide) for guide in active)
        with torch.set_grad_enabled(through):
            if through:
                moment.latents = moment.latents.detach().requires_grad_()
            cond, uncond = self._network(moment, both)
            moment.output = self._combine(moment, cond, uncond)
            if self.stack.calls["on_predicted_x0"]:
                self._on_predicted_x0(moment)
            if active:
                moment.x0()  # with its graph
        return cond.detach(), None if uncond is None else uncond.detach()

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

    def _guide(
        self, moment: Moment, active: list[Call], cond: Tensor, uncond: Tensor | None
    ) -> None:
        """Let the guides move the moment, which keeps no graph."""
        start = moment.latents if moment.latents.requires_grad else None
        trunk = Trunk(moment.x0(), self.model.decode, self.model.rgb, start)
        moment.detach()
        move = self.guides.move(
            moment, active, trunk, self._place(moment, cond, uncond), self._offsets(moment)
        )
        if move is None:
            return
        applied_to = self.guides.preset.applied_to
        if applied_to == "latents":
            moment.latents = moment.latents + move.to(moment.latents.dtype)
        elif applied_to == "prediction":
            moment.change_x0(moment.x0() + move)
        else:
            moment.after_step = move

    def _place(self, moment: Moment, cond: Tensor, uncond: Tensor | None) -> rules.Place:
        pull = rules.prompt_pull(moment.level, cond, uncond, self.run.guidance_scale)
        following = self._following(moment.index)
        return rules.Place(moment.level, following, pull, self._strengths[moment.index])

    def _offsets(self, moment: Moment) -> list[Tensor]:
        """What is added to x0 for each sample of a loss; nothing where the preset asks for none."""
        preset = self.guides.preset
        size = preset.smoothing * moment.level.sigma / moment.level.norm
        if not size:
            return []
        generators, like = self._generators_of(SAMPLES), moment.x0()
        noise = [draw(self.shape, generators, like.dtype) for _ in range(preset.samples)]
        return [size * n.to(like.device) for n in noise]

    def _network(self, moment: Moment, both: Conditioning) -> tuple[Tensor, Tensor | None]:
        """One call of the network: the prediction for the prompt, and for the negative prompt."""
        guided = self.run.guided_by_prompt
        latents = torch.cat([moment.latents] * 2) if guided else moment.latents
        latents = self.scheduler.scale_model_input(latents, moment.timestep)
        output = self.model.predict(latents, moment.timestep, both)  # (B or 2B, C, H, W)
        if not guided:
            return output, None
        uncond, cond = output.chunk(2)
        return cond, uncond

    def _combine(self, moment: Moment, cond: Tensor, uncond: Tensor | None) -> Tensor:
        answer = self.stack.first(
            "combine_predictions",
            lambda name, _: {"cond": cond, "uncond": uncond, "step": Step(moment, name)},
            moment.where,
        )
        if answer is not None:
            return self._checked(answer, "combine_predictions", cond, moment)
        if uncond is None:
            return cond
        return uncond + self.run.guidance_scale * (cond - uncond)

    def _advance(self, moment: Moment) -> Tensor:
        answer = self.stack.first("advance", self._for_step(moment), moment.where)
        if answer is not None:
            self._pass_over(moment.index)
            return self._after_step(
                moment, self._checked(answer, "advance", moment.latents, moment)
            )
        if self.guides.preset.rule == "sphere" and moment.after_step is not None:
            return self._turn(moment, moment.after_step)
        return self._after_step(moment, self._step(moment, self.scheduler, self.generators))

    def _step(self, moment: Moment, scheduler: Any, generators: list[torch.Generator]) -> Tensor:
        options = dict(self._step_options)
        if "generator" in options:
            options["generator"] = generators if len(generators) > 1 else generators[0]
        latents: Tensor = scheduler.step(
            moment.output, moment.timestep, moment.latents, **options, return_dict=False
        )[0]
        return latents

    def _after_step(self, moment: Moment, latents: Tensor) -> Tensor:
        if moment.after_step is None:
            return latents
        if self.guides.preset.rule == "sphere":  # taken once more: there is no noise to turn
            return latents
        return latents + moment.after_step.to(latents.dtype)

    def _turn(self, moment: Moment, direction: Tensor) -> Tensor:
        """The scheduler's step with its noise turned towards a direction.

        Which part of a step is noise no scheduler tells, but two steps with different noise do: a
        copy of the scheduler takes the second.
        """
        draws = [[copied(g) for g in self.generators], seeded(self.run, TURN)]
        noises = [draw(self.shape, d, moment.latents.dtype).to(direction) for d in draws]
        draws[1] = seeded(self.run, TURN)
        other = self._step(moment, copy.deepcopy(self.scheduler), draws[1]).to(direction)
        latents = self._step(moment, self.scheduler, self.generators)
        deviation = rms(latents - other) / rms(noises[0] - noises[1])
        noise = deviation * noises[0]
        if moment.index + 1 < self.num_steps:
            self._check_noise(moment, latents - noise, other - deviation * noises[1], noise)
        return rules.turned(latents - noise, noise, deviation, direction).to(latents.dtype)

    def _check_noise(self, moment: Moment, mean: Tensor, same: Tensor, noise: Tensor) -> None:
        """Refuse a scheduler that draws no noise, or draws it otherwise.

        Raises:
            InputError: it is such a one.
        """
        size = float(mean.abs().max())
        drawn = float(noise.abs().max()) > 1e-6 * size
        if drawn and float((mean - same).abs().max()) < 1e-3 * size:
            return
        raise InputError(
            f"preset {self.guides.preset.name!r} turns the noise that each step adds, and "
            f"{type(self.scheduler).__name__} adds none that can be told from its step; use "
            "scheduler='euler-ancestral' or 'ddpm'"
        )

    def _pass_over(self, index: int) -> None:
        """Let the scheduler know that step `index` was taken without it.

        `scale_model_input` counts on `step` to move its index; there is no public way to do so.
        """
        if getattr(self.scheduler, "step_index", None) is not None:
            self.scheduler._step_index = index + 1

    # ---- small things ----

    def _for_run(self, *_: Any) -> dict[str, Any]:
        return {"run": self.run}

    def _for_step(self, moment: Moment) -> Callable[[str, Any], dict[str, Any]]:
        return lambda name, _: {"step": Step(moment, name)}

    def _generators_of(self, plugin: str) -> list[torch.Generator]:
        if plugin not in self._plugin_generators:
            self._plugin_generators[plugin] = seeded(self.run, plugin)
        return self._plugin_generators[plugin]

    def _checked(self, answer: tuple[str, Any], hook: str, like: Tensor, moment: Moment) -> Tensor:
        name, tensor = answer
        if problem := tensor_problem(tensor, like):
            self.stack.blame(name, hook, problem, moment.where)
        result: Tensor = tensor
        return result

    def _check_finite(self, latents: Tensor, moment: Moment) -> None:
        if images.is_finite(latents):
            return
        records = [r for r in self.trace if r.index == moment.index and r.gradient_norm]
        message = f"latents became non-finite after step {moment.index} of {moment.num_steps} " + (
            f"(sigma {moment.level.sigma:.3g})."
        )
        if records:
            worst = max(records, key=lambda r: max(r.gradient_norm))
            message += (
                f" The largest gradient came from {worst.plugin!r}, norm "
                f"{max(worst.gradient_norm):.2g}; lower its scale."
            )
        else:
            message += " No guide acted: the network's own output is not finite; try float32."
        raise NonFiniteError(message)

    def _teardown(self) -> None:
        """Tear all plugins down in reverse, then raise the first error."""
        errors = []
        for call in reversed(self.stack.calls["teardown"]):
            try:
                self.stack.call(call, {"run": self.run})
            except PilotfishError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def describe(model: Any, run: Run, stack: Stack) -> Run:
    """The run with everything resolved that the user left open."""
    described = getattr(model, "describe_scheduler", lambda spec: spec)
    factor = getattr(model, "factor", 1)
    _, height, width = model.latent_shape(run.height, run.width)
    return dataclasses.replace(
        run,
        scheduler=described(run.scheduler),
        height=height * factor,
        width=width * factor,
        model_id=model.id,
        dtype=str(model.dtype).removeprefix("torch."),
        plugins=stack.tables(),
    )


def seeded(run: Run, plugin: str) -> list[torch.Generator]:
    """One CPU generator per image: the run's own, or a plugin's, independent of all others."""
    seeds = [run.seed + i for i in range(run.num_images)]
    if plugin:
        digests = (hashlib.sha256(f"{seed}:{plugin}".encode()).digest() for seed in seeds)
        seeds = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def copied(generator: torch.Generator) -> torch.Generator:
    """A generator that draws the same from here on."""
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def draw(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """Noise of shape (B, ...), each image from its own generator, so neighbours do not matter."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators])
