"""The program's frame: which commands there are, and how errors are told."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeVar

import click

from ..errors import PilotfishError, unknown
from ..hooks.registry import COMMAND_GROUP, LIMIT, Installed, installed, limit, load_installed
from .listing import remark

Command = TypeVar("Command", bound=Callable[..., Any])

# Each is the command of its name in the module of its name.
OWN = ("doctor", "generate", "plugins", "replay")
# The commands that come with packages of the same project.
PACKAGES = {
    "grid": "pilotfish-view",
    "plugins.check": "pilotfish-kit",
    "plugins.new": "pilotfish-kit",
    "studio": "pilotfish-studio",
    "sweep": "pilotfish-sweep",
    "view": "pilotfish-view",
}


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
            with warnings_in_a_line(), ended_by_sigterm():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(error.args[0] if error.args else 130) from None
        except Exception as error:
            message = _own_mistake(error)
            if message is None or ctx.find_root().meta.get("debug"):
                raise
            raise Failure(message) from None

    @property
    def prefix(self) -> str:
        """What stands before the names of commands that packages add to this group."""
        return f"{self.name}."

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own names and installed ones."""
        return sorted({*super().list_commands(ctx), *self.added()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command; an installed one is not imported here."""
        claims = self.added().get(name)
        return super().get_command(ctx, name) or (Added(claims) if claims else None)

    def added(self) -> dict[str, list[Installed]]:
        """What installed packages add to this group, by name."""
        found = {
            n.removeprefix(self.prefix): c
            for n, c in installed(COMMAND_GROUP).items()
            if n.startswith(self.prefix)
        }
        return {name: claims for name, claims in found.items() if "." not in name}

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command lists all of them, or names its package."""
        if self.get_command(ctx, args[0]) is None:
            path = f"{self.prefix}{args[0]}"
            if path in PACKAGES:
                raise not_installed(f"the command {path.replace('.', ' ')!r}", PACKAGES[path])
            raise click.UsageError(str(unknown("command", args[0], self.list_commands(ctx))), ctx)
        return super().resolve_command(ctx, args)


class Program(Commands):
    """The program: its own commands, then those that installed packages add.

    A package adds click commands by the entry-point group `pilotfish.commands`: `concept` to the
    program, `plugins.new` to the group `plugins`. The program's own come first, so that no package
    can take their place.
    """

    prefix = ""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Own names, then the installed ones."""
        return [*OWN, *(name for name in self.added() if name not in OWN)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command; an installed one is not imported here."""
        if name in OWN:
            command: click.Command = getattr(import_module(f".{name}", __package__), name)
            return command
        return super().get_command(ctx, name)


class Added(click.Command):
    """A command of an installed package: told of by metadata, imported when it runs."""

    def __init__(self, claims: Sequence[Installed]) -> None:
        super().__init__(claims[0].name, short_help=remark(claims[0], claims))

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        """The context of the package's own command, which so takes this one's place."""
        command: click.Command = load_installed(str(self.name), COMMAND_GROUP)
        if not any(option.name == "debug" for option in command.params):
            debug_option(command)
        return command.make_context(info_name, args, parent, **extra)


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Warnings for users, told as errors are: on one line of stderr, above a progress bar."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        from tqdm import tqdm

        if issubclass(category, UserWarning):
            tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: what is half-written is taken away.

    Not by a SystemExit, which would be taken for the plugin's at work.
    """

    def end(number: int, _: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only there handlers can be set
        return
    usual = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def not_installed(what: str, package: str) -> PilotfishError:
    """The error for what a package brings that is not there, or that `PILOTFISH_PLUGINS` hides."""
    hides = "" if limit() is None else f". {LIMIT}={os.environ[LIMIT]} hides what it does not name"
    return PilotfishError(f"{what} comes with {package}: pip install {package}{hides}")


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
