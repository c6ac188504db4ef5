"""Text encoders as transformers has them: prompt -> tokens -> token embeddings -> output.

The shared tokenizer is never changed: words that plugins add live in a copy of it. The encoder's
token embeddings are changed by a hook for the time of one call, on this run's own copy of it.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
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
        layer: which of the hidden states is the output, -2 for the last but one; None is the last
            one after the final norm.
        words: what plugins added: text as the tokenizer gets it, by word.
        vectors: the vector (D,) and name of each token that they added, by id.
    """

    name: str
    tokenizer: Any
    network: Any
    prepare: Callable[[str], str] = str
    layer: int | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[int, tuple[Tensor, str]] = field(default_factory=dict)
    kind: ClassVar[str] = "clip"
    between: ClassVar[str] = " "  # the pieces of an added word, where a space is no token
    before: ClassVar[str] = ""  # what begins a word within a prompt, and belongs to its tokens

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
            spelled[word] = self.between.join(pieces)
            for i, (piece, vector) in enumerate(zip(pieces, values, strict=True)):
                shown = word if i == 0 else f"{word}_{i}"  # as diffusers names them
                vectors[tokenizer.convert_tokens_to_ids(piece)] = (vector, shown)
        return replace(self, tokenizer=tokenizer, words=spelled, vectors=vectors)

    def ids(self, word: str) -> list[int]:
        """The tokens of a word or two as they stand in a prompt, without what goes around one."""
        with _one_at_a_time:
            text = self._prepared_word(word)
            found = self.tokenizer(text, truncation=False, add_special_tokens=False).input_ids
        return [i for i in found if i not in set(self.tokenizer.all_special_ids)]

    def _prepared_word(self, word: str) -> str:
        return self.prepare(word)

    def tokenize(self, text: str, length: int | None = None) -> Tokens:
        """A prompt's tokens, padded and cut to `length`.

        Added words stand in the ids as the lowest id: encoders of Stable Diffusion 1.x find their
        pooled position at the *highest* id, which must remain the end token.

        Args:
            length: how many tokens a run asks for, where that is not the encoder's own affair.

        Warns:
            UserWarning: the prompt is longer than the encoder takes; names the words that are
                dropped.
        """
        length = self._takes(length)
        pad = {"padding": self._padding, "truncation": True, "max_length": length}
        with _one_at_a_time:
            text = self.prepare(self._spell(text))
            found = self.tokenizer(text, **pad, return_tensors="pt")
            whole = self.tokenizer(text, truncation=False, verbose=False).input_ids
            special = self.tokenizer.num_special_tokens_to_add()
        if len(whole) > length:
            dropped = self.tokenizer.decode(whole[length - 1 : -1])
            dropped = dropped.replace("</w>", " ")  # a copied tokenizer leaves the ends of words
            for number, (_, shown) in self.vectors.items():
                piece = self.tokenizer.convert_ids_to_tokens(number)
                dropped = dropped.replace(piece, f"{shown} ")
            takes = f"{self.name} takes {length - special}. Dropped: {dropped.strip()!r}"
            warnings.warn(
                f"the prompt is {len(whole) - special} tokens long; {takes}", stacklevel=2
            )
        ids, used, added = found.input_ids, int(found.attention_mask.sum()), {}
        pieces = self.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        for at, number in enumerate(ids[0].tolist()):
            if number in self.vectors:
                added[at], pieces[at] = self.vectors[number]
                ids[0, at] = 0
        return Tokens(ids, tuple(pieces), used, added, found.attention_mask)

    @property
    def _padding(self) -> str | bool:
        return "max_length"

    @property
    def _embeddings(self) -> Any:
        """The module that looks tokens up."""
        return self.network.get_input_embeddings()

    def _takes(self, asked: int | None) -> int:
        """How many tokens, where a run asks for so many: a CLIP has one length."""
        return self.length

    def _spell(self, text: str) -> str:
        """Write out added words as their pieces: the longest word that stands at a place counts.

        Also beside the tokenizer's own added words, which stay whole. Case counts only where the
        tokenizer keeps it, or two words differ by it.
        """
        if not self.words:
            return text
        own = self.tokenizer.get_added_vocab()
        lower = {word.lower(): pieces for word, pieces in self.words.items()}
        same = self.tokenizer.tokenize("A") == self.tokenizer.tokenize("a")
        longest_first = sorted([*own, *self.words], key=len, reverse=True)
        words = f"(?:{self.before})?({'|'.join(map(re.escape, longest_first))})"

        def written(found: re.Match[str]) -> str:
            if found[1] in own:
                return found[0]
            return self.words.get(found[1]) or lower.get(found[1].lower(), found[0])

        return re.sub(words, written, text, flags=re.IGNORECASE if same else 0)

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

        handle = self._embeddings.register_forward_hook(at_token_stage)
        try:
            return self._output(tokens, role)
        finally:
            handle.remove()

    def _output(self, tokens: Tokens, role: Role) -> Embedding:
        ids, hidden = tokens.ids.to(self.network.device), self.layer is not None
        output = self.network(ids, attention_mask=None, output_hidden_states=hidden)
        values = output.hidden_states[self.layer] if hidden else output.last_hidden_state
        # A projection, where the encoder has one, comes in the place of the plain pooled output.
        pooled = output.get("text_embeds", output.get("pooler_output"))
        return Embedding("prompt", role, values, pooled, tokens.pieces, self.name)


