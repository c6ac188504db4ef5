"""What makes the next plugin: functions as guides, `plugins new`, `plugins check`, discovery."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import pilotfish
from pilotfish import Guide, InputError, PilotfishError, PluginError, SettingsError
from pilotfish.cli import main
from pilotfish.cli import new as kit
from pilotfish.hooks import registry
from pilotfish.testing import CHECKS, check_plugin


def call(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, and nothing installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(registry, "_entry_points", lambda group: ())
    return tmp_path


def install(monkeypatch, **targets):
    entries = [EntryPoint(name, target, registry.PLUGIN_GROUP) for name, target in targets.items()]
    monkeypatch.setattr(
        registry, "_entry_points", lambda g: tuple(e for e in entries if e.group == g)
    )


# ---- pilotfish.guide ----


def brightness(step):
    """How bright it is."""
    return step.image.mean(dim=(1, 2, 3))


def test_a_function_is_a_guide_like_the_class_with_the_same_loss(latents_of):
    class Brightness(Guide):
        def loss_guidance(self, step):
            return brightness(step)

    settings = {"scale": -0.5, "every": 2, "gradient": "latents"}
    ours = latents_of(pilotfish.guide(brightness, **settings))
    assert torch.equal(ours, latents_of(Brightness(**settings)))
    assert not torch.equal(ours, latents_of())


def test_a_function_gives_the_guide_its_name_unless_one_is_chosen(sampler):
    guides = [
        pilotfish.guide(brightness, scale=2),
        pilotfish.guide(brightness, name="light"),
        pilotfish.guide(lambda step: brightness(step)),
        pilotfish.guide(lambda step: brightness(step)),
    ]
    assert repr(guides[0]) == "brightness(scale=2.0)"
    assert type(guides[0]).__doc__ == "How bright it is."
    trace = sampler("a cat", plugins=guides, steps=1, seed=0).trace
    assert trace.plugins == ["brightness", "light", "guide", "guide#2"]


def test_a_run_with_a_function_says_that_no_file_can_repeat_it(sampler):
    run = sampler("a cat", plugins=[pilotfish.guide(brightness)], steps=1).run
    with pytest.raises(PilotfishError, match="'brightness' .* cannot be repeated from a file"):
        run.to_toml()


def test_errors_of_a_function_name_it(sampler):
    broken = pilotfish.guide(lambda step: step.image.mean(), name="flat")
    with pytest.raises(PluginError, match=r"plugin 'flat': loss_guidance\(\) returned shape \(\)"):
        sampler("a cat", plugins=[broken], steps=1, num_images=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), r"guide\(\) takes a function of the step, .*; got 3"),
        ((Guide,), r"takes a function of the step, .*; got <class"),
        ((lambda: 1,), r"calls its function with the step alone: too many positional arguments"),
        ((lambda step, image: 1,), "with the step alone: missing a required argument: 'image'"),
    ],
)
def test_what_is_no_function_of_the_step_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        pilotfish.guide(*arguments)


def test_settings_and_name_of_a_function_are_checked():
    with pytest.raises(SettingsError, match="brightness: no setting 'scael'. Did you mean 'scale'"):
        pilotfish.guide(brightness, scael=2)
    with pytest.raises(InputError, match="a plugin's name takes letters, .*; got 'so bright'"):
        pilotfish.guide(brightness, name="so bright")


def test_a_plugin_that_cannot_be_made_is_named(folder):
    (folder / "mine.py").write_text(
        "from pilotfish import Plugin\n"
        "class Mine(Plugin):\n"
        "    def __init__(self):\n        super().__init__()\n        open('nothing.txt')\n"
        "    def after_step(self, step): ...\n"
    )
    with pytest.raises(PluginError, match=r"'./mine.py:Mine' cannot be made: FileNotFoundError"):
        registry.resolve("./mine.py:Mine")


# ---- plugins new ----


def test_a_new_plugin_asks_for_pilotfish_and_only_for_a_least_version_of_it(folder):
    done = call("plugins", "new", "film-grain")
    assert done.exit_code == 0, done.output
    project = tomllib.loads(Path("pilotfish-film-grain/pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["pilotfish>=0.1"]
    assert project["entry-points"] == {
        "pilotfish.plugins": {"film-grain": "pilotfish_film_grain:FilmGrain"}
    }
    assert "src/pilotfish_film_grain/__init__.py" in done.stdout
    assert "  cd pilotfish-film-grain\n" in done.stdout


def test_a_new_plugin_works_as_it_is(folder, monkeypatch, sampler):
    kit.create("warmth")
    monkeypatch.syspath_prepend(str(folder / "pilotfish-warmth" / "src"))
    install(monkeypatch, warmth="pilotfish_warmth:Warmth")
    plugin = registry.resolve("warmth:target=0.3").plugin
    check_plugin(plugin, sampler)
    run = sampler("a red cat", plugins=[plugin], steps=8, seed=0)
    assert run.run.plugins[0]["use"] == "warmth"
    losses = run.trace.losses("warmth")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["warmth", "a-b-c-3d", "x" * 28])
def test_a_new_plugin_is_formatted_and_clean(folder, name):
    new = kit.create(name)
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "100", "."]
    rules = ["--select", "E,F,W,I,UP,B,C4,SIM,RUF"]
    for command in (["check", *rules, *options], ["format", "--check", *options]):
        done = subprocess.run([*ruff, *command], cwd=new, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def pytest_in(folder, *arguments):
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", *arguments],
        **{"cwd": folder, "env": {**os.environ, "PYTHONPATH": path}},
        **{"capture_output": True, "text": True, "check": False},
    )


@pytest.mark.slow
def test_a_new_plugin_passes_its_own_tests_at_once(folder):
    done = pytest_in(kit.create("film-grain"))
    assert done.returncode == 0, done.stdout
    assert f"{2 * len(CHECKS) + 2} passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Warmth", "got 'Warmth'. For example: warmth"),
        ("my loss", "got 'my loss'. For example: my-loss"),
        (
            "pilotfish-warmth",
            "no pilotfish- before it; got 'pilotfish-warmth'. For example: warmth",
        ),
        ("../warmth", "got '../warmth'. For example: warmth"),
        ("3d", "begins with a letter"),
        ("a--b", "got 'a--b'. For example: a-b"),
        ("x" * 29, "has at most 28 characters"),
        ("", "got ''"),
        ("wärme", "got 'wärme'"),
        ("guide", "'guide' has a meaning in pilotfish already"),
        ("none", "'none' has a meaning in pilotfish already"),
        ("testament", "pytest would take the class Testament for tests"),
        ("color", "the package pilotfish-color 0.1.0 is installed"),
    ],
)
def test_a_name_that_will_not_do_is_refused_and_nothing_is_written(folder, name, words):
    done = call("plugins", "new", "--", name)
    assert done.exit_code == 1
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_the_name_of_an_installed_plugin_is_refused_also_where_it_is_hidden(folder, monkeypatch):
    install(monkeypatch, warmth="nowhere:Warmth")
    monkeypatch.setenv(registry.LIMIT, "none")
    assert "installed plugin 'warmth' already" in call("plugins", "new", "warmth").stderr


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_what_exists_is_left_as_it_is(folder, what):
    there = folder / "pilotfish-warmth"
    if what == "folder":
        there.mkdir()
    elif what == "file":
        there.write_text("mine")
    else:
        there.symlink_to("nothing")
    done = call("plugins", "new", "warmth")
    assert done.exit_code == 1
    assert "pilotfish-warmth exists already; nothing was written" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["pilotfish-warmth"]
    assert what != "file" or there.read_text() == "mine"


def test_a_plugin_that_cannot_be_written_to_the_end_is_not_there_at_all(folder, monkeypatch):
    write, written = Path.write_text, []

    def full(path, text, **options):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="cannot write pilotfish-warmth: No space left on device"):
        kit.create("warmth")
    assert len(written) == 2 and list(folder.iterdir()) == []


# ---- plugins check ----

MINE = """
from pilotfish import Guide

