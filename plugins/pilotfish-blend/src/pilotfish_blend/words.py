"""Words with the token embedding of others: `token-blend` and `token-swap`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ValidationInfo, field_validator
from torch import Tensor

from pilotfish import InputError, Plugin, Setting

from .mixing import mixed, rest
from .syntax import FORMS, Mark, cut

if TYPE_CHECKING:
    from pilotfish import Run

Weight = Annotated[float, Setting(ge=0)]
Mix = Mapping[str, float]


class Words(Plugin):
    """What `token-blend` and `token-swap` share: words of the prompt with vectors of their own.

    Each becomes a word that exists for one run only, so that it can have other vectors than the
    tokenizer's, and another number of them.
    """

    heading = "prompts"

    kind: ClassVar[str]

    def setup(self) -> dict[str, Mix]:
        """What the new words of a run are mixed of; `prompt_transform` finds them."""
        return {}

    def _asked(self) -> Mix:
        """The mix that the settings ask for in place of `word`."""
        raise NotImplementedError

    def _marked(self, mark: Mark) -> Mix:
        """The mix that a mark asks for."""
        return mark.weights

    def prompt_transform(self, prompt: str, run: Run, state: dict[str, Mix]) -> str:
        added: dict[str, Mix] = {}

        def name(piece: str | Mark) -> str:
            if not isinstance(piece, Mark) or piece.plugin != self.kind:
                return str(piece)
            mix = self._marked(piece)
            if problem := next(filter(None, map(word_problem, mix)), None):
                raise InputError(f"{self.kind}: {piece} must hold words; {problem}")
            added[word := new_word(mix)] = mix
            return word

        text = "".join(name(piece) for piece in cut(prompt, run))
        if word := self.settings.word:
            mix = self._asked()
            text = self._replaced(text, word, new_word(mix, word))
            added[new_word(mix, word)] = mix
        if not added:
            raise InputError(
                f"{self.kind} has nothing to do: the setting word is not given and there is no "
                f"mark in {prompt!r}. Marks: {FORMS}"
            )
        state.update(added)
        return text

    def _replaced(self, text: str, word: str, by: str) -> str:
        """The text with another word wherever `word` stands, but not inside a `<word>`."""
        pattern = rf"<[^<>\s]+>|(?<!\w){re.escape(word)}(?!\w)"
        same = word.lower()
        replaced = re.sub(
            pattern, lambda m: by if m[0].lower() == same else m[0], text, flags=re.IGNORECASE
        )
        if replaced == text:
            raise InputError(f"{self.kind}: the prompt has no word {word!r}; it is {text!r}")
        return replaced

    def vocabulary(self, run: Run, state: dict[str, Mix]) -> dict[str, dict[str, Tensor]]:
        return {
            word: {e.name: self._vectors(mix, e) for e in run.model.text_encoders}
            for word, mix in state.items()
        }

    def _vectors(self, mix: Mix, encoder: Any) -> Tensor:
        """The mix of the words' rows in the encoder's table, (n, D)."""
        ids = {word: self._ids(word, encoder) for word, weight in mix.items() if weight > 0}
        if len({len(i) for i in ids.values()}) > 1:
            counts = ", ".join(f"{w!r} is {len(i)} ({spelled(i, encoder)})" for w, i in ids.items())
            raise InputError(
                f"{self.kind}: words can be mixed if they have the same number of tokens; in "
                f"{encoder.name} {counts}. Choose other words, or mix whole prompts with blend"
            )
        table = encoder.network.get_input_embeddings().weight.detach()
        return mixed([table[i] for i in ids.values()], [mix[word] for word in ids])

    def _ids(self, word: str, encoder: Any) -> list[int]:
        tokenizer = encoder.tokenizer
        ids: list[int] = encoder.ids(word)
        if word.startswith("<") and tokenizer.convert_ids_to_tokens(ids[:1]) != [word]:
            raise InputError(
                f"{self.kind}: {encoder.name} has no word {word}; a word that another plugin of "
                "this run adds cannot be used here"
            )
        return ids


def word_problem(word: str) -> str | None:
    """Why this cannot be a word in a mix: it is empty, or has a sign that means something here."""
    if re.fullmatch(r"<[^<>\s]+>", word) or re.fullmatch(r"(?=.*\S)[^\[\]<>|+:=&*]+", word):
        return None
    return f"{word!r} is none: no [ ] < > | + : = & *, or one <word> of the model's own"


def new_word(mix: Mix, word: str = "") -> str:
    """A name that no other mix has, such as `<puppy=puppy*0.5&skunk*0.5>`."""
    parts = "&".join(f"{part}*{weight}" for part, weight in mix.items())
    name = re.sub(r"[<>\s]+", "_", f"{word}={parts}" if word else parts)
    return f"<{name.lower()}>"


def spelled(ids: list[int], encoder: Any) -> str:
    """Tokens as an error shows them."""
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    return " ".join(token.removesuffix("</w>") for token in tokens)


class TokenBlend(Words):
    """Give a word the mixed token embedding of several: half puppy, half skunk.

    Weights that sum to less than 1 leave the rest to the word itself; larger sums are divided by
    the sum.
    """

    kind = "token-blend"

    class Settings(Plugin.Settings):
        word: str = Setting(
            "", description="the word of the prompt, wherever it stands", examples=["campfire"]
        )
        mix: dict[str, Weight] = Setting(
            {}, description="words and their weights", examples=[{"castle": 0.5}]
        )

        @field_validator("mix")
        @classmethod
        def _both(cls, mix: dict[str, float], info: ValidationInfo) -> dict[str, float]:
            word = info.data.get("word", "")
            if bool(mix) != bool(word):
                raise ValueError("a mapping of words to weights if word is given, and only then")
            if problem := next(filter(None, map(word_problem, [*mix, word] if word else [])), None):
                raise ValueError(f"a mapping of words to weights; {problem}")
            return mix

    def _asked(self) -> Mix:
        word, mix = self.settings.word, self.settings.mix
        return {**mix, word: mix.get(word, 0) + rest(mix.values())}


class TokenSwap(Words):
    """Put the token embedding of one word in another's place."""

    kind = "token-swap"

    class Settings(Plugin.Settings):
        word: str = Setting(
            "", description="the word of the prompt, wherever it stands", examples=["campfire"]
        )
        by: str = Setting(
            "", description="the word whose embedding takes its place", examples=["castle"]
        )

        @field_validator("by")
        @classmethod
        def _both(cls, by: str, info: ValidationInfo) -> str:
            word = info.data.get("word", "")
            if bool(by) != bool(word):
                raise ValueError("a word if word is given, and only then")
            if problem := word and (word_problem(word) or word_problem(by)):
                raise ValueError(f"a word for a word; {problem}")
            return by

    def _asked(self) -> Mix:
        return {self.settings.by: 1.0}

    def _marked(self, mark: Mark) -> Mix:
        return {list(mark.weights)[-1]: 1.0}
