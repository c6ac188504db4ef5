"""From a run file, `--set` and options to the content of one run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..runs.run import Run
from .changes import TEXT_KEYS, changed, table
from .options import given


def compose(
    run_file: str | None,
    uses: tuple[str, ...],
    changes: tuple[str, ...],
    options: Mapping[str, str | None],
) -> dict[str, Any]:
    """The keys of a run: the file's, then `--set`, then the options that were given.

    A run file is there to be changed: what differs from what it was made with is told, no more.
    """
    content = {**Run.read(run_file), "anyway": True} if run_file is not None else {"plugins": []}
    return completed(content, uses, changes, options)


def completed(
    content: dict[str, Any],
    uses: tuple[str, ...],
    changes: tuple[str, ...],
    options: Mapping[str, str | None],
) -> dict[str, Any]:
    """The keys of a run that was read, then `--set`, then the options that were given."""
    content["plugins"] = [as_table(item) for item in (uses or content["plugins"])]
    texts = given(options)
    if "preset" in texts:  # before --set, which may change one of its knobs
        content["preset"] = texts.pop("preset")
    if "model" in texts:  # another one's configuration is not this one's
        content.pop("config", None)
    content = functools.reduce(changed, changes, content)
    return functools.reduce(_with_option, texts.items(), content)


def _with_option(content: dict[str, Any], option: tuple[str, str]) -> dict[str, Any]:
    """As `--set` does it, but text stays as it is, with its quotes."""
    key, text = option
    return {**content, key: text} if key in TEXT_KEYS else changed(content, f"{key}={text}")


def as_table(item: object) -> Any:
    """A plugin of a run that was read, as a table.

    Raises:
        InputError: it is neither a table nor a text.
    """
    if not isinstance(item, dict | str):
        raise InputError(f"a plugin is a table with `use`, or NAME:SETTING=VALUE; got {item!r}")
    return table(item)
