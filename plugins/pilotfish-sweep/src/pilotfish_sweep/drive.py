"""The driver: hands out what is not done yet, until all of it is."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pilotfish import PilotfishError

from .claims import BEAT, is_held, locks_of
from .folder import Folder
from .plan import Cell, Sweep
from .pools import Pool, WorkerDied
from .work import Job, Outcome, Task

TASK = 16  # cells at most that are handed out together
SHARE = 8  # tasks at least for each worker, so that no one is left with a long one at the end
DEATHS = 3  # of workers with one cell alone, or without any, before it is given up


@dataclass
class Progress:
    """How far a sweep is.

    Attributes:
        outcomes: of each cell that is known to be done or to have failed.
        kept: how many of them were done before.
    """

    planned: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    kept: int = 0

    @property
    def failed(self) -> list[str]:
        """The cells that failed."""
        return [name for name, outcome in self.outcomes.items() if outcome == "failed"]


def run(
    sweep: Sweep,
    folder: Folder,
    pool: Pool,
    *,
    thorough: bool = False,
    watch: Callable[[Progress], object] = lambda _: None,
    pause: float = BEAT,
) -> Progress:
    """Make all cells of a sweep that are not done in its folder and have not failed there.

    Cells that others work at are waited for, and taken over where those give up.

    Args:
        thorough: compare what is in the finished files, not only how much.
        watch: is told of the progress, each time there is some.
        pause: seconds to wait where others work at all that is left.

    Raises:
        InputError: the folder cannot be written.
        PilotfishError: workers die before they begin with a cell.
    """
    folder.begin(sweep)
    folder.clear_up()
    job = Job(str(folder.path), sweep.scores, sweep.scored)
    cells = sweep.cells()
    progress = Progress(len(cells))
    left = [c for c in cells if not _known(c, folder, sweep.scored, thorough, progress)]
    progress.kept = len(cells) - len(left) - len(progress.failed)
    watch(progress)
    alone: list[Cell] = []  # a worker died with them: they go one by one, for one may be to blame
    deaths: Counter[str] = Counter()
    while left:
        before = len(progress.outcomes)
        try:
            for outcomes in pool.run(job, tasks(sweep, alone[:1] or left, pool.workers)):
                progress.outcomes |= {n: o for n, o in outcomes.items() if o != "busy"}
                watch(progress)
            alone = alone[1:]
            if not alone and len(progress.outcomes) == before:
                time.sleep(pause)
        except WorkerDied as death:
            alone = alone or _suspects(death, left, folder)
            blamed = alone[0].name if alone else ""
            deaths[blamed] += len(progress.outcomes) == before
            if deaths[blamed] == DEATHS:
                _give_up(alone, job, sweep, progress)
        left = [cell for cell in left if cell.name not in progress.outcomes]
        alone = [cell for cell in alone if cell.name not in progress.outcomes]
    return progress


def _known(cell: Cell, folder: Folder, scored: str, thorough: bool, progress: Progress) -> bool:
    """Whether a cell is done or has failed, which the progress then knows."""
    if folder.is_done(cell.name, scored, thorough=thorough):
        progress.outcomes[cell.name] = "done"
    elif folder.failure(cell.name):
        progress.outcomes[cell.name] = "failed"
    elif thorough:  # or workers would take it for done
        folder.undo(cell.name)
    return cell.name in progress.outcomes


def tasks(sweep: Sweep, cells: Sequence[Cell], workers: int) -> Iterator[Task]:
    """Cells of one model and prompt together, as far as all workers keep having something to do.

    They are still made one after the other: in one batch of the network each would come out a
    little different, by what it happens to share it with.
    """
    most = max(1, min(TASK, len(cells) // (SHARE * workers)))
    for _, group in itertools.groupby(cells, lambda cell: cell.batch):
        while several := [*itertools.islice(group, most)]:
            yield [(cell.name, sweep.content(cell.values)) for cell in several]


def _suspects(death: WorkerDied, left: Sequence[Cell], folder: Folder) -> list[Cell]:
    """The cells that a worker may have died of: those whose lock nobody holds any more."""
    if death.cells is not None:
        return [cell for cell in left if cell.name in death.cells]
    return [c for c in left if any(not is_held(k) for k in locks_of(folder.cell(c.name))[-1:])]


def _give_up(alone: Sequence[Cell], job: Job, sweep: Sweep, progress: Progress) -> None:
    """Write a cell down as failed, since its workers died.

    Raises:
        PilotfishError: they died without one.
    """
    why = f"{DEATHS} workers died with it alone: killed, perhaps since memory ran out, or crashed"
    if not alone:
        raise PilotfishError(
            f"{DEATHS} workers died before they began with a cell; what they wrote is above"
        )
    name = alone[0].name
    job.give_up(name, sweep.content(alone[0].values), PilotfishError(why))
    progress.outcomes[name] = "failed"
