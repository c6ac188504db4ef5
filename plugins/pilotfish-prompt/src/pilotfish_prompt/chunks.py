"""Texts longer than a CLIP takes, as several that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ROOM = 75  # tokens in a chunk, beside start and end
BACK = 20  # tokens by which a chunk may end early, at a comma, as AUTOMATIC1111's webui has it


@dataclass(frozen=True)
class Chunk:
    """What the encoder gets at a time.

    Attributes:
        tokens: T of them.
        part: of each, the number of the part of the text that it is from; None for start, end and
            padding.
    """

    tokens: Any
    part: Sequence[int | None]

    def each(self, weights: Sequence[float], like: Tensor) -> Tensor:
        """The weight of each token, (T, 1), by those of the parts."""
        return like.new_tensor([[1.0 if p is None else weights[p]] for p in self.part])


def cut(whole: Chunk, empty: Any) -> list[Chunk]:
    """Chunks of a text, each with start and end: as many as it needs, at least one.

    They end after a comma among their last tokens if there is one, otherwise after a word.

    Args:
        empty: the tokens of a text without any, as many as the encoder takes.
    """
    pieces, added = whole.tokens.pieces, whole.tokens.added
    start, end, chunks = 1, whole.tokens.used - 1, []
    while end - start > ROOM:
        stop = start + ROOM
        words = [
            at + 1
            for at in range(start, stop)
            if pieces[at].endswith("</w>") or (at in added and at + 1 not in added)
        ]
        commas = [at for at in words if at > stop - BACK and pieces[at - 1] == ",</w>"]
        stop = (commas or words or [stop])[-1]
        chunks.append(framed(whole, slice(start, stop), empty))
        start = stop
    return [*chunks, framed(whole, slice(start, end), empty)]


def framed(whole: Chunk, kept: slice, empty: Any) -> Chunk:
    """Some of a text's tokens in the frame of an empty one: start, end and padding."""
    count, length = kept.stop - kept.start, len(empty.pieces)
    after = slice(1, length - count)  # the end, and less padding

    def tensor(name: str) -> Tensor:
        frame, inside = getattr(empty, name), getattr(whole.tokens, name)
        return torch.cat([frame[:, :1], inside[:, kept], frame[:, after]], dim=1)

    tokens = replace(
        empty,
        ids=tensor("ids"),
        mask=tensor("mask"),
        pieces=(*empty.pieces[:1], *whole.tokens.pieces[kept], *empty.pieces[after]),
        used=count + 2,
        added={
            at - kept.start + 1: vector
            for at, vector in whole.tokens.added.items()
            if kept.start <= at < kept.stop
        },
    )
    return Chunk(tokens, [None, *whole.part[kept], *[None] * (length - count - 1)])
