"""Where the command's files go: nothing is overwritten unasked, and no finished picture is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pilotfish.cli import main
from pilotfish.runs import pictures
from pilotfish.testing import random_pipeline

SLOW = """
import time
from pilotfish import Plugin


class Slow(Plugin):
    def after_step(self, step):
        time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    random_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(model: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["generate", "--model", model, "--steps", "1", "--seed", "5", *arguments]
    )


def found() -> list[str]:
    """All files here, none of them a folder."""
    return sorted(str(p) for p in Path().rglob("*") if p.is_file())


def test_without_a_name_pictures_have_that_of_prompt_and_seed(model: str) -> None:
    assert generate(model, "A red cat, on blue!").exit_code == 0
    assert generate(model, "").exit_code == 0
    assert found() == ["out/a-red-cat-on-blue-5.png", "out/picture-5.png"]


def test_nothing_is_overwritten_unless_it_is_asked_for(model: str) -> None:
    files = ("--out", "cat.png", "--save-run", "cat.toml")
    generate(model, "a cat", *files)
    first = Path("cat.png").read_bytes(), Path("cat.toml").read_bytes()
    again = generate(model, "a dog", *files)
    assert found() == ["cat.png", "cat.toml", "cat_2.png", "cat_2.toml"]
    assert "cat_2.png" in again.stdout
    assert (Path("cat.png").read_bytes(), Path("cat.toml").read_bytes()) == first
    generate(model, "a dog", *files, "--force")
    assert Path("cat.png").read_bytes() == Path("cat_2.png").read_bytes() != first[0]


def test_several_pictures_go_where_none_of_them_is_yet(model: str) -> None:
    Image.new("RGB", (8, 8)).save("cat-2.png")
    generate(model, "a cat", "--out", "cat.png", "--num-images", "2")
    assert found() == ["cat-2.png", "cat_2-1.png", "cat_2-2.png"]


def test_a_file_of_prompts_makes_the_picture_that_each_makes_alone(model: str) -> None:
    Path("prompts.txt").write_text("a cat\n\n  a dog  \n")
    answers = json.loads(generate(model, "--prompts", "prompts.txt", "--json").stdout)
    assert [a["files"] for a in answers] == [["out/a-cat-5.png"], ["out/a-dog-5.png"]]
    for name in ("a cat", "a dog"):
        generate(model, name, "--out", f"{name}.png")
        alone, listed = Image.open(f"{name}.png"), Image.open(f"out/{name.replace(' ', '-')}-5.png")
        assert alone.tobytes() == listed.tobytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, 'a PROMPT is missing: pilotfish generate "a campfire"'),
        (["a cat", "--prompts", "prompts.txt"], 2, "give a PROMPT or --prompts, not both"),
        (["--prompts", "none.txt"], 1, "cannot read the prompts of none.txt"),
        (["--prompts", "empty.txt"], 1, "empty.txt holds no prompt; expected one a line"),
    ],
)
def test_what_is_no_prompt_is_told(model: str, arguments: list[str], code: int, words: str) -> None:
    Path("prompts.txt").write_text("a cat")
    Path("empty.txt").write_text("\n \n")
    done = generate(model, *arguments)
    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("option", ["--out", "--save-run"])
@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("folder.png", "it is a folder"),
        ("x" * 300 + ".png", "name too long"),
        ("/dev/null/a.png", ""),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(
    option: str, place: str, words: str
) -> None:
    Path("folder.png").mkdir()
    done = generate("./nothing", "a cat", option, place)
    assert done.exit_code == 1
    assert f"\nerror: cannot write {place}: " in done.stderr and words in done.stderr.lower()


def test_a_picture_whose_place_fails_by_the_end_is_kept_elsewhere(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, save = tmp_path / "elsewhere", pictures.save_picture
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))

    def full(picture: Image.Image, path: Path) -> Path:
        if kept not in Path(path).parents:
            raise pictures.InputError(f"cannot write {path}: No space left on device")
        return save(picture, path)

    monkeypatch.setattr(pictures, "save_picture", full)
    done = generate(model, "a cat", "--out", "cat.png")
    assert done.exit_code == 1
    assert "No space left on device. The finished picture is not lost: " in done.stderr
    (file,) = kept.rglob("*.png")
    assert str(file) in done.stderr
    monkeypatch.undo()
    generate(model, "a cat", "--out", str(tmp_path / "cat.png"))
    assert file.read_bytes() == (tmp_path / "cat.png").read_bytes()


def test_sigterm_ends_a_run_with_nothing_half_written(model: str) -> None:
    Path("slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "pilotfish", "generate", "a cat", "--model", model]
    options = ["--use", "./slow.py", "--steps", "500", "--out", "cat.png"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        while b" 1/500" not in (told := running.stderr.read1()):
            assert told, "it ended before its first step"
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait(timeout=60) == 128 + signal.SIGTERM
    assert found() == ["slow.py"]
