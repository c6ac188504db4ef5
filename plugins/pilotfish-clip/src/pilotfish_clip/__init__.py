"""The guide `clip`: a picture that a CLIP model finds close to a text, or to another picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import field_validator, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from pilotfish import Guide, Setting, pixels, read_picture

from .networks import CHECKPOINT, MODEL, Networks, choose, load

if TYPE_CHECKING:
    from pilotfish import Run, Step

__all__ = ["Clip"]


class Clip(Guide):
    """Pull the picture towards a text or another picture, as a CLIP model sees it.

    The loss is half the squared angle (in radians) between CLIP's embedding of the picture and that
    of the text or the other picture, averaged over the whole picture and its cutouts.
    """

    heading = "text and classifier guidance"

    class Settings(Guide.Settings):
        text: dict[str, float] | None = Setting(
            None,
            title="a text, a list of texts, or a table of texts and weights",
            description="what the picture is to look like",
            examples=["a watercolor"],
        )
        image: Path | None = Setting(
            None, title="a path to a picture", description="instead of text"
        )
        model: str | None = Setting(
            None,
            description="open_clip's name of a model, 'local-dir:FOLDER' or 'hf-hub:ID'; "
            f"if not given, the one in the diffusion model's own folder, or else {MODEL}",
        )
        pretrained: str | None = Setting(
            None,
            description=f"open_clip's name of a checkpoint ({CHECKPOINT} if not given), or a file",
        )
        cutouts: int = Setting(
            8, ge=0, le=256, description="random squares to look at beside the whole picture"
        )

        @field_validator("text", mode="before")
        @classmethod
        def _weighted(cls, text: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            if isinstance(texts, list) and all(isinstance(t, str) for t in texts):
                return dict(Counter(texts))
            if texts is not None and not isinstance(texts, dict):
                raise ValueError("a text, a list of texts, or a table of texts and weights")
            return texts

        @field_validator("text")
        @classmethod
        def _wanted(cls, text: dict[str, float] | None) -> dict[str, float] | None:
            if text is not None and not (any(text.values()) and all(t.strip() for t in text)):
                raise ValueError("one or more texts, none of them empty, not all of weight 0")
            return text

        @model_validator(mode="after")
        def _either(self) -> Self:
            if (self.image is None) == (self.text is None):
                raise ValueError(
                    "give text, what the picture should show, or image, a picture file to be like; "
                    f"got {'both' if self.image else 'neither'}"
                )
            return self

    def setup(self, run: Run) -> Target:
        settings, device = self.settings, run.model.device
        name, checkpoint = choose(settings.model, settings.pretrained, run)
        picture = settings.image and pixels(read_picture(settings.image, "Clip: image")).to(device)
        networks = load(name, checkpoint, device, run.model.dtype)
        if picture is None:
            features = networks.read(list(settings.text))  # (T, D)
        else:
            views = networks.views(picture, 0, [])
            features = networks.see(views.flatten(0, 1))
        weights = [1.0] if settings.text is None else list(settings.text.values())
        total = sum(map(abs, weights))
        shares = features.new_tensor([weight / total for weight in weights])
        return Target(networks, features.detach(), shares)

    def loss_guidance(self, step: Step, state: Target) -> Tensor:
        networks = state.networks
        views = networks.views(step.image, self.settings.cutouts, step.generator)
        features = networks.see(views.flatten(0, 1)).view(*views.shape[:2], -1)
        distance = spherical_distance(features.unsqueeze(2), state.features)  # (B, views, T)
        loss: Tensor = (distance * state.weights).sum(-1).mean(-1)
        return loss


@dataclass(frozen=True)
class Target:
    """What a guide aims at in one run: features (T, D), weights (T,) whose sizes add up to 1."""

    networks: Networks
    features: Tensor
    weights: Tensor


def spherical_distance(one: Tensor, other: Tensor) -> Tensor:
    """Half the squared angle between vectors (..., D), from 0 to pi^2 / 2.

    Crowson 2021, "CLIP Guided Diffusion". We differ: the arcsine's argument stays below 1, where
    its slope is infinite and the gradient of opposite vectors would be NaN.
    """
    chord = (normalize(one, dim=-1) - normalize(other, dim=-1)).norm(dim=-1)
    distance: Tensor = 2 * (chord / 2).clamp(max=1 - 1e-6).asin().square()
    return distance