class Fine(Guide):
    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))

class Contrast(Guide):
    def loss_guidance(self, step):
        return -(step.image - step.image.mean()).square().mean(dim=(1, 2, 3))
"""


def test_check_reports_each_check_and_ends_in_one_where_a_plugin_fails(folder):
    (folder / "mine.py").write_text(MINE)
    done = call("plugins", "check", "./mine.py:Contrast:scale=2")
    assert done.exit_code == 1
    head, *lines, counts = done.stdout.splitlines()
    assert head == "Contrast(scale=2.0)"
    assert {line.split()[1] for line in lines if line.startswith("  FAILED")} == {"batch"}
    assert "FAILED  batch" in done.stdout and "beside a neighbour" in done.stdout
    assert [line.split()[1] for line in lines] == list(CHECKS)
    assert counts == f"{len(CHECKS) - 1} ok, 1 failed, 0 not tried"


def test_check_is_content_with_a_whole_plugin(folder):
    (folder / "mine.py").write_text(MINE)
    done = call("plugins", "check", "./mine.py:Fine")
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"\n{len(CHECKS)} ok, 0 failed, 0 not tried\n")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("./mine.py:Fin", "Did you mean 'Fine'?"),
        ("./mine.py:Fine:scael=2", "Did you mean 'scale'?"),
        ("./nothing.py:Fine", "no plugin file nothing.py"),
        ("nothing", "no plugin called 'nothing'"),
    ],
)
def test_check_says_in_one_line_what_it_cannot_find(folder, use, words):
    (folder / "mine.py").write_text(MINE)
    done = call("plugins", "check", use)
    assert done.exit_code == 1
    assert words in done.stderr and done.stderr.startswith("error: ")
    assert done.stdout == ""


# ---- in pytest ----


def test_the_pytest_plugin_imports_nothing_heavy_until_a_fixture_is_asked_for():
    code = (
        "import sys, pilotfish.testing.fixtures\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_offers_its_pytest_plugin():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, _ = project["entry-points"]["pytest11"]["pilotfish"].partition(":")
    assert module == "pilotfish.testing.fixtures"


TESTS = """
import pytest
from pilotfish import Guide
from pilotfish.testing import parametrize_with_checks

