"""What a command loads until it has something to tell."""

import importlib
import subprocess
import sys

import pytest

from pilotfish.cli import starting

CLOCK = """
import sys
import pilotfish

class Clock(pilotfish.Plugin):
    def after_step(self, step):
        print("at the first step:", HEAVY & {*sys.modules})
        step.stop()
"""
HEAVY = {"scipy.stats", "scipy.integrate", "scipy.optimize", "torch._dynamo", "torch._inductor"}
COMMANDS = ["plugins", "show", "blue"], ["generate", "a cat", "--use", "blue", "--dry-run"]


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_looking_at_a_plugin_and_at_a_run_loads_no_torch(tmp_path):
    pytest.importorskip("pilotfish_color")
    pytest.importorskip("pilotfish_emoji")
    code = (
        "import sys; from pilotfish.cli import main\n"
        f"for command in {COMMANDS}: main(command, standalone_mode=False)\n"
        "sys.exit('loaded torch' if {'torch', 'numpy'} & {*sys.modules} else 0)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "25 of 25 steps, 0 to 24" in done.stdout and "scheduler       ddim" in done.stdout


def test_a_first_step_loads_no_compiler_and_no_statistics_and_tells_at_once_what_it_loads(tmp_path):
    pytest.importorskip("pilotfish_emoji")
    (tmp_path / "clock.py").write_text(CLOCK.replace("HEAVY", repr(HEAVY)))
    command = ["generate", "a cat", "--use", "clock.py"]
    code = f"from pilotfish.cli import main; main({command}, standalone_mode=False)"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("loading emoji with clock.py ...\n")
    assert "at the first step: set()" in done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that leaves a file when it is really imported."""
    folder = tmp_path / "dear_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("open(f'{__file__}.imported', 'w').close(); VALUE = 3\n")
    (folder / "part.py").write_text("def twice(x): return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "dear_package"
    for name in [name for name in sys.modules if name.startswith("dear_package")]:
        del sys.modules[name]


@pytest.fixture
def imported(tmp_path):
    return lambda: [*tmp_path.rglob("*.imported")] != []


def test_what_stands_in_for_a_package_answers_what_is_known_and_goes_when_left(package, imported):
    with starting._instead(package, known=5):
        assert importlib.import_module(package).known == 5
        assert not hasattr(importlib.import_module(package), "__unheard_of__")
        assert not imported()
    assert package not in sys.modules
    assert importlib.import_module(package).VALUE == 3 and imported()


def test_a_stand_in_becomes_the_package_when_more_is_asked(package, imported):
    with starting._instead(package, known=5):
        module = importlib.import_module(package)
        assert module.VALUE == 3 and imported()
        assert not hasattr(module, "known")
    assert sys.modules[package] is module


def test_a_part_of_a_package_is_imported_without_the_package(package, imported):
    with starting._instead(package):
        assert importlib.import_module(package).part.twice(2) == 4
        assert not imported()


def test_who_kept_a_stand_in_gets_the_package_later(package):
    with starting._instead(package):
        module = importlib.import_module(package)
    assert module.VALUE == 3
    assert sys.modules[package].VALUE == 3 and sys.modules[package] is not module


def test_a_function_of_a_package_imports_it_when_it_is_called(package):
    with starting._instead(f"{package}.part", "twice"):
        from dear_package.part import twice
    assert f"{package}.part" not in sys.modules
    assert twice(4) == 8


def test_a_package_that_is_there_already_stays(package):
    module = importlib.import_module(package)
    with starting._instead(package, known=5):
        assert importlib.import_module(package) is module
    assert sys.modules[package] is module


@pytest.mark.slow
def test_after_a_lean_start_torch_compiles_and_scipy_computes(tmp_path):
    pytest.importorskip("pilotfish_emoji")
    code = (
        "import torch\n"
        "from pilotfish.cli.starting import lean\n"
        "with lean():\n"
        "    import pilotfish\n"
        "    sampler = pilotfish.load()\n"
        "sampler('a cat', steps=3, scheduler={'name': 'euler', 'use_beta_sigmas': True})\n"
        "sampler('a cat', steps=3, scheduler='lms')\n"
        "f = torch.compile(lambda x: x + 1, backend='eager', fullgraph=True)\n"
        "assert f(torch.ones(2)).tolist() == [2, 2]\n"
        "import torch._dynamo\n"
        "assert torch.compile(torch.nn.Linear(2, 2)).__class__ is "
        "torch._dynamo.eval_frame.OptimizedModule\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
