"""What becomes of a run for which the memory of a device, or its model, is not enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import (
    InputError,
    ModelError,
    OutOfMemoryError,
    PilotfishError,
    is_out_of_memory,
    told,
)
from .trace import Record, Trace

if TYPE_CHECKING:
    from ..runs.run import Run

# Of what is in memory at once: published VAEs' decoders end with several maps of 64 (TAESD) to 128
# channels as large as the picture, and networks begin with more at the latents' size.
LEAST_CHANNELS = 32


def check_size(run: Run, latents: Sequence[int], device: torch.device) -> None:
    """Refuse a run of which a fraction of what it computes can never lie in a device's memory.

    Args:
        latents: (C, H, W).

    Raises:
        InputError: says how much it needs at least, and how much there is.
    """
    height, width = run.height or 0, run.width or 0
    # A picture is decoded alone if it must; the network is asked for all together.
    cells = max(height * width, run.num_images * latents[1] * latents[2])
    needs, there = 4 * LEAST_CHANNELS * cells, total_memory(device)
    if there and needs > there:
        count = f"{run.num_images} pictures" if run.num_images > 1 else "a picture"
        raise InputError(
            f"{count} of {width}x{height} cannot be made here: at least {needs // 2**30:,} GiB "
            f"of memory, of {there // 2**30} on {device}. Make it smaller, or fewer at once"
        )


def total_memory(device: torch.device) -> int:
    """Of a device, in bytes; 0 where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    # Windows has no such names.
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def in_parts(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A function of a batch (B, ...): at once, or else in halves, and halves of these."""
    try:
        return function(batch)
    except Exception as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    # Only now, when what the first try has left in memory is gone with its frames.
    half = len(batch) // 2
    return torch.cat([in_parts(function, part) for part in (batch[:half], batch[half:])])


@contextlib.contextmanager
def own_errors(run: Run, kept: Callable[[], tuple[Tensor | None, Tensor | None]]) -> Iterator[None]:
    """Let no library's error out.

    Args:
        kept: tells the latents of the last whole step, and the finished ones, where there are any.

    Raises:
        OutOfMemoryError: holds them.
        ModelError: a network or a scheduler raised, as where its config is another one's.
    """
    try:
        yield
    except (PilotfishError, Warning):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, run, *kept()) from error
        raise ModelError(
            f"the model cannot be run: {told(error)}. The config.json of one of its networks, or "
            "of its scheduler or tokenizer, may not be its own"
        ) from error


def out_of_memory(
    error: BaseException, run: Run, latents: Tensor | None, final: Tensor | None
) -> OutOfMemoryError:
    """The error for a run that ended so: what would help it."""
    dearest = "the network's graph" if run.checkpointing == "off" else "activations"
    ways = [f"a smaller picture than {run.width}x{run.height}"]
    if run.plugins and run.checkpointing != "on":
        ways.insert(0, "checkpointing='on', which keeps less for gradients")
    if run.plugins and run.decoder == "vae":
        ways.insert(1, "decoder='tiny' or 'linear' for the guides")
    if run.num_images > 1:
        ways.insert(0, "fewer images at once")
    ways += ["a dtype of half the size", "offload='text' where the model is loaded"]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return OutOfMemoryError(
        f"the device is out of memory, most of it for {dearest} ({lines[0][:200]}). "
        f"What helps: {'; '.join(ways)}",
        latents=latents if final is None else final,
        finished=final is not None,
    )


def merged(traces: Sequence[Trace]) -> Trace:
    """The trace of a batch from those of its parts, in order."""
    records: dict[tuple[Any, ...], Record] = {}
    for record in chain(*traces):
        key = record.index, record.plugin, record.repeat, record.final
        records[key] = _joined(records[key], record) if key in records else record
    trace = Trace(sorted(records.values(), key=lambda record: (record.final, record.index)))
    trace.remarks = list(dict.fromkeys(chain(*(t.remarks for t in traces))))
    return trace


def _joined(first: Record, second: Record) -> Record:
    """Two parts' records of the same guide at the same step."""
    names = ("loss", "gradient_norm", "share", "outside")
    values = {name: getattr(first, name) + getattr(second, name) for name in names}
    both = {n: first.cosine[n] + second.cosine[n] for n in first.cosine if n in second.cosine}
    seconds, error = first.seconds + second.seconds, first.error or second.error
    return replace(first, **values, cosine=both, seconds=seconds, error=error)
