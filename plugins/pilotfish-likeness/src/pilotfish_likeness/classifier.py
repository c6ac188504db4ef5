"""The guide `classifier`: a picture that an image classifier takes for a given class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationInfo, field_serializer, field_validator
from torch import Tensor
from torch.nn.functional import log_softmax

from pilotfish import Guide, Setting, SettingsError, at_least_float32, cutouts

from .networks import class_of, load

if TYPE_CHECKING:
    from pilotfish import Run, Step

OWN = "classifier"  # in a diffusion model's folder, the folder of its own classifier
SMALLEST = 0.7  # side of a cutout, as a fraction of the picture's shorter side
PYTHON = "python:"  # how a callable stands in a run file


class Classifier(Guide):
    """Make the picture look like one class of an image classifier.

    The loss is `-log p(label)`, averaged over the whole picture and its cutouts.
    """

    heading = "text and classifier guidance"

    class Settings(Guide.Settings):
        label: int | str = Setting(
            description="a class of the classifier, by name or index", examples=["fox"]
        )
        model: str | Callable[..., Any] | None = Setting(
            None,
            description="a folder or hub id for transformers, 'timm:NAME', or in Python a "
            "callable: images in [0, 1] -> logits; if not given, the diffusion model's own",
        )
        labels: list[str] | None = Setting(
            None, description="the names of a callable's classes, in order"
        )
        cutouts: int = Setting(
            0, ge=0, le=256, description="random squares to look at beside the whole picture"
        )

        @field_validator("model")
        @classmethod
        def _still_there(cls, model: Any) -> Any:
            if isinstance(model, str) and model.startswith(PYTHON):
                raise ValueError(
                    "the callable itself: a run file holds only its name, and it must be passed "
                    "again in Python"
                )
            return model

        @field_validator("labels")
        @classmethod
        def _of_a_callable(cls, labels: Any, info: ValidationInfo) -> Any:
            # No model in the data: it was wrong itself, which is told already.
            if labels is not None and "model" in info.data and not callable(info.data["model"]):
                raise ValueError("left out, because this model brings its names")
            return labels

        @field_serializer("model", when_used="json")
        def _named(self, model: Any) -> str | None:
            if not callable(model):
                return str(model) if model else None
            name = getattr(model, "__qualname__", type(model).__qualname__)
            return f"{PYTHON}{model.__module__}:{name}"

    def setup(self, run: Run) -> Aim:
        settings = self.settings
        if callable(settings.model):
            index = class_of(settings.label, settings.labels or [])
            return Aim(settings.model, None, index)
        network = load(settings.model or own_classifier(run), run.model.device, run.model.dtype)
        index = class_of(settings.label, network.labels)
        return Aim(network, network.size, index)

    def loss_guidance(self, step: Step, state: Aim) -> Tensor:
        images = step.image
        size = state.size or (images.shape[2], images.shape[3])
        views = cutouts(images, size, self.settings.cutouts, step.generator, smallest=SMALLEST)
        logits = state.logits(views.flatten(0, 1))
        check(logits, views.shape[0] * views.shape[1], state.index)
        loss: Tensor = -log_softmax(at_least_float32(logits), dim=-1)[:, state.index]
        return loss.view(views.shape[:2]).mean(dim=1)  # (B,)


@dataclass(frozen=True)
class Aim:
    """What a guide aims at in one run.

    Attributes:
        logits: images (B, 3, *size) -> (B, classes).
        size: None takes images of any size.
    """

    logits: Callable[[Tensor], Tensor]
    size: tuple[int, int] | None
    index: int


def own_classifier(run: Run) -> str:
    """The folder of the classifier that the diffusion model brings.

    Raises:
        SettingsError: it brings none.
    """
    folder = run.model.folder
    if folder is None or not (folder / OWN / "config.json").is_file():
        raise SettingsError(
            "Classifier: model must be a folder or hub id of an image classifier, or 'timm:NAME'; "
            f"got None, and the diffusion model {run.model_id} brings none of its own"
        )
    return str(folder / OWN)


def check(logits: Any, count: int, index: int) -> None:
    """Check what a classifier answered.

    Raises:
        SettingsError: not one row of logits for each picture, or no such class.
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
        raise SettingsError(
            f"Classifier: model must answer {count} pictures with logits of shape "
            f"({count}, classes); got {shape}"
        )
    if index >= logits.shape[1]:
        raise SettingsError(
            f"Classifier: label must be below {logits.shape[1]}, the number of classes; got {index}"
        )
