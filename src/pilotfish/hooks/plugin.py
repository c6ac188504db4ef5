"""What plugin authors inherit from: `Plugin`, and `Guide` for plugins with a loss."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic
from pydantic import Field as Setting

from ..errors import DefinitionError, InputError, SettingsError, explain, in_utf8
from ..guidance.presets import within
from .area import Area
from .specs import KINDS, hookimpl
from .strength import Strength, strength_at

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["Guide", "Plugin", "Setting", "guide"]


def implemented(plugin: object) -> list[str]:
    """The hooks that a plugin, or its class, implements."""
    return [hook for hook in KINDS if hasattr(getattr(plugin, hook, None), "pilotfish_impl")]


def near_hooks(name: str) -> list[str]:
    """The hooks that a method's name is a typo of, or has the words of in another order."""
    turned = [hook for hook in KINDS if set(name.split("_")) == set(hook.split("_"))]
    return turned or difflib.get_close_matches(name, KINDS, n=1, cutoff=0.8)


class Plugin:
    """An object that implements hooks (see `pilotfish.hooks.specs`).

    Keyword arguments become its `settings`, checked against the class's `Settings`. Plugins
    compare by identity; one instance can serve many runs. `heading` is what `pilotfish plugins
    list` puts it under; written as a literal, it is read without importing the class.

    Raises:
        SettingsError: a setting is unknown or out of range.
        DefinitionError: `Settings` inherits from the wrong class; already at class definition,
            where a method's name is nearly, but not quite, a hook's.
    """

    class Settings(pydantic.BaseModel):
        """Validated, read-only, named like the keyword arguments."""

        model_config = pydantic.ConfigDict(
            extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
        )

        _in_utf8 = pydantic.field_validator("*")(in_utf8)

    heading: ClassVar[str] = "others"
    settings: Any

    @property
    def particles(self) -> int:
        """How many candidates of each picture go along, in one batch; `resample` chooses."""
        return 1

    def __init__(self, **settings: Any) -> None:
        kind, base = type(self), Guide if isinstance(self, Guide) else Plugin
        if not (inspect.isclass(kind.Settings) and issubclass(kind.Settings, base.Settings)):
            right = f"{base.__name__}.Settings"
            raise DefinitionError(
                f"{kind.__qualname__}.Settings must inherit from {right}; write "
                f"class Settings({right}): ...",
                plugin=kind.__qualname__,
            )
        try:
            self.settings = self.Settings(**settings)
        except pydantic.ValidationError as error:
            known = self.Settings.model_fields
            problems = f"{type(self).__name__}: {explain(error, known, 'setting')}"
            raise SettingsError(f"{problems} Settings: {', '.join(known) or 'none'}") from None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)  # of a static or class method
            if name in KINDS and inspect.isfunction(function):
                hookimpl(function)
            elif inspect.isfunction(member) and name[0] != "_" and (near := near_hooks(name)):
                raise DefinitionError(
                    f"{cls.__qualname__}.{name} is not a hook. Did you mean {near[0]!r}? "
                    f"Otherwise start the name with an underscore. Hooks: {', '.join(KINDS)}",
                    plugin=cls.__qualname__,
                )

    def __repr__(self) -> str:
        given = self.settings.model_dump(exclude_defaults=True)
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"


class Guide(Plugin):
    """A plugin with a loss: `loss_guidance(step)` says, per image, what should be lower.

    Its settings always have `scale`, `start`, `stop`, `every`, `gradient`, `mask`, `soft_edge` and
    `mask_edge`, which the host applies, not the plugin.
    """

    heading = "losses on the picture"

    class Settings(Plugin.Settings):
        """What every guide has."""

        scale: Strength = Setting(
            1.0,
            description="strength; 0 is off, below 0 pushes away; or a curve over the run, "
            "[[progress, strength], ...], with straight lines between the points",
        )
        start: float = Setting(0.0, ge=0, le=1, description="first moment, a fraction of the run")
        stop: float = Setting(1.0, ge=0, le=1, description="last moment, a fraction of the run")
        every: int = Setting(1, ge=1, description="act on every n-th step only")
        gradient: Literal["x0", "latents", "none"] | None = Setting(
            None,
            description="stop at x0 (cheap) or go on through the network to the latents; "
            "none: the loss is measured and moves nothing; where not given, the preset decides",
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
        inside = within(index / num_steps, settings.start, settings.stop)
        return inside and index % settings.every == 0 and self.scale_at(index, num_steps) != 0

    def scale_at(self, index: int, num_steps: int) -> float:
        """How strong it is at step `index` of `num_steps`."""
        return strength_at(self.settings.scale, index / num_steps)


def guide(
    function: Callable[[Any], Tensor | None], *, name: str | None = None, **settings: Any
) -> Guide:
    """A guide from a plain function of the step: `guide(lambda step: step.rgb.var((1, 2, 3)))`.

    For notebooks: a run file cannot hold a function, so `run.to_toml()` refuses a run with one.

    Args:
        function: the loss as in `Guide.loss_guidance`, one value per image, (B,).
        name: in errors and in the trace; None is the function's own, or "guide" for a lambda.
        settings: those of every guide: `scale`, `start`, `stop`, `every`, `gradient`, `mask`,
            `soft_edge`, `mask_edge`.

    Raises:
        InputError: not a function, or not a name.
        SettingsError: a setting is unknown or out of range.
    """
    if not callable(function) or inspect.isclass(function):
        example = "lambda step: step.rgb.var(dim=(1, 2, 3))"
        raise InputError(f"guide() takes a function of the step, as {example}; got {function!r}")
    own = getattr(function, "__name__", "guide").replace("<lambda>", "guide")

    class Function(Guide):
        __doc__ = inspect.getdoc(function)

        def loss_guidance(self, step: Any) -> Tensor | None:
            return function(step)

    Function.__name__ = own if name is None else check_name(name)
    return Function(**settings)


def check_name(name: str) -> str:
    """A name that a user chose for a plugin.

    Raises:
        InputError: it has characters that do not do in messages and on the command line.
    """
    if not re.fullmatch(r"[\w#.<>-]+", str(name)):
        raise InputError(f"a plugin's name takes letters, digits, - _ . #; got {name!r}")
    return name


def instance_problem(plugin: object) -> str | None:
    """Why it can never act, and what to write: a class, no hooks, one that was never set up."""
    if isinstance(plugin, type):
        return f"got the class {plugin.__qualname__}; pass an instance: {plugin.__name__}(...)"
    kind = type(plugin).__name__
    members = {hook: inspect.getattr_static(plugin, hook, None) for hook in KINDS}
    for hook, member in members.items():
        if member is not None and not callable(getattr(member, "__func__", member)):
            what = type(member).__name__
            return f"{kind}.{hook} is a {what}; a hook is a method: def {hook}(self, ...)"
    if isinstance(plugin, Plugin) and "settings" not in vars(plugin):
        return f"{kind}.__init__ sets no settings; begin it with super().__init__(**settings)"
    if implemented(plugin):
        return None
    advice = f"Hooks: {', '.join(KINDS)}"
    if not isinstance(plugin, Plugin):
        advice = "Inherit from pilotfish.Plugin or mark its methods with @pilotfish.hookimpl."
    for name in vars(type(plugin)) if isinstance(plugin, Plugin) else ():
        if alike := [hook for hook in KINDS if set(name.split("_")) & set(hook.split("_"))]:
            advice = f"Did you mean {alike[0]} where it has {name}()?"
    return f"{kind} implements no hook. {advice}"