class Mine(Guide):
    def loss_guidance(self, step):
        return -(step.image - step.image.mean()).square().mean(dim=(1, 2, 3))

@parametrize_with_checks([Mine(), Mine(scale=2)])
def test_contract(plugin, check, random_sampler):
    check(plugin, random_sampler)

def test_fixtures(random_sampler, random_step, emoji_sampler):
    assert random_step.image.shape == (2, 3, 128, 128)
    assert random_sampler.model.dtype == emoji_sampler.model.dtype
"""


@pytest.mark.slow
def test_in_pytest_each_check_of_each_plugin_is_a_test_of_its_own(folder):
    (folder / "test_mine.py").write_text(TESTS)
    done = pytest_in(folder, "test_mine.py")
    assert "FAILED test_mine.py::test_contract[Mine()-batch]" in done.stdout
    assert "FAILED test_mine.py::test_contract[Mine(scale=2.0)-batch]" in done.stdout
    assert f"2 failed, {2 * len(CHECKS) - 2 + 1} passed" in done.stdout


# ---- PILOTFISH_PLUGINS ----


def test_a_hidden_plugin_is_said_to_be_hidden(folder, monkeypatch):
    install(monkeypatch, blue="nowhere:Blue", red="nowhere:Red")
    monkeypatch.setenv(registry.LIMIT, " red , green")
    done = call("plugins", "list")
    assert "\nred " in done.stdout and "\nblue " not in done.stdout
    note = "Discovery is limited by PILOTFISH_PLUGINS= red , green; hidden: blue; "
    assert done.stdout.endswith(f"{note}not installed: green\n")
    assert "'blue' is installed, but PILOTFISH_PLUGINS" in call("plugins", "show", "blue").stderr


@pytest.mark.parametrize("value", ["none", ""])
def test_discovery_can_be_switched_off_but_files_are_found(folder, monkeypatch, value):
    install(monkeypatch, blue="nowhere:Blue")
    monkeypatch.setenv(registry.LIMIT, value)
    (folder / "mine.py").write_text(MINE)
    assert call("plugins", "list").stdout == (
        f"Discovery is limited by PILOTFISH_PLUGINS={value}; hidden: blue\n"
    )
    assert registry.resolve("./mine.py:Fine").use == "./mine.py:Fine"


def test_doctor_tells_of_a_limit_and_leaves_hidden_plugins_alone(folder, monkeypatch):
    install(monkeypatch, broken="no_such_module:Blue")
    monkeypatch.setenv(registry.LIMIT, "none")
    done = call("doctor")
    assert done.exit_code == 0, done.output
    assert "Discovery is limited by PILOTFISH_PLUGINS=none; hidden: broken\n" in done.stdout
