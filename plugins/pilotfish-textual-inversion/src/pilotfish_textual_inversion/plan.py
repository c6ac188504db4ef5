"""What the trainer is to learn, and how; light, so that the command's help needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pilotfish import InputError

TOKEN = "{token}"  # stands for the word in captions and prompts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is learned, and how.

    Attributes:
        token: the new word, without spaces, such as "<ink>".
        init: what it means at first: a word that the text encoder knows, or several for several
            vectors.
        vectors: how many tokens of the prompt the word takes; more of them hold more detail, and
            leave less to the rest of the prompt.
        captions: what the pictures show, with "{token}" for the word; one is drawn each time.
        prompts: what the sample sheet shows; without, what the captions say.
        steps: each sees `batch` pictures, noised.
        batch: pictures in a step.
        learning_rate: the first step's size, in units of the root mean square of the text encoder's
            own vectors; it falls to 0 in half a cosine.
        every: steps between two checkpoints.
        seed: of everything that is drawn.
    """

    token: str
    init: str
    vectors: int = 1
    captions: tuple[str, ...] = (f"a {TOKEN}",)
    prompts: tuple[str, ...] = ()
    steps: int = 1000
    batch: int = 4
    learning_rate: float = 0.1
    every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.token or any(c.isspace() for c in self.token):
            raise InputError(f"token must be a word without spaces; got {self.token!r}")
        for name, least in (("vectors", 1), ("steps", 1), ("batch", 1), ("every", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be a number > 0; got {self.learning_rate!r}")
        if not self.captions:
            raise InputError("captions must be one or more texts; got none")
        for text in (*self.captions, *self.prompts):
            check_caption(text)

    def spell(self, text: str) -> str:
        """A caption with the word in it."""
        return text.replace(TOKEN, self.token)

    def before(self, text: str) -> str:
        """The same with what the word starts from in its place."""
        return text.replace(TOKEN, self.init)


def check_caption(text: str, origin: str = "caption") -> None:
    """Refuse a caption without the word: nothing could be learned from it.

    Raises:
        InputError: there is no "{token}" in it; names where it came from.
    """
    if TOKEN not in text:
        raise InputError(f"{origin} {text!r} has no {TOKEN}: write it where the word stands")
