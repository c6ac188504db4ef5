"""What a plugin's source says of it, read as text: nothing is imported."""

from __future__ import annotations

import ast
import functools
import inspect
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path

from ..hooks.plugin import Plugin


def about(target: str) -> tuple[str, str] | None:
    """A class's heading and summary, of `module:Class`; None where the source has no such class."""
    module, _, name = target.partition(":")
    try:
        found = _class(module, name)
        heading = found and _heading(*found)
    except (ImportError, RecursionError):  # no such package around it; names in a circle
        return None
    if found is None:
        return None
    return heading or Plugin.heading, summary(ast.get_docstring(found[1]))


def summary(docstring: str | None) -> str:
    """The first paragraph, on one line."""
    return " ".join(inspect.cleandoc(docstring or "no description").split("\n\n")[0].split())


def _heading(module: str, node: ast.ClassDef) -> str | None:
    """The class's own `heading = "..."`, or that of the first of its bases that has one."""
    for statement in node.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name("heading")], value=ast.Constant(str(text)))
                | ast.AnnAssign(target=ast.Name("heading"), value=ast.Constant(str(text)))
            ):
                return text
    for base in node.bases:
        where, _, name = ast.unparse(base).rpartition(".")
        found = _class(where or module, name)
        if inherited := found and _heading(*found):
            return inherited
    return None


def _class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The class statement that a name in a module stands for, and the module that has it."""
    for statement in _statements(module):
        match statement:
            case ast.ClassDef() if statement.name == name:
                return module, statement
            case ast.ImportFrom():
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return _class(_origin(statement, module), alias.name)
    return None


def _origin(statement: ast.ImportFrom, module: str) -> str:
    """The module that `from ... import` in a module names."""
    spec = spec_of(module)
    assert spec is not None  # it has been read
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    return resolve_name("." * statement.level + (statement.module or ""), package)


@functools.cache
def _statements(module: str) -> list[ast.stmt]:
    """The statements of a module; none where there is no source that can be read."""
    spec = spec_of(module)
    try:
        return ast.parse(Path(spec.origin).read_bytes()).body if spec and spec.origin else []
    except (OSError, SyntaxError, ValueError):
        return []


def spec_of(module: str) -> ModuleSpec | None:
    """Where a module is; `importlib.util.find_spec` would import the package around it."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{spec.name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec
