"""What all plugins here share: which layers are weakened, and what is made of the prediction."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from pilotfish import InputError, ModelError, Plugin, Setting

if TYPE_CHECKING:
    from pilotfish import Run, Step


# What weakens the network for some images of a call.
PatchOf = Callable[[slice], AbstractContextManager[Any]]
# The command line gives text.
NumberOrName = Annotated[int | str, Setting(union_mode="left_to_right")]


@dataclass(frozen=True)
class Layer:
    """A block of the network, with attention among image tokens.

    Attributes:
        name: its path in the denoiser.
        block: diffusers' module.
        sites: that attention, see `sites` of a model.
    """

    name: str
    block: Any
    sites: tuple[Any, ...]


class Perturbed(Plugin):
    """A plugin that leads away from what is predicted where something is made worse."""

    heading = "perturbed guidance"

    class Settings(Plugin.Settings):
        """What every plugin of the package has."""

        scale: float = Setting(3.0, description="strength; 0 is off, below 0 leads to the weaker")
        start: float = Setting(0.0, ge=0, le=1, description="first moment, a fraction of the run")
        stop: float = Setting(1.0, ge=0, le=1, description="last moment, a fraction of the run")
        layers: list[NumberOrName] | None = Setting(
            None,
            min_length=1,
            description="which blocks are weakened: numbers from 0, or how their names begin; "
            "where not given a UNet's middle, or a transformer's from 30 to 42 % of its depth",
            examples=[[7, 8, 9], ["mid_block", "up_blocks.1"]],
        )

    def setup(self, run: Run) -> Any:
        return chosen(run.model, self.settings.layers)

    def _acts(self, step: Step) -> bool:
        settings = self.settings
        return bool(settings.scale and settings.start <= step.progress < settings.stop)


class Weakened(Perturbed):
    """A plugin that adds `scale * (cond - weakened)` to the prediction.

    `weakened` is a further prediction for the prompt, by a network in which layers do worse: one
    more for each image, where classifier-free guidance has two, in one batch with them if it can.
    """

    def further_prediction(self, step: Step, state: Any) -> PatchOf | None:
        return partial(self._patch, step, state) if self._acts(step) else None

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, step: Step, state: Any
    ) -> Tensor | None:
        if not self._acts(step):
            return None
        scale: float = self.settings.scale
        return prediction + scale * (cond - self._weaker(step, state))

    def _weaker(self, step: Step, state: Any) -> Tensor:
        """The weakened network's prediction."""
        return step.further_prediction

    def _patch(self, step: Step, state: Any, images: slice) -> AbstractContextManager[Any]:
        """The network, weaker for these images of a call while this lasts."""
        raise NotImplementedError


def of_images(made: Tensor, taken: Tensor, images: slice) -> Tensor:
    """The values `made` for a call's images, with `taken` for some of them."""
    return torch.cat([made[: images.start], taken, made[images.stop :]])


def chosen(model: Any, wanted: Sequence[int | str] | None) -> tuple[Layer, ...]:
    """The layers of a model with these numbers or names; the usual ones where none are given.

    Raises:
        ModelError: the model's family does not tell where its attention is.
        InputError: there is no such layer.
    """
    layers = all_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no sites: it does not tell image tokens from text tokens. "
            "Nothing can be weakened by attention or by layers there; use autoguidance with a "
            "weaker model"
        )
    if wanted is None:
        return usual(layers)
    names = {layer.name: None for item in wanted for layer in named(layers, item)}
    return tuple(layer for layer in layers if layer.name in names)


def all_layers(model: Any) -> list[Layer]:
    """The blocks of a model's network that hold attention among image tokens, in order."""
    sites: dict[str, list[Any]] = {}
    for site in model.sites:
        if site.kind != "cross":
            sites.setdefault(site.name.rpartition(".")[0], []).append(site)
    return [Layer(n, model.denoiser.get_submodule(n), tuple(s)) for n, s in sites.items()]


def usual(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """A UNet's middle, as with PAG and SEG; of a transformer's 24 those that SD 3.5 medium skips.

    Those are 7, 8 and 9; of another number of layers, as deep.
    """
    middle = tuple(layer for layer in layers if layer.name.startswith("mid_block"))
    first, count = 3 * len(layers) // 10, len(layers) // 8
    return middle or tuple(layers[first : first + max(count, 1)])


def named(layers: Sequence[Layer], item: int | str) -> Sequence[Layer]:
    """Those of a number, or whose names begin so, whole numbers in them being one character."""
    if str(item).isdigit():
        found = layers[int(item) : int(item) + 1]
    else:
        begins = re.compile(rf"{re.escape(str(item))}(?!\d)")
        found = [layer for layer in layers if begins.match(layer.name)]
    if not found:
        known = ", ".join(f"{number}: {layer.name}" for number, layer in enumerate(layers))
        raise InputError(f"no layer {item!r} in this model. Its layers: {known}")
    return found


@contextmanager
def shadowed(values: Mapping[Any, Any], name: str) -> Iterator[None]:
    """One attribute of several modules, by module, in place of what each has, for a while."""
    before = [(vars(module), name in vars(module), vars(module).get(name)) for module in values]
    try:
        for module, value in values.items():
            vars(module)[name] = value
        yield
    finally:
        for own, had, value in before:
            if had:
                own[name] = value
            else:
                own.pop(name, None)
