"""Every block of the README runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from pilotfish import Run
from pilotfish.cli import main
from pilotfish.runs.metadata import Picture
from pilotfish.testing import random_pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)
BLOCKS = [m.groupdict() for m in BLOCK.finditer(README)]
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"

pytestmark = pytest.mark.slow


def blocks(kind):
    return [b for b in BLOCKS if b["kind"] == kind]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the files that the README shows."""
    for block in BLOCKS:
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_no_kind_of_block_that_is_not_tested():
    assert {b["kind"] for b in BLOCKS} == {"python", "bash"}
    assert len(BLOCKS) == README.count("```") / 2


def test_every_python_block_runs_after_those_above_it(workplace):
    names = {}
    for block in blocks("python"):
        exec(compile(block["text"], "README.md", "exec"), names)
    assert names["result"].images


def commands():
    return [
        line for b in blocks("bash") for line in b["text"].replace("\\\n", "").splitlines() if line
    ]


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(workplace, command):
    program, *arguments = shlex.split(command)
    if program == "make":  # this test runs inside one of them: see that the rest would
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    assert program == "pilotfish"
    if HUB_ID in arguments:  # no downloads here: the same layout in a folder
        random_pipeline().save_pretrained("model")
        arguments[arguments.index(HUB_ID)] = "./model"
    if arguments[0] == "replay":  # of a picture that the command above it makes
        blue = {"use": "blue"}
        run = Run(prompt="a parrot", steps=2, seed=1, model_id="emoji", plugins=(blue,))
        Picture.of(Image.new("RGB", (64, 64)), run).save(arguments[1])
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if "--out" in arguments:
        assert (workplace / arguments[arguments.index("--out") + 1]).stat().st_size > 100


def test_every_file_that_the_readme_points_to_exists():
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target
