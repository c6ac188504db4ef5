"""`pilotfish generate`. What needs torch is imported when it runs: help needs none."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError, OutOfMemoryError
from .options import Options, run_options
from .places import Output, saved, with_latents, write
from .program import debug_option
from .starting import alone, lean

if TYPE_CHECKING:
    from pilotfish_view import Film

    from ..hooks.stack import Stack
    from ..models.protocol import LatentDiffusion
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
    "--prompts", "prompts_file", metavar="FILE", help="A prompt a line, made one after the other."
)
@click.option(
    "--out",
    metavar="FILE",
    help="The picture; for several images FILE-1, FILE-2 ... Where there is one already: FILE_2.  "
    "[default: out/PROMPT-SEED.png]",
)
@click.option("--force", is_flag=True, help="Write over files that are there.")
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
@click.option("--no-preview", is_flag=True, help="No small picture above the progress bar.")
@click.option("--dry-run", is_flag=True, help="Check and explain the run; load no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@debug_option
def generate(
    uses: tuple[str, ...],
    changes: tuple[str, ...],
    run_file: str | None,
    prompts_file: str | None,
    out: str | None,
    force: bool,
    save_run: str | None,
    film: str | None,
    film_decoded: bool,
    no_preview: bool,
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
    prompts = read_prompts(prompts_file, content)
    model = {**of_model(content), "device": device, "offload": offload}
    output = Output(out, save_run, film, film_decoded, force, not no_preview)
    # Whatever a plugin or a library prints must not get between the lines of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        answers = [*answered([{**content, **p} for p in prompts], model, output, dry_run)]
    if as_json:
        found = [answer for _, answer in answers]
        click.echo(json.dumps(found if prompts_file else found[0], indent=2))
    else:
        click.echo("\n".join(text for text, _ in answers))


def answered(
    contents: Sequence[dict[str, Any]],
    model: Model,
    output: Output,
    dry_run: bool = False,
    within: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each run's answer, as text and as data; all are checked first, and the model loaded once.

    Args:
        within: what is put around all but the model's loading.
    """
    with lean():
        if not dry_run:
            click.echo(f"loading {loads(contents, model)} ...", err=True)
        with within():
            checked = [build(content) for content in contents]
        if dry_run:
            yield from [explain(*each, model) for each in checked]
            return
        output.check()
        if any("prompt" not in content for content in contents):
            raise click.UsageError(
                'a PROMPT is missing: pilotfish generate "a campfire"; "" for a run without one'
            )
        loaded = load_model(model)
    for stack, run in checked:
        with within():
            answer = make_pictures(stack, run, loaded, output)
        yield answer


def loads(contents: Sequence[dict[str, Any]], model: Model) -> str:
    """What runs load, for who waits for it: `emoji with blue, clip`."""
    uses = [str(item.get("use")) for content in contents for item in content["plugins"]]
    plugins = ", ".join(dict.fromkeys(uses))
    return f"{model['model'] or 'emoji'}{' with ' * bool(plugins)}{plugins}"


def load_model(model: Model) -> LatentDiffusion:
    """See `pilotfish.load`."""
    with alone():
        from ..models.loading import load

        return load(**model)


def read_prompts(file: str | None, content: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each line of a file that is not empty changes of a run; nothing, without a file.

    Raises:
        UsageError: the run has a prompt as well.
        InputError: the file cannot be read, or is empty.
    """
    if file is None:
        return [{}]
    if content.get("prompt"):
        raise click.UsageError("give a PROMPT or --prompts, not both")
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:  # no UTF-8, or a name with a NUL
        raise InputError(f"cannot read the prompts of {file}: {error}") from None
    prompts = [{"prompt": line.strip()} for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{file} holds no prompt; expected one a line")
    return prompts


def of_model(content: dict[str, Any]) -> Model:
    """Take out of a run what `pilotfish.load` is told."""
    from ..runs.run import MODEL_KEYS

    return {key: content.pop(key, None) for key in MODEL_KEYS}


def build(content: Mapping[str, Any]) -> tuple[Stack, Run]:
    """Plugins and run, checked; no model is loaded yet."""
    from ..hooks.stack import Stack
    from ..runs.run import Run

    run = Run(**{key: value for key, value in content.items() if key != "plugins"})
    return Stack(run.prepared(content["plugins"])), run


def explain(stack: Stack, run: Run, model: Model) -> tuple[str, dict[str, Any]]:
    """A dry run, as text and as data."""
    from .dry_run import plan, told

    planned = plan(stack, run, model)
    return told(planned), planned


def make_pictures(
    stack: Stack, run: Run, model: LatentDiffusion, output: Output
) -> tuple[str, dict[str, Any]]:
    """A run, its files, and what there is to tell, as text and as data."""
    from .report import report, summary

    film = output.new_film()
    stream = start(stack, run, model)
    more: dict[str, str] = {}
    if output.save_run is not None:
        more["run_file"] = str(output.unused(Path(output.save_run)))
        write(Path(more["run_file"]), stream.run.to_toml())
    place = output.pictures(stream.run)
    try:
        result, seconds = watch(stream, film, output.preview)
    except OutOfMemoryError as error:
        raise with_latents(error, stream.run, place) from error
    files = saved(result, place)
    text, answer = report(result, files, seconds), summary(result, files, seconds)
    if film is not None and output.film is not None:
        more["film"] = str(output.unused(Path(output.film)))
        film.save(more["film"])
        text = f"{text}\n{more['film']}  {len(film)} frames"
    return text, {**answer, **more}


def start(stack: Stack, run: Run, model: LatentDiffusion) -> Stream:
    """Everything is checked before the first step."""
    from ..sampling.loop import Sampling
    from ..sampling.sampler import Stream

    return Stream(Sampling(model, run, stack))


def watch(stream: Stream, film: Film | None = None, preview: bool = True) -> tuple[Result, float]:
    """Take all steps under a progress bar; the result and the seconds it took."""
    from tqdm import tqdm

    from .preview import fits, thumbnail
    from .report import latest_losses

    begin = time.perf_counter()
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(stream))
        bar = opened.enter_context(tqdm(total=len(stream), unit="step", file=sys.stderr))
        draw = opened.enter_context(thumbnail(bar)) if preview and fits() else None
        for step in stream:
            bar.set_postfix_str(latest_losses(stream.trace), refresh=False)
            bar.update(step.index + 1 - bar.n)
            if draw is not None:
                draw(step)
            if film is not None:
                film.add(step)
        result = stream.result()
    return result, time.perf_counter() - begin
