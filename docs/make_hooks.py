"""Writes docs/hooks.md from the docstrings of the hooks: `python docs/make_hooks.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pilotfish import Embedding, Start, Step
from pilotfish.hooks import specs
from pilotfish.models.protocol import Conditioning

FILE = Path(__file__).with_name("hooks.md")

HEAD = """\
# The hooks

<!-- Written by docs/make_hooks.py from src/pilotfish/hooks/specs.py; change it there. -->

What a plugin may do, hook by hook. [Write a plugin](plugins.md) is the way in. In a class each hook
is a method, with `self` before the arguments shown here.
"""


def page() -> str:
    """The whole page."""
    about = paragraphs(inspect.getdoc(specs) or "")[1:]  # without the module's own title
    parts = [HEAD, *about, table(), *(section(name) for name in specs.KINDS)]
    parts += [
        "## What a step shows",
        "`step` is read-only. Its values are made when they are first read, and shared: ten "
        "plugins that read the picture cost one decode.",
        meanings(*members("step.", Step)),
        "## What the network is asked",
        "Within `network_inputs` and `around_network` a step knows the present call: "
        "`step.network_latents` and `step.conditioning`. A further call is the plugin's own:",
        signature("step.predict", Step.predict),
        *contract(inspect.getdoc(Step.predict) or ""),
        "`network_inputs` and `around_network` are asked at this call too, which has B images "
        "alone.",
        "A `Conditioning` is what the network is told of a prompt, by name, batch first; nobody "
        "changes it. Under classifier-free guidance `step.conditioning` has 2B images, the "
        "negative prompt's half first, and B more with each further prediction; what "
        "`step.predict` is given has B, or 1 for all of them.",
        meanings(*fields("", Conditioning), *members("", Conditioning)),
        "## What a start shows",
        *paragraphs(inspect.getdoc(Start) or "")[:1],
        meanings(*fields("start.", Start), *members("start.", Start)),
        "## What an embedding holds",
        *paragraphs(inspect.getdoc(Embedding) or "")[:1],
        meanings(*fields("", Embedding)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table() -> str:
    """All hooks with their kind and when they are called."""
    rows = [f"| [`{n}`](#{n}) | {kind} | {when(n)} |" for n, kind in specs.KINDS.items()]
    return "\n".join(["| hook | kind | when |", "|---|---|---|", *rows])


def when(name: str) -> str:
    """The beginning of a hook's docstring, up to the colon, without its kind."""
    first = paragraphs(doc(name))[0].partition(":")[0].strip(" .")
    begun = first.removeprefix(f"{specs.KINDS[name].capitalize()}, ")
    return begun[0].lower() + begun[1:]


def section(name: str) -> str:
    """One hook: its signature, and its contract."""
    parts = [f"## {name}", signature(f"def {name}", getattr(specs, name)), *contract(doc(name))]
    return "\n\n".join(parts)


def signature(name: str, function: Callable[..., Any]) -> str:
    """A call, as code."""
    found = inspect.signature(function)
    given = [p for p in found.parameters.values() if p.name != "self"]
    text = str(found.replace(parameters=given)).replace("'", "")
    return f"```python\n{name}{text}\n```"


def contract(text: str) -> list[str]:
    """A docstring's paragraphs, with its titles bold."""
    return paragraphs(re.sub(r"^(Args|Returns|Raises):$", r"**\1**", text, flags=re.M))


def doc(name: str) -> str:
    """A hook's docstring."""
    return inspect.getdoc(getattr(specs, name)) or ""


def paragraphs(text: str) -> list[str]:
    """The text with each paragraph on one line, lists and indented items as lists."""
    return [block(part) for part in text.split("\n\n")]


def block(text: str) -> str:
    """One paragraph; below a bold title, indented lines are items."""
    lines: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        starts_item = bare.startswith("* ") or re.match(r"    \w+: ", line) is not None
        if starts_item and not bare.startswith("* "):
            bare = re.sub(r"^(\w+):", r"* `\1`:", bare)
        if not lines or starts_item:
            lines.append(bare)
        elif lines[-1].startswith("**"):
            lines += ["", bare]
        else:
            lines[-1] += f" {bare}"
    return "\n".join(spaced(lines))


def spaced(lines: list[str]) -> Iterator[str]:
    """An empty line between a title or a sentence and the list below it."""
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("* ") and before and not before.startswith("* "):
            yield ""
        yield line


def meanings(*rows: str) -> str:
    """A table of names."""
    return "\n".join(["| name | meaning |", "|---|---|", *rows])


def members(owner: str, kind: type) -> Iterator[str]:
    """A row for each public property and method of a class."""
    for name, member in vars(kind).items():
        if not name.startswith("_") and inspect.getdoc(member):
            text = (inspect.getdoc(member) or "").partition("\n\nArgs:")[0]
            call = "" if isinstance(member, property) else "()"
            yield f"| `{owner}{name}{call}` | {' '.join(text.split())} |"


def fields(owner: str, kind: Any) -> Iterator[str]:
    """A row for each public field of a dataclass, as its docstring tells it."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    told = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, flags=re.M))
    for name in (f.name for f in dataclasses.fields(kind) if not f.name.startswith("_")):
        yield f"| `{owner}{name}` | {' '.join(told[name].split())} |"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
