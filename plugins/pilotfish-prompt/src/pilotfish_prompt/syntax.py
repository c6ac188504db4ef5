"""What brackets and signs in a prompt mean, in two dialects: text -> parts with weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from pilotfish import InputError

Part = tuple[str, float]  # a text, and its weight

WORD = r"<[^<>\s]+>"  # of the run's vocabulary: whatever signs are in it are its name
NUMBER = r"\d+\.?\d*|\.\d+"
AUTOMATIC = re.compile(
    rf"{WORD}|\\.|:(?P<weight>[^:()\[\]\\]*)\)|[()\[\]:|]|[^\\()\[\]:|<]+|.", re.S
)
COMPEL = re.compile(
    rf"\\.|(?P<close>\))(?P<factor>\++|-+|{NUMBER})?"
    r"|(?P<quote>\")(?P<quoted>\++|-+)?|\("
    rf"|(?P<word>{WORD}|[^\s(),.\"=<\\+-]+(?:[+-]+[^\s(),.\"=<\\+-]+)*)"
    r"(?:(?P<signs>\++|-+)(?=[\s(),.\"=]|$))?|.",
    re.S,
)
OPERATORS = re.compile(r"\)\s*\.(?:swap|blend|and|add|attend)\(|\b(?:with|use)Lora\(")
UP, DOWN = 1.1, 0.9  # compel's + and -; the other dialect divides by UP


class Groups:
    """The parts read so far, and the brackets that are open."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.parts: list[Part] = []
        self._open: list[tuple[str, int, int]] = []

    @property
    def inside(self) -> str:
        """The bracket that was opened last; "" outside of all."""
        return self._open[-1][0] if self._open else ""

    def open(self, sign: str, at: int) -> None:
        """A bracket opens."""
        self._open.append((sign, at, len(self.parts)))

    def close(self, sign: str, at: int, opened: str, factor: float) -> None:
        """One closes, and what was in it weighs `factor` times as much."""
        if self.inside != opened:
            raise self.unpaired(sign, at)
        first = self._open.pop()[2]
        self.parts[first:] = [(text, weight * factor) for text, weight in self.parts[first:]]

    def text(self, text: str, weight: float = 1.0) -> None:
        """Plain text comes."""
        self.parts.append((text, weight))

    def unpaired(self, sign: str, at: int) -> InputError:
        """The error for a bracket without its partner."""
        return self.error(f"{sign} has no partner", at, f"one that is text is written \\{sign}")

    def error(self, what: str, at: int, remedy: str) -> InputError:
        """An error with its place in the prompt."""
        near = self.prompt[max(0, at - 10) : at + 20]
        return InputError(f"weights: {what}, at character {at + 1}, in {near!r}; {remedy}")

    def result(self) -> list[Part]:
        """All parts, neighbours of one weight as one, also where there is a space between.

        Raises:
            InputError: a bracket is still open.
        """
        if self._open:
            raise self.unpaired(*self._open[-1][:2])
        merged: list[Part] = []
        for text, weight in self.parts:
            if merged and (merged[-1][1] == weight or not text.strip()):
                merged[-1] = (merged[-1][0] + text, merged[-1][1])
            elif text.strip():
                merged.append((text, weight))
        return merged


def automatic1111(prompt: str) -> list[Part]:
    """`(word)` weighs 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3; nested ones multiply.

    As in AUTOMATIC1111's stable-diffusion-webui, which takes brackets without a partner as if they
    closed at the end, and a colon without a number as text; here they are errors.

    Raises:
        InputError: such a bracket or colon, or one that schedules or alternates words; says where.
    """
    groups = Groups(prompt)
    for found in AUTOMATIC.finditer(prompt):
        sign, at = found[0], found.start()
        if sign in ("(", "["):
            groups.open(sign, at)
        elif sign in (")", "]"):
            opened, factor = ("(", UP) if sign == ")" else ("[", 1 / UP)
            groups.close(sign, at, opened, factor)
        elif sign[0] in ":|" and groups.inside == "[":
            raise groups.error(
                f"{sign[0]} in [ ] changes words during the run, which weights does not do",
                at,
                "blend has schedules",
            )
        elif sign[0] == ":" and groups.inside == "(":
            groups.close(")", found.end() - 1, "(", weight_of(found, groups))
        elif found["weight"] is not None:
            raise groups.unpaired(")", found.end() - 1)
        else:
            groups.text(sign[1:] if len(sign) == 2 and sign[0] == "\\" else sign)
    return groups.result()


def weight_of(found: re.Match[str], groups: Groups) -> float:
    """The number after a colon in round brackets."""
    text = found["weight"]
    if text is None or not re.fullmatch(rf"\s*[+-]?(?:{NUMBER})\s*", text):
        came = "" if text is None else f": {text.strip()!r} is none"
        what = f"the colon in ( ) must lead to a number and the bracket's end{came}"
        raise groups.error(what, found.start(), "a colon that is text is written \\:")
    return float(text)


def compel(prompt: str) -> list[Part]:
    """`word+` and `(some words)+` weigh 1.1, `-` 0.9, each further sign once more; `(words)1.3`.

    As in compel 2, with round brackets and double quotes as groups. Its operators are refused.

    Raises:
        InputError: a bracket without its partner, or an operator; says where.
    """
    groups = Groups(prompt)
    if operator := OPERATORS.search(prompt):
        what = f"{operator[0].lstrip(') ')}...) is an operator of compel that weights does not read"
        raise groups.error(what, operator.start(), "blend has [[one | another]]")
    for found in COMPEL.finditer(prompt):
        sign, at = found[0], found.start()
        if found["close"]:
            groups.close(")", at, "(", factor_of(found["factor"]))
        elif found["quote"] and groups.inside == '"':
            groups.close('"', at, '"', factor_of(found["quoted"]))
        elif sign[0] in '("':
            groups.open(sign[0], at)
            if found["quoted"]:  # the signs behind an opening quote are text
                groups.text(found["quoted"])
        elif found["word"]:
            groups.text(found["word"], factor_of(found["signs"]))
        else:
            groups.text(sign[1:] if len(sign) == 2 and sign[0] == "\\" else sign)
    return groups.result()


def factor_of(written: str | None) -> float:
    """What signs or a number behind a word or a bracket make of its weight."""
    if not written:
        return 1.0
    if written[0] in "+-":
        return float((UP if written[0] == "+" else DOWN) ** len(written))
    return float(written)


DIALECTS: Final[Mapping[str, Callable[[str], list[Part]]]] = {
    "automatic1111": automatic1111,
    "compel": compel,
}
"""What reads each dialect."""
