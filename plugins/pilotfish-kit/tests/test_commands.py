"""`plugins new`, `plugins check`, and the checks as tests of pytest."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from pilotfish_kit import CHECKS, check_plugin, parametrize_with_checks
from pilotfish_kit.new import create

import pilotfish
from pilotfish import Guide, InputError, PilotfishError
from pilotfish.cli import main


def call(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


# ---- plugins new ----


def test_a_new_plugin_asks_for_pilotfish_and_only_for_a_least_version_of_it(folder):
    done = call("plugins", "new", "film-grain")
    assert done.exit_code == 0, done.output
    project = tomllib.loads(Path("pilotfish-film-grain/pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["pilotfish>=0.1"]
    assert project["optional-dependencies"] == {"test": ["pilotfish-kit>=0.1", "pytest>=8"]}
    assert project["entry-points"] == {
        "pilotfish.plugins": {"film-grain": "pilotfish_film_grain:FilmGrain"}
    }


def test_what_is_told_of_a_new_plugin_is_what_was_written(folder):
    told = call("plugins", "new", "film-grain").stdout.partition("\n\n")[0].splitlines()
    new = folder / "pilotfish-film-grain"
    files = [str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()]
    assert told[0] == "pilotfish-film-grain/"
    assert sorted(line.strip() for line in told[1:]) == sorted(files)


def test_a_new_plugin_works_as_it_is(folder, monkeypatch, random_sampler):
    create("warmth")
    monkeypatch.syspath_prepend(str(folder / "pilotfish-warmth" / "src"))
    plugin = pilotfish.make_plugin("pilotfish_warmth:Warmth:target=0.3")
    check_plugin(plugin, random_sampler)
    losses = random_sampler("a red cat", plugins=[plugin], steps=8, seed=0).trace.losses("Warmth")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["warmth", "a-b-c-3d", "x" * 28])
def test_a_new_plugin_is_formatted_and_clean(folder, name):
    new = create(name)
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "100", "."]
    rules = ["--select", "E,F,W,I,UP,B,C4,SIM,RUF"]
    for command in (["check", *rules, *options], ["format", "--check", *options]):
        done = subprocess.run([*ruff, *command], cwd=new, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_new_plugin_passes_its_own_tests_at_once(folder):
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        **{"cwd": create("film-grain"), "env": {**os.environ, "PYTHONPATH": path}},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert f"{2 * len(CHECKS) + 1} passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Warmth", "got 'Warmth'. For example: film-grain"),
        ("my loss", "got 'my loss'"),
        ("pilotfish-warmth", "no pilotfish- before it; got 'pilotfish-warmth'"),
        ("../warmth", "got '../warmth'"),
        ("3d", "begins with a letter"),
        ("a--b", "got 'a--b'"),
        ("x" * 29, "has at most 28 characters"),
        ("", "got ''"),
        ("wärme", "got 'wärme'"),
        ("guide", "'guide' has a meaning to pilotfish or pytest"),
        ("none", "'none' has a meaning to pilotfish or pytest"),
        ("testament", "'testament' has a meaning to pilotfish or pytest"),
        ("color", "an installed package has the name 'color' already"),
        ("blue", "an installed package has the name 'blue' already"),
    ],
)
def test_a_name_that_will_not_do_is_refused_and_nothing_is_written(
    folder, monkeypatch, name, words
):
    monkeypatch.setenv("PILOTFISH_PLUGINS", "plugins.new")  # what is hidden is taken all the same
    done = call("plugins", "new", "--", name)
    assert done.exit_code == 1
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


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
        create("warmth")
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


def test_help_of_both_commands_loads_no_torch():
    code = (
        "import sys; from pilotfish.cli import main\n"
        "for command in ('check', 'new'):\n"
        "    main(['plugins', command, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


# ---- in pytest ----


class Contrast(Guide):
    def loss_guidance(self, step):
        return -(step.image - step.image.mean()).square().mean(dim=(1, 2, 3))


def test_in_pytest_each_check_of_each_plugin_is_a_test_of_its_own(random_sampler):
    mark = parametrize_with_checks([Contrast(), Contrast(scale=2)]).mark
    names, cases = mark.args
    assert (mark.name, names) == ("parametrize", ("plugin", "check"))
    assert [case.id for case in cases] == [
        f"{plugin}-{name}" for plugin in ("Contrast()", "Contrast(scale=2.0)") for name in CHECKS
    ]
    for case in cases:
        plugin, check = case.values
        if case.id.endswith("-batch"):
            with pytest.raises(PilotfishError, match="batch: gives an image another picture"):
                check(plugin, random_sampler)
        else:
            check(plugin, random_sampler)


def test_in_pytest_a_check_that_has_nothing_to_look_at_skips_its_test(random_sampler):
    class Quiet(pilotfish.Plugin):
        def after_step(self, step): ...

    _, cases = parametrize_with_checks([Quiet()]).mark.args
    (plugin, check) = next(case.values for case in cases if case.id == "Quiet()-scale-0")
    with pytest.raises(pytest.skip.Exception, match="it has no scale"):
        check(plugin, random_sampler)


def test_check_tries_a_plugin_on_a_family_and_names_it(folder):
    done = call("plugins", "check", "blue", "--family", "sd3")
    assert done.exit_code == 0, done.output
    assert "Blue() on sd3" in done.output
    assert "FAILED" not in done.output
    assert "qwen-image" in call("plugins", "check", "blue", "--family", "nobodys").output
