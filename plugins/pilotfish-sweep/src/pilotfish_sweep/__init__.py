"""Sweeps: many runs in one folder, which several machines may share.

| name | is |
|---|---|
| `Sweep` | a sweep file's content: a run, axes, scores |
| `Folder` | a sweep's folder: which cells are done, failed, under way |
| `run` | makes what is left of a sweep |
| `Processes` | workers on this machine |
| `Cluster` | workers of a dask scheduler, with `pilotfish-sweep[cluster]` |
| `table`, `save` | the results as rows, and as CSV, Parquet or SQLite |
| `write` | the report |
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import Cluster
    from .drive import run
    from .folder import Folder
    from .plan import Sweep
    from .pools import Processes
    from .report import write
    from .results import save, table

__all__ = ["Cluster", "Folder", "Processes", "Sweep", "run", "save", "table", "write"]

# Loaded when they are asked for, so that the command's help needs nothing.
_LAZY = {
    "Cluster": "cluster",
    "Folder": "folder",
    "Processes": "pools",
    "Sweep": "plan",
    "run": "drive",
    "save": "results",
    "table": "results",
    "write": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
