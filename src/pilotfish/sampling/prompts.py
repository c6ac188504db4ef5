"""A run's prompt and negative prompt, and what the network is told of them at each step."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import InputError, in_utf8, unknown
from ..hooks.stack import Stack
from ..models.protocol import Conditioning, Embedding, Role, TextEncoder
from .step import Step, StepState

Encode = Callable[[str], Embedding]
Calls = tuple[Conditioning, ...]

BRACKETS = (
    "brackets in a prompt are text; where they are to weigh words, add the plugin weights "
    "(pip install pilotfish-prompt): --use weights:dialect=automatic1111, or dialect=compel"
)


class Prompts:
    """Both prompts of a run, rewritten by the plugins, and encoded once.

    Attributes:
        positive: the prompt's conditioning before the first step.
    """

    def __init__(self, run: Any, stack: Stack) -> None:
        self._run, self._stack = run, stack
        self._texts: dict[Role, dict[str, str]] = {
            "positive": self._of_encoders("prompt", self._rewritten),
            "negative": self._of_encoders("negative_prompt"),
        }
        if run.negative_prompt and run.cfg_scale is None:
            idle = "counts for nothing in this run: it has no classifier-free guidance"
            warnings.warn(f"the negative prompt {run.negative_prompt!r} {idle}", stacklevel=2)
        texts = (text for of_encoders in self._texts.values() for text in of_encoders.values())
        reads = any(table["use"] == "weights" for table in run.plugins)
        if not reads and any("(" in text for text in texts):
            warnings.warn(BRACKETS, stacklevel=2)
        words = collect_vocabulary(stack, run, run.model.text_encoders)
        self._encoders = [e.with_words(words[e.name]) for e in run.model.text_encoders]
        self._encoded: dict[tuple[str, Role, str], Embedding] = {}
        self._ready: dict[str, TextEncoder] = {}  # where the network is, while prompts are encoded
        self._by_step = any("step" in c.arguments for c in stack.calls["embedding_transform"])
        self._before = self._both(None)
        self.positive = self._before[0]

    def conditioning(self, state: StepState) -> tuple[Conditioning, Calls]:
        """The prompt's, and what the network is told at each of a step's calls."""
        return self._both(state) if self._by_step else self._before

    def of_text(self, text: str) -> Conditioning:
        """Another prompt's, with the plugins' words and their answers at stage "token"."""
        if problem := _text_problem(text):
            raise InputError(f"step.predict: the prompt {problem}")
        embeddings = [self._encode(encoder, "positive", text) for encoder in self._encoders]
        self._ready.clear()
        return self._condition(embeddings, "positive")

    def _rewritten(self, text: str) -> str:
        """A prompt after all plugins' `prompt_transform`."""

        def arguments(_: str, value: str) -> dict[str, Any]:
            return {"prompt": value, "run": self._run}

        answer: str = self._stack.chain("prompt_transform", text, arguments, _text_problem)
        return answer

    def _of_encoders(self, key: str, rewrite: Callable[[str], str] = str) -> dict[str, str]:
        """A prompt of the run for each text encoder: those that a table leaves out get its first.

        Raises:
            InputError: the table names one that the model does not have.
        """
        given, names = getattr(self._run, key), [e.name for e in self._run.model.text_encoders]
        given = "" if given is None else given
        if isinstance(given, str):
            return dict.fromkeys(names, rewrite(given))
        if wrong := [name for name in given if name not in names]:
            raise unknown(f"text encoder of this model, in {key},", wrong[0], names)
        texts = {name: rewrite(text) for name, text in given.items()}
        first = next(iter(texts.values()))
        return {name: texts.get(name, first) for name in names}

    def _both(self, state: StepState | None) -> tuple[Conditioning, Calls]:
        positive = self._of_role("positive", state)
        if self._run.cfg_scale is None:
            self._ready.clear()
            return positive, (positive,)
        negative = self._of_role("negative", state)
        self._ready.clear()
        together = self._run.model.together
        return positive, (negative.cat(positive),) if together else (positive, negative)

    def _of_role(self, role: Role, state: StepState | None) -> Conditioning:
        embeddings = []
        for encoder in self._encoders:
            encode = partial(self._encode, encoder, role)
            plain = encode(self._texts[role][encoder.name])
            embeddings.append(self._transformed(plain, state, encode))
        return self._condition(embeddings, role)

    def _condition(self, embeddings: Sequence[Embedding], role: Role) -> Conditioning:
        conditioning: Conditioning = self._run.model.condition(embeddings, role, self._run)
        return conditioning.expand(self._run.num_images)

    def _encode(self, encoder: TextEncoder, role: Role, text: str) -> Embedding:
        """A text's at stage "prompt", with all plugins' answers at stage "token" in it."""
        key = encoder.name, role, text
        if key not in self._encoded:
            tokens = encoder.tokenize(text, self._run.max_sequence_length)
            plain = not (tokens.added or self._stack.calls["embedding_transform"])
            if encoder.name not in self._ready:
                self._ready[encoder.name] = encoder.on(self._run.model.device)
            ready, on_token = self._ready[encoder.name], None if plain else self._transformed
            self._encoded[key] = ready.encode(tokens, role, on_token)
        return self._encoded[key]

    def _transformed(
        self, embedding: Embedding, state: StepState | None = None, encode: Encode | None = None
    ) -> Embedding:
        """After all plugins' `embedding_transform`; before the first step there is no state."""

        def arguments(name: str, value: Embedding) -> dict[str, Any]:
            step = Step(state, name) if state else None
            told = {"embedding": value, "embedding.values": value.values}  # what must stay as it is
            return {**told, "run": self._run, "step": step, "encode": encode}

        answer: Embedding = self._stack.chain(
            "embedding_transform",
            embedding,
            arguments,
            lambda new, old: embedding_problem(new, old, self._run),
            state.where if state else "",
        )
        return answer


