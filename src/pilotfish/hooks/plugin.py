"""What plugin authors inherit from: `Plugin`, and `Guide` for plugins with a loss."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import Field as Setting

from ..errors import InputError, PluginError, SettingsError
from .area import Area
from .specs import KINDS, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling.step import Step

__all__ = ["Guide", "Plugin", "Setting", "guide"]


def refuse_near_miss(owner: str, name: str) -> None:
    """Raise where a public method's name is nearly a hook's: a typo would be silent."""
    near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.8)
    if near:
        raise TypeError(
            f"{owner}.{name} is not a hook. Did you mean {near[0]!r}? "
            f"Otherwise start the name with an underscore. Hooks: {', '.join(KINDS)}"
        )


class Plugin:
    """An object that implements hooks (see `pilotfish.hooks.specs`).

    Keyword arguments become its `settings`, checked against the class's `Settings`. Plugins
    compare by identity; one instance can serve many runs.

    Raises:
        SettingsError: a setting is unknown or out of range.
        TypeError: at class definition, where a method's name is nearly, but not quite, a hook's.
    """

    class Settings(pydantic.BaseModel):
        """Validated, read-only, named like the keyword arguments."""

        model_config = pydantic.ConfigDict(
            extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
        )

    settings: Any

    def __init__(self, **settings: Any) -> None:
        try:
            self.settings = self.Settings(**settings)
        except pydantic.ValidationError as error:
            raise SettingsError(explain_settings(type(self), error)) from None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in vars(cls).items():
            if name in KINDS and inspect.isfunction(member):
                hookimpl(member)
            elif inspect.isfunction(member) and not name.startswith("_"):
                refuse_near_miss(cls.__qualname__, name)

    def __repr__(self) -> str:
        given = self.settings.model_dump(exclude_defaults=True)
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"


class Guide(Plugin):
    """A plugin with a loss: `loss_guidance(step)` says, per image, what should be lower.

    Its settings always have `scale`, `start`, `stop`, `every`, `gradient`, `mask`, `soft_edge` and
    `mask_edge`, which the host applies, not the plugin.
    """

    class Settings(Plugin.Settings):
        """What every guide has."""

        scale: float = Setting(1.0, description="strength; 0 is off, below 0 pushes away")
        start: float = Setting(0.0, ge=0, le=1, description="first moment, a fraction of the run")
        stop: float = Setting(1.0, ge=0, le=1, description="last moment, a fraction of the run")
        every: int = Setting(1, ge=1, description="act on every n-th step only")
        gradient: Literal["x0", "latents"] | None = Setting(
            None,
            description="stop at x0 (cheap) or go on through the network to the latents; "
            "where not given, the preset decides",
        )
        mask: Area | None = Setting(
            None,
            description="act in a part of the picture only: a picture file, white where it acts, "
            "or a box [left, top, right, bottom] in fractions of the picture",
        )
        soft_edge: float = Setting(
            0.05, ge=0, le=1, description="how far the mask's edges fade, of the shorter side"
        )
        mask_edge: Literal["soft", "hard"] = Setting(
            "soft",
            description="soft: the gradient fades over soft_edge; hard: outside of the mask the "
            "picture stays what it is without the guide",
        )

    def acts_at(self, index: int, num_steps: int) -> bool:
        """Whether the settings ask for this guide at step `index` of `num_steps`."""
        settings = self.settings
        inside = settings.start <= index / num_steps and (
            index / num_steps < settings.stop or settings.stop == 1
        )
        return bool(settings.scale != 0 and inside and index % settings.every == 0)


def guide(
    function: Callable[[Step], Tensor | None], *, name: str | None = None, **settings: Any
) -> Guide:
    """A guide from a plain function of the step: `guide(lambda step: step.rgb.var((1, 2, 3)))`.

    For notebooks: a run file cannot hold a function, so `run.to_toml()` refuses a run with one.

    Args:
        function: the loss as in `Guide.loss_guidance`, one value per image, (B,).
        name: in errors and in the trace; None is the function's own, or "guide" for a lambda.
        settings: those of every guide: `scale`, `start`, `stop`, `every`, `gradient`, `mask`,
            `soft_edge`, `mask_edge`.

    Raises:
        InputError: not a function of one argument, or not a name.
        SettingsError: a setting is unknown or out of range.
    """
    _check_function(function)
    own = getattr(function, "__name__", "guide").replace("<lambda>", "guide")

    class Function(Guide):
        __doc__ = inspect.getdoc(function)

        def loss_guidance(self, step: Step) -> Tensor | None:
            return function(step)

    Function.__name__ = own if name is None else check_name(name)
    return Function(**settings)


def _check_function(function: object) -> None:
    if not callable(function) or inspect.isclass(function):
        raise InputError(
            f"guide() takes a function of the step, such as "
            f"lambda step: step.rgb.var(dim=(1, 2, 3)); got {function!r}"
        )
    try:
        inspect.signature(function).bind("step")
    except TypeError as error:
        raise InputError(f"guide() calls its function with the step alone: {error}") from None
    except ValueError:
        pass  # some functions written in C have no signature


def check_name(name: str) -> str:
    """A name that a user chose for a plugin.

    Raises:
        InputError: it has characters that do not do in messages and on the command line.
    """
    if not re.fullmatch(r"[\w#.<>-]+", str(name)):
        raise InputError(f"a plugin's name takes letters, digits, - _ . #; got {name!r}")
    return name


def explain_settings(plugin: type[Plugin], error: pydantic.ValidationError) -> str:
    """One line per wrong setting: what was expected, what came; then what there is."""
    known = plugin.Settings.model_fields
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=1)
            lines.append(f"no setting {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        elif problem["type"] == "missing":
            lines.append(f"{name} must be given ({known[name].description}).")
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            lines.append(f"{name} must be {message}; got {problem['input']!r}.")
    return f"{plugin.__name__}: {' '.join(lines)} Settings: {', '.join(known) or 'none'}"


def check_instance(plugin: object, name: str) -> None:
    """Check a bare object with `@hookimpl` methods as strictly as a `Plugin` subclass."""
    if isinstance(plugin, type):
        raise PluginError(
            f"plugin {name!r}: got the class {plugin.__qualname__}; "
            f"pass an instance: {plugin.__name__}(...)",
            plugin=name,
        )
    if not isinstance(plugin, Plugin) and not any(
        hasattr(getattr(plugin, hook, None), "pilotfish_impl") for hook in KINDS
    ):
        raise PluginError(
            f"plugin {name!r}: {type(plugin).__name__} implements no hook. Inherit from "
            "pilotfish.Plugin or mark its methods with @pilotfish.hookimpl.",
            plugin=name,
        )
