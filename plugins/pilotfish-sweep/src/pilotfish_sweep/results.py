"""What a sweep came to: how far it is, and a table of its cells."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pilotfish
from pilotfish import InputError, PilotfishError

from .claims import is_held, owner_of
from .folder import FAILED, TRACE, Folder
from .plan import Cell, Sweep

Row = dict[str, Any]
LOSSES = ("cell", "image", "guide", "step", "sigma", "loss", "gradient_norm", "share", "final")
LAST = ("seconds", "pilotfish", "error")  # columns
TOLD = 10  # failures in the text of `status`


def state(folder: Folder) -> dict[str, Any]:
    """How far a sweep is, by what is there; no file is opened but failures' and locks'."""
    cells = {cell.name for cell in folder.sweep().cells()}
    there = {*folder.names()}
    done = {name for name in cells if f"{name}{TRACE}" in there}
    failed = {name for name in cells if f"{name}{FAILED}" in there} - done
    locks = [lock for lock in folder.locks() if is_held(lock)]
    others = {name.removesuffix(TRACE) for name in there if name.endswith(TRACE)} - cells
    return {
        "planned": len(cells),
        "done": len(done),
        "failed": len(failed),
        "running": [{"cell": lock.name.partition(".")[0], **owner_of(lock)} for lock in locks],
        "left": len(cells - done - failed),
        "of_other_plans": len(others),
        "failures": {name: folder.failure(name) for name in sorted(failed)},
    }


def told(state: dict[str, Any]) -> str:
    """The state for people."""
    running = state["running"]
    lines = [
        f"{state['done']} of {state['planned']} cells done, {state['failed']} failed, "
        f"{len(running)} under way, {state['left']} left"
    ]
    for claim in running:
        where = str(claim.get("where", "unknown")).partition(" ")[0]
        lines.append(f"  {claim['cell']}  on {where}, process {claim.get('pid', 'unknown')}")
    failures = [*state["failures"].items()]
    for name, failure in failures[:TOLD]:
        why = failure or {"kind": "unknown", "message": "its file is damaged"}
        lines.append(f"  {name}  {why['kind']}: {' '.join(why['message'].split())}")
    if len(failures) > TOLD:
        lines.append(f"  and {len(failures) - TOLD} more failures; --json tells all")
    if state["of_other_plans"]:
        lines.append(f"  {state['of_other_plans']} cells are of another sweep; they are left alone")
    return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """A sweep as rows.

    Attributes:
        pictures: a row for each picture, or for a cell without one.
        losses: a row for each guide, step and picture.
    """

    pictures: list[Row]
    losses: list[Row]

    @property
    def columns(self) -> list[str]:
        """Of the pictures' rows, in order."""
        found = dict.fromkeys(column for row in self.pictures for column in row)
        return [*(column for column in found if column not in LAST), *LAST]


def table(folder: Folder) -> Table:
    """The rows of the sweep that was run in a folder, in the order of its axes.

    Columns: `cell`, `state` (done, failed or open), each axis, `image`, `seed`, `picture` (from the
    folder on), `score.NAME` of each score, `loss.NAME` of each guide (its last, or of the finished
    picture where that is known), `seconds`, `pilotfish`, `error`.

    Raises:
        InputError: the folder holds no sweep.
    """
    sweep = folder.sweep()
    seconds = {entry["cell"]: entry.get("seconds") for entry in folder.logged()}
    pictures: list[Row] = []
    losses: list[Row] = []
    for cell in sweep.cells():
        trace = folder.trace(cell.name)
        pictures += _rows(folder, sweep, cell, trace, seconds.get(cell.name))
        losses += _loss_rows(cell.name, trace["records"] if trace else [])
    return Table(pictures, losses)