def _text_problem(text: object, _: object = None) -> str | None:
    if not isinstance(text, str):
        return f"returned {text!r}; expected text"
    try:
        in_utf8(text)
    except ValueError as error:
        return f"is {text!r}; expected {error}"
    return None


def collect_vocabulary(
    stack: Stack, run: Any, encoders: Sequence[TextEncoder]
) -> dict[str, dict[str, Tensor]]:
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
            if problem := _text_problem(word):
                stack.blame(name, "vocabulary", f"gave a word that {problem}")
            if word in owners:
                stack.blame(name, "vocabulary", f"adds {word!r}, as {owners[word]!r} does already")
            owners[word] = name
            if not isinstance(vectors, Mapping):
                vectors = dict.fromkeys(words, vectors)
            if not vectors or vectors.keys() - words.keys():
                known = f"{list(vectors)} for {word!r}; text encoders are {list(words)}"
                stack.blame(name, "vocabulary", f"gave vectors for {known}")
            for encoder in (e for e in encoders if e.name in vectors):
                values: Any = vectors[encoder.name]
                if problem := _vector_problem(values, encoder):
                    stack.blame(name, "vocabulary", f"gave {problem} for {word!r}")
                words[encoder.name][word] = values
    return words


def _vector_problem(values: object, encoder: TextEncoder) -> str | None:
    if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] != encoder.width:
        came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        return f"{came}; {encoder.name} takes vectors of shape (n, {encoder.width})"
    if not values.isfinite().all():
        return "vectors that are not finite"
    return None


def embedding_problem(answer: Any, old: Embedding, run: Any) -> str | None:
    """What is wrong with an `embedding_transform`'s answer."""
    if not isinstance(answer, Embedding):
        return f"returned {type(answer).__name__}; expected an Embedding or None"
    allowed = {1, run.num_images} if answer.stage == "prompt" else {1}
    expected: tuple[int, ...] = old.values.shape[1:]
    if answer.stage == "prompt" and run.model.masked:  # as many tokens as it names
        expected = len(answer.tokens), *expected[1:]
        old = dataclasses.replace(old, tokens=answer.tokens)
    if len(answer.values) not in allowed or answer.values.shape[1:] != expected:
        return (
            f"returned values of shape {tuple(answer.values.shape)} at stage {answer.stage!r}; "
            f"expected {tuple(old.values.shape)}"
        )
    if dataclasses.replace(answer, values=old.values, pooled=old.pooled) != old:
        return "changed stage, role, tokens or encoder; only values and pooled may change"
    if not answer.values.isfinite().all():
        return f"returned values that are not finite at stage {answer.stage!r}"
    return None
