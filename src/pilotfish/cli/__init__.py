"""The command line. Only the command that runs imports what it needs: help loads no torch."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import InputError, PilotfishError, unknown
from ..presets import PRESETS
from ..registry import COMMAND_GROUP, Installed, installed, load_command

if TYPE_CHECKING:
    from ..run import Run
    from ..sampler import Result, Stream
    from ..stack import Stack

Command = TypeVar("Command", bound=Callable[..., Any])
Model = dict[str, str | None]  # model, device and dtype, as `pilotfish.load` takes them

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Failure(click.ClickException):
    """The user's own mistake: one line, no traceback, exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print to stderr."""
        click.echo(f"error: {self.message}", err=True)


class Commands(click.Group):
    """A group that turns pilotfish's own errors into one line, unless `--debug` is given."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            message = _own_mistake(error)
            if message is None or ctx.find_root().meta.get("debug"):
                raise
            raise Failure(message) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command lists all of them."""
        if self.get_command(ctx, args[0]) is None:
            raise click.UsageError(str(unknown("command", args[0], self.list_commands(ctx))), ctx)
        return super().resolve_command(ctx, args)


class Program(Commands):
    """The program: its own commands, then those that installed packages add.

    A package adds a click command by the entry-point group `pilotfish.commands`. The program's own
    come first, so that no package can take their place.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own names, then the installed ones."""
        own = super().list_commands(ctx)
        return own + [name for name in installed(COMMAND_GROUP) if name not in own]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command; an installed one is not imported here."""
        own = super().get_command(ctx, name)
        if own is None and (claims := installed(COMMAND_GROUP).get(name)):
            return Added(claims)
        return own


class Added(click.Command):
    """A command of an installed package: told of by metadata, imported when it runs."""

    def __init__(self, claims: Sequence[Installed]) -> None:
        from .listing import remark

        super().__init__(claims[0].name, short_help=remark(claims[0], claims))

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        """The context of the package's own command, which so takes this one's place."""
        command: click.Command = load_command(str(self.name))
        return command.make_context(info_name, args, parent, **extra)


def _own_mistake(error: Exception) -> str | None:
    """The message, where the error is one that a user can mend without reading code."""
    if isinstance(error, PilotfishError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return (
            f"the device is out of memory ({str(error).splitlines()[0]}) "
            "Try --dtype bfloat16, --checkpointing on, a smaller --size or fewer --num-images."
        )
    return None


def debug_option(command: Command) -> Command:
    """Add `--debug`, before or after the subcommand."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().meta["debug"] = True

    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show the traceback of an error.",
    )(command)


def parse_size(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """`512x768` as (width, height)."""
    if text is None:
        return None
    width, _x, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"expected WIDTHxHEIGHT such as 512x512; got {text!r}")
    return int(width), int(height)


@click.group(cls=Program, context_settings=CONTEXT)
@click.version_option(version("pilotfish"), prog_name="pilotfish")
@debug_option
def main() -> None:
    """Small plugins that pilot a big diffusion model.

    \b
    pilotfish generate "a campfire" --use blue:scale=0.5 --seed 32
    pilotfish plugins list
    pilotfish doctor
    """


