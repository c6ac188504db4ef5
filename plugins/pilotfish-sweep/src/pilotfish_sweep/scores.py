"""What judges a cell's pictures: guides, and functions of pictures."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pilotfish import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from pilotfish import Result, Run, Sampler

Scores = dict[str, list[float]]  # a value for each picture


def scores_of(sampler: Sampler, result: Result, tables: Sequence[Mapping[str, Any]]) -> Scores:
    """The scores of a result's pictures: higher is better, for a guide's is minus its loss.

    Raises:
        InputError: a plugin has no loss, a function cannot be found or answers with something else
            than a value for each picture, or two scores have one name.
        PluginError: see `Sampler.losses`.
    """
    guides = [table for table in tables if "use" in table]
    losses = sampler.losses(result, guides) if guides else {}
    if len(losses) < len(guides):
        told = ", ".join(str(table["use"]) for table in guides)
        raise InputError(f"scores: each of {told} must have a loss; only {[*losses]} have one")
    scores: Scores = {name: [-value for value in loss] for name, loss in losses.items()}
    for table in tables:
        if "judge" in table:
            for name, found in _judged(table, result).items():
                if name in scores:
                    raise InputError(f"two scores are named {name!r}; give one another name")
                scores[name] = found
    return scores


def _judged(table: Mapping[str, Any], result: Result) -> Scores:
    import torch

    from pilotfish import pixels

    judge = str(table["judge"])
    name = str(table.get("name") or judge.rpartition(":")[2])
    images = torch.cat([pixels(picture) for picture in result.images])  # (B, 3, H, W)
    answer = function(judge)(images, result.run)
    answers = answer if isinstance(answer, Mapping) else {"": answer}
    return {f"{name}.{k}" if k else name: _values(v, name, images) for k, v in answers.items()}


def _values(answer: Any, name: str, images: Tensor) -> list[float]:
    import torch

    values = torch.as_tensor(answer, dtype=torch.float64).detach().cpu()
    if values.shape != (len(images),):
        raise InputError(
            f"scores: {name} must answer with a value for each picture, shape ({len(images)},), or "
            f"a mapping of such; got shape {tuple(values.shape)}"
        )
    found: list[float] = values.tolist()
    return found


def function(name: str) -> Callable[[Tensor, Run], Any]:
    """A judge: `module:name`, or `file.py:name`.

    Raises:
        InputError: there is none.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            found = runpy.run_path(place)[attribute]
        else:
            found = getattr(importlib.import_module(place), attribute)
    except (ImportError, OSError, KeyError, AttributeError, ValueError) as error:
        raise InputError(
            f"scores: judge must be a function as MODULE:NAME or FILE.py:NAME; got {name!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not callable(found):
        raise InputError(f"scores: judge must be a function; {name!r} is {found!r}")
    judge: Callable[[Tensor, Run], Any] = found
    return judge