def _rows(
    folder: Folder, sweep: Sweep, cell: Cell, trace: dict[str, Any] | None, seconds: float | None
) -> Iterator[Row]:
    axes = {key: _plain(value) for key, value in zip(sweep.keys, cell.values, strict=True)}
    if trace is None:
        failure = folder.failure(cell.name)
        error = f"{failure['kind']}: {failure['message']}" if failure else None
        state = "failed" if failure else "open"
        yield {"cell": cell.name, "state": state, **axes, "seconds": seconds, "error": error}
        return
    place = folder.cell(cell.name).parent.relative_to(folder.path)
    files = [fact["file"] for fact in trace["files"] if fact["file"].endswith(".png")]
    last = last_losses(trace["records"])
    for image, file in enumerate(files):
        yield {
            "cell": cell.name,
            "state": "done",
            **axes,
            "image": image,
            "seed": trace["seed"] + image,
            "picture": (place / file).as_posix(),
            **{f"score.{name}": values[image] for name, values in trace["scores"].items()},
            **{f"loss.{name}": values[image] for name, values in last.items()},
            "seconds": seconds,
            "pilotfish": trace["pilotfish"],
            "error": None,
        }


def last_losses(records: Sequence[dict[str, Any]]) -> dict[str, Sequence[float]]:
    """Each guide's last loss, a value for each picture; that of the finished one comes last."""
    return {record["plugin"]: record["loss"] for record in records if record["loss"]}


def _loss_rows(cell: str, records: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for record in records:
        for image, loss in enumerate(record["loss"]):
            norm, share = (
                record[key][image] if record[key] else None for key in ("gradient_norm", "share")
            )
            own = (cell, image, record["plugin"], record["index"], record["sigma"], loss)
            more = (norm, share, record["final"])
            yield dict(zip(LOSSES, (*own, *more), strict=True))


def _plain(value: Any) -> Any:
    """A value as a table can hold it: numbers, truths and text stay, others become JSON."""
    return value if isinstance(value, int | float | str) else json.dumps(value, default=str)


def save(table: Table, path: Path) -> Path:
    """Write the pictures' rows as .csv or .parquet, or all rows as .sqlite or .db.

    Raises:
        InputError: the name ends otherwise, or the place cannot be written.
        PilotfishError: pyarrow is not installed.
    """
    writers = {".csv": _csv, ".parquet": _parquet, ".sqlite": _sqlite, ".db": _sqlite}
    if path.suffix.lower() not in writers:
        raise InputError(f"cannot write {path}: end its name in {', '.join(writers)}")
    pilotfish.check_folder(path)
    with pilotfish.whole_file(path) as part:
        part.unlink(missing_ok=True)  # of a command that was killed
        writers[path.suffix.lower()](table, part)
    return path


def _csv(table: Table, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.columns)
        writer.writeheader()
        writer.writerows(table.pictures)


def _parquet(table: Table, path: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise PilotfishError(
            "Parquet takes pyarrow: pip install 'pilotfish-sweep[parquet]', or write a .csv"
        ) from None
    columns = {
        name: _one_type([_stored(row.get(name)) for row in table.pictures])
        for name in table.columns
    }
    parquet.write_table(pyarrow.table(columns), path)


def _one_type(values: list[Any]) -> list[Any]:
    """A column's values: numbers among each other stay numbers; where text is among them, text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return [None if value is None else float(value) for value in values]
    return values if len(kinds) < 2 else [None if v is None else str(v) for v in values]


def _sqlite(table: Table, path: Path) -> None:
    with closing(sqlite3.connect(path)) as base:
        _fill(base, "pictures", table.columns, table.pictures)
        _fill(base, "losses", LOSSES, table.losses)
        base.execute("create index losses_of_cell on losses (cell, guide, step)")
        base.commit()


def _fill(base: sqlite3.Connection, name: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    quoted = ['"{}"'.format(column.replace('"', '""')) for column in columns]
    base.execute(f"create table {name} ({', '.join(quoted)})")
    marks = ", ".join("?" * len(columns))
    values = ([_stored(row.get(column)) for column in columns] for row in rows)
    base.executemany(f"insert into {name} values ({marks})", values)


def _stored(value: Any) -> Any:
    """Whole numbers of 64 bits with a sign stay numbers; seeds may have one bit more."""
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value
