"""Who may import whom, what is public, and what stays unloaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pilotfish

ROOT = Path(__file__).parents[1]
CORE = ROOT / "src" / "pilotfish"
PLUGINS = sorted((ROOT / "plugins").glob("*/src/*"))

# What a core module may import of the core, beside `errors`.
ALLOWED = {
    "errors": set(),
    "noise": set(),
    "presets": set(),
    "trace": set(),
    "hookspecs": set(),
    "plugin": {"hookspecs"},
    "registry": {"plugin"},
    "stack": {"hookspecs", "plugin", "registry"},
    "run": {"presets"},
    "generators": {"run"},
    "clock": set(),
    "guidance": {"clock", "noise"},
    "rules": {"guidance", "noise", "presets"},
    "schedule": {"generators", "guidance", "noise", "presets", "rules"},
    "text": {"stack"},
    "prompts": {"stack", "text"},
    "images": set(),
    "torchvision_fakes": set(),
    "schedulers": {"torchvision_fakes"},
    "decoders": {"noise", "torchvision_fakes"},
    "checkpointing": set(),
    "model": {
        *("checkpointing", "decoders", "noise", "schedulers", "text", "torchvision_fakes"),
    },
    "loading": {"model", "registry"},
    "step": {"guidance", "images", "noise", "run", "text"},
    "start": set(),
    "regions": {"images"},
    "guides": {
        *("clock", "generators", "guidance", "noise", "plugin", "presets", "regions", "rules"),
        *("run", "schedule", "stack", "step", "trace"),
    },
    "loop": {
        *("generators", "guides", "images", "prompts", "run", "schedule", "stack", "start"),
        *("step", "text", "trace"),
    },
    "change": {"plugin", "presets", "registry", "run", "stack"},
    "view/layout": set(),
    "view/film": {"images", "layout"},
    "view/grid": {"change", "layout", "registry", "run", "sampler"},
    "view/latents": {"images", "layout"},
    "view/schedule": {"layout", "noise"},
    "view/tokens": {"layout", "text"},
    "sampler": {"images", "loop", "run", "stack", "step", "trace"},
    "exact": {"noise", "schedulers", "text"},
    "testing": {
        *("exact", "generators", "guidance", "noise", "run", "sampler", "step"),
        *("text", "torchvision_fakes"),
    },
    "pytest_plugin": {"load", "registry", "testing"},
}


def imports(path, runtime_only=True):
    """The modules that a file imports: `.name` for the core's own, else the top-level name."""
    tree = ast.parse(path.read_text())
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f".{name.split('.')[0]}" for name in names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", ALLOWED)
def test_core_modules_import_only_what_stands_below_them(name):
    ours = {i[1:] for i in imports(CORE / f"{name}.py") if i.startswith(".")}
    # Sampler.from_pipeline makes the adapter for the pipeline that it is given.
    late = {"model"} if name == "sampler" else set()
    assert ours <= ALLOWED[name] | {"errors"} | late


def test_only_the_model_and_the_test_kit_import_diffusers_or_transformers():
    allowed = {"decoders", "model", "schedulers", "loading", "testing"}
    for path in CORE.rglob("*.py"):
        heavy = imports(path) & {"diffusers", "transformers"}
        assert not heavy or path.stem in allowed, path


def test_every_core_module_has_its_place_and_its_size():
    modules = {str(p.relative_to(CORE).with_suffix("")) for p in CORE.rglob("*.py")}
    entrances = {"__init__", "view/__init__"} | {m for m in modules if m.startswith("cli/")}
    assert modules - entrances == set(ALLOWED)
    for module in modules:
        assert len((CORE / f"{module}.py").read_text().splitlines()) <= 350, module


@pytest.mark.parametrize("package", PLUGINS, ids=lambda p: p.name)
def test_plugins_use_public_names_only_and_no_other_plugin(package):
    others = {p.name for p in PLUGINS} - {package.name}
    for path in package.rglob("*.py"):
        assert not imports(path, runtime_only=False) & others, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                ours = node.module.startswith("pilotfish.")
                allowed = package.name == "pilotfish_kit" and node.module == "pilotfish.testing"
                assert not ours or allowed, path
                if node.module == "pilotfish":
                    assert {alias.name for alias in node.names} <= set(pilotfish.__all__), path
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("pilotfish.") for alias in node.names), path


@pytest.mark.parametrize("package", PLUGINS, ids=lambda p: p.name)
def test_plugins_pin_nothing(package):
    import tomllib

    project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text())["project"]
    needs = project.get("dependencies", [])
    assert not [n for n in needs if "==" in n or ("<" in n and "torch" in n)]


def test_every_public_name_exists_and_is_documented():
    for name in pilotfish.__all__:
        assert getattr(pilotfish, name).__doc__, name
    public = {n for n in vars(pilotfish) if not n.startswith(("_", "@"))}  # @: pytest's own
    modules = {p.stem for p in CORE.rglob("*.py")} | {p.stem for p in CORE.iterdir()}
    known = set(pilotfish.__all__) | modules | {"Any", "TYPE_CHECKING", "annotations"}
    assert public <= known


def test_importing_pilotfish_loads_neither_torch_nor_diffusers():
    code = (
        "import sys, pilotfish; pilotfish.Guide; "
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pilotfish.nothing  # noqa: B018


def test_there_are_no_drawers():
    for name in ("utils", "helpers", "common"):
        assert not list(CORE.rglob(f"{name}.py"))
