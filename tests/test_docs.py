"""Every page says what is so: commands and their answers, checks, hooks."""

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import pilotfish
from pilotfish.cli import main
from pilotfish.testing import CHECKS, random_sampler

DOCS = Path(__file__).parents[1] / "docs"
PLUGINS = (DOCS / "plugins.md").read_text()
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)


def blocks(kind):
    return [m.groupdict() for m in BLOCK.finditer(PLUGINS) if m["kind"] == kind]


def answers():
    """Each command of the page with its answer, in order."""
    text = "\n".join(block["text"] for block in blocks("console"))
    parts = re.split(r"^\$ (.*)\n", text, flags=re.M)[1:]
    return list(zip(parts[::2], (answer.strip() for answer in parts[1::2]), strict=True))


def run(command, monkeypatch):
    """What a command line of the page prints."""
    words = shlex.split(command)
    with monkeypatch.context() as patch:
        while "=" in words[0]:
            patch.setenv(*words.pop(0).split("=", 1))
        assert words.pop(0) == "pilotfish"
        done = CliRunner().invoke(main, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    # A progress bar may stand before the error.
    return done.stdout.strip() or done.stderr[done.stderr.index("error: ") :].strip()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the files of the page; packages look as long as in a fresh shell."""
    for block in (m.groupdict() for m in BLOCK.finditer(PLUGINS)):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_plugins_page_answers_as_the_page_says(workplace, monkeypatch):
    for command, answer in answers():
        pattern = re.escape(answer).replace(re.escape("..."), ".*")
        came = run(command, monkeypatch)
        assert re.fullmatch(pattern, came, re.S), f"{command}\n{came}"


@pytest.mark.slow
def test_every_python_block_of_the_plugins_page_runs(workplace, monkeypatch):
    monkeypatch.syspath_prepend(str(workplace))
    for block in blocks("python"):
        if block["file"] != "typo.py":  # refused on purpose
            exec(compile(block["text"], "plugins.md", "exec"), {"__name__": "plugins_md"})
    monkeypatch.delitem(sys.modules, "my_loss")


def test_every_python_block_of_the_views_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pilotfish, "load", random_sampler)  # the page's own model takes a minute
    names = {}
    for block in BLOCK.finditer((DOCS / "views.md").read_text()):
        if block["kind"] == "python":
            exec(compile(block["text"], "views.md", "exec"), names)
    shown = {p.name for p in tmp_path.glob("views-*.png")}
    assert shown == {p.name for p in DOCS.glob("views-*.png")}


def test_the_plugins_page_lists_every_check_with_its_claim():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", PLUGINS, flags=re.M))
    assert {name: rows[name] for name in CHECKS} == {n: c.claim for n, c in CHECKS.items()}


def test_the_page_of_hooks_is_the_one_that_the_specs_give():
    spec = importlib.util.spec_from_file_location("make_hooks", DOCS / "make_hooks.py")
    make_hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_hooks)
    page = make_hooks.page()
    assert (DOCS / "hooks.md").read_text() == page, "run python docs/make_hooks.py"
    assert all(f"\n## {hook}\n" in page for hook in make_hooks.hookspecs.KINDS)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_file_that_a_page_points_to_exists(page):
    for target in re.findall(r"\]\(((?!https?:|#)[^)#]+)", page.read_text()):
        assert os.path.exists(DOCS / target), target
