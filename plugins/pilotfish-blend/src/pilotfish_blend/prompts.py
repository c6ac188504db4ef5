"""Prompts mixed at the text encoder's output: `blend`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ValidationInfo, field_validator
from torch.nn.functional import pad

from pilotfish import InputError, Plugin, Setting

from .mixing import mixed, rest
from .syntax import Mark, cut

if TYPE_CHECKING:
    from pilotfish import Embedding, Run, Step

Weight = Annotated[float, Setting(ge=0)]
Schedule = Literal["constant", "travel"] | dict[float, list[float]]


@dataclass
class Mixture:
    """The prompts that one run mixes: those of the settings, or of the mark once it is read.

    Attributes:
        own: weight of the run's own prompt.
        marked: they come from a mark, and the run's own prompt is the first of them.
        encoded: their embeddings by text encoder.
    """

    weights: Mapping[str, float]
    own: float
    marked: bool = False
    encoded: dict[str, list[Embedding]] = field(default_factory=dict)


class Blend(Plugin):
    """Mix the output embeddings of prompts, also with weights that travel over the run.

    Weights that sum to less than 1 leave the rest to the run's own prompt; larger sums are divided
    by the sum. `slerp` mixes directions on the sphere, token by token, and lengths apart.
    """

    heading = "prompts"

    class Settings(Plugin.Settings):
        prompts: dict[str, Weight] = Setting(
            {}, description="prompts and their weights", examples=[{"a skunk": 0.5}]
        )
        mode: Literal["lerp", "slerp"] = Setting(
            "lerp", description="mean on the straight line, or of directions on the sphere"
        )
        schedule: Schedule = Setting(
            "constant",
            description="factors on the weights over the run: `travel` from the first prompt to "
            "the last, or moments (0 first step, 1 last) with one factor for each prompt",
        )

        @field_validator("prompts")
        @classmethod
        def _unmarked(cls, prompts: dict[str, float]) -> dict[str, float]:
            if any("[[" in prompt or "]]" in prompt for prompt in prompts):
                raise ValueError("a mapping of prompts to weights, the prompts without [[ and ]]")
            return prompts

        @field_validator("schedule", mode="before")
        @classmethod
        def _fits(cls, schedule: Any, info: ValidationInfo) -> Any:
            if schedule not in ("constant", "travel"):
                schedule = read_moments(schedule)
            prompts = info.data.get("prompts")
            if prompts and (problem := misfit(schedule, len(prompts))):
                raise ValueError(problem)
            return schedule

    def setup(self) -> Mixture:
        prompts = self.settings.prompts
        return Mixture(prompts, rest(prompts.values()))

    def prompt_transform(self, prompt: str, run: Run, state: Mixture) -> str | None:
        pieces = cut(prompt, run)
        marks = [p for p in pieces if isinstance(p, Mark) and p.plugin == "blend"]
        prompts = self.settings.prompts
        if len(marks) + bool(prompts) != 1:
            raise InputError(
                "blend takes its setting prompts, or one [[text | text]] in the prompt; "
                f"got {len(prompts)} prompts, and {len(marks)} such marks in {prompt!r}"
            )
        if prompts:
            return None
        weights = alternatives(pieces, marks[0])
        if problem := misfit(self.settings.schedule, len(weights)):
            raise InputError(f"blend: schedule must be {problem}; got {self.settings.schedule!r}")
        state.weights, state.own, state.marked = weights, 0.0, True
        return next(iter(weights))

    def embedding_transform(
        self,
        embedding: Embedding,
        step: Step | None,
        encode: Callable[[str], Embedding],
        state: Mixture,
    ) -> Embedding | None:
        if embedding.stage != "prompt" or embedding.role != "positive":
            return None
        if embedding.encoder not in state.encoded:
            state.encoded[embedding.encoder] = [encode(prompt) for prompt in state.weights]
        others = state.encoded[embedding.encoder]
        if state.marked and others[0].tokens != embedding.tokens:
            raise InputError(
                "blend: a plugin listed after it changed the prompt, which is only the first of "
                "those in [[text | text]]. List blend last"
            )
        weights = [state.own, *self._weights_at(moment(step), state)]
        return mix([embedding, *others], weights, self.settings.mode)

    def _weights_at(self, when: float, mixture: Mixture) -> list[float]:
        """The prompts' weights at a moment of the run."""
        factors = factors_at(when, self.settings.schedule, len(mixture.weights))
        weights = [w * f for w, f in zip(mixture.weights.values(), factors, strict=True)]
        if not any(weights) and not mixture.own:
            raise InputError(
                f"blend: at moment {when:.3g} of the run no prompt has a weight: weights are "
                f"{list(mixture.weights.values())}, factors of the schedule {list(factors)}"
            )
        return weights