@dataclass(frozen=True)
class T5Text(ClipText):
    """A T5 with its tokenizer: as many tokens as a run asks for, by `max_sequence_length`."""

    kind: ClassVar[str] = "t5"
    between: ClassVar[str] = ""

    @property
    def _embeddings(self) -> Any:
        return self.network.encoder.embed_tokens  # `shared` has the same weight, but is not asked

    def _takes(self, asked: int | None) -> int:
        return self.length if asked is None else asked

    def _output(self, tokens: Tokens, role: Role) -> Embedding:
        values = self.network(tokens.ids.to(self.network.device)).last_hidden_state
        return Embedding("prompt", role, values, None, tokens.pieces, self.name)


@dataclass(frozen=True)
class QwenText(ClipText):
    """A Qwen with its tokenizer: the prompt in a template, and chosen layers' outputs.

    Attributes:
        prepare: puts a prompt into the template.
        layers: whose outputs are put side by side.
        dropped: tokens of the template before the prompt, whose outputs are left out.
        padded: whether the encoder sees as many tokens as a run asks for.
        whole: whether what it makes of the padding counts too.
        most: how many tokens a prompt may have where `padded` does not say so.
    """

    kind: ClassVar[str] = "qwen"
    between: ClassVar[str] = ""
    before: ClassVar[str] = " "
    layers: tuple[int, ...] = (-2,)
    dropped: int = 0
    padded: bool = False
    whole: bool = False
    most: int = 512

    @property
    def length(self) -> int:
        """T, its tokens at most."""
        return self.most + self.dropped

    @property
    def _padding(self) -> str | bool:
        return "max_length" if self.padded else False

    def _prepared_word(self, word: str) -> str:
        return self.before + word  # and no template

    def _takes(self, asked: int | None) -> int:
        return asked if self.padded and asked is not None else self.length

    def _output(self, tokens: Tokens, role: Role) -> Embedding:
        device = self.network.device
        output = self.network(
            input_ids=tokens.ids.to(device),
            attention_mask=tokens.mask.to(device),
            output_hidden_states=True,
        )
        values = torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)
        kept = torch.ones_like(tokens.mask[0]) if self.whole else tokens.mask[0]
        kept = (kept.cumsum(0) > self.dropped) & kept.bool()
        pieces = tuple(itertools.compress(tokens.pieces, kept.tolist()))
        return Embedding("prompt", role, values[:, kept.to(device)], None, pieces, self.name)


def chat(tokenizer: Any, **options: Any) -> Callable[[str], str]:
    """What puts a prompt into a tokenizer's own template as a user's message."""

    def asked(prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return str(
            tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, **options
            )
        )

    return asked


def side_by_side(values: Sequence[Tensor]) -> Tensor:
    """Several encoders' outputs in one, along the width, of as many images as any of them is."""
    most = max(len(v) for v in values)
    return torch.cat([v.expand(most, *v.shape[1:]) for v in values], dim=-1)
