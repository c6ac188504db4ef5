"""`pilotfish generate`. What needs torch is imported when it runs: help needs none."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import Options, run_options
from .program import debug_option, not_installed

if TYPE_CHECKING:
    from pilotfish_view import Film

    from ..hooks.stack import Stack
    from ..runs.run import Run
    from ..sampling.sampler import Result, Stream

Model = dict[str, str | None]  # as `pilotfish.load` takes it


@click.command(cls=Options)
@click.argument("prompt", required=False)
@click.option(
    "--use",
    "uses",
    multiple=True,
    metavar="NAME[:SETTING=VALUE,...]",
    help="A plugin: an installed one's name, or FILE.py:Class. Again for more, in order. "
    "With --run: instead of the file's plugins.",
)
@click.option(
    "--out",
    default="out.png",
    show_default=True,
    metavar="FILE",
    help="The picture; for several images FILE-1, FILE-2 ...",
)
@click.option(
    "--model",
    metavar="FOLDER|HUB_ID|NAME|FILE.safetensors",
    help="[default: the emoji model]",
)
@click.option(
    "--config",
    metavar="FOLDER|HUB_ID",
    help="Of a FILE.safetensors: a model with its configuration  [default: downloaded]",
)
@run_options
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
@click.option("--dtype", metavar="NAME", help="bfloat16, float16 ...  [default: float32]")
@click.option(
    "--offload", metavar="text", help="Text encoders leave the device once prompts are encoded."
)
@click.option("--run", "run_file", metavar="RUN.toml", help="Repeat a run; options override it.")
@click.option(
    "-s",
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value: plugins.subject.scale=40, steps=20, or the preset's rho=0.5.",
)
@click.option("--save-run", metavar="RUN.toml", help="Write down everything that repeats the run.")
@click.option(
    "--film",
    metavar="FILE.gif|FILE.mp4",
    help="Also the run as a film: noisy latents left, predicted x0 right.",
)
@click.option("--film-decoded", is_flag=True, help="A sharp film, for two decodes a step.")
@click.option("--dry-run", is_flag=True, help="Check and explain the run; load no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@debug_option
def generate(
    uses: tuple[str, ...],
    changes: tuple[str, ...],
    run_file: str | None,
    out: str,
    save_run: str | None,
    film: str | None,
    film_decoded: bool,
    device: str | None,
    offload: str | None,
    dry_run: bool,
    as_json: bool,
    **options: str | None,
) -> None:
    """Make pictures of PROMPT, steered by plugins.

    \b
    pilotfish generate "a campfire" --use blue:scale=0.5,every=5 --seed 32
    pilotfish generate "a cat" --use ./my_loss.py:Warmth:scale=2 --dry-run
    pilotfish generate --run run.toml -s plugins.subject.scale=40
    pilotfish generate "a parrot" --film parrot.gif
    """
    from .overrides import compose

    content = compose(run_file, uses, changes, options)
    model = {**of_model(content), "device": device, "offload": offload}
    # Whatever a plugin or a library prints must not get between the lines of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        stack, run = build(content)
        if dry_run:
            text, answer = explain(stack, run, model)
        else:
            output = Output(out, save_run, film, film_decoded)
            text, answer = make_pictures(stack, run, model, output)
    click.echo(json.dumps(answer, indent=2) if as_json else text)


def of_model(content: dict[str, Any]) -> Model:
    """Take out of a run what `pilotfish.load` is told."""
    from ..runs.run import MODEL_KEYS

    return {key: content.pop(key, None) for key in MODEL_KEYS}


def build(content: Mapping[str, Any]) -> tuple[Stack, Run]:
    """Plugins and run, checked; no model is loaded yet."""
    from ..hooks.stack import Stack
    from ..runs.run import Run

    stack = Stack(content["plugins"])
    return stack, Run(**{key: value for key, value in content.items() if key != "plugins"})


def explain(stack: Stack, run: Run, model: Model) -> tuple[str, dict[str, Any]]:
    """A dry run, as text and as data."""
    from .dry_run import plan, told

    planned = plan(stack, run, model)
    return told(planned), planned


@dataclass(frozen=True)
class Output:
    """The files of a run: `out` for the pictures, and what else is asked for."""

    out: str
    save_run: str | None = None
    film: str | None = None
    film_decoded: bool = False

    def check(self) -> Film | None:
        """Find out before the run, not after it, whether they can be written; the empty film.

        Raises:
            PilotfishError: one cannot.
        """
        from ..runs.pictures import check_writable

        check_writable(self.out)
        if self.film is None:
            return None
        try:
            from pilotfish_view import Film
        except ModuleNotFoundError as error:
            if error.name != "pilotfish_view":
                raise
            raise not_installed("the option '--film'", "pilotfish-view") from None
        Film.check(self.film)
        return Film(decoded=self.film_decoded)


def make_pictures(
    stack: Stack, run: Run, model: Model, output: Output
) -> tuple[str, dict[str, Any]]:
    """A run, its files, and what there is to tell, as text and as data."""
    from .report import report, summary

    film = output.check()
    stream = start(stack, run, model)
    if output.save_run is not None:
        write(Path(output.save_run), stream.run.to_toml())
    result, seconds = watch(stream, film)
    files = result.save(output.out)
    if film is not None and output.film is not None:
        film.save(output.film)
    text, answer = report(result, files, seconds), summary(result, files, seconds)
    if film is None:
        return text, answer
    return f"{text}\n{output.film}  {len(film)} frames", {**answer, "film": output.film}


def start(stack: Stack, run: Run, model: Model) -> Stream:
    """Load the model; everything is checked before the first step."""
    from ..models.loading import load
    from ..sampling.loop import Sampling
    from ..sampling.sampler import Stream

    return Stream(Sampling(load(**model), run, stack))


def watch(stream: Stream, film: Film | None = None) -> tuple[Result, float]:
    """Take all steps under a progress bar; the result and the seconds it took."""
    from tqdm import tqdm

    from .report import latest_losses

    begin = time.perf_counter()
    with contextlib.closing(stream), tqdm(total=len(stream), unit="step", file=sys.stderr) as bar:
        for step in stream:
            bar.set_postfix_str(latest_losses(stream.trace), refresh=False)
            bar.update(step.index + 1 - bar.n)
            if film is not None:
                film.add(step)
        result = stream.result()
    return result, time.perf_counter() - begin


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        InputError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
