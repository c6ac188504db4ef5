"""What `pilotfish generate --dry-run` tells of a run, without loading weights."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..guidance.presets import find_preset
from ..hooks.plugin import Guide, Plugin, implemented
from ..hooks.registry import Entry
from ..hooks.stack import Stack
from ..models import places
from ..runs.run import FOUND, MODELS, OPEN, Run
from .listing import columns

# Of those schedulers each step is one timestep, whatever their configuration says.
PLAIN = ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
FILLED = ("steps", "guidance_scale", "scheduler", "height", "width")


def plan(stack: Stack, run: Run, model: Mapping[str, str | None]) -> dict[str, Any]:
    """Check what can be checked without weights; the run, and what each plugin would do.

    Args:
        model: model, device and dtype, as `pilotfish.load` takes them.

    Raises:
        InputError: model, device, dtype, scheduler or tiny decoder do not exist.
        ModelError: no family takes the model.
    """
    if model["device"] is not None:
        from ..models.loading import parse_device

        parse_device(model["device"])
    places.dtype_name(model["dtype"])
    places.check_offload(model["offload"])
    name, folder, num_steps = model["model"] or "emoji", Path(places.locate(model["model"])), None
    if folder.is_file() and model["config"] is not None:
        folder = Path(places.locate(model["config"]))
    if folder.is_dir():
        run, num_steps = resolved(run, folder, name)
    elif run.scheduler is not None:
        from ..models.schedulers import diffusers, new

        new(run.scheduler, diffusers.DDIMScheduler())  # is there one of that name?
    kind, _, place = run.decoder.partition(":")
    if kind == "tiny" and (place or folder.is_dir()):
        places.locate_tiny(place, folder)
    return {
        "model": name,
        "num_steps": num_steps,
        "run": run.model_dump(exclude={*FOUND}),
        "plugins": [
            {"name": name, **described(entry, run, num_steps)}
            for name, entry in stack.entries.items()
        ],
    }


def resolved(run: Run, folder: Path, name: str) -> tuple[Run, int]:
    """A run with the values of the model in a folder, and how many steps that makes."""
    try:
        kind = _read(folder / "model_index.json")["_class_name"]
        config = _read(folder / "scheduler" / "scheduler_config.json")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model {name!r}: {error}") from error
    places.find_family(kind, f"model {name!r}")
    return by_files(run, folder, config) or by_diffusers(run, folder, kind, config)


def by_files(run: Run, folder: Path, config: Mapping[str, Any]) -> tuple[Run, int] | None:
    """`resolved` by the folder's files alone, without torch; None where they do not do.

    They do where the model's own scheduler is a plain one, and the folder says what a run takes.
    """
    try:
        own = tomllib.loads((folder / "pilotfish.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run = _filled(run, own)
    plain = run.scheduler is None and config["_class_name"] in PLAIN
    # Beyond half of the levels a scheduler may refuse.
    most = config.get("num_train_timesteps", 0) // 2
    if not plain or own.keys() - set(OPEN) or run.guidance_scale is None:
        return None
    if not isinstance(run.steps, int) or not 0 < run.steps <= most:
        return None
    name = places.scheduler_name(config["_class_name"])
    return run.model_copy(update={"scheduler": name}), run.steps


def by_diffusers(run: Run, folder: Path, kind: str, config: Mapping[str, Any]) -> tuple[Run, int]:
    """`resolved` by what diffusers' classes of the pipeline and the scheduler say."""
    from ..models import schedulers
    from ..models.protocol import Defaults
    from ..models.schedulers import diffusers
    from ..sampling.schedule import Schedule

    own = schedulers.named(config["_class_name"]).from_config(config)
    # Only the signature of the pipeline's class is looked at. It does not know the size.
    defaults = Defaults.of(object.__new__(getattr(diffusers, kind)), folder, 0, 0)
    run = _filled(run, vars(defaults))
    scheduler = schedulers.new(run.scheduler, own)
    num_steps = Schedule(scheduler, run.steps or defaults.steps, set_timesteps).num_steps
    return run.model_copy(update={"scheduler": schedulers.describe(run.scheduler, own)}), num_steps


def _filled(run: Run, own: Mapping[str, Any]) -> Run:
    """A run with the model's values where it leaves them open."""
    left = {key: own.get(key) or None for key in FILLED if getattr(run, key) is None}
    return run.model_copy(update=left)


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Let a scheduler choose so many steps; where they lie depends on a size that is not known."""
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **shift)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def described(entry: Entry, run: Run, num_steps: int | None) -> dict[str, Any]:
    """A plugin's package, settings and hooks, and on which steps it acts, if it is a guide."""
    plugin, hooks = entry.plugin, implemented(entry.plugin)
    settings = plugin.settings if isinstance(plugin, Plugin) else None
    return {
        "package": entry.version,
        "hooks": hooks,
        "acts": guided_steps(plugin, run, num_steps) if "loss_guidance" in hooks else None,
        "settings": settings.model_dump(mode="json", exclude_defaults=True) if settings else {},
    }


def guided_steps(guide: object, run: Run, num_steps: int | None) -> str:
    """On which steps a guide acts: `10 of 50 steps, 0 to 45`."""
    if num_steps is None:
        return "as its settings say"
    steps = [i for i in range(num_steps) if find_preset(run.preset).acts_at(i / num_steps)]
    if isinstance(guide, Guide):
        steps = [i for i in steps if guide.acts_at(i, num_steps)]
    if not steps:
        return "never: its scale is 0, or no step lies between start and stop"
    return f"{len(steps)} of {num_steps} steps, {steps[0]} to {steps[-1]}"


def told(planned: Mapping[str, Any]) -> str:
    """A dry run for people."""
    run, num_steps = planned["run"], planned["num_steps"]
    own = {key: MODELS if value is None else value for key, value in run.items()}
    size = f"{own['width']}x{own['height']}" if run["width"] or run["height"] else "the model's own"
    more = f", which makes {num_steps}" if num_steps not in (None, run["steps"]) else ""
    head = [
        ("prompt", repr(run["prompt"])),
        ("model", f"{planned['model']} (not loaded)"),
        ("images", f"{run['num_images']}, size {size}, seed {run['seed']}"),
        ("steps", f"{own['steps']}{more}"),
        *((key, str(own[key])) for key in ("guidance_scale", "scheduler")),
        ("preset", find_preset(run["preset"]).name),
        ("decoder", run["decoder"]),
    ]
    parts = ["plugins, in order" if planned["plugins"] else "no plugins: the model alone"]
    for number, plugin in enumerate(planned["plugins"], 1):
        settings = ", ".join(f"{key}={value!r}" for key, value in plugin["settings"].items())
        rows = [("hooks", ", ".join(plugin["hooks"])), ("settings", settings or "defaults")]
        rows[1:1] = [("acts", plugin["acts"])] if plugin["acts"] else []
        package = f"  ({plugin['package']})" if plugin["package"] else ""
        parts += [f"  {number}. {plugin['name']}{package}", columns(rows, "     ")]
    return "\n".join([columns(head), "", *parts, "", "Nothing was loaded or run."])
