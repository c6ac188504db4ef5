"""Runs for pages, one after the other, as events; the model is loaded once."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish import PilotfishError, load, offline, save_new

from .content import MODEL

if TYPE_CHECKING:
    from PIL import Image
    from pilotfish_view import Film

    from pilotfish import Result, Sampler, Stream

TRUST = "Look at its run on the page; if you want that, say there that you trust it"


@dataclass(frozen=True)
class Waiting:
    """Others come first.

    Attributes:
        before: what they show, the running one first.
    """

    before: list[str]


@dataclass(frozen=True)
class Loading:
    """The model is on its way."""

    model: str


@dataclass(frozen=True)
class Taken:
    """One step is done.

    Attributes:
        pictures: small ones of the predicted x0, one per image.
        losses: of each guide so far, over the steps on which it acted.
        part: which of a job's runs it is: "", or "without NAME".
    """

    index: int
    num_steps: int
    sigma: float
    pictures: list[Image.Image]
    losses: dict[str, list[float]]
    part: str = ""


@dataclass(frozen=True)
class Done:
    """One run's pictures are written."""

    files: list[Path]
    losses: dict[str, list[float]]
    remarks: list[str]
    seconds: float
    seed: int
    about: str
    film: Path | None = None
    part: str = ""


@dataclass(frozen=True)
class Stopped:
    """It was ended before it was done; `index` steps were taken."""

    index: int


@dataclass(frozen=True)
class Failed:
    """The engine's sentence, or what foreign code raised."""

    sentence: str


Event = Waiting | Loading | Taken | Done | Stopped | Failed


@dataclass
class Job:
    """One press of the button.

    Attributes:
        content: of the run.
        page: whose it is.
        origin: of a run that is not trusted: the picture's name.
        film: whether it becomes one too.
        without: the plugins of a second run, to compare with, and what they lack.
    """

    content: dict[str, Any]
    page: str
    origin: str | None = None
    film: bool = False
    without: tuple[str, list[dict[str, Any]]] | None = None
    stop: threading.Event = field(default_factory=threading.Event)


class Studio:
    """The networks of all pages, and the line before them.

    Args:
        folder: of the pictures.
        networks: `model`, `device` and `dtype` as `pilotfish.load` takes them, where a page says
            nothing else.
    """

    def __init__(self, folder: str | Path, **networks: Any) -> None:
        self.folder = Path(folder)
        self.networks = networks
        self.about = ""
        self._loaded: tuple[dict[str, Any], Sampler] | None = None
        self._loading = threading.Lock()
        self._line: list[Job] = []
        self._moved = threading.Condition()

    @property
    def line(self) -> list[Job]:
        """The running job, then those that wait."""
        with self._moved:
            return list(self._line)

    def stop(self, page: str) -> None:
        """End a page's running job at its next step, and those of it that wait."""
        for job in self.line:
            if job.page == page:
                job.stop.set()

    def sampler(self, content: Mapping[str, Any]) -> Sampler:
        """The networks that a run names; the last ones are kept.

        Raises:
            PilotfishError: they cannot be loaded.
        """
        own = {key: content[key] for key in MODEL if content.get(key) is not None}
        wanted = {**self.networks, **own}
        if "model" in own and own["model"] != self.networks.get("model"):
            wanted["dtype"] = own.get("dtype")
        with self._loading:
            if self._loaded is None or self._loaded[0] != wanted:
                self._loaded = None  # two may not fit into memory
                self._loaded = (wanted, load(**wanted))
                self.about = repr(self._loaded[1]).removeprefix("Sampler")
            return self._loaded[1]

    def events(self, job: Job) -> Iterator[Event]:
        """What happens to a job, to its end; nothing is raised.

        Leaving early ends it.
        """
        with self._moved:
            self._line.append(job)
        taken = 0
        try:
            yield from self._turn(job)
            for event in self._runs(job):
                taken = event.index + 1 if isinstance(event, Taken) else taken
                yield event
                if job.stop.is_set():
                    break
            if job.stop.is_set():
                yield Stopped(taken)
        except PilotfishError as error:
            yield Failed(str(error))
        except Exception as error:  # whatever a plugin or a library raises: the page lives on
            traceback.print_exc()
            yield Failed(f"{type(error).__name__}: {error}")
        finally:
            with self._moved:
                self._line.remove(job)
                self._moved.notify_all()

    def _turn(self, job: Job) -> Iterator[Waiting]:
        """Wait until all before it are done; tells of each that ends."""
        told: list[str] | None = None
        while not job.stop.is_set():
            with self._moved:
                place = self._line.index(job)
                before = [str(other.content["prompt"]) for other in self._line[:place]]
                if before and before == told:
                    self._moved.wait(0.2)
                    continue
            if not before:
                return
            yield Waiting(before)
            told = before

    def _runs(self, job: Job) -> Iterator[Event]:
        """The job's run, then the one to compare with, on the same seed."""
        if job.stop.is_set():
            return
        if self._loaded is None:
            yield Loading(str(job.content.get("model") or self.networks.get("model") or "emoji"))
        sampler = self.sampler(job.content)
        content = {key: value for key, value in job.content.items() if key not in MODEL}
        for event in self._run(sampler, content, job, job.film):
            yield event
            if isinstance(event, Done):
                content["seed"] = event.seed
        if job.without is not None and not job.stop.is_set():
            part, plugins = job.without
            yield from self._run(sampler, {**content, "plugins": plugins}, job, False, part)

    def _run(
        self, sampler: Sampler, content: dict[str, Any], job: Job, film: bool, part: str = ""
    ) -> Iterator[Event]:
        begin, frames = time.perf_counter(), _film() if film else None
        closed = Closed(job.origin)
        # Entered anew around each step: between two of them the page's own threads go on.
        with closed():
            stream = sampler.stream(**content)
        with contextlib.closing(stream):
            while (step := closed.step(stream)) is not None:
                if frames is not None:
                    frames.add(step)
                losses = _losses(stream)
                where = (step.index, len(stream), step.sigma)
                yield Taken(*where, step.preview(), losses, part)
                if job.stop.is_set():
                    return
            with closed():
                result = stream.result()
        files = save_new(result, self.folder)
        yield Done(
            files,
            _losses(stream),
            list(result.trace.remarks),
            time.perf_counter() - begin,
            result.run.seed,
            _about(result),
            None if frames is None else frames.save(_beside(files[0])),
            part,
        )


class Closed:
    """What stands around the steps of a run that is not trusted: no network.

    Args:
        origin: the picture that the run is from; None for a run of one's own.
    """

    def __init__(self, origin: str | None) -> None:
        self.origin = origin

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        """The context of the next step."""
        if self.origin is None:
            return contextlib.nullcontext()
        return offline(self.origin, TRUST)

    def step(self, stream: Stream) -> Any:
        """The next step; None after the last."""
        with self():
            return next(stream, None)


def _film() -> Film:
    from pilotfish_view import Film

    return Film()


def _beside(file: Path) -> Path:
    """A film's place beside its picture; nothing is written over."""
    counted = (file.with_name(f"{file.stem}_{count}.gif") for count in itertools.count(2))
    return next(p for p in itertools.chain([file.with_suffix(".gif")], counted) if not p.exists())


def _losses(stream: Stream) -> dict[str, list[float]]:
    return {name: stream.trace.losses(name) for name in stream.trace.plugins}


def _about(result: Result) -> str:
    run = result.run
    return f"{run.width} x {run.height}, {run.steps} steps, guidance {run.guidance_scale:g}"
