"""Workers as processes of this machine, by `concurrent.futures`."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Protocol

from pilotfish import GuideWarning

if TYPE_CHECKING:
    from .work import Job, Models, Outcome, Task

QUEUED = 3  # tasks for each worker: one at work, the others so that it need not wait


class WorkerDied(Exception):
    """A worker was killed, by the system where memory ran out, or by a crash in native code.

    Attributes:
        cells: those that it may have worked at; None where only their locks tell.
    """

    def __init__(self, cells: Sequence[str] | None = None) -> None:
        super().__init__("a worker died")
        self.cells = cells


class Pool(Protocol):
    """What makes tasks' cells."""

    @property
    def workers(self) -> int:
        """How many tasks are worked at together."""

    def run(self, job: Job, tasks: Iterator[Task]) -> Iterator[dict[str, Outcome]]:
        """What became of the cells of each task, in the order in which they end.

        Raises:
            WorkerDied: what is not told of has to be run again.
            InputError: the folder cannot be written.
        """


class Processes:
    """Processes, each with its own models.

    Args:
        workers: how many.
        devices: of the workers, in turn; none is the best of the machine.
        threads: of each worker, on the CPU. Another number may round differently.
    """

    def __init__(self, workers: int = 1, devices: Sequence[str] = (), threads: int = 1) -> None:
        self.workers, self.devices, self.threads = workers, devices, threads
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the workers, at once where the sweep breaks off: a cell half made counts nothing."""
        self._end(at_once=kind is not None)

    def run(self, job: Job, tasks: Iterator[Task]) -> Iterator[dict[str, Outcome]]:
        """See `Pool.run`."""
        pool = self._pool = self._pool or self._started()
        waiting: set[Future[dict[str, Outcome]]] = set()
        try:
            while True:
                more = itertools.islice(tasks, QUEUED * self.workers - len(waiting))
                waiting |= {pool.submit(_work, job, task) for task in more}
                if not waiting:
                    return
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        except BrokenExecutor:
            self._end(at_once=True)
            raise WorkerDied from None

    def _started(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # torch and CUDA do not outlive a fork
        devices = context.Queue()
        for device in itertools.islice(itertools.cycle(self.devices or [""]), self.workers):
            devices.put(device)
        return ProcessPoolExecutor(
            self.workers, context, initializer=_begin, initargs=(devices, self.threads)
        )

    def _end(self, at_once: bool) -> None:
        if self._pool is None:
            return
        if at_once:
            for process in [*getattr(self._pool, "_processes", {}).values()]:
                process.kill()
        self._pool.shutdown(cancel_futures=True)  # and wait: until then the dead seem alive
        self._pool = None


# Of this process, if it is a worker: `concurrent.futures` hands its tasks nothing else to keep.
_models: list[Models] = []


def _begin(devices: Any, threads: int) -> None:
    """Begin a worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends us
    sys.stdout = sys.stderr  # what plugins print
    warnings.simplefilter("ignore", GuideWarning)  # the traces have it
    # Read when torch is imported, which is later.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    from .work import Models

    _models.append(Models(devices.get() or None))


def _end_with_parent() -> None:
    """Without it, workers of a driver that was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: Job, task: Task) -> dict[str, Outcome]:
    with contextlib.redirect_stdout(sys.stderr):
        return job.work(task, _models[0])
