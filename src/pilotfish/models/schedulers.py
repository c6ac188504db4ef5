"""Schedulers of diffusers, by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, unknown
from .torchvision import mend_torchvision

mend_torchvision()

import diffusers  # noqa: E402  # after the declaration, because it imports torchvision
from diffusers.schedulers import KarrasDiffusionSchedulers  # noqa: E402


def new(spec: Any, own: Any) -> Any:
    """A fresh scheduler, made from a configuration; nothing is shared with another run.

    Args:
        spec: None for the model's own, a short name ("lms"), a class name, a diffusers
            scheduler, or a mapping with `name` and configuration.

    Raises:
        InputError: there is no such scheduler, or its own package is missing.
    """
    if spec is None:
        return type(own).from_config(own.config)
    if isinstance(spec, str | Mapping):
        config = {"name": spec} if isinstance(spec, str) else dict(spec)
        scheduler = named(config.pop("name", ""))
        if "clip_sample" in inspect.signature(scheduler).parameters:
            # Some schedulers clip where the model's configuration is silent; latents never are.
            config.setdefault("clip_sample", own.config.get("clip_sample", False))
        return scheduler.from_config(own.config, **config)
    if isinstance(spec, diffusers.SchedulerMixin):
        return type(spec).from_config(spec.config)
    raise InputError(f"scheduler must be a name or a diffusers scheduler; got {spec!r}")


def describe(spec: Any, own: Any) -> str | dict[str, Any]:
    """A scheduler as a run file holds it: its name, and what differs from the model's."""
    if spec is None:
        return short_name(type(own).__name__)
    if isinstance(spec, str):
        return short_name(named(spec).__name__)
    scheduler = new(spec, own)
    name = short_name(type(scheduler).__name__)
    if isinstance(spec, Mapping):
        return {**spec, "name": name}
    usual = type(scheduler).from_config(own.config).config
    changed = {
        key: value
        for key, value in scheduler.config.items()
        if value != usual.get(key) and not key.startswith("_")
    }
    return {"name": name, **changed} if changed else name


def short_name(class_name: str) -> str:
    """A scheduler's name here: `EulerAncestralDiscreteScheduler` -> `euler-ancestral`."""
    name = re.sub("Scheduler|Discrete", "", class_name)
    return re.sub("(?<=.)(?=Multistep|Singlestep|Ancestral|SDE|Euler)", "-", name).lower()


def available() -> dict[str, type[Any]]:
    """Every scheduler that `StableDiffusionPipeline` accepts and that can be used here, by name."""
    classes = [getattr(diffusers, member.name) for member in KarrasDiffusionSchedulers]
    # Where a scheduler's own package is missing, diffusers puts a stand-in that is no scheduler.
    return {short_name(c.__name__): c for c in classes if issubclass(c, diffusers.SchedulerMixin)}


def named(name: str) -> type[Any]:
    """The scheduler of that short or class name, or of that unmistakable beginning.

    Raises:
        InputError: there is none, with the nearest name and all choices.
    """
    choices = available()
    wanted = _letters(name)
    exact = [c for c in choices if _letters(c) == wanted]
    found = exact or [c for c in choices if wanted and _letters(c).startswith(wanted)]
    if len(found) != 1:
        raise unknown("scheduler", name, choices)
    return choices[found[0]]


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]|scheduler|discrete", "", name.lower())
