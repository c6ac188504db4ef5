"""CLIP's text encoders as transformers has them: prompt -> tokens -> token embeddings -> output.

The shared tokenizer is never changed: words that plugins add live in a copy of it. The encoder's
token embeddings are changed by a hook for the time of one call, on this run's own copy of it.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import InputError
from .protocol import Embedding, OnToken, Role, Tokens

# Tokenizers keep truncation and padding in themselves: two threads would change each other's.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class ClipText:
    """A CLIP text encoder with its tokenizer.

    Attributes:
        name: see `TextEncoder`.
        tokenizer, network: of transformers; the network is a run's own copy where one runs.
        prepare: rewrites a prompt before tokenising (words of several vectors that a pipeline has
            loaded).
        words: what plugins added: text as the tokenizer gets it, by word.
        vectors: the vector (D,) and name of each token that they added, by id.
    """

    name: str
    tokenizer: Any
    network: Any
    prepare: Callable[[str], str] = str
    words: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[int, tuple[Tensor, str]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D, of its token embeddings."""
        return int(self.network.get_input_embeddings().weight.shape[1])

    @property
    def length(self) -> int:
        """T, its tokens, start and end among them."""
        return int(self.tokenizer.model_max_length)

    def with_words(self, words: Mapping[str, Tensor]) -> ClipText:
        """The same encoder, which also knows these words of vectors (n, D).

        Each vector gets a token of a name that no text contains, so that no word can be taken for a
        piece of another one.

        Raises:
            InputError: it knows one of them already.
        """
        if not words:
            return self
        with _one_at_a_time:
            tokenizer = copy.deepcopy(self.tokenizer)
        known, spelled, vectors = set(tokenizer.get_vocab()), {}, {}
        for number, (word, values) in enumerate(words.items()):
            if word in known:
                raise InputError(
                    f"the word {word!r} cannot be added: {self.name} knows it already; take another"
                )
            pieces = [f"<|pilotfish-{number}-{i}|>" for i in range(len(values))]
            tokenizer.add_tokens(pieces)
            spelled[word] = " ".join(pieces)
            for i, (piece, vector) in enumerate(zip(pieces, values, strict=True)):
                shown = word if i == 0 else f"{word}_{i}"  # as diffusers names them
                vectors[tokenizer.convert_tokens_to_ids(piece)] = (vector, shown)
        return replace(self, tokenizer=tokenizer, words=spelled, vectors=vectors)

    def tokenize(self, text: str) -> Tokens:
        """A prompt's tokens, padded and cut to `length`.

        Added words stand in the ids as the lowest id: encoders of Stable Diffusion 1.x find their
        pooled position at the *highest* id, which must remain the end token.

        Warns:
            UserWarning: the prompt is longer than the encoder takes; names the words that are
                dropped.
        """
        with _one_at_a_time:
            text = self.prepare(self._spell(text))
            found = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
            whole = self.tokenizer(text, truncation=False, verbose=False).input_ids
        if len(whole) > self.length:
            dropped = self.tokenizer.decode(whole[self.length - 1 : -1])
            dropped = dropped.replace("</w>", " ")  # a copied tokenizer leaves the ends of words
            for number, (_, shown) in self.vectors.items():
                piece = self.tokenizer.convert_ids_to_tokens(number)
                dropped = dropped.replace(piece, f"{shown} ")
            takes = f"{self.name} takes {self.length - 2}. Dropped: {dropped.strip()!r}"
            warnings.warn(f"the prompt is {len(whole) - 2} tokens long; {takes}", stacklevel=2)
        ids, used, added = found.input_ids, int(found.attention_mask.sum()), {}
        pieces = self.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        for at, number in enumerate(ids[0].tolist()):
            if number in self.vectors:
                added[at], pieces[at] = self.vectors[number]
                ids[0, at] = 0
        return Tokens(ids, tuple(pieces), used, added)

    def _spell(self, text: str) -> str:
        """Write out added words as their pieces: the longest word that stands at a place counts.

        Also beside the tokenizer's own added words, which stay whole. Case counts only where the
        tokenizer keeps it, or two words differ by it.
        """
        if not self.words:
            return text
        exact = {**{own: own for own in self.tokenizer.get_added_vocab()}, **self.words}
        lower = {word.lower(): pieces for word, pieces in self.words.items()}
        same = self.tokenizer.tokenize("A") == self.tokenizer.tokenize("a")
        longest_first = "|".join(map(re.escape, sorted(exact, key=len, reverse=True)))
        pattern = re.compile(longest_first, re.IGNORECASE if same else 0)
        return pattern.sub(lambda m: exact.get(m[0]) or lower.get(m[0].lower(), m[0]), text)

    def encode(self, tokens: Tokens, role: Role, on_token: OnToken | None) -> Embedding:
        """The embedding at stage "prompt", with `on_token`'s answer at stage "token" in it."""
        if on_token is None:
            return self._output(tokens, role)

        def at_token_stage(_module: Any, _inputs: Any, values: Tensor) -> Tensor:
            handle.remove()  # `on_token` may ask the module for more, and gets it as it is
            values = values.clone()
            for position, vector in tokens.added.items():
                values[:, position] = vector.to(values)
            return on_token(Embedding("token", role, values, None, tokens.pieces, self.name)).values

        handle = self.network.get_input_embeddings().register_forward_hook(at_token_stage)
        try:
            return self._output(tokens, role)
        finally:
            handle.remove()

    def _output(self, tokens: Tokens, role: Role) -> Embedding:
        output = self.network(tokens.ids.to(self.network.device), attention_mask=None)
        pooled = output[1] if len(output) > 1 else None
        return Embedding("prompt", role, output[0], pooled, tokens.pieces, self.name)
