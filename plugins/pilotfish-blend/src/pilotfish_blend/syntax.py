"""The syntax inside prompts: `[[word -> word]]`, `[[word + word]]`, `[[text | text]]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pilotfish import InputError

if TYPE_CHECKING:
    from pilotfish import Run

SIGNS = {"token-swap": "->", "token-blend": "+", "blend": "|"}
FORMS = (
    "[[word -> word]] (token-swap), [[word + word]] (token-blend) or [[text | text]] (blend); "
    "the last two may have weights: [[puppy:0.7 + skunk:0.3]]"
)


@dataclass(frozen=True)
class Mark:
    """One `[[...]]` of a prompt: whose it is, and its texts with their weights."""

    plugin: str
    inside: str
    weights: dict[str, float]

    def __str__(self) -> str:
        return f"[[{self.inside}]]"


def cut(prompt: str, run: Run) -> list[str | Mark]:
    """The prompt as plain text and marks, in turn.

    Raises:
        InputError: a bracket is left open, a mark means nothing, or its plugin is not in the run.
    """
    pieces = re.split(r"\[\[(.*?)\]\]", prompt, flags=re.DOTALL)
    if stray := [text for text in pieces[::2] if "[[" in text or "]]" in text]:
        raise InputError(
            f"the prompt has [[ or ]] without its partner in {stray[0]!r}. "
            f"Expected {FORMS}; none inside another"
        )
    used = {installed_name(table["use"]) for table in run.plugins}
    return [read_mark(text, used) if i % 2 else text for i, text in enumerate(pieces)]


def installed_name(use: str) -> str:
    """`token-swap` also where the run was given `module:TokenSwap`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", use.rpartition(":")[2]).lower()


def read_mark(inside: str, used: set[str]) -> Mark:
    """What stands between `[[` and `]]`, for one of the plugins that are used.

    Raises:
        InputError: it has none of the forms, or its plugin is not in the run.
    """
    plugins = [plugin for plugin, sign in SIGNS.items() if sign in inside]
    if len(plugins) != 1 or re.search(r"[\[\]]", inside):
        raise unreadable(inside)
    (plugin,) = plugins
    parts = [read_part(part, inside) for part in inside.split(SIGNS[plugin])]
    weights: dict[str, float] = {}
    for text, weight in parts:
        weights[text] = weights.get(text, 0) + (1 if weight is None else weight)
    if "" in weights or not any(weights.values()):
        raise unreadable(inside)
    weighted = any(weight is not None for _, weight in parts)
    if plugin == "token-swap" and (weighted or len(parts) != 2):
        raise unreadable(inside)
    if plugin not in used:
        raise InputError(
            f"[[{inside}]] in the prompt is for the plugin {plugin!r}, which this run does not "
            "use. Add it to the run's plugins"
        )
    return Mark(plugin, inside, weights)


def read_part(part: str, inside: str) -> tuple[str, float | None]:
    """One text of a mark, and its weight if it has one."""
    text, colon, number = part.rpartition(":")
    if not colon:
        return part.strip(), None
    if not re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", number):
        raise unreadable(inside)
    return text.strip(), float(number)


def unreadable(inside: str) -> InputError:
    """The error for a mark that means nothing."""
    return InputError(f"cannot read [[{inside}]] in the prompt. Expected {FORMS}")
