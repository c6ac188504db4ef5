"""The options that are keys of a run: type, default and help come from `pilotfish.runs.run`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from ..errors import InputError
from ..runs.run import ELSEWHERE, KEYS

Command = TypeVar("Command", bound=Callable[..., Any])

SIZE = ("width", "height")  # `--size` stands for both
# Keys that are no option of their own name.
HERE = {"prompt": "PROMPT, the argument", "plugins": "--use", **dict.fromkeys(SIZE, "--size")}


def run_options(command: Command) -> Command:
    """Add an option for each key; what is given arrives as text, and the run judges it."""
    for name in reversed([name for name in KEYS if name not in ("prompt", "width")]):
        field, option, metavar = KEYS[name], name.replace("_", "-"), _metavar(KEYS[name])
        description = str(field.description)
        if name == "height":
            option, metavar = "size", "WIDTHxHEIGHT"
            description = f"width and height, {description}"
        how: dict[str, Any] = {"metavar": metavar}
        if field.annotation is bool:
            how = {"flag_value": "true", "default": None}
        command = click.option(f"--{option}", help=told(description, field), **how)(command)
    return command


def _metavar(field: FieldInfo) -> str:
    """What stands for a value: the key's own word, its choices, or its type."""
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    return str(_more(field)["metavar"] or _number(field.annotation).upper())


def _number(annotation: Any) -> str:
    """`int` or `float`, of a key that may also be None."""
    return _number(get_args(annotation)[0]) if get_args(annotation) else str(annotation.__name__)


class Options(click.Command):
    """A command that names the right option where another program's was given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            key = error.option_name.lstrip("-").replace("-", "_")
            key = ELSEWHERE.get(key, key)
            if here := HERE.get(key) or (key in KEYS and f"--{key.replace('_', '-')}"):
                raise click.UsageError(
                    f"no option {error.option_name}; it is {here}", ctx
                ) from None
            raise


def told(description: str, field: FieldInfo) -> str:
    """A key's help: a sentence, and what it is where nothing is given."""
    default = field.default if _more(field)["none"] is None else _more(field)["none"]
    text = f"{description[0].upper()}{description[1:]}."
    default = None if field.annotation is bool else default  # off
    return f"{text}  [default: {default}]" if default else text


def _more(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def given(options: Mapping[str, str | None]) -> dict[str, str]:
    """The keys of a run that options give, each as text.

    Raises:
        InputError: the size is none.
    """
    texts = {name: text for name, text in options.items() if text is not None}
    if (size := texts.pop("size", None)) is not None:
        sides = re.fullmatch("([0-9]+)x([0-9]+)", size.lower())
        if sides is None:
            raise InputError(f"size must be WIDTHxHEIGHT, such as 512x512; got {size!r}")
        texts |= zip(SIZE, sides.groups(), strict=True)
    return texts
