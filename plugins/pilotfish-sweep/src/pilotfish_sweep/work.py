"""What a worker does: it makes cells, and loads each model once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from pilotfish import load

from .claims import claimed
from .folder import FAILED, RUN, TRACE, Folder, facts, place
from .plan import MODEL
from .scores import Scores, scores_of

if TYPE_CHECKING:
    from pilotfish import Result, Sampler

Content = Mapping[str, Any]
Outcome = Literal["done", "failed", "busy"]
Task = Sequence[tuple[str, Content]]  # cells by name, of one model and prompt


class Models:
    """The models of a worker: each is loaded once, also where threads ask at the same time.

    Args:
        device: as `pilotfish.load` takes it.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        self._loading = threading.Lock()
        self._loaded: dict[tuple[Any, ...], Sampler] = {}

    def of(self, content: Content) -> Sampler:
        """The sampler that a run names.

        Raises:
            InputError, ModelError: see `pilotfish.load`.
        """
        key = tuple(content.get(part) for part in MODEL)
        with self._loading:
            if key not in self._loaded:
                model, config, dtype = key
                self._loaded[key] = load(model, config=config, dtype=dtype, device=self.device)
            return self._loaded[key]


@dataclass(frozen=True)
class Job:
    """What all cells of a sweep have in common, for workers.

    Attributes:
        folder: the sweep's.
        scores, scored: see `Sweep`.
    """

    folder: str
    scores: tuple[dict[str, Any], ...]
    scored: str

    def work(self, task: Task, models: Models) -> dict[str, Outcome]:
        """Make a task's cells.

        Raises:
            InputError: the folder cannot be written.
        """
        return {name: self.make(name, content, models) for name, content in task}

    def make(self, name: str, content: Content, models: Models) -> Outcome:
        """Make one cell, if nobody else has or does.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Folder(self.folder)
        with folder.writing(), claimed(folder.cell(name)) as lock:
            if lock is None:
                return "busy"
            if folder.is_done(name, self.scored):
                return "done"
            if folder.failure(name):
                return "failed"
            begin = time.perf_counter()
            made = self._made(content, models)
            outcome: Outcome = "failed" if isinstance(made, Exception) else "done"
            try:
                if isinstance(made, Exception):
                    place(lock, _failure(name, content, made, lock))
                else:
                    place(lock, _files(name, content, *made, self.scored, lock))
                    folder.forget(name)  # a failure whose file was damaged
            except FileNotFoundError:  # given up for abandoned, and made by another one
                return "busy"
            folder.log(cell=name, outcome=outcome, seconds=time.perf_counter() - begin)
            return outcome

    def give_up(self, name: str, content: Content, why: Exception) -> None:
        """Write a cell down as failed, unless another one has it.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Folder(self.folder)
        with folder.writing(), claimed(folder.cell(name)) as lock:
            if lock is not None:
                place(lock, _failure(name, content, why, lock))

    def _made(self, content: Content, models: Models) -> tuple[Result, Scores] | Exception:
        """The pictures and their scores, or what went wrong."""
        try:
            sampler = models.of(content)
            result = sampler(**{key: v for key, v in content.items() if key not in MODEL})
            return result, scores_of(sampler, result, self.scores)
        except Exception as error:  # whatever a plugin, a judge or a library raises
            return error


def _run_file(name: str, content: Content, lock: Path) -> Path:
    file = lock / f"{name}{RUN}"
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    return file


def _failure(name: str, content: Content, error: Exception, lock: Path) -> list[Path]:
    """Write down why a cell failed, beside its run file."""
    file = lock / f"{name}{FAILED}"
    failure = {"kind": type(error).__name__, "message": str(error)}
    file.write_text(json.dumps(failure), encoding="utf-8")
    return [_run_file(name, content, lock), file]


def _files(
    name: str, content: Content, result: Result, scores: Scores, scored: str, lock: Path
) -> list[Path]:
    """Write all files of a cell, the trace last."""
    files = [_run_file(name, content, lock), *result.save(lock / f"{name}.png")]
    records = result.trace.to_dicts()
    for record in records:  # the one thing that is not the same the next time
        del record["seconds"]
    trace = {
        "pilotfish": version("pilotfish"),
        "seed": result.run.seed,
        "files": [facts(file) for file in files],
        "scored": scored,
        "scores": scores,
        "remarks": result.trace.remarks,
        "records": records,
    }
    file = lock / f"{name}{TRACE}"
    file.write_text(json.dumps(trace), encoding="utf-8")
    return [*files, file]
