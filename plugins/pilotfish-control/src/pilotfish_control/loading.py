"""Around diffusers' loaders: what goes wrong with a file, and their own chatter."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from pilotfish import InputError, PilotfishError, mend_torchvision

mend_torchvision()

from transformers.utils.logging import (  # noqa: E402  # it may import torchvision
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

LOGGERS = ("diffusers", "transformers", "peft")
_ONE_AT_A_TIME = threading.Lock()  # loggers and warnings are the whole program's


@contextlib.contextmanager
def fitting(what: str, network: object) -> Iterator[None]:
    """Around a loader: whatever it raises says that the file does not fit the network.

    Raises:
        InputError: names the file, the network, and what the loader said.
    """
    try:
        with _ONE_AT_A_TIME, _quiet():
            yield
    except PilotfishError:
        raise
    except Exception as error:  # a foreign file makes the loaders raise anything
        raise InputError(
            f"{what} does not fit this model's {type(network).__name__}: it is damaged, or was "
            f"made for another model ({type(error).__name__}: {str(error)[:500]})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word of parts that a file need not have, of a second adapter, of a loader's own old names.

    Downloads keep their bars.
    """
    with contextlib.ExitStack() as afterwards:
        for logger in map(logging.getLogger, LOGGERS):
            afterwards.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if is_progress_bar_enabled():
            afterwards.callback(enable_progress_bar)
            disable_progress_bar()
        afterwards.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def check_place(place: str | Path, what: str) -> str:
    """A folder or a hub id; refused where it can only be a folder and there is none.

    Raises:
        InputError: it is a file, or a folder that does not exist.
    """
    name, path = str(place), Path(place).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{what} must be a folder that exists, or a hub id; got {name}")
    return name
