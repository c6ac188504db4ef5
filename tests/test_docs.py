"""Every page says what is so: commands and their answers, checks, hooks, the interface."""

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pilotfish_kit
import pilotfish_view
import pytest
import yaml
from click.testing import CliRunner
from pilotfish_kit import CHECKS

import pilotfish
from pilotfish import Run, testing
from pilotfish.cli import main
from pilotfish.cli.program import OWN
from pilotfish.hooks import specs
from pilotfish.testing import random_sampler

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {page.stem: page.read_text() for page in sorted(DOCS.glob("*.md"))}
WRITTEN = sorted(script.stem for script in DOCS.glob("make_*.py"))
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)


def blocks(page, kind):
    return [m.groupdict() for m in BLOCK.finditer(PAGES[page]) if m["kind"] == kind]


def joined(text):
    """With each command on one line."""
    return text.replace("\\\n", "")


def answers(page):
    """Each command of the page with its answer, in order."""
    text = joined("\n".join(block["text"] for block in blocks(page, "console")))
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
    """An empty folder with the files of all pages; packages look as long as in a fresh shell."""
    for block in (m.groupdict() for text in PAGES.values() for m in BLOCK.finditer(text)):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", ["start", "plugins"])
def test_every_command_answers_as_its_page_says(workplace, monkeypatch, page):
    assert answers(page)
    for command, answer in answers(page):
        pattern = re.escape(answer).replace(re.escape("..."), ".*")
        came = run(command, monkeypatch)
        assert re.fullmatch(pattern, came, re.S), f"{command}\n{came}"


@pytest.mark.slow
def test_every_python_block_of_the_plugins_page_runs(workplace, monkeypatch):
    monkeypatch.syspath_prepend(str(workplace))
    for block in blocks("plugins", "python"):
        if block["file"] != "typo.py":  # refused on purpose
            exec(compile(block["text"], "plugins.md", "exec"), {"__name__": "plugins_md"})
    monkeypatch.delitem(sys.modules, "my_loss")


@pytest.mark.parametrize("page", ["index", "start", "questions", "views"])
def test_every_python_block_of_a_page_runs_after_those_above_it(workplace, monkeypatch, page):
    monkeypatch.setattr(pilotfish, "load", random_sampler)  # the pages' own model takes a minute
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block["text"], f"{page}.md", "exec"), names)
    shown = {p.name for p in workplace.glob("views-*.png")}
    assert shown == ({p.name for p in DOCS.glob("views-*.png")} if page == "views" else set())


def commands(page):
    return [line for block in blocks(page, "bash") for line in joined(block["text"]).splitlines()]


@pytest.mark.parametrize("command", commands("questions"))
def test_every_command_of_the_questions_can_be_given(workplace, monkeypatch, command):
    if command.startswith("pilotfish generate"):
        command += " --dry-run"  # everything is checked, nothing is loaded
    if command.startswith("pilotfish replay"):
        run("pilotfish generate cat --steps 2 --use blue --out campfire.png", monkeypatch)
    assert "error" not in run(command, monkeypatch)


def test_the_run_files_of_the_pages_can_be_read():
    shown = [b for page in PAGES for b in blocks(page, "toml") if b["file"]]
    assert shown
    for block in shown:
        assert Run.parse(block["text"])["plugins"]


def test_the_plugins_page_lists_every_check_with_its_claim():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", PAGES["plugins"], flags=re.M))
    assert {name: rows[name] for name in CHECKS} == {n: c.claim for n, c in CHECKS.items()}


@pytest.mark.parametrize("script", WRITTEN)
def test_what_a_script_writes_is_what_it_would_write_now(script):
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.page(), f"run python docs/{script}.py"


@pytest.mark.parametrize("hook", specs.KINDS)
def test_every_hook_has_its_section_and_its_place_in_the_loop(hook):
    assert f"\n## {hook}\n" in PAGES["hooks"]
    assert f">{hook}</text>" in (DOCS / "loop.svg").read_text()


def test_the_command_line_page_has_every_command_with_each_of_its_options():
    """By another way than the script's: click's own tree, not the text of its help."""

    def check(command, path):
        _, _, after = PAGES["commands"].partition(f"\n## {path}\n")
        section = after.partition("\n## ")[0]
        for name in (name for p in command.params for name in p.opts if name.startswith("--")):
            assert name in section, f"{path} {name}"
        for name in getattr(command, "commands", ()) or command_names(command):
            check(command.get_command(None, name), f"{path} {name}")

    def command_names(command):
        return OWN if command is main else ()

    check(main, "pilotfish")


@pytest.mark.parametrize(
    "module",
    [pilotfish, testing, pilotfish_kit, pilotfish_view],
    ids=lambda module: module.__name__,
)
def test_the_python_page_has_every_public_name(module):
    told = set(re.findall(r"^::: pilotfish\S*\.(\w+)$", PAGES["python"], flags=re.M))
    for title in re.findall(r"^#{2,3} (.*?) \{", PAGES["python"], flags=re.M):
        told |= set(re.findall(r"\w+", title))
    assert not set(module.__all__) - told


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())["nav"]
    assert {f"{page}.md" for page in PAGES} <= set(leaves(nav))


def leaves(nav):
    """The files of a navigation, however deep they lie."""
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [file for item in items for file in leaves(item)]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_file_that_a_page_points_to_exists(page):
    for target in re.findall(r"\]\(((?!https?:|#)[^)#]+)", BLOCK.sub("", page.read_text())):
        assert os.path.exists(DOCS / target), target
