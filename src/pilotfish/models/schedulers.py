"""Schedulers of diffusers: by name, as objects, and as a run file holds them."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import pickle
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch

from ..errors import InputError, unknown
from .places import scheduler_name
from .torchvision import mend_torchvision

mend_torchvision()

import diffusers as diffusers  # noqa: E402  # after the declaration, because it imports torchvision
from diffusers.schedulers import KarrasDiffusionSchedulers  # noqa: E402

NONE = "none"  # TOML has no null


def new(spec: Any, own: Any) -> Any:
    """A fresh scheduler, made from a configuration; nothing is shared with another run.

    Args:
        own: the model's; where it goes along a flow, so must the other.
        spec: None for the model's own, a short name ("lms"), a class name of diffusers or
            `module:Class`, a scheduler of diffusers' kind, or a mapping with `name` and
            configuration.

    Raises:
        InputError: there is no such scheduler, it cannot be made so, its own package is missing, or
            it knows no flows.
    """
    spec = own if spec is None else spec
    flow = type(own).__name__.startswith("FlowMatch") or own.config.get("use_flow_sigmas")
    if isinstance(spec, diffusers.SchedulerMixin):
        if flow:
            _flow_settings(type(spec), own, spec.config.get("use_flow_sigmas"))
        return _same(spec)
    if not isinstance(spec, str | Mapping):
        raise InputError(f"scheduler must be a name or a diffusers scheduler; got {spec!r}")
    config = {"name": spec} if isinstance(spec, str) else dict(spec)
    scheduler = named(config.pop("name", ""))
    config = {key: _given(value, own) for key, value in config.items()}
    takes = inspect.signature(scheduler).parameters
    if flow:
        config = {**_flow_settings(scheduler, own), **config}
    if wrong := sorted(config.keys() - takes.keys()):
        raise unknown(f"setting of the scheduler {short_name(scheduler)}", wrong[0], takes)
    if "clip_sample" in takes:
        # Some schedulers clip where the model's configuration is silent; latents never are.
        config.setdefault("clip_sample", own.config.get("clip_sample", False))
    made = _made(scheduler, own.config, config)
    plain_types = (str, bool, int, float, type(None))
    return made if all(type(value) in plain_types for value in config.values()) else _same(made)


def _flow_settings(scheduler: type[Any], own: Any, used: bool | None = True) -> dict[str, Any]:
    """What lets a scheduler go along a flow.

    Args:
        used: whether it is asked to.

    Raises:
        InputError: it knows none.
    """
    if scheduler.__name__.startswith("FlowMatch"):
        return {}
    if not used or "use_flow_sigmas" not in inspect.signature(scheduler).parameters:
        raise InputError(
            f"the scheduler {short_name(scheduler)} does not go along a flow, as this model does; "
            "use flowmatch-euler, flowmatch-heun, flowmatch-lcm, unipc or dpmsolver-multistep (in "
            "Python with use_flow_sigmas=True)"
        )
    shift = own.config.get("flow_shift", own.config.get("shift", 1.0))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {**flow, "flow_shift": shift}


def linear_shift(config: Mapping[str, Any], tokens: int, most: float = 1.15) -> float:
    """`mu` of so many image tokens: a line through the configuration's two points.

    Args:
        most: `max_shift` where the configuration says none.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", most)
    slope = (most - least) / (many - few)
    return float(tokens * slope + (least - slope * few))


def _given(value: Any, own: Any) -> Any:
    """A setting's value, from what a run file holds."""
    if isinstance(value, Mapping) and "name" in value:  # UniPC's solver_p
        return new(value, own)
    return None if isinstance(value, str) and value == NONE else value


def _same(scheduler: Any) -> Any:
    """Another of the same tables, made from nothing but what a run file can hold.

    Numbers of NumPy and tensors as they are in a configuration give other betas than the same
    numbers of Python: those betas are then given themselves.
    """
    kind = type(scheduler)
    config = {key: _given(value, scheduler) for key, value in _settings(scheduler).items()}
    made = _made(kind, {}, config)
    if "trained_betas" in config and _numbers(scheduler, "betas") != _numbers(made, "betas"):
        made = _made(kind, {}, {**config, "trained_betas": plain(scheduler.betas)})
    theirs, ours = _tables(scheduler), _tables(made)
    if wrong := sorted(name for name in ours if theirs.get(name) != ours[name]):
        raise InputError(
            f"the {kind.__name__} has other {wrong[0].strip('_')} than its own configuration "
            "gives: it was changed after it was made. Make it with what it should have, so that "
            "a run can be repeated"
        )
    return made


