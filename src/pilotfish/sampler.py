"""The sampling loop, and the step that plugins see."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import Tensor

from . import guidance, images
from .errors import ModelError, NonFiniteError, PilotfishError, PluginError
from .noise import NoiseLevel, noise_level
from .plugin import Guide
from .presets import Preset, find_preset
from .run import Options, Run
from .stack import Call, Stack, tensor_problem
from .text import Conditioning, collect_vocabulary, embed
from .trace import Record, Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import LatentDiffusion


@dataclass
class Moment:
    """What all views of one step share; lazy values are computed once."""

    run: Run
    index: int
    num_steps: int
    timestep: Tensor
    level: NoiseLevel
    latents: Tensor
    conditioning: Conditioning
    generators: Callable[[str], list[torch.Generator]]
    output: Tensor | None = None
    known_x0: Tensor | None = None
    stopped: bool = False
    views: dict[str, Tensor] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """For error messages."""
        return f" at step {self.index} of {self.num_steps} (sigma {self.level.sigma:.3g})"

    def x0(self) -> Tensor:
        """Predicted clean latents."""
        if self.known_x0 is None:
            if self.output is None:
                raise PilotfishError(
                    "step.x0, eps, rgb and image are known only after the network has run; "
                    "in before_step use step.latents"
                )
            self.known_x0 = self.level.x0(self.latents, self.output)
        return self.known_x0

    def view(self, name: str, build: Callable[[Tensor], Tensor]) -> Tensor:
        """A picture of x0, built once."""
        if name not in self.views:
            with torch.no_grad():  # a stream's reader may have gradients on
                self.views[name] = build(self.x0().detach())
        return self.views[name]

    def change_x0(self, x0: Tensor) -> None:
        """Replace x0, and the output that would have given it."""
        if self.output is None:
            raise ValueError("no prediction to change")
        self.output = self.level.output(self.latents, x0).to(self.output.dtype)
        self.known_x0 = x0
        self.views.clear()


class Step:
    """One step of a run: read-only, with lazy values that all plugins share.

    Attributes:
        index, num_steps: position in the loop, from 0. Two-stage schedulers such as Heun have
            nearly two of these for each step of the user's.
    """

    def __init__(
        self, moment: Moment, plugin: str = "", leaves: guidance.Leaves | None = None
    ) -> None:
        self._moment, self._plugin, self._leaves = moment, plugin, leaves
        self.index, self.num_steps = moment.index, moment.num_steps

    @property
    def run(self) -> Run:
        """The run's description; `run.model` holds the networks."""
        return self._moment.run

    @property
    def progress(self) -> float:
        """`index / num_steps`: 0 at the first step, below 1 at the last."""
        return self.index / self.num_steps

    @property
    def timestep(self) -> Tensor:
        """The network's own index, a scalar."""
        return self._moment.timestep

    @property
    def alpha(self) -> float:
        """`latents = alpha * x0 + sigma * eps`."""
        return self._moment.level.alpha

    @property
    def sigma(self) -> float:
        """`latents = alpha * x0 + sigma * eps`."""
        return self._moment.level.sigma

    @property
    def latents(self) -> Tensor:
        """Noisy latents (B, C, H, W), before this step is taken."""
        return self._moment.latents.detach()

    @property
    def eps(self) -> Tensor:
        """Predicted noise (B, C, H, W), after classifier-free guidance."""
        moment = self._moment
        x0 = moment.x0().detach()
        return moment.level.eps(moment.latents.detach(), x0)

    @property
    def x0(self) -> Tensor:
        """Predicted clean latents (B, C, H, W), float32."""
        if self._leaves is not None:
            return self._leaves("x0")
        return self._moment.x0().detach()

    @property
    def image(self) -> Tensor:
        """Decoded x0 (B, 3, 8H, 8W) in [0, 1], not clamped; costs a decode, once a step."""
        if self._leaves is not None:
            return self._leaves("image")
        return self._moment.view("image", self.run.model.decode)

    @property
    def rgb(self) -> Tensor:
        """Linear estimate of the colours of x0 (B, 3, H, W) in about [0, 1], nearly free."""
        if self._leaves is not None:
            return self._leaves("rgb")
        return self._moment.view("rgb", self.run.model.rgb)

    @property
    def embeddings(self) -> Tensor:
        """The prompt's embedding as the network gets it (B, T, D)."""
        return self._moment.conditioning.values

    @property
    def generator(self) -> list[torch.Generator]:
        """One CPU generator per image, this plugin's own: other plugins do not change its draws."""
        return self._moment.generators(self._plugin)

    def preview(self) -> list[Image]:
        """Small pictures of x0, without a decode."""
        return images.preview(self.rgb)

    def stop(self) -> None:
        """End the run after this step; its x0 becomes the result."""
        self._moment.stopped = True


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
        self.preset: Preset = find_preset(run.preset)
        self.shape = (run.num_images, *model.latent_shape(run.height, run.width))
        self.described = describe(model, run, stack)
        self.run = dataclasses.replace(self.described, model=model)
        self.generators = seeded(self.run, "")
        self.disabled: set[str] = set()
        self.final: Tensor | None = None
        self._plugin_generators: dict[str, list[torch.Generator]] = {}
        self._step_options = self._accepted_options()
        self._refuse_what_cannot_work()

    @torch.no_grad()
    def steps(self) -> Generator[Step]:
        """The loop."""
        try:
            self.stack.notify("setup", self._for_run)
            conditioning, both = self._encode()
            latents, first = self._start()
            for index in range(first, self.num_steps):
                moment = self._moment(index, latents, conditioning)
                moment.latents = self._before_step(moment)
                guides = self._active(index)
                with self._differentiable(guides):
                    trunk, pull = self._predict(moment, both, guides)
                    self._guide(moment, guides, trunk, pull)
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

    def _encode(self) -> tuple[Conditioning, Conditioning]:
        """The prompt's conditioning, and what the network gets: negative first under guidance."""
        prompt = self.stack.chain(
            "prompt_transform",
            self.run.prompt,
            lambda _, value: {"prompt": value, "run": self.run},
            lambda new, _: None if isinstance(new, str) else f"returned {new!r}; expected text",
        )
        words = collect_vocabulary(self.stack, self.run, self.model.text_encoders)

        def encode(text: str, role: Any) -> Conditioning:
            embeddings = [
                embed(encoder, text, role, self.stack, self.run, words[encoder.name])
                for encoder in self.model.text_encoders
            ]
            return self.model.condition(embeddings).expand(self.run.num_images)

        positive = encode(prompt, "positive")
        if not self.run.guided_by_prompt:
            return positive, positive
        return positive, encode(self.run.negative_prompt, "negative").cat(positive)

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
        self, moment: Moment, both: Conditioning, guides: list[Call]
    ) -> tuple[guidance.Trunk | None, Tensor | None]:
        """The guided prediction and x0; for guides also the trunk and the prompt's own pull."""
        through = any(self._end(guide) == "latents" for guide in guides)
        with torch.set_grad_enabled(through):
            if through:
                moment.latents = moment.latents.detach().requires_grad_()
            cond, uncond = self._network(moment, both)
            moment.output = self._combine(moment, cond, uncond)
            if self.stack.calls["on_predicted_x0"]:
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
            if not guides:
                return None, None
            x0 = moment.x0()
        trunk = guidance.Trunk(
            x0, self.model.decode, self.model.rgb, moment.latents if through else None
        )
        moment.output, moment.known_x0 = moment.output.detach(), x0.detach()
        moment.latents = moment.latents.detach()
        scale, applied_to = self.run.guidance_scale, self.preset.applied_to
        cond, uncond = cond.detach(), None if uncond is None else uncond.detach()
        return trunk, guidance.prompt_pull(moment.level, cond, uncond, scale, applied_to)

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

    # ---- guides ----

    def _active(self, index: int) -> list[Call]:
        """The guides that act at this step."""
        return [
            call
            for call in self.stack.calls["loss_guidance"]
            if call.name not in self.disabled
            and (not isinstance(call.plugin, Guide) or call.plugin.acts_at(index, self.num_steps))
        ]

    def _end(self, call: Call) -> guidance.End:
        own = getattr(getattr(call.plugin, "settings", None), "gradient", None)
        return own or self.preset.gradient

    def _differentiable(self, guides: list[Call]) -> contextlib.AbstractContextManager[None]:
        if not guides:
            return contextlib.nullcontext()
        return self.model.differentiable(self.run.checkpointing)

    def _guide(
        self,
        moment: Moment,
        guides: list[Call],
        trunk: guidance.Trunk | None,
        prompt_pull: Tensor | None,
    ) -> None:
        """Move the latents, or the prediction, against the guides' gradients."""
        if trunk is None or prompt_pull is None:
            return
        pulls = [p for guide in guides if (p := self._pull(moment, guide, trunk)) is not None]
        if not pulls:
            return
        move = guidance.combine(trunk, pulls, self.preset, moment.level, prompt_pull)
        if self.preset.applied_to == "latents":
            moment.latents = moment.latents + move.to(moment.latents.dtype)
        else:
            moment.change_x0(moment.x0() + move)
        for pull in pulls:
            loss, norm, share = (tuple(v.tolist()) for v in (pull.loss, pull.norm(), pull.share))
            self.trace.append(
                Record(moment.index, moment.level.sigma, pull.name, loss, norm, share, pull.seconds)
            )

    def _pull(self, moment: Moment, call: Call, trunk: guidance.Trunk) -> guidance.Pull | None:
        """One guide's gradient at its leaves; what is wrong with it is dealt with by `on_error`."""
        leaves = guidance.Leaves(trunk)
        start = time.perf_counter() - trunk.seconds
        try:
            with torch.enable_grad():
                view = Step(moment, call.name, leaves)
                loss = self.stack.call(call, {"step": view}, moment.where)
                if loss is None:
                    return None
                try:
                    gradients = guidance.leaf_gradients(loss, leaves, self.run.num_images)
                except guidance.LossFault as fault:
                    self.stack.blame(call.name, call.hook, str(fault), moment.where)
        except PluginError as error:
            self._tolerate(error, moment, call.name)
            return None
        settings = getattr(call.plugin, "settings", None)
        return guidance.Pull(
            name=call.name,
            scale=getattr(settings, "scale", 1.0),
            end=self._end(call),
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
