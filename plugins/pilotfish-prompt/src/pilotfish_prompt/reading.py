"""A text encoder that reads prompts as people write them: with weights, and longer than it takes.

It stands in the place of the run's own, so that it reads every text that the run encodes: both
prompts, those that other plugins mix in, and those of further predictions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pilotfish import InputError

from .chunks import ROOM, Chunk, cut
from .syntax import DIALECTS
from .weighing import WEIGH

if TYPE_CHECKING:
    from pilotfish import Embedding, Run

MOST = 64  # chunks
ALL = MOST * ROOM + 2  # tokens, start and end among them


@dataclass(frozen=True)
class Reading:
    """A text as a `Reader` takes it; it has what the encoder's own tokens have, too.

    Attributes:
        tokens: of the text without its signs.
        chunks: the same as the encoder gets them, one after the other.
        weights: of the text's parts.
    """

    tokens: Any
    chunks: Sequence[Chunk]
    weights: Sequence[float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokens, name)


@dataclass(frozen=True)
class Reader:
    """A text encoder for texts with weights, for long ones, or for both.

    Attributes:
        encoder: a CLIP or a T5 with its tokenizer, for which it stands.
        long: the same, whose tokenizer cuts nothing off.
        dialect: in which weights are written; None where they are not read.
        plan: how many chunks the run's prompts have; None where they are cut off.
    """

    encoder: Any
    long: Any
    dialect: str | None = None
    plan: Plan | None = None

    @classmethod
    def of(cls, encoder: Any, **reads: Any) -> Reader:
        """One that also reads what is asked for."""
        if isinstance(encoder, cls):
            return replace(encoder, **reads)
        tokenizer = copy.deepcopy(encoder.tokenizer)
        tokenizer.model_max_length = ALL
        return cls(encoder, replace(encoder, tokenizer=tokenizer), **reads)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def with_words(self, words: Mapping[str, Tensor]) -> Reader:
        """The same, which also knows these words of vectors (n, D)."""
        encoder, long = (e.with_words(words) for e in (self.encoder, self.long))
        reader = replace(self, encoder=encoder, long=long)
        if self.plan:
            self.plan.readers[encoder.name] = reader
        return reader

    def on(self, device: Any) -> Reader:
        """The same, where its network is to be for a run's prompts."""
        return replace(self, encoder=self.encoder.on(device))

    def tokenize(self, text: str, length: int | None = None) -> Reading:
        """A text's tokens, with the weights of its parts, in chunks.

        Raises:
            InputError: its signs cannot be read.

        Warns:
            UserWarning: words were dropped; names them.
        """
        read = DIALECTS[self.dialect](text) if self.dialect else [(text, 1.0)]
        texts, weights = [part.strip() for part, _ in read], [weight for _, weight in read]
        # Each part is tokenised by itself, as both dialects do: a space is between them.
        encoder, plain = self.long if self.plan else self.encoder, " ".join(texts)
        tokens = encoder.tokenize(plain if self.dialect else text, length)
        whole = Chunk(tokens, self._parts(tokens, texts))
        return Reading(tokens, cut(whole, self._empty) if self.plan else [whole], weights)

    def _parts(self, tokens: Any, texts: Sequence[str]) -> list[int | None]:
        """The number of the part that each token is from; None for start, end and padding."""
        frame, length = self._empty.used, len(tokens.pieces)
        counts = [length]
        if len(texts) > 1:
            counts = [self.long.tokenize(text, ALL).used - frame for text in texts]
        numbers = list(chain.from_iterable(map(repeat, range(len(texts)), counts)))
        inside = numbers[: tokens.used - frame]
        before = [None] * (frame - 1)
        return [*before, *inside, *[None] * (length - len(inside) - len(before))]

    @cached_property
    def _empty(self) -> Any:
        """The tokens of a text without any: start if there is one, end, padding."""
        return self.encoder.tokenize("")

    def encode(self, reading: Reading, role: Any, on_token: Any) -> Embedding:
        """The embedding at stage "prompt": that of the chunks one after the other.

        What the encoder pools is the first chunk's, without weights, as in both dialects.

        Raises:
            InputError: there are more chunks than the run's prompts have.
        """
        chunks = list(reading.chunks)
        if self.plan:
            empty = Chunk(self._empty, [None] * len(self._empty.pieces))
            chunks += [empty] * self.plan.missing(reading)
        encode = partial(self.encoder.encode, role=role, on_token=on_token)
        done = [encode(chunk.tokens) for chunk in chunks]
        values = [embedding.values for embedding in done]
        if self.dialect and any(weight != 1 for weight in reading.weights):
            values = list(map(partial(self._weighed, reading, encode), values, chunks))
        pieces = tuple(chain.from_iterable(embedding.tokens for embedding in done))
        first: Embedding = done[0]
        return replace(first, values=torch.cat(values, dim=1), tokens=pieces)

    def _weighed(
        self, reading: Reading, encode: Callable[[Any], Embedding], values: Tensor, chunk: Chunk
    ) -> Tensor:
        """A chunk's output (1, T, D) by the weights of its parts."""
        there = {part for c in reading.chunks for part in c.part if part is not None}

        def again(part: int | None) -> Tensor:
            if part is None:
                return encode(self.encoder.tokenize("", len(chunk.part))).values
            with masked(self.encoder.network, [p != part for p in chunk.part]):
                return encode(chunk.tokens).values

        low = [part for part in sorted(there) if reading.weights[part] < 1]
        return WEIGH[self.dialect or ""](values, chunk, reading.weights, low, again)


@contextmanager
def masked(network: Any, kept: Sequence[bool]) -> Iterator[None]:
    """Within, the network attends only to tokens that are kept."""

    def tell(module: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = torch.tensor([kept], dtype=torch.long, device=module.device)
        return args, {**options, "attention_mask": mask}

    handle = network.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Plan:
    """How many chunks all prompts of a run are filled up to.

    Attributes:
        chunks: what the user asks for; None is what the longest of both prompts needs.
        texts: the run's prompt, or prompts for its text encoders, as they have been rewritten.
        readers: the text encoders with the run's words, by name.
    """

    run: Run
    chunks: int | None
    texts: list[str] = field(default_factory=list)
    readers: dict[str, Reader] = field(default_factory=dict)

    @cached_property
    def count(self) -> int:
        """The number of chunks."""
        if self.chunks is not None:
            return self.chunks
        prompt, negative = self.run.prompt, self.run.negative_prompt or ""
        names = [""] if isinstance(prompt, str) else list(prompt)
        given: list[Any] = [dict(zip(names, self.texts, strict=True))]
        if self.run.cfg_scale is not None:
            given.append({"": negative} if isinstance(negative, str) else negative)
        return max(
            len(reader.tokenize(texts.get(name, next(iter(texts.values())))).chunks)
            for name, reader in self.readers.items()
            for texts in given
        )

    def missing(self, reading: Reading) -> int:
        """How many chunks a text is filled up with.

        Raises:
            InputError: the text has more chunks than there are.
        """
        needs = len(reading.chunks)
        if needs > self.count:
            raise InputError(
                f"long-prompt: a text has {reading.used - 2} tokens, for which it takes {needs} "
                f"chunks of {ROOM}; this run's prompts have {self.count}. Set chunks={needs}"
            )
        return self.count - needs
