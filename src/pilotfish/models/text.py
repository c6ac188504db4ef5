"""Prompt -> tokens -> token embeddings -> encoder -> conditioning, with the hooks in between.

The shared tokenizer and encoder are never changed: words that plugins add live in a copy of the
tokenizer and in a forward hook that exists for one call.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..hooks.stack import Stack

Vocabulary = Mapping[str, Tensor]


@dataclass(frozen=True)
class Embedding:
    """A prompt's embedding at one of two stages; change it with `dataclasses.replace`.

    Attributes:
        stage: "token" (looked up, before positions and encoder) or "prompt" (encoder's output).
        role: "positive" or "negative" prompt.
        values: (B, T, D), with B = 1: all images of a run share the prompt.
        pooled: (B, D), at stage "prompt" where the encoder gives one, else None.
        tokens: the T tokens as the tokenizer writes them, among them its start, end and padding.
        encoder: the text encoder's name in the model, "text_encoder" for Stable Diffusion.
    """

    stage: Literal["token", "prompt"]
    role: Literal["positive", "negative"]
    values: Tensor
    pooled: Tensor | None
    tokens: tuple[str, ...]
    encoder: str


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of a prompt: values (B, T, D), for some models pooled (B, D)."""

    values: Tensor
    pooled: Tensor | None = None

    def expand(self, num_images: int) -> Conditioning:
        """The same prompt for each image."""
        return self._map(lambda v: v.expand(num_images, *v.shape[1:]) if len(v) == 1 else v)

    def cat(self, other: Conditioning) -> Conditioning:
        """Both along the batch, this one first."""
        pooled = (
            None
            if self.pooled is None or other.pooled is None
            else torch.cat([self.pooled, other.pooled])
        )
        return Conditioning(torch.cat([self.values, other.values]), pooled)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        return Conditioning(change(self.values), pooled)


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a model with its tokenizer.

    Attributes:
        name: "text_encoder", "text_encoder_2", ...
        prepare: rewrites a prompt before tokenising (words of several vectors that a pipeline has
            loaded).
    """

    name: str
    tokenizer: Any
    network: Any
    prepare: Callable[[str], str] = str


Encode = Callable[[str], Embedding]
View = Callable[[str], Any]


def embed(
    encoder: TextEncoder,
    prompt: str,
    role: Literal["positive", "negative"],
    stack: Stack,
    run: Any,
    vocabulary: Vocabulary,
) -> Embedding:
    """A prompt's embedding at stage "prompt", with all plugins' answers at stage "token" in it."""
    ids, tokens, added = tokenize(encoder, prompt, vocabulary)

    def at_token_stage(values: Tensor) -> Tensor:
        values = _place(values, added)
        embedding = Embedding("token", role, values, None, tokens, encoder.name)
        return transform(embedding, stack, run).values

    with _hooked(encoder.network.get_input_embeddings(), at_token_stage):
        output = encoder.network(ids.to(encoder.network.device), attention_mask=None)
    pooled = output[1] if len(output) > 1 else None
    return Embedding("prompt", role, output[0], pooled, tokens, encoder.name)


def transform(
    embedding: Embedding,
    stack: Stack,
    run: Any,
    encode: Encode | None = None,
    view: View = lambda _: None,
    where: str = "",
) -> Embedding:
    """An embedding after all plugins' `embedding_transform`.

    Args:
        encode: see `hookspecs.embedding_transform`.
        view: the step as the plugin of that name sees it; None before the first.
        where: for error messages.
    """
    answer: Embedding = stack.chain(
        "embedding_transform",
        embedding,
        lambda name, old: {"embedding": old, "run": run, "step": view(name), "encode": encode},
        lambda new, old: embedding_problem(new, old, run.num_images),
        where,
    )
    return answer


def tokenize(
    encoder: TextEncoder, prompt: str, vocabulary: Vocabulary
) -> tuple[Tensor, tuple[str, ...], dict[int, Tensor]]:
    """A prompt as ids (1, T), as token strings, and the added vectors (D,) by position.

    Added words stand in the ids as the lowest id: encoders of Stable Diffusion 1.x find their
    pooled position at the *highest* id, which must remain the end token.

    Warns:
        UserWarning: the prompt is longer than the encoder takes; names the words that are dropped.
    """
    tokenizer, vectors = _extended(encoder, vocabulary)
    text = encoder.prepare(_spell(prompt, vocabulary))
    length = tokenizer.model_max_length
    ids = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    whole = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(whole) > length:
        dropped = tokenizer.decode(whole[length - 1 : -1])
        warnings.warn(
            f"the prompt is {len(whole) - 2} tokens long; {encoder.name} takes {length - 2}. "
            f"Dropped: {dropped!r}",
            UserWarning,
            stacklevel=2,
        )
    tokens = tuple(tokenizer.convert_ids_to_tokens(ids[0].tolist()))
    added = {p: vectors[i] for p, i in enumerate(ids[0].tolist()) if i in vectors}
    for position in added:
        ids[0, position] = 0
    return ids, tokens, added


def _extended(encoder: TextEncoder, vocabulary: Vocabulary) -> tuple[Any, dict[int, Tensor]]:
    """A copy of the tokenizer that knows the added words, and their vectors by id."""
    if not vocabulary:
        return encoder.tokenizer, {}
    tokenizer = copy.deepcopy(encoder.tokenizer)
    known = set(tokenizer.get_vocab())
    vectors = {}
    for word, values in vocabulary.items():
        for piece, vector in zip(_pieces(word, len(values)), values, strict=True):
            if piece in known:
                raise InputError(
                    f"the word {word!r} cannot be added: {encoder.name} already knows {piece!r}. "
                    "Choose another token."
                )
            tokenizer.add_tokens(piece)
            vectors[tokenizer.convert_tokens_to_ids(piece)] = vector
    return tokenizer, vectors


def _pieces(word: str, count: int) -> list[str]:
    """The tokens of a word of several vectors: `<w>`, `<w>_1`, ... as diffusers names them."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def _spell(prompt: str, vocabulary: Vocabulary) -> str:
    """Write out each added word of several vectors as its pieces."""
    for word, values in vocabulary.items():
        if len(values) > 1:
            prompt = prompt.replace(word, " ".join(_pieces(word, len(values))))
    return prompt


def _place(values: Tensor, added: Mapping[int, Tensor]) -> Tensor:
    """Token embeddings with the added words' vectors put in."""
    if not added:
        return values
    values = values.clone()
    for position, vector in added.items():
        values[:, position] = vector.to(values)
    return values


@contextmanager
def _hooked(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a module returns while the context lasts."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def collect_vocabulary(stack: Stack, run: Any, encoders: Sequence[TextEncoder]) -> dict[str, Any]:
    """All plugins' new words, checked: `{encoder name: {word: (n, D) tensor}}`.

    Raises:
        PluginError: a word is not text without spaces, its vectors do not fit, or two plugins add
            the same word.
    """
    words: dict[str, dict[str, Tensor]] = {encoder.name: {} for encoder in encoders}
    owners: dict[str, str] = {}
    for name, answer in stack.collect("vocabulary", lambda *_: {"run": run}):
        if not isinstance(answer, Mapping):
            stack.blame(name, "vocabulary", f"returned {type(answer).__name__}; expected a mapping")
        for word, vectors in answer.items():
            if not isinstance(word, str) or not word or any(c.isspace() for c in word):
                stack.blame(name, "vocabulary", f"gave {word!r}; a word has no spaces")
            if word in owners:
                stack.blame(name, "vocabulary", f"adds {word!r}, as {owners[word]!r} does already")
            owners[word] = name
            for encoder in encoders:
                values: Any = vectors.get(encoder.name) if isinstance(vectors, Mapping) else vectors
                if problem := _vector_problem(values, encoder):
                    stack.blame(name, "vocabulary", f"gave {problem} for {word!r}")
                words[encoder.name][word] = values
    return words


def _vector_problem(values: object, encoder: TextEncoder) -> str | None:
    width = encoder.network.get_input_embeddings().weight.shape[1]
    if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] != width:
        came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        return f"{came}; {encoder.name} takes vectors of shape (n, {width})"
    if not values.isfinite().all():
        return "vectors that are not finite"
    return None


def embedding_problem(answer: Any, old: Embedding, num_images: int) -> str | None:
    """What is wrong with an `embedding_transform`'s answer."""
    if not isinstance(answer, Embedding):
        return f"returned {type(answer).__name__}; expected an Embedding or None"
    allowed = {1, num_images} if answer.stage == "prompt" else {1}
    if len(answer.values) not in allowed or answer.values.shape[1:] != old.values.shape[1:]:
        return (
            f"returned values of shape {tuple(answer.values.shape)} at stage {answer.stage!r}; "
            f"expected {tuple(old.values.shape)}"
        )
    if dataclasses.replace(answer, values=old.values, pooled=old.pooled) != old:
        return "changed stage, role, tokens or encoder; only values and pooled may change"
    if not answer.values.isfinite().all():
        return f"returned values that are not finite at stage {answer.stage!r}"
    return None
