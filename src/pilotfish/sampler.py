"""The sampler, and the sampling loop."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import Tensor

from . import guidance, images
from .errors import ModelError, NonFiniteError, PilotfishError
from .guides import Guides
from .noise import noise_level
from .presets import find_preset
from .run import Options, Run
from .stack import Call, Stack, tensor_problem
from .step import Moment, Step
from .text import Conditioning, Prompt, collect_vocabulary
from .trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import LatentDiffusion


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

    @torch.no_grad()
    def steps(self) -> Generator[Step]:
        """The loop."""
        try:
            self.stack.notify("setup", self._for_run)
            prompts = self._prompts()
            conditioning, both = self._condition(prompts)
            latents, first = self._start()
            for index in range(first, self.num_steps):
                moment = self._moment(index, latents, conditioning)
                if self._conditioned_by_step:
                    moment.conditioning, both = self._condition(prompts, moment)
                moment.latents = self._before_step(moment)
                active = self.guides.active(index, self.num_steps)
                with self._networks if active else contextlib.nullcontext():
                    cond, uncond = self._predict(moment, both, active)
                    if active:
                        self._guide(moment, active, cond, uncond)
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

    def _accepted_options(self) -> dict[str, Any]:
        """What `scheduler.step` takes beside the rest; eta = 0 as in StableDiffusionPipeline."""
        accepted = inspect.signature(self.scheduler.step).parameters
        generators = self.generators if len(self.generators) > 1 else self.generators[0]
        options = {"eta": 0.0, "generator": generators}
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

    def _moment(self, index: int, latents: Tensor, conditioning: Conditioning) -> Moment:
        return Moment(
            run=self.run,
            index=index,
            num_steps=self.num_steps,
            timestep=self.scheduler.timesteps[index],
            level=noise_level(self.scheduler, index),
            latents=latents,
            conditioning=conditioning,
            generators=self._generators_of,
        )

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
        through = any(self.guides.end(guide) == "latents" for guide in active)
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
        trunk = guidance.Trunk(moment.x0(), self.model.decode, self.model.rgb, start)
        moment.detach()
        pull = guidance.prompt_pull(
            moment.level, cond, uncond, self.run.guidance_scale, self.guides.preset.applied_to
        )
        self.guides.move(moment, active, trunk, pull)

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
            return self._checked(answer, "advance", moment.latents, moment)
        latents: Tensor = self.scheduler.step(
            moment.output,
            moment.timestep,
            moment.latents,
            **self._step_options,
            return_dict=False,
        )[0]
        return latents

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


def draw(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """Noise of shape (B, ...), each image from its own generator, so neighbours do not matter."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators])