def alternatives(pieces: Sequence[str | Mark], mark: Mark) -> dict[str, float]:
    """Whole prompts with their weights, one for each text of a mark.

    Raises:
        InputError: another mark stands beside it.
    """
    if others := [str(p) for p in pieces if isinstance(p, Mark) and p is not mark]:
        raise InputError(f"blend: the plugin of {others[0]} must come first. List blend last")
    return {
        "".join(text if piece is mark else str(piece) for piece in pieces): weight
        for text, weight in mark.weights.items()
    }


def mix(embeddings: Sequence[Embedding], weights: Sequence[float], mode: str) -> Embedding:
    """The first embedding with the mean of all in it, pooled ones alike.

    Where prompts are not filled up to one length, the mean is as long as the longest that has a
    weight, and shorter ones end in zeros, as in ComfyUI's ConditioningAverage.
    """
    used = [e for e, weight in zip(embeddings, weights, strict=True) if weight > 0]
    weights = [weight for weight in weights if weight > 0]
    longest = max(used, key=length)
    values = [pad(e.values, (0, 0, 0, length(longest) - length(e))) for e in used]
    pooled = [e.pooled for e in used if e.pooled is not None]
    return replace(
        embeddings[0],
        values=mixed(values, weights, mode),
        pooled=mixed(pooled, weights, mode) if pooled else None,
        tokens=longest.tokens if length(longest) != length(embeddings[0]) else embeddings[0].tokens,
    )


def length(embedding: Embedding) -> int:
    """T, its tokens."""
    return embedding.values.shape[1]


# ---- the schedule ----


def moment(step: Step | None) -> float:
    """Where in the run: 0 before and at the first step, 1 at the last."""
    return 0.0 if step is None else step.index / max(step.num_steps - 1, 1)


def read_moments(schedule: Any) -> dict[float, list[float]]:
    """A schedule's moments and factors as numbers.

    Raises:
        ValueError: they are none, or out of range.
    """
    try:
        moments = {float(when): [float(f) for f in list(row)] for when, row in schedule.items()}
    except (AttributeError, TypeError, ValueError):
        moments = {}
    rows = list(moments.values())
    if (
        not moments
        or any(isinstance(row, str) for row in schedule.values())
        or not all(0 <= when <= 1 for when in moments)
        or not all(any(row) and all(f >= 0 and math.isfinite(f) for f in row) for row in rows)
    ):
        raise ValueError(
            "'constant', 'travel', or a mapping of moments, 0 to 1, to lists of one factor for "
            "each prompt, numbers >= 0 that are not all 0"
        )
    return moments


def misfit(schedule: Schedule, count: int) -> str | None:
    """What a schedule would have to be for so many prompts, if it does not fit them."""
    if schedule == "travel" and count < 2:
        return "'constant' with one prompt; to travel, list also the prompt to start from"
    if isinstance(schedule, dict) and any(len(row) != count for row in schedule.values()):
        return f"lists of one factor for each prompt ({count})"
    return None


def factors_at(when: float, schedule: Schedule, count: int) -> Sequence[float]:
    """Each prompt's factor at a moment: on straight lines between the schedule's."""
    if schedule == "constant":
        return [1.0] * count
    if not isinstance(schedule, dict):
        return [max(0.0, 1 - abs(when * (count - 1) - i)) for i in range(count)]
    moments = sorted(schedule)
    after = bisect_right(moments, when)
    if after in (0, len(moments)):
        return schedule[moments[max(after - 1, 0)]]
    start, end = moments[after - 1], moments[after]
    part = (when - start) / (end - start)
    return [a + part * (b - a) for a, b in zip(schedule[start], schedule[end], strict=True)]
