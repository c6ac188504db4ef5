"""Workers of a cluster, by `dask.distributed`: `pip install pilotfish-sweep[cluster]`."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from distributed import Client, KilledWorker, LocalCluster, Worker, WorkerPlugin, as_completed
from distributed import get_worker as this_worker

from .pools import QUEUED, WorkerDied
from .work import Job, Models, Outcome, Task

PLUGIN = "pilotfish-sweep"


class Loaded(WorkerPlugin):  # type: ignore[misc] # dask is not looked into
    """A worker's models, loaded once, however many tasks it gets.

    Args:
        device: as `pilotfish.load` takes it.
        threads: of torch, on the CPU.
    """

    name = PLUGIN

    def __init__(self, device: str | None, threads: int) -> None:
        self.device, self.threads = device, threads

    def setup(self, worker: Worker) -> None:
        """Begin; the models come with the first tasks that name them."""
        import torch

        torch.set_num_threads(self.threads)
        self.models = Models(self.device)


class Cluster:
    """The workers of a dask scheduler.

    Args:
        address: the scheduler's; "local" starts one with workers on this machine.
        workers: how many "local" starts.
        device: of all workers; None is the best of each machine.
        threads: of each worker, on the CPU.
        resources: what a worker must have for a task, such as {"GPU": 1}.
    """

    def __init__(
        self,
        address: str,
        workers: int = 1,
        device: str | None = None,
        threads: int = 1,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        self.resources = dict(resources or {})
        self._stack = contextlib.ExitStack()
        place: Any = address
        if address == "local":
            each = {"threads_per_worker": 1, "memory_limit": 0, "resources": self.resources}
            cluster = LocalCluster(n_workers=workers, dashboard_address=None, **each)
            place = self._stack.enter_context(cluster)
        self._client: Any = self._stack.enter_context(Client(place, timeout="10s"))
        self._client.register_plugin(Loaded(device, threads))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def workers(self) -> int:
        """See `Pool.workers`."""
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def run(self, job: Job, tasks: Iterator[Task]) -> Iterator[dict[str, Outcome]]:
        """See `Pool.run`."""
        under_way: dict[Any, Task] = {}

        def submit(task: Task) -> Any:
            future = self._client.submit(work, job, task, resources=self.resources, pure=False)
            under_way[future] = task
            return future

        first = itertools.islice(tasks, QUEUED * self.workers)
        ended = as_completed([submit(task) for task in first])
        try:
            for future in ended:
                task = under_way.pop(future)
                try:
                    yield future.result()
                except KilledWorker:
                    raise WorkerDied([name for name, _ in task]) from None
                for task in itertools.islice(tasks, 1):
                    ended.add(submit(task))
        finally:
            self._client.cancel([*under_way])


def work(job: Job, task: Task) -> dict[str, Outcome]:
    """A task, on a worker."""
    with contextlib.redirect_stdout(sys.stderr):
        plugin: Any = this_worker().plugins[PLUGIN]
        return job.work(task, plugin.models)
