"""Presets: named ways of turning losses into a move. Data, not code.

Every algorithm here is a point in one space (as Ye et al. 2024, "TFG", arXiv 2409.15761, showed for
five of them). They stand in `presets.toml`; `docs/guidance.md` has the formulas, and `moves.py` is
them in code.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from ..errors import InputError, explain, unknown

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100)]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Preset:
    """One way of turning losses into a move.

    Attributes:
        name: for run files and messages; the file's own where a file says none.
        gradient: where a guide's gradient ends unless its settings say otherwise: at the predicted
            "x0", through the network at the "latents", or at "both", one after the other.
        applied_to: "latents" moves the latents and keeps the prediction made before the move;
            "prediction" moves x0, and the scheduler continues from there; "after_step" moves what
            the scheduler made of the unmoved ones.
        rule: how far: "sigma2", "rms", "residual", "plain" or "sphere" (`moves.py`).
        units: under "rms", what the prompt's pull is measured in: as it moves "x0", or in "eps".
        rho: multiplies every guide's scale where its gradient ends at the latents. Under "sphere",
            the part of the noise's direction that the guides take.
        mu: multiplies every guide's scale where its gradient ends at x0.
        variance: of x0 given the latents, as the guides' gradient allows for it, under "sigma2":
            "none" takes x0 as known; "move" is the one that the rule moves by, which makes the step
            an implicit one; "unit" that of data N(0, 1). Costs a decode for each iteration.
        schedule: how rho and mu change over the run, 1 on average: "constant", or with the ratio
            `r` of two steps' abar as "increase" (r) or "decrease" (1 - r).
        iterations: steps of gradient descent on x0; of conjugate gradients under a `variance`.
        blended: a move of x0 counts by the part of the noise in the latents, sigma / (alpha +
            sigma).
        keeps: what of the prediction stays where "after_step" moves x0: "eps", or a flow's "v",
            under which what is moved at x0 moves latents at every level alike.
        renoise: the part of the next level's noise, of its variance, that is drawn anew where
            guides act: a step of the DDIM formula, whatever the scheduler. "alpha" is alpha /
            (alpha + sigma) of that level.
        samples: each loss is `-log mean exp(-loss)` over so many x0 with noise added.
        smoothing: that noise, as a multiple of the step's sigma (of variance-preserving latents).
        recurrence: how often each step is taken: noise is put back in between.
        recurrence_start: the fraction of the run at which that begins.
        recurrence_stop: the fraction at which it ends.
        start: the fraction of the run at which guides begin to act, within their own windows.
        stop: the fraction at which they end.
        combine: "sum", or "project": what a guide's gradient has against another's is taken out, at
            the cost of a backward pass through the decoder for each guide.
        trust: a bound on the guides' move, as a multiple of the prompt's pull; None is none.
        source: where it comes from.
    """

    name: str = "unnamed"
    gradient: Literal["x0", "latents", "both"]
    applied_to: Literal["latents", "prediction", "after_step"]
    rule: Literal["sigma2", "rms", "residual", "plain", "sphere"]
    source: str = ""
    units: Literal["x0", "eps"] = "x0"
    rho: Strength = 1.0
    mu: Strength = 1.0
    variance: Literal["none", "move", "unit"] = "none"
    schedule: Literal["constant", "increase", "decrease"] = "constant"
    iterations: Count = 1
    blended: bool = False
    keeps: Literal["eps", "v"] = "eps"
    renoise: Fraction | Literal["alpha"] = 0.0
    samples: Count = 1
    smoothing: Strength = 0.0
    recurrence: Count = 1
    recurrence_start: Fraction = 0.0
    recurrence_stop: Fraction = 1.0
    start: Fraction = 0.0
    stop: Fraction = 1.0
    combine: Literal["sum", "project"] = "sum"
    trust: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.rule == "sphere" and (self.gradient, self.applied_to) != ("latents", "after_step"):
            fitting = "gradient='latents' and applied_to='after_step'"
            raise ValueError(f"rule 'sphere' turns the noise of a done step: it takes {fitting}")
        if self.rule == "sphere" and self.trust is not None:
            raise ValueError("rule 'sphere' keeps the length of the step's noise: no trust")
        if self.variance != "none" and (self.rule, self.applied_to) != ("sigma2", "prediction"):
            fitting = "rule='sigma2' and applied_to='prediction'"
            raise ValueError(
                f"variance {self.variance!r} belongs to moves of x0 by sigma^2: it takes {fitting}"
            )

    @property
    def normalizes(self) -> bool:
        """Whether the rule does not see how large a loss is."""
        return self.rule in ("rms", "sphere")

    def repeats(self, progress: float) -> int:
        """How often the step at that fraction of the run is taken."""
        inside = within(progress, self.recurrence_start, self.recurrence_stop)
        return self.recurrence if inside else 1

    def acts_at(self, progress: float) -> bool:
        """Whether guides act at that fraction of the run."""
        return within(progress, self.start, self.stop)

    def changes(self) -> dict[str, Any]:
        """What a run file needs: `base`, and the knobs that differ from it; all without a base."""
        base = dataclasses.asdict(PRESETS[self.name]) if self.name in PRESETS else {}
        knobs = {k: v for k, v in dataclasses.asdict(self).items() if v != base.get(k)}
        return {"base": self.name, **knobs} if base else knobs


def within(progress: float, start: float, stop: float) -> bool:
    """Whether a fraction of the run, below 1, lies in a window: without its end."""
    return start <= progress < stop


_SHIPPED = resources.files(__package__).joinpath("presets.toml").read_text(encoding="utf-8")
PRESETS = {name: Preset(name=name, **knobs) for name, knobs in tomllib.loads(_SHIPPED).items()}
"""The presets by their names."""

KNOBS = tuple(Preset.__dataclass_fields__)


def find_preset(preset: str | Path | Preset | Mapping[str, Any]) -> Preset:
    """A preset, from its name, a TOML file (`.toml`), or a table of knobs with or without `base`.

    Raises:
        InputError: there is none of that name, or a knob is unknown or out of range.
    """
    if isinstance(preset, Preset):
        return preset
    if isinstance(preset, Mapping):
        return _from_table(preset)
    name = str(preset)
    if name.endswith(".toml"):
        return _from_file(Path(preset))
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def _from_file(path: Path) -> Preset:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ... no UTF-8, no TOML, [[[[[[ ...
        raise InputError(f"cannot read the preset file {path}: {error}") from None
    return _from_table({"name": path.stem, **table})


def _from_table(table: Mapping[str, Any]) -> Preset:
    knobs = dict(table)
    if base := knobs.pop("base", None):
        knobs = {**dataclasses.asdict(find_preset(base)), **knobs}
    try:
        return Preset(**knobs)
    except pydantic.ValidationError as error:
        problems = explain(error, Preset.__dataclass_fields__, "knob").removesuffix(".")
        raise InputError(f"preset {knobs.get('name', 'unnamed')!r}: {problems}") from None
