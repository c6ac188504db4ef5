"""Who may import whom, what is public, and what stays unloaded."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pilotfish

ROOT = Path(__file__).parents[1]
CORE = ROOT / "src" / "pilotfish"
PLUGINS = sorted((ROOT / "plugins").glob("*/src/*"))
# Each imports only what stands before it.
ROOMS = ("guidance", "hooks", "models", "runs", "sampling", "testing", "cli")
# hooks/specs.py looks further down, for the types in its signatures.
MODULES = sorted(p for p in CORE.rglob("*.py") if p.name != "specs.py" and p.parent != CORE)


def core_imports(path, types=False):
    """The core's own modules, as paths, that a module imports; at run time, or for types too."""
    tree = ast.parse(path.read_text())
    if not types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [folder / alias.name for alias in node.names]
            for place in names if folder.is_dir() else [folder]:
                yield next(
                    p for p in (place.with_suffix(".py"), folder / "__init__.py") if p.exists()
                )


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(CORE)))
def test_a_room_imports_only_from_rooms_before_it(module):
    room = ROOMS.index(module.relative_to(CORE).parts[0])
    for imported in core_imports(module, types=True):
        first = imported.relative_to(CORE).parts[0]
        assert first in ("errors.py", "__init__.py", *ROOMS[: room + 1]), imported


def test_there_is_no_circle_between_modules():
    seen, under_way = set(), []

    def visit(module):
        assert module not in under_way, [str(p.relative_to(CORE)) for p in [*under_way, module]]
        if module not in seen:
            under_way.append(module)
            for imported in core_imports(module, types=module.name != "specs.py"):
                visit(imported)
            under_way.pop()
            seen.add(module)

    for module in CORE.rglob("*.py"):
        if module.parent != CORE or module.name == "errors.py":
            visit(module)


def test_no_file_is_longer_than_350_lines():
    for path in (p for folder in (CORE, *PLUGINS) for p in folder.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 350, path


@pytest.mark.parametrize("package", PLUGINS, ids=lambda p: p.name)
def test_plugins_use_public_names_only_and_no_other_plugin_that_they_do_not_ask_for(package):
    project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text())["project"]
    asked = {need.replace("-", "_") for need in project.get("dependencies", [])}
    others = {p.name for p in PLUGINS} - {package.name} - asked
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names, module = [alias.name for alias in node.names], node.module or ""
            elif isinstance(node, ast.Import):
                names, module = [], node.names[0].name
            else:
                continue
            assert module.split(".")[0] not in others, path
            if module.split(".")[0] == "pilotfish" and module != "pilotfish.testing":
                assert module == "pilotfish", path
                assert set(names) <= set(pilotfish.__all__), path


@pytest.mark.parametrize("package", PLUGINS, ids=lambda p: p.name)
def test_plugins_pin_nothing(package):
    project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text())["project"]
    needs = project.get("dependencies", [])
    assert not [n for n in needs if "==" in n or ("<" in n and "torch" in n)]


def test_every_public_name_exists_and_is_documented():
    for name in pilotfish.__all__:
        member = getattr(pilotfish, name)
        assert getattr(member, "__doc__", None) or name in ("Area", "Setting"), name


@pytest.mark.parametrize("module", ["pilotfish", "pilotfish.testing", "pilotfish.cli.generate"])
def test_importing_loads_neither_torch_nor_diffusers(module):
    code = (
        f"import sys, pilotfish, {module}; pilotfish.Guide; "
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pilotfish.nothing  # noqa: B018
