"""`pilotfish replay`. What needs torch is imported when it runs: help needs none."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from ..errors import InputError
from .generate import answered, of_model
from .places import Output
from .program import debug_option


@click.command()
@click.argument("picture", metavar="PICTURE")
@click.option("--out", metavar="FILE", help="As of generate.  [default: out/PROMPT-SEED.png]")
@click.option("--force", is_flag=True, help="Write over files that are there.")
@click.option(
    "-s", "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one value: steps=20."
)
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: the picture's own]")
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
@click.option("--show", is_flag=True, help="Print the run as a run file, and do nothing.")
@click.option(
    "--anyway",
    is_flag=True,
    help="Go on where the model or an input file is not what it was made with.",
)
@click.option("--yes", is_flag=True, help="Also import, open and download what the run names.")
@debug_option
def replay(
    picture: str,
    out: str | None,
    force: bool,
    changes: tuple[str, ...],
    model: str | None,
    device: str | None,
    show: bool,
    anyway: bool,
    yes: bool,
) -> None:
    """Make a picture again, from the run that its file (PNG, JPEG, WebP) holds.

    A run that names more than what is installed here by name, such as files, code in them, or other
    models, is told and waits for --yes. Where the model's weights or an input file are not what the
    picture was made with, that is told, and nothing is made.

    \b
    pilotfish replay campfire.png --out again.png
    pilotfish replay campfire.png --show > run.toml
    """
    from ..runs.metadata import read_run
    from .overrides import completed
    from .trust import offline

    text = read_run(picture)
    if show:
        click.echo(text, nl=False)
        return
    content = completed(checked(text, picture, model, yes, anyway), (), changes, {})
    networks = of_model(content)
    within = contextlib.nullcontext if yes else functools.partial(offline, picture)
    with contextlib.redirect_stdout(sys.stderr):  # what plugins print
        chosen = {**networks, "device": device}
        output = Output(out, force=force)
        run = {"prompt": "", **content, "anyway": anyway}
        ((answer, _),) = answered([run], chosen, output, within=within)
    click.echo(answer)


def checked(
    text: str, origin: str, model: str | None, trusted: bool, anyway: bool
) -> dict[str, Any]:
    """The content of a run, with another model where one is given.

    Raises:
        InputError: the run asks for what is not installed here under a name, and is not trusted; or
            nothing tells which model made it.
    """
    from ..runs.made_with import tell
    from ..runs.run import Run
    from .trust import foreign_run

    named = Run.parse(text, origin).get("model")
    content, asked = foreign_run(text, origin, **({"model": None, "config": None} if model else {}))
    if asked and not trusted:
        raise InputError(
            f"{origin} asks for what pilotfish does for nobody unasked: {'; '.join(asked)}. Read "
            f"its run with `pilotfish replay {origin} --show`; if you want all that, add --yes"
        )
    if not named:
        tell(unnamed(content, model), anyway)
    return {**content, "model": model} if model else content


def unnamed(content: Mapping[str, Any], model: str | None) -> Iterator[str]:
    """What there is to say of a picture whose model has no name.

    Raises:
        InputError: no other model is given either.
    """
    if model is None:
        raise InputError("the picture's model has no name: give its folder or name by --model")
    made_with = content.get("made_with")
    if not isinstance(made_with, Mapping) or "weights" not in made_with:
        yield f"its model has no name, and nothing tells whether it was {model!r}"
