"""`pilotfish sweep`. What needs torch is imported when it runs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from .drive import Progress
    from .folder import Folder
    from .plan import Sweep
    from .pools import Pool

Command = TypeVar("Command", bound=Callable[..., Any])
FOLDER = click.argument("folder", metavar="FOLDER")


@click.group()
def sweep() -> None:
    """Many runs: a run file with [axes], and a folder."""


def workers(command: Command) -> Command:
    """Add what says where cells are made."""
    for option in (
        click.option(
            "--check", "thorough", is_flag=True, help="Read finished files again, every byte."
        ),
        click.option(
            "--resources", metavar="NAME=NUMBER", help="What a worker of a cluster needs: GPU=1."
        ),
        click.option(
            "--scheduler", metavar="ADDRESS|local", help="A dask scheduler in place of processes."
        ),
        click.option(
            "--threads", type=click.IntRange(1), default=1, show_default=True,
            help="Of each worker on the CPU. Another number may round differently.",
        ),
        click.option(
            "--device", metavar="NAME,...", help="Of the workers in turn  [default: the best]"
        ),
        click.option(
            "--workers", type=click.IntRange(1), default=1, show_default=True,
            help="Processes; each loads the model once.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@sweep.command("run")
@click.argument("sweep_file", metavar="SWEEP.toml")
@click.option("--out", required=True, metavar="FOLDER", help="Made if need be.")
@workers
@click.option("--dry-run", is_flag=True, help="Check the sweep and count its cells.")
def run_sweep(sweep_file: str, out: str, dry_run: bool, **where: Any) -> None:
    """Make all cells of a sweep that are not done in its folder yet.

    The same command goes on after whatever stopped it, also on several machines at once.

    \b
    pilotfish sweep run sweep.toml --out folder --workers 2
    """
    from .folder import Folder
    from .plan import Sweep

    planned = Sweep.read(sweep_file)
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print
        planned.check()
    if dry_run:
        click.echo(f"{len(planned.cells())} cells over {', '.join(planned.keys)}")
        return
    make(planned, Folder(out), **where)


@sweep.command("rerun")
@click.argument("which", metavar="failed|CELL")
@FOLDER
@workers
def rerun(which: str, folder: str, **where: Any) -> None:
    """Try the cells once more that failed, or the one whose name begins so.

    \b
    pilotfish sweep rerun failed folder
    """
    from pilotfish import InputError

    from .folder import Folder

    place = Folder(folder)
    planned = place.sweep()
    failed = [c.name for c in planned.cells() if place.failure(c.name)]
    chosen = [name for name in failed if which == "failed" or name.startswith(which)]
    if not chosen and which != "failed":
        raise InputError(f"no cell that failed has a name that begins with {which!r}")
    with place.writing():
        for name in chosen:
            place.forget(name)
    make(planned, place, **where)


def make(
    planned: Sweep,
    folder: Folder,
    workers: int,
    device: str | None,
    threads: int,
    scheduler: str | None,
    resources: str | None,
    thorough: bool,
) -> None:
    """Make what is left of a sweep under a progress bar, and tell what there is."""
    from tqdm import tqdm

    from .drive import run

    with contextlib.ExitStack() as stack:
        bar: Any = None

        def watch(progress: Progress) -> None:
            nonlocal bar
            known = len(progress.outcomes)
            if bar is None:  # now that nothing is refused any more
                bar = tqdm(total=progress.planned, initial=known, unit="cell", file=sys.stderr)
                stack.callback(bar.close)
            bar.set_postfix_str(f"{len(progress.failed)} failed", refresh=False)
            bar.update(known - bar.n)

        pool = stack.enter_context(pool_of(workers, device, threads, scheduler, resources))
        progress = run(planned, folder, pool, thorough=thorough, watch=watch)
    done = len(progress.outcomes) - len(progress.failed)
    click.echo(f"{folder.path}  {done} of {progress.planned} cells, {progress.kept} kept")
    if progress.failed:
        click.echo(
            f"error: {len(progress.failed)} of {progress.planned} cells failed; "
            f"`pilotfish sweep status {folder.path}` tells why, "
            f"`pilotfish sweep rerun failed {folder.path}` tries them again",
            err=True,
        )
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def pool_of(
    workers: int, device: str | None, threads: int, scheduler: str | None, resources: str | None
) -> Iterator[Pool]:
    """The workers that options ask for.

    Raises:
        InputError: the options do not go together, or there is no scheduler there.
        PilotfishError: dask is not installed.
    """
    from pilotfish import InputError, PilotfishError

    devices = [name.strip() for name in device.split(",")] if device else []
    if scheduler is None:
        from .pools import Processes

        if resources:
            raise InputError("--resources is of a cluster's workers; it goes with --scheduler")
        with Processes(workers, devices, threads) as pool:
            yield pool
        return
    if len(devices) > 1:
        raise InputError("--device names one device for all of a cluster's workers")
    try:
        from .cluster import Cluster
    except ModuleNotFoundError as error:
        if error.name != "distributed":
            raise
        raise PilotfishError(
            "--scheduler takes dask: pip install 'pilotfish-sweep[cluster]'"
        ) from None
    with Cluster(scheduler, workers, device, threads, amounts(resources)) as cluster:
        yield cluster


def amounts(resources: str | None) -> dict[str, float]:
    """Resources as dask takes them: `GPU=1,MEMORY=2e9`.

    Raises:
        InputError: it is no list of numbers.
    """
    from pilotfish import InputError

    found = {}
    for part in resources.split(",") if resources else []:
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise InputError(
                f"--resources must be NAME=NUMBER,..., such as GPU=1; got {resources!r}"
            ) from None
    return found


@sweep.command("status")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def status(folder: str, as_json: bool) -> None:
    """How far a sweep is: what is done, failed, under way and left."""
    from .folder import Folder
    from .results import state, told

    found = state(Folder(folder))
    click.echo(json.dumps(found, indent=2) if as_json else told(found))


@sweep.command("results")
@FOLDER
@click.option(
    "--out", required=True, metavar="FILE.csv|.parquet|.sqlite", help="Parquet takes pyarrow."
)
def results(folder: str, out: str) -> None:
    """A table of all cells: settings, scores, losses and pictures.

    The SQLite file also holds the loss of each guide at each step; datasette opens it.

    \b
    pilotfish sweep results folder --out results.csv
    """
    from .folder import Folder
    from .results import save, table

    rows = table(Folder(folder))
    click.echo(f"{save(rows, Path(out))}  {len(rows.pictures)} rows")


@sweep.command("report")
@FOLDER
@click.option("--out", metavar="FILE.html", help="[default: report.html in the folder]")
def report(folder: str, out: str | None) -> None:
    """One HTML file: the pictures over two axes, scores, losses, and two runs compared.

    It needs no server and loads nothing.
    """
    from .folder import Folder
    from .report import write

    file, cells = write(Folder(folder), Path(out) if out else None)
    click.echo(f"{file}  {cells} cells")
