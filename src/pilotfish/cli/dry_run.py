"""What `pilotfish generate --dry-run` tells of a run, without loading weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..guidance import gradients as guidance
from ..guidance.noise import NoiseLevel
from ..guidance.presets import Preset, find_preset
from ..hooks.plugin import Guide, Plugin
from ..hooks.stack import Call, Stack
from ..models import loading, schedulers
from ..models.decoders import locate_tiny
from ..models.text import Conditioning
from ..runs.run import Run
from ..sampling.generators import seeded
from ..sampling.step import Moment, Step
from .listing import columns, hooks_of

ONCE = {
    "setup": "once, before the run",
    "teardown": "once, after the run",
    "vocabulary": "once, before tokenising",
    "prompt_transform": "once, on the prompt",
    "embedding_transform": "on each prompt, at both stages",
    "start_latents": "once, before the first step",
}


@dataclass(frozen=True)
class Needs:
    """What a guide costs at a step on which it acts; None is not known before it runs."""

    decode: bool | None
    unet_gradient: bool

    def __str__(self) -> str:
        wanted = ["decode"] * bool(self.decode) + ["UNet gradient"] * self.unet_gradient
        if self.decode is None:
            wanted.append("a decode only if it reads step.image: not known before it runs")
        return ", ".join(wanted) or "nothing (no decode, no UNet gradient)"


@dataclass(frozen=True)
class PluginPlan:
    """One plugin of a dry run: its hooks, each with the steps on which it acts."""

    name: str
    package: str | None
    settings: dict[str, Any]
    hooks: dict[str, str]
    needs: Needs

    def text(self) -> str:
        """A few lines."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        rows = [*self.hooks.items(), ("needs", str(self.needs)), ("settings", given or "defaults")]
        return (
            f"{self.name}"
            + (f"  ({self.package})" if self.package else "")
            + ("\n" + columns(rows, "     "))
        )


@dataclass(frozen=True)
class Plan:
    """A dry run.

    Attributes:
        num_steps: None where only the model itself knows its scheduler.
    """

    model: str
    scheduler: str | None
    num_steps: int | None
    run: Run
    plugins: tuple[PluginPlan, ...]

    def text(self) -> str:
        """For people."""
        run, preset = self.run, find_preset(self.run.preset)
        size = f"{run.width}x{run.height}" if run.width and run.height else "the model's own size"
        head = [
            ("prompt", repr(run.prompt)),
            ("model", f"{self.model} (not loaded)"),
            ("images", f"{run.num_images}, {size}, seed {run.seed}"),
            ("steps", self._steps()),
            ("preset", described(preset)),
            ("decoder", run.decoder),
        ]
        plugins = [f"  {i}. {p.text()}" for i, p in enumerate(self.plugins, 1)]
        stack = "plugins, in order" if plugins else "no plugins: the model alone"
        return "\n".join([columns(head), "", stack, *plugins, "", "Nothing was loaded or run."])

    def _steps(self) -> str:
        run = self.run
        text = f"{run.steps}, guidance_scale {run.guidance_scale}"
        text += f", scheduler {self.scheduler or 'of the model'}"
        if self.num_steps is not None and self.num_steps != run.steps:
            text += f", which makes {self.num_steps} of them, 0 to {self.num_steps - 1}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        run = dataclasses.asdict(self.run)
        for key in ("model", "model_id", "dtype", "plugins"):
            del run[key]
        return {
            "model": self.model,
            "scheduler": self.scheduler,
            "num_steps": self.num_steps,
            "run": run,
            "plugins": [dataclasses.asdict(p) for p in self.plugins],
        }


def plan(
    stack: Stack, run: Run, model_name: str | None, device: str | None, dtype: str | None
) -> Plan:
    """Check what can be checked without weights, and say what each plugin would do.

    Raises:
        InputError: model, device, dtype, scheduler or tiny decoder do not exist.
    """
    if device is not None:
        loading.parse_device(device)
    loading.parse_dtype(dtype)
    folder = loading.locate(model_name)
    scheduler = scheduler_of(run, Path(folder))
    kind, _, place = run.decoder.partition(":")
    if kind == "tiny" and (place or Path(folder).is_dir()):
        locate_tiny(place, Path(folder))
    num_steps = len(scheduler.timesteps) if scheduler is not None else None
    return Plan(
        model=str(model_name or "emoji"),
        scheduler=schedulers.short_name(type(scheduler).__name__)
        if scheduler is not None
        else None,
        num_steps=num_steps,
        run=run,
        plugins=tuple(_plugin_plan(stack, run, name, num_steps or run.steps) for name, _ in stack),
    )


