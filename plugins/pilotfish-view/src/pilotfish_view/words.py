"""How a prompt is cut into tokens."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from pilotfish import InputError, Sampler

from .layout import GAP, Label, Shown

SHADES = ("#dbe7f5", "#f7e3c8")  # words in turn, so that the pieces of one are seen together
FONT, ROW, LONGEST_LINE = 16, 8, 1000  # pixels, tokens, pixels


@dataclass(frozen=True)
class Tokens(Shown):
    """A prompt's tokens by position; `str()` gives a table, `picture()` a row of them.

    Attributes:
        ids: T whole numbers, rows of the text encoder's table of embeddings.
        pieces: the T tokens as the tokenizer writes them; `</w>` ends a word.
        used: how many there are before the padding: start, prompt, end.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    used: int

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        used = zip(range(self.used), self.ids, self.pieces, strict=False)
        lines = [f"{position:8} {id:6}  {piece}" for position, id, piece in used]
        return "\n".join([f"{'position':>8} {'id':>6}  piece", *lines, self._padding()]).rstrip()

    def picture(self) -> Image.Image:
        """Each token with its position and id, those of one word in one shade."""
        used = zip(range(self.used), self.ids, self.pieces, strict=False)
        texts = [f"{piece}\nposition {position}\nid {id}" for position, id, piece in used]
        width = max(Label(text, LONGEST_LINE, FONT).width for text in texts) + 2 * GAP
        labels = [Label(text, width - 2, FONT) for text in texts]
        height, rows = labels[0].height + GAP, -(-len(labels) // ROW)
        foot = Label(self._padding(), min(len(labels), ROW) * width, FONT)
        sheet = Image.new("RGB", (foot.room, rows * height + foot.height + GAP), "white")
        word = 0
        for number, label in enumerate(labels):
            left, top = number % ROW * width, number // ROW * height
            sheet.paste(SHADES[word % 2], (left, top, left + width - 2, top + height - 2))
            label.draw(sheet, left, top + GAP // 2)
            word += not self._goes_on(number)
        foot.draw(sheet, 0, rows * height + GAP // 2)
        return sheet

    def _goes_on(self, position: int) -> bool:
        """Whether the next token belongs to the same word."""
        piece = self.pieces[position]
        return not piece.endswith(("</w>", ">"))

    def _padding(self) -> str:
        more = len(self) - self.used
        return f"and {more} more of {self.pieces[-1]} as padding" if more else ""


def tokens(sampler: Sampler, prompt: str) -> Tokens:
    """A prompt as the model's (first) text encoder gets it.

    Raises:
        InputError: the prompt is no text in UTF-8.

    Warns:
        UserWarning: the prompt is longer than the encoder takes; names the words that are dropped.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # half of a character, of a terminal in another encoding
        raise InputError(f"a prompt must be text in UTF-8; got {prompt[:80]!r}") from None
    found = sampler.model.text_encoders[0].tokenize(prompt)
    return Tokens(tuple(found.ids[0].tolist()), found.pieces, found.used)
