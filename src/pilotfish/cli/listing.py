"""What `pilotfish plugins list` and `show` print."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from ..hooks import specs as hookspecs
from ..hooks.plugin import Guide, Plugin, implemented
from ..hooks.registry import COMMAND_GROUP, LIMIT, Installed, hidden, installed, limit, load_class
from .sources import about, summary
from .wording import default, takes

NOTHING_INSTALLED = (
    "No plugins are installed. A file is enough:\n"
    '  pilotfish generate "a campfire" --use ./my_loss.py:Class'
)


def columns(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Rows of cells in aligned columns; the last one is wrapped to the terminal's width."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)][:-1]
    left = len(indent) + sum(width + 2 for width in widths)
    room = max(shutil.get_terminal_size().columns - left, 36)  # hooks at 60
    lines = []
    for *cells, last in rows:
        head = indent + "".join(c.ljust(w + 2) for c, w in zip(cells, widths, strict=True))
        first, *more = textwrap.wrap(last, room, break_on_hyphens=False) or [""]
        lines += [(head + first).rstrip(), *(" " * left + line for line in more)]
    return "\n".join(lines)


def list_text() -> str:
    """All installed plugins under their headings, from metadata and sources alone."""
    found, note = installed(), limit_note()
    if not found:
        return note if hidden() else "\n\n".join(filter(None, (NOTHING_INSTALLED, note)))
    width = max(map(len, found))
    parts = [
        f"{heading}\n" + columns([(name.ljust(width), text) for name, text in rows], "  ")
        for heading, rows in installed_plugins().items()
    ]
    packages = sorted({e.package for entries in found.values() for e in entries})
    parts.append("packages\n" + columns([(", ".join(packages),)], "  "))
    parts.append("pilotfish plugins show NAME tells what a plugin takes.")
    return "\n\n".join(filter(None, (*parts, note)))


def installed_plugins() -> dict[str, list[tuple[str, str]]]:
    """The installed plugins under their headings: name, and summary or what is wrong with it.

    From metadata and sources alone: nothing is imported.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for entry, claims in ((e, entries) for entries in installed().values() for e in entries):
        heading, text = described(entry, claims)
        rows.setdefault(heading, []).append((entry.name, text))
    order = sorted(rows, key=lambda heading: (heading == Plugin.heading, heading))
    return {heading: rows[heading] for heading in order}


def limit_note() -> str:
    """What `PILOTFISH_PLUGINS` does to discovery; empty where it is not set."""
    wanted = limit()
    if wanted is None:
        return ""
    found = {*installed(), *installed(COMMAND_GROUP)}
    lists = {"hidden": hidden(), "not installed": [name for name in wanted if name not in found]}
    parts = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    return "; ".join([f"Discovery is limited by {LIMIT}={os.environ[LIMIT]}", *parts])


def described(entry: Installed, claims: Sequence[Installed]) -> tuple[str, str]:
    """An installed plugin's heading, and its summary or what is wrong with it."""
    found = None if metadata_problem(entry, claims) else about(entry.target)
    return found or (Plugin.heading, remark(entry, claims))


def remark(entry: Installed, claims: Sequence[Installed]) -> str:
    """An installed thing in one line: its package's summary, or what is wrong with it."""
    if problem := metadata_problem(entry, claims):
        return f"broken: {problem}"
    return entry.summary


def metadata_problem(entry: Installed, claims: Sequence[Installed]) -> str | None:
    """What is wrong with what is installed, as far as can be told without importing it."""
    others = [c.distribution for c in claims if c is not entry]
    if others:
        return f"the name is claimed by {' and '.join(others)} too; uninstall one"
    if not entry.found:
        return f"there is no module {entry.target.split(':')[0].split('.')[0]!r}; reinstall it"
    return None


def show_text(use: str) -> str:
    """One plugin's summary, hooks, settings, and a block to paste; imports that plugin only."""
    plugin = load_class(use)
    entry = installed().get(use)
    package = f"  ({entry[0].distribution} {entry[0].version})" if entry else ""
    parts = [
        f"{use}{package}\n" + columns([(docstring_summary(plugin),)]),
        "hooks\n" + (columns(hook_rows(plugin), "  ") or "  none: it does nothing"),
        *settings_text(plugin),
        "use it\n" + paste_block(use, plugin),
    ]
    return "\n\n".join(parts)