def scheduler_of(run: Run, folder: Path) -> Any:
    """The run's scheduler, from the model's configuration where that lies on this disk."""
    file = folder / "scheduler" / "scheduler_config.json"
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    spec = run.scheduler
    if spec is None:
        spec = schedulers.short_name(own.get("_class_name", ""))
        if spec not in schedulers.available():
            return None
    config = {"name": spec} if isinstance(spec, str) else dict(spec)
    scheduler = schedulers.named(config.pop("name", "")).from_config(own, **config)
    scheduler.set_timesteps(run.steps)
    return scheduler


def _plugin_plan(stack: Stack, run: Run, name: str, num_steps: int) -> PluginPlan:
    entry = stack.entries[name]
    given = (
        entry.plugin.settings.model_dump(mode="json", exclude_defaults=True)
        if isinstance(entry.plugin, Plugin)
        else {}
    )
    hooks = {h: ONCE.get(h, "every step") for h in hooks_of(entry.plugin)}
    if "loss_guidance" in hooks:
        hooks["loss_guidance"] = guided_steps(entry.plugin, num_steps)
    return PluginPlan(name, entry.version, given, hooks, needs_of(stack, run, name, num_steps))


def guided_steps(guide: Any, num_steps: int) -> str:
    """On which steps a guide acts: `steps 0-45 every 5 (10 of 50)`."""
    if not isinstance(guide, Guide):
        return "every step"
    steps = [i for i in range(num_steps) if guide.acts_at(i, num_steps)]
    if steps:
        return f"steps {compressed(steps)} ({len(steps)} of {num_steps})"
    off = "its scale is 0" if guide.settings.scale == 0 else "no step lies between start and stop"
    return f"never: {off}"


def compressed(steps: Sequence[int]) -> str:
    """Evenly spaced numbers in few words: `0-49`, `0-45 every 5`, `7`."""
    if len(steps) == 1:
        return str(steps[0])
    gap = steps[1] - steps[0]
    return f"{steps[0]}-{steps[-1]}" + (f" every {gap}" if gap > 1 else "")


def described(preset: Preset) -> str:
    """The preset, and what it does that costs time or acts only now and then."""
    more = [f"gradient ends at {preset.gradient}"]
    if preset.recurrence > 1:
        more.append(f"up to {preset.recurrence} UNet calls a step")
    if preset.samples > 1:
        more.append(f"{preset.samples} decodes a step")
    if preset.iterations > 1:
        more.append(f"{preset.iterations} decodes a step for the descent on x0")
    if (preset.start, preset.stop) != (0, 1):
        more.append(f"acts from {preset.start:.0%} to {preset.stop:.0%} of the run")
    return f"{preset.name} ({'; '.join(more)})"


def needs_of(stack: Stack, run: Run, name: str, num_steps: int) -> Needs:
    """What a plugin needs: a guide's loss is tried on random numbers, others are not tried."""
    calls = [c for c in stack.calls["loss_guidance"] if c.name == name]
    if not calls:
        return Needs(decode=None if _sees_steps(stack, name) else False, unet_gradient=False)
    own = getattr(getattr(calls[0].plugin, "settings", None), "gradient", None)
    end = own or find_preset(run.preset).gradient
    return Needs(reads_image(calls[0], run, num_steps), unet_gradient=end != "x0")


def _sees_steps(stack: Stack, name: str) -> bool:
    return any("step" in c.arguments and c.name == name for cs in stack.calls.values() for c in cs)


def reads_image(call: Call, run: Run, num_steps: int) -> bool | None:
    """Whether a loss reads `step.image`: it gets a step of random numbers.

    None where that cannot be told: it needs its `setup`, or gives no loss at its first step.
    """
    guide = call.plugin
    steps = [
        i for i in range(num_steps) if not isinstance(guide, Guide) or guide.acts_at(i, num_steps)
    ]
    step, leaves = _random_step(run, call.name, steps[0] if steps else 0, num_steps)
    try:
        with torch.enable_grad():
            finished = call({"step": step}) is not None
    except Exception:  # without its setup a plugin may fail in any way
        finished = False
    return True if "image" in leaves.read else (False if finished else None)


def _random_step(run: Run, name: str, index: int, num_steps: int) -> tuple[Step, guidance.Leaves]:
    """A step like a Stable Diffusion's, small and of random numbers, and what is read of it."""
    generator, batch = torch.Generator().manual_seed(0), run.num_images

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator)

    latents, image, rgb = random(4, 16, 16), random(3, 128, 128), random(3, 16, 16)
    moment = Moment(
        run=run,
        index=index,
        num_steps=num_steps,
        timestep=torch.tensor(500),
        level=NoiseLevel(
            alpha=0.6, sigma=0.8, skip=1 / 0.6, out=-0.8 / 0.6, prediction_type="epsilon"
        ),
        latents=latents,
        conditioning=Conditioning(random(77, 16)),
        generators=lambda plugin: seeded(run, plugin),
        output=random(4, 16, 16),
    )
    leaves = guidance.Leaves(guidance.Trunk(moment.x0(), lambda _: image, lambda _: rgb))
    return Step(moment, name, leaves), leaves
