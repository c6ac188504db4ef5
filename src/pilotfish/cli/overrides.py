"""From a run file, `--set` and options to the content of one run."""

from __future__ import annotations

import functools
from typing import Any

from ..errors import InputError
from ..runs.run import Run
from .changes import changed, table


def compose(
    run_file: str | None, uses: tuple[str, ...], changes: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The keys of a run: the file's, then `--set`, then the options that were given."""
    content = Run.read(run_file) if run_file is not None else {"plugins": []}
    return completed(content, uses, changes, options)


def completed(
    content: dict[str, Any],
    uses: tuple[str, ...],
    changes: tuple[str, ...],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The keys of a run that was read, then `--set`, then the options that were given."""
    content["plugins"] = [_table(item) for item in (uses or content["plugins"])]
    if size := options.pop("size", None):
        options["width"], options["height"] = size
    given = {key: value for key, value in options.items() if value is not None}
    if "preset" in given:  # before --set, which may change one of its knobs
        content["preset"] = given.pop("preset")
    content = functools.reduce(changed, changes, content)
    return {**content, **given}


def _table(item: object) -> Any:
    if not isinstance(item, dict | str):
        raise InputError(f"a plugin is a table with `use`, or NAME:SETTING=VALUE; got {item!r}")
    return table(item)