def docstring_summary(plugin: type[Any]) -> str:
    """The first paragraph of the class's own docstring, on one line."""
    return summary(plugin.__doc__)


def settings_text(plugin: type[Any]) -> Iterator[str]:
    """Each setting: what it takes, and below what it means; first the plugin's own."""
    every = Guide.Settings.model_fields if issubclass(plugin, Guide) else {}
    rows = setting_rows(plugin)[1:]
    width = max((len(name) for name, *_ in rows), default=0)
    for title, inside in (("settings", False), ("settings of every guide", True)):
        lines = [
            line
            for name, takes, default, description in rows
            if (name in every) == inside
            for line in ((name.ljust(width), f"{takes} ({default})"), ("", description))
        ]
        if lines or not inside:
            yield f"{title}\n" + (columns(lines, "  ") or "  none")


def hook_rows(plugin: type[Any]) -> list[tuple[str, str]]:
    """Each hook with the first line of its contract."""
    docs = {hook: inspect.getdoc(getattr(hookspecs, hook)) or "" for hook in implemented(plugin)}
    return [(hook, doc.splitlines()[0]) for hook, doc in docs.items()]


def setting_rows(plugin: type[Any]) -> list[tuple[str, str, str, str]]:
    """The table of settings, its head first; the plugin's own before what every guide has."""
    fields = _fields(plugin)
    names = sorted(fields, key=lambda name: name in Guide.Settings.model_fields)
    rows = [(n, takes(fields[n]), default(fields[n]), fields[n].description or "") for n in names]
    return [("name", "takes", "if not given", "description"), *rows]


def _fields(plugin: type[Any]) -> dict[str, FieldInfo]:
    return dict(plugin.Settings.model_fields) if issubclass(plugin, Plugin) else {}


def paste_block(use: str, plugin: type[Any]) -> str:
    """The plugin on the command line, in Python and in a run file."""
    settings = example_settings(plugin)
    on_line = ",".join(f"{name}={value_text(value)}" for name, value in settings.items())
    item = f"{use}:{on_line}" if settings else use
    text = f'"{item}"' if '"' not in item else repr(item)
    call = f'result = sampler("a campfire", plugins=[{text}])'
    table = tomli_w.dumps({"use": use, **settings}).strip().replace("\n[", "\n[plugins.")
    return "\n\n".join(
        "\n".join(f"  {line}".rstrip() for line in (f"# {where}", *text.splitlines()))
        for where, text in (
            ("on the command line", f'pilotfish generate "a campfire" --use {shlex.quote(item)}'),
            ("in Python", f"import pilotfish\nsampler = pilotfish.load()\n{call}"),
            ("in a run file", f"[[plugins]]\n{table}"),
        )
    )


def example_settings(plugin: type[Any]) -> dict[str, Any]:
    """What must be given, or has `examples=[...]` of its own, with an example; a guide's scale.

    A setting that must be given and has none gets a stand-in of its type.
    """
    shown = {}
    for name, field in _fields(plugin).items():
        if field.examples:
            shown[name] = field.examples[0]
        elif field.is_required():
            shown[name] = _stand_in(field)
    if issubclass(plugin, Guide):
        shown["scale"] = plugin.Settings.model_fields["scale"].default
    return shown


def _stand_in(field: FieldInfo) -> Any:
    origin = get_origin(field.annotation) or field.annotation
    if origin is Literal:
        return get_args(field.annotation)[0]
    stand_ins: dict[Any, Any] = {int: 1, float: 1.0, bool: True, list: ["..."], tuple: ["..."]}
    return stand_ins.get(origin, "...")


def value_text(value: Any) -> str:
    """A setting's value as `--use` takes it, and as `parse_value` reads it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}={value_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, str) and not value.replace("_", "").replace("-", "").isalnum():
        return f"'{value}'" if '"' in value else f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)