@main.command()
@click.argument("prompt", required=False)
@click.option(
    "--use",
    "uses",
    multiple=True,
    metavar="NAME[:SETTING=VALUE,...]",
    help="A plugin: an installed one's name, or FILE.py:Class. Again for more, in order. "
    "With --run: instead of the file's plugins.",
)
@click.option("--seed", type=int, help="Of the first image; drawn and printed if not given.")
@click.option(
    "--out",
    default="out.png",
    show_default=True,
    metavar="FILE",
    help="The picture; for several images FILE-1, FILE-2 ...",
)
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: the emoji model]")
@click.option("--steps", type=int, help="Sampling steps.  [default: 50]")
@click.option("--guidance-scale", type=float, help="1 switches it off.  [default: 7.5]")
@click.option("--scheduler", metavar="NAME", help="lms, ddim, euler ...  [default: the model's]")
@click.option(
    "--preset", metavar="NAME|FILE.toml", help=f"{', '.join(PRESETS)}: how losses become a move.  "
    "[default: balanced]",
)  # fmt: skip
@click.option("--num-images", type=int, help="With the same prompt.  [default: 1]")
@click.option("--negative-prompt", metavar="TEXT", help="What the picture should not show.")
@click.option("--size", callback=parse_size, metavar="WIDTHxHEIGHT", help="[default: the model's]")
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu  [default: the best]")
@click.option("--dtype", metavar="NAME", help="bfloat16, float16 ...  [default: float32]")
@click.option(
    "--checkpointing",
    type=click.Choice(["auto", "on", "off"]),
    help="Less memory, more time, where a gradient goes through the network.  [default: auto]",
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "skip", "disable"]),
    help="Where a guide fails: stop, skip that step, or go on without it.  [default: raise]",
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
@click.option("--dry-run", is_flag=True, help="Check and explain the run; load no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@debug_option
def generate(
    uses: tuple[str, ...],
    changes: tuple[str, ...],
    run_file: str | None,
    out: str,
    save_run: str | None,
    device: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make pictures of PROMPT, steered by plugins.

    \b
    pilotfish generate "a campfire" --use blue:scale=0.5,every=5 --seed 32
    pilotfish generate "a cat" --use ./my_loss.py:Warmth:scale=2 --dry-run
    pilotfish generate --run run.toml -s plugins.subject.scale=40
    """
    from .overrides import compose

    content = compose(run_file, uses, changes, options)
    model = {"model": content.pop("model", None), "dtype": content.pop("dtype", None)}
    model["device"] = device
    # Whatever a plugin or a library prints must not get between the lines of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        stack, run = build(content)
        if dry_run:
            text, answer = explain(stack, run, model)
        else:
            text, answer = make_pictures(stack, run, model, out, save_run)
    click.echo(json.dumps(answer, indent=2) if as_json else text)


# ---- the run ----


def build(content: Mapping[str, Any]) -> tuple[Stack, Run]:
    """Plugins and run, checked; no model is loaded yet."""
    from ..run import Run
    from ..stack import Stack

    stack = Stack(content["plugins"])
    return stack, Run(**{key: value for key, value in content.items() if key != "plugins"})


def explain(stack: Stack, run: Run, model: Model) -> tuple[str, dict[str, Any]]:
    """A dry run, as text and as data."""
    from .dry_run import plan

    planned = plan(stack, run, model["model"], model["device"], model["dtype"])
    return planned.text(), planned.to_dict()


def make_pictures(
    stack: Stack, run: Run, model: Model, out: str, save_run: str | None
) -> tuple[str, dict[str, Any]]:
    """A run, its files, and what there is to tell, as text and as data."""
    from .report import report, summary

    files = picture_files(out, run.num_images)
    stream = start(stack, run, model)
    if save_run is not None:
        write(Path(save_run), stream.run.to_toml())
    result, seconds = watch(stream)
    save(result, files)
    return report(result, files, seconds), summary(result, files, seconds)


def start(stack: Stack, run: Run, model: Model) -> Stream:
    """Load the model; everything is checked before the first step."""
    from ..model import load, quiet
    from ..sampler import Sampling, Stream

    quiet()
    return Stream(Sampling(load(**model), run, stack))


def watch(stream: Stream) -> tuple[Result, float]:
    """Take all steps under a progress bar; the result and the seconds it took."""
    from tqdm import tqdm

    from .report import latest_losses

    begin = time.perf_counter()
    with contextlib.closing(stream), tqdm(total=len(stream), unit="step", file=sys.stderr) as bar:
        for step in stream:
            bar.set_postfix_str(latest_losses(stream.trace), refresh=False)
            bar.update(step.index + 1 - bar.n)
        result = stream.result()
    return result, time.perf_counter() - begin


def picture_files(out: str, num_images: int) -> list[Path]:
    """Where the pictures go; found out before the run, not after it.

    Raises:
        InputError: the ending names no format, or the folder cannot be made.
    """
    from ..images import check_writable

    path = check_writable(out)
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i + 1}") for i in range(num_images)]


def save(result: Result, files: list[Path]) -> None:
    """Write the pictures."""
    from .. import images

    for picture, path in zip(result.images, files, strict=True):
        images.save(picture, path)


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


# ---- plugins, doctor ----


@main.group(cls=Commands)
def plugins() -> None:
    """What is installed, and what it takes."""


@plugins.command("list")
@debug_option
def list_plugins() -> None:
    """All installed plugins; none of them is imported.

    The environment variable PILOTFISH_PLUGINS limits what is found: names with commas, or none.
    """
    from .listing import list_text

    click.echo(list_text())


@plugins.command("show")
@click.argument("name")
@debug_option
def show_plugin(name: str) -> None:
    """One plugin's hooks and settings, with a block to paste.

    NAME is an installed plugin, or FILE.py:Class.
    """
    from .listing import show_text

    click.echo(show_text(name))


@plugins.command("check")
@click.argument("name")
@click.option("--prompt", default="a red cat", show_default=True, help="Of the runs.")
@click.option("--model", metavar="FOLDER|HUB_ID|NAME", help="[default: a small random one]")
@debug_option
@click.pass_context
def check_plugin(ctx: click.Context, name: str, prompt: str, model: str | None) -> None:
    """Try in short runs what every plugin must keep.

    NAME is an installed plugin, or FILE.py:Class, with settings as --use takes them. The exit code
    is 1 where something fails.

    \b
    pilotfish plugins check ./my_loss.py:Warmth
    pilotfish plugins check 'palette:colors=[#035,#fa0]'
    """
    from .check import report

    with contextlib.redirect_stdout(sys.stderr):  # what plugins print
        text, failed = report(name, prompt, model)
    click.echo(text)
    if failed:
        ctx.exit(1)


@plugins.command("new")
@click.argument("name")
@debug_option
def new_plugin(name: str) -> None:
    """Write a package for a plugin, ready to publish: ./pilotfish-NAME."""
    from .new import create, next_steps

    click.echo(next_steps(create(name)))


@main.command()
@debug_option
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Look at versions, devices, models and plugins; exit code 1 where something is broken."""
    from .doctor import examine

    with contextlib.redirect_stdout(sys.stderr):  # what plugins print when they are imported
        text, broken = examine()
    click.echo(text)
    if broken:
        ctx.exit(1)


if __name__ == "__main__":
    main()
