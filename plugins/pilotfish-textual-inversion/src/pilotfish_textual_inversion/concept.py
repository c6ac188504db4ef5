"""The plugin `concept`: a learned embedding, bound to its word for one run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from pilotfish import InputError, Plugin, Setting

from .files import T5, Words, read

if TYPE_CHECKING:
    from torch import Tensor

    from pilotfish import Run


class Concept(Plugin):
    """Teach the prompt a word from a textual-inversion file.

    The word then stands in the prompt, or the negative prompt, like any other: "a cat, <ink>".
    Gal et al. 2022, arXiv 2208.01618. The model itself stays as it is.
    """

    heading = "prompts"

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
        # Each encoder may have a prompt of its own; the word can stand in another one's.
        others = run.prompt if isinstance(run.prompt, Mapping) else ""
        said = (
            f"{prompt} {others} {run.negative_prompt or ''}".lower()
        )  # as most tokenizers read it
        for word in self._words:
            if word.lower() not in said:
                warnings.warn(
                    f"{self.settings.file} teaches the word {word!r}, which the prompt does not "
                    f"contain: {prompt!r}. Write it there, or the file changes nothing.",
                    UserWarning,
                    stacklevel=2,
                )

    def vocabulary(self, run: Run) -> Words:
        encoders = {part_of(encoder): encoder for encoder in run.model.text_encoders}
        for word, parts in self._words.items():
            self._check_fit(word, parts, encoders)
        return {
            word: {encoders[part].name: vectors for part, vectors in parts.items()}
            for word, parts in self._words.items()
        }

    def _check_fit(self, word: str, parts: Mapping[str, Tensor], encoders: dict[str, Any]) -> None:
        where = f"plugin 'concept': {self.settings.file} holds"
        # A T5 for which there are no vectors reads the word as text, as in diffusers.
        asked = [part for part in encoders if part in parts or part != T5]
        if parts.keys() != set(asked):
            missing = [
                f"{part}, which takes width {encoders[part].width}"
                for part in asked
                if part not in parts
            ]
            raise InputError(
                f"{where} vectors for {' and '.join(parts)}; this model has {' and '.join(asked)}. "
                "It was made for another model family."
                + (f" Missing: {' and '.join(missing)}." if missing else "")
            )
        swapped = sorted(v.shape[1] for v in parts.values()) == sorted(
            encoders[part].width for part in asked
        )
        for part, vectors in parts.items():
            encoder, (count, width) = encoders[part], vectors.shape
            room = encoder.length - encoder.tokenizer.num_special_tokens_to_add()
            if width != encoder.width:
                raise InputError(
                    f"{where} vectors of width {width}, but this model's {encoder.name} takes "
                    f"{encoder.width}. It was made for another model family"
                    + (", or its encoders are swapped." if swapped else ".")
                )
            if count > room:
                raise InputError(
                    f"{where} {count} vectors for {word!r}; a prompt has room for {room}"
                )


def part_of(encoder: Any) -> str:
    """What files call a text encoder: its name, but for a T5, whose name differs by family."""
    return T5 if encoder.kind == T5 else str(encoder.name)
