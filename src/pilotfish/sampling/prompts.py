"""A run's prompt and negative prompt, and what the network gets of them at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..hooks.stack import Stack
from ..models.text import (
    Conditioning,
    Embedding,
    TextEncoder,
    View,
    Vocabulary,
    collect_vocabulary,
    embed,
    transform,
)


@dataclass(frozen=True)
class Prompt:
    """One of a run's two prompts: encoded once, transformed by the plugins as often as asked."""

    text: str
    role: Literal["positive", "negative"]
    encoders: Sequence[TextEncoder]
    words: Mapping[str, Vocabulary]
    stack: Stack
    run: Any
    encoded: dict[str, Embedding] = field(default_factory=dict)

    def embeddings(self, view: View = lambda _: None, where: str = "") -> list[Embedding]:
        """One embedding of each text encoder, after both stages.

        Args:
            view: the step as the plugin of that name sees it; None before the first.
            where: for error messages.
        """
        return [self._embedding(encoder, view, where) for encoder in self.encoders]

    def _embedding(self, encoder: TextEncoder, view: View, where: str) -> Embedding:
        def encode(text: str) -> Embedding:
            words = self.words[encoder.name]
            return embed(encoder, text, self.role, self.stack, self.run, words)

        if encoder.name not in self.encoded:
            self.encoded[encoder.name] = encode(self.text)
        before = self.encoded[encoder.name]
        return transform(before, self.stack, self.run, encode, view, where)


class Prompts:
    """Both prompts of a run, rewritten by the plugins, and encoded.

    Attributes:
        positive: the prompt's conditioning before the first step.
    """

    def __init__(self, run: Any, stack: Stack) -> None:
        text = stack.chain(
            "prompt_transform",
            run.prompt,
            lambda _, value: {"prompt": value, "run": run},
            lambda new, _: None if isinstance(new, str) else f"returned {new!r}; expected text",
        )
        encoders = run.model.text_encoders
        words = collect_vocabulary(stack, run, encoders)
        self._run = run
        self._prompt = Prompt(text, "positive", encoders, words, stack, run)
        self._negative = Prompt(run.negative_prompt, "negative", encoders, words, stack, run)
        self._by_step = any("step" in c.arguments for c in stack.calls["embedding_transform"])
        self._before = self._conditioning(lambda _: None, "")
        self.positive = self._before[0]

    def conditioning(self, view: View, where: str) -> tuple[Conditioning, Conditioning]:
        """The prompt's, and what the network gets at a step: negative first under guidance.

        Args:
            view: the step as the plugin of that name sees it.
            where: for error messages.
        """
        return self._conditioning(view, where) if self._by_step else self._before

    def _conditioning(self, view: View, where: str) -> tuple[Conditioning, Conditioning]:
        def condition(prompt: Prompt) -> Conditioning:
            conditioning: Conditioning = self._run.model.condition(prompt.embeddings(view, where))
            return conditioning.expand(self._run.num_images)

        positive = condition(self._prompt)
        if not self._run.guided_by_prompt:
            return positive, positive
        return positive, condition(self._negative).cat(positive)
