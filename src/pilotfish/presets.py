"""Presets: named ways of turning losses into a move. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import InputError, unknown


@dataclass(frozen=True)
class Preset:
    """One way of turning losses into a move; `docs/guidance.md` has the formulas.

    Attributes:
        gradient: where a guide's gradient ends unless its settings say otherwise: at the predicted
            "x0", or through the network at the "latents".
        applied_to: "latents" moves the latents and keeps the prediction made before the move;
            "prediction" moves x0, and the scheduler continues from there.
        rule: "sigma2", `scale * sigma^2 * g`; or "rms", `scale` times the prompt's own pull,
            whatever the loss's own size (`guidance.py`).
        source: where it comes from.
    """

    name: str
    gradient: Literal["x0", "latents"]
    applied_to: Literal["latents", "prediction"]
    rule: Literal["sigma2", "rms"]
    source: str


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("deep-dive", "x0", "latents", "sigma2", "Whitaker 2022, Stable Diffusion Deep Dive"),
        Preset("balanced", "x0", "prediction", "rms", "ours; rule after FreeDoM, arXiv 2303.09833"),
    )
}


def find_preset(preset: str | Preset) -> Preset:
    """The preset of that name; a `Preset` is returned as it is.

    Raises:
        InputError: there is none of that name, or it is neither.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise InputError(f"preset must be a name or a Preset; got {preset!r}")
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return PRESETS[preset]