def _tables(scheduler: Any) -> dict[str, bytes]:
    """The numbers that a scheduler goes by, whatever run it had before."""
    ready, config = copy.deepcopy(scheduler), scheduler.config
    try:
        ready.set_timesteps(10, **({"mu": 1.0} if config.get("use_dynamic_shifting") else {}))
    except Exception:  # it takes other steps; then what it was made with must do
        return {name: _numbers(scheduler, name) for name in ("betas", "alphas_cumprod", "_shift")}
    return {name: _numbers(ready, name) for name, value in vars(ready).items() if _is_table(value)}


def _is_table(value: Any) -> bool:
    if isinstance(value, list):  # of outputs and timesteps that were; None before the first
        return not any(item is None or torch.is_tensor(item) for item in value)
    numbers = (np.ndarray, np.generic, torch.Tensor, int, float)
    return isinstance(value, numbers) and not isinstance(value, bool)


def _numbers(scheduler: Any, name: str) -> bytes:
    # In which NaN equals itself; ten times as fast as text, which every run would wait for.
    return pickle.dumps(plain(getattr(scheduler, name, None)))


def _made(scheduler: Any, base: Any, config: Mapping[str, Any]) -> Any:
    try:
        # As `from_config`, which would also keep what another class takes, and log it.
        return scheduler(**scheduler.extract_init_dict(base, **config)[0])
    except Exception as error:  # whatever a class makes of foreign values
        raise InputError(
            f"cannot make the scheduler {short_name(scheduler)}: {type(error).__name__}: {error}"
        ) from error


def describe(spec: Any, own: Any) -> str | dict[str, Any]:
    """A scheduler as a run file holds it: its name, and what differs from the model's."""
    if spec is None or isinstance(spec, str):
        return short_name(type(own) if spec is None else named(spec))
    scheduler = new(spec, own)
    name = short_name(type(scheduler))
    usual = _settings(new(name, own))
    # By what is written, in which NaN equals itself.
    changed = {k: v for k, v in _settings(scheduler).items() if repr(v) != repr(usual.get(k))}
    return {"name": name, **changed} if changed else name


def _settings(scheduler: Any) -> dict[str, Any]:
    """A configuration as a run file holds it; diffusers' own also keeps what others take."""
    takes = inspect.signature(type(scheduler)).parameters
    config = {key: plain(value) for key, value in scheduler.config.items() if key in takes}
    return {key: NONE if value is None else value for key, value in config.items()}


def plain(value: Any) -> Any:
    """A value of a configuration as TOML has it: arrays and tensors as lists of their numbers.

    A scheduler within a scheduler is a table of all that it takes.
    """
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, diffusers.SchedulerMixin):
        return {"name": short_name(type(value)), **_settings(value)}
    return value


def short_name(scheduler: type[Any]) -> str:
    """A scheduler's name here: `EulerAncestralDiscreteScheduler` -> `euler-ancestral`.

    One that diffusers does not have is named `module:Class`.

    Raises:
        InputError: it is a class within a function, which no name finds.
    """
    if "<locals>" in scheduler.__qualname__:
        raise InputError(
            f"the scheduler {scheduler.__qualname__} was defined within a function, so no run file "
            "can name it; define it at the top of a module"
        )
    if getattr(diffusers, scheduler.__name__, None) is not scheduler:
        return f"{scheduler.__module__}:{scheduler.__qualname__}"
    return scheduler_name(scheduler.__name__)


def available() -> dict[str, type[Any]]:
    """Every scheduler that `StableDiffusionPipeline` accepts and that can be used here, by name."""
    classes = [getattr(diffusers, member.name) for member in KarrasDiffusionSchedulers]
    # Where a scheduler's own package is missing, diffusers puts a stand-in that is no scheduler.
    return {short_name(c): c for c in classes if _is_scheduler(c)}


def _is_scheduler(value: Any) -> TypeGuard[type[Any]]:
    return inspect.isclass(value) and issubclass(value, diffusers.SchedulerMixin)


def named(name: str) -> type[Any]:
    """The scheduler of that short or class name, or of that unmistakable beginning.

    Raises:
        InputError: there is none, with the nearest name and all choices.
    """
    choices, wanted = available(), _letters(name)
    exact = [c for c in choices if _letters(c) == wanted]
    found = exact or [c for c in choices if wanted and _letters(c).startswith(wanted)]
    if len(found) == 1:
        return choices[found[0]]
    if ":" in name:
        return _imported(name)
    # Those that its pipelines do not offer.
    others = {_letters(n): n for n in dir(diffusers) if n.endswith("Scheduler")}
    other = getattr(diffusers, others.get(wanted, ""), None)
    if _is_scheduler(other):
        return other
    raise unknown("scheduler", name, choices)


def _imported(name: str) -> type[Any]:
    module, _, attribute = name.partition(":")
    try:
        scheduler = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"no scheduler {name}: {error}") from error
    if not _is_scheduler(scheduler):
        raise InputError(f"{name} is no scheduler: expected a class of diffusers' SchedulerMixin")
    return scheduler


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]|scheduler|discrete", "", name.lower())
