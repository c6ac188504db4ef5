"""Wheels of the core, of every plugin here and of a new one, in an environment of their own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from pilotfish_kit.new import create

from pilotfish.hooks.registry import LIMIT

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
NOT_SOURCE = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*", "tests")

pytestmark = pytest.mark.slow


# Neither what else is on the path, nor a limit of discovery, belongs to a clean environment.
OURS = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", LIMIT)}


def run(*command, code=0, **options):
    words = [str(word) for word in command]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run(words, text=True, check=False, env=OURS, **options)
    assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment with all that pilotfish needs, and nothing of pilotfish."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    place = next(folder.glob("lib/python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("pilotfish", "__editable__", "__pycache__")):
            place.joinpath(path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A wheel of each distribution, by its name."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = folder / "sources"
    sources.mkdir()
    core = sources / "pilotfish"
    shutil.copytree(ROOT / "src", core / "src", ignore=NOT_SOURCE)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, core)
    for plugin in PLUGINS:
        shutil.copytree(plugin, sources / plugin.name, ignore=NOT_SOURCE)
    create("warmth", sources)
    broken = create("grain", sources)
    (broken / "src/pilotfish_grain/__init__.py").write_text("raise RuntimeError('no grain today')")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", folder)
    run(sys.executable, "-m", "pip", *build, *sorted(sources.iterdir()))
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def test_plugins_come_and_go_with_their_wheels(environment, wheels, tmp_path):
    def pip(*arguments):
        python = environment / "bin/python"
        run(python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def pilotfish(*arguments, **options):
        return run(environment / "bin/pilotfish", *arguments, cwd=tmp_path, **options)

    def listed():
        rows = pilotfish("plugins", "list").splitlines()
        return {row.split()[0] for row in rows if row[:2] == "  " != row[2:4]}

    assert len(wheels) == len(PLUGINS) + 3
    install = ("install", "--no-deps", "--no-index", "-q")
    pip(*install, wheels["pilotfish"])
    assert "No plugins are installed" in pilotfish("plugins", "list")
    missing = "the command 'plugins new' comes with pilotfish-kit: pip install pilotfish-kit"
    assert missing in pilotfish("plugins", "new", "fog", code=1, stderr=subprocess.STDOUT)

    pip(*install, *(wheel for name, wheel in wheels.items() if name != "pilotfish"))
    assert {"blue", "palette", "warmth", "grain"} <= listed()
    assert "pilotfish_fog/__init__.py" in pilotfish("plugins", "new", "fog")
    use = ("--use", "blue", "--use", "warmth:target=0.3", "--steps", "2", "--seed", "1")
    pilotfish("generate", "a cat on a gray background", *use, "--out", "cat.png")
    assert (tmp_path / "cat.png").stat().st_size > 100
    assert "BROKEN: RuntimeError: no grain today" in " ".join(pilotfish("doctor", code=1).split())

    pip("uninstall", "-q", "-y", "pilotfish-warmth", "pilotfish-grain")
    assert {"blue", "palette"} <= listed() and not {"warmth", "grain"} & listed()
    pilotfish("plugins", "show", "warmth", code=1)
