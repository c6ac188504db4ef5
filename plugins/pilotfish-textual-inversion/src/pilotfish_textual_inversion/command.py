"""`pilotfish concept`: the trainer on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .plan import TOKEN, Plan

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Plan)}


def number(name: str, help: str) -> Callable[[Command], Command]:
    """An option for a number of the plan, with the plan's default."""
    default = DEFAULTS[name]
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, type=type(default), default=default, show_default=True, help=help)


@click.group()
def concept() -> None:
    """Learned words (textual inversion)."""


@concept.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--token", required=True, metavar="WORD", help='The new word, such as "<ink>".')
@click.option("--init", required=True, metavar="WORD", help="What it means at first: a known word.")
@click.option(
    "--out", required=True, metavar="FILE.safetensors", type=click.Path(path_type=Path),
    help="The learned word; the sample sheet goes beside it, as .png.",
)  # fmt: skip
@click.option(
    "--caption", "captions", multiple=True, metavar="TEXT", default=DEFAULTS["captions"],
    show_default=True,
    help=f"What the pictures show, with {TOKEN} for the word. Again for more. A picture cat.png "
    "with a cat.txt beside it takes the lines of that file instead.",
)  # fmt: skip
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT",
    help=f"What the sample sheet shows, with {TOKEN}. Again for more.  [default: the captions]",
)  # fmt: skip
@number("vectors", "Tokens that the word takes; more hold more detail.")
@number("steps", "Training steps.")
@number("batch", "Pictures in a step.")
@number("learning_rate", "Of the first step, in sizes of the model's own vectors.")
@number("every", "Steps between two checkpoints.")
@number("seed", "Of everything that is drawn.")
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: the emoji model]")
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
@click.option("--dtype", metavar="NAME", help="bfloat16, float16 ...  [default: float32]")
def train(
    pictures: tuple[Path, ...],
    out: Path,
    model: str | None,
    device: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """Learn a word for what PICTURES share; use it with the plugin `concept`.

    The model does not change. The same command again goes on where the last one was stopped.

    \b
    pilotfish concept train ink/*.png --token "<ink>" --init "drawing" --out ink.safetensors
    pilotfish generate "a <ink> of a cat" --use concept:file=ink.safetensors
    """
    plan = Plan(**options)

    import pilotfish

    from .trainer import train as learn

    word = learn(pilotfish.load(model, device=device, dtype=dtype), pictures, out, plan)
    several = word.items() if isinstance(word, dict) else [("", word)]
    sizes = ", ".join(f"{len(v)} x {v.shape[1]} {name}".strip() for name, v in several)
    click.echo(f"{out}  {plan.token}: {sizes}\n{out.with_suffix('.png')}  samples")
