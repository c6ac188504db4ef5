"""The plugin `concept`: a learned embedding, bound to its word for one run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from pilotfish import InputError, Plugin, Setting

from .files import Words, read

if TYPE_CHECKING:
    from pilotfish import Run


class Concept(Plugin):
    """Teach the prompt a word from a textual-inversion file.

    The word then stands in the prompt, or the negative prompt, like any other: "a cat, <ink>".
    Gal et al. 2022, arXiv 2208.01618. The model itself stays as it is.
    """

    class Settings(Plugin.Settings):
        file: Path = Setting(
            description="the learned embedding: .safetensors, .bin or .pt",
            examples=["ink.safetensors"],
        )
        token: str | None = Setting(
            None, description="the word for it in the prompt, instead of the file's own"
        )

        @field_validator("token")
        @classmethod
        def _is_one_word(cls, token: str | None) -> str | None:
            if token is not None and token.split() != [token]:
                raise ValueError("a word without spaces")
            return token

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._words = read(self.settings.file, self.settings.token)

    def prompt_transform(self, prompt: str, run: Run) -> None:
        """Only look: here the prompt is what the plugins before this one have made of it."""
        said = f"{prompt} {run.negative_prompt or ''}".lower()  # as most tokenizers read it
        for word in self._words:
            if word.lower() not in said:
                warnings.warn(
                    f"{self.settings.file} teaches the word {word!r}, which the prompt does not "
                    f"contain: {prompt!r}. Write it there, or the file changes nothing.",
                    UserWarning,
                    stacklevel=2,
                )

    def vocabulary(self, run: Run) -> Words:
        encoders = {encoder.name: encoder for encoder in run.model.text_encoders}
        for word, parts in self._words.items():
            if parts.keys() != encoders.keys():
                raise InputError(
                    f"plugin 'concept': {self.settings.file} holds vectors for "
                    f"{' and '.join(parts)}; this model has {' and '.join(encoders)}. "
                    "It was made for another model family."
                )
            for name, vectors in parts.items():
                self._check_fit(word, vectors.shape, encoders[name])
        return self._words

    def _check_fit(self, word: str, shape: tuple[int, ...], encoder: Any) -> None:
        count, width = shape
        takes, room = encoder.width, encoder.length - 2  # beside the start and the end
        if width != takes:
            raise InputError(
                f"plugin 'concept': {self.settings.file} holds vectors of width {width}, but this "
                f"model's {encoder.name} takes {takes}. It was made for another model family."
            )
        if count > room:
            raise InputError(
                f"plugin 'concept': {self.settings.file} holds {count} vectors for {word!r}; "
                f"a prompt has room for {room}"
            )
