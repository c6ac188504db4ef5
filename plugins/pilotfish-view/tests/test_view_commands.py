"""Films, grids and views on the command line."""

from pathlib import Path

import numpy as np
import pilotfish_view as view
import pytest
from click.testing import CliRunner
from PIL import Image

from pilotfish import load
from pilotfish.cli import main
from pilotfish.testing import random_pipeline, random_sampler

RUN = """
prompt = "a red cat"
steps = 2
seed = 7
guidance_scale = 3.0
[[plugins]]
use = "./my_loss.py:Cheap"
name = "cheap"
"""
MY_LOSS = '''
from pilotfish import Guide

class Cheap(Guide):
    """Reads no picture."""
    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))

class Torn(Guide):
    """Breaks where it stands in a second run."""
    runs = 0
    def setup(self, run):
        Torn.runs += 1
    def loss_guidance(self, step):
        if Torn.runs > 1:
            raise ValueError("torn")
'''


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    random_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(MY_LOSS)
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)


def call(*arguments):
    return CliRunner().invoke(main, arguments)


# ---- films ----


@pytest.mark.parametrize("more", [(), ("--film-decoded",)])
def test_generate_writes_a_film_beside_the_picture_and_the_picture_stays(model, more):
    plain = ("generate", "a red cat", "--model", model, "--steps", "3", "--seed", "5")
    assert call(*plain, "--out", "plain.png").exit_code == 0
    done = call(*plain, "--out", "cat.png", "--film", "new/cat.gif", *more)
    assert done.exit_code == 0, done.output
    assert "new/cat.gif  3 frames" in done.stdout
    assert Path("plain.png").read_bytes() == Path("cat.png").read_bytes()
    with Image.open("new/cat.gif") as film:
        assert film.n_frames == 3


def test_a_film_that_cannot_be_written_is_refused_before_the_run():
    done = call("generate", "a red cat", "--model", "./nothing", "--film", "cat.avi")
    assert done.exit_code == 1
    assert "cannot write cat.avi: end a film's name in .gif or .mp4" in done.stderr


# ---- grids ----


def test_a_grid_on_the_command_line_is_the_grid_of_its_run_file(model):
    axes = ("--x", "plugins.cheap.scale=0,4", "--y", "seed=1,2")
    done = call("grid", "run.toml", *axes, "--model", model, "-s", "steps=1", "--out", "new/g.png")
    assert done.exit_code == 0, done.output
    assert "new/g.png  2 x 2 pictures" in done.stdout and "4 steps in" in done.stdout
    assert "4/4" in done.stderr  # the progress bar
    grid = view.grid(
        random_sampler(),
        "a red cat",
        plugins=[{"use": "./my_loss.py:Cheap", "name": "cheap"}],
        x=axes[1],
        y=axes[3],
        steps=1,
        guidance_scale=3.0,
    )
    with Image.open("new/g.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(grid.picture()))


def test_models_and_number_formats_can_be_an_axis_and_each_is_loaded_once(model, monkeypatch):
    loads = []

    def counted(name, **options):
        loads.append((name, options["dtype"]))
        return load(name, **options)

    monkeypatch.setattr("pilotfish.load", counted)
    axes = ("--x", "dtype=float32,bfloat16", "--y", "seed=1,2")
    done = call("grid", "run.toml", *axes, "--model", model)
    assert done.exit_code == 0, done.output
    assert sorted(loads) == [(model, "bfloat16"), (model, "float32")]


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("plugins.cheap.scal=1,2", "plugins.cheap.scal=1: Cheap: no setting 'scal'"),
        ("plugins.blue.scale=1,2", "no plugin in this run called 'blue'"),
        ("steps=2,none", "steps=none: steps must be a whole number"),
        ("seed", "an axis is KEY=VALUE,VALUE,..."),
    ],
)
def test_a_wrong_axis_gives_one_line_and_no_picture(model, axis, words):
    done = call("grid", "run.toml", "--x", axis, "--model", model)
    assert done.exit_code == 1 and words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("grid.png").exists()


def test_a_grid_that_breaks_off_leaves_what_it_has(model):
    use = Path("run.toml").read_text().replace("Cheap", "Torn")
    Path("run.toml").write_text(use)
    done = call("grid", "run.toml", "--x", "seed=1,2,3", "--model", model)
    assert done.exit_code == 1 and "torn" in done.stderr
    with Image.open("grid.png") as picture:
        assert picture.width == 3 * 128 + 4 * 8


# ---- views ----


def test_a_schedule_is_printed_and_drawn(model):
    done = call("view", "schedule", "heun", "--steps", "3", "--model", model, "--out", "new/s.png")
    scheduler = load(model).model.new_scheduler("heun")
    assert done.stdout == f"{view.schedule(scheduler, 3)}\n"
    with Image.open("new/s.png") as picture:
        assert picture.size == (800, 600)


def test_tokens_are_printed_and_drawn(model):
    done = call("view", "tokens", "a red puppyzz", "--model", model, "--out", "tokens.png")
    tokens = view.tokens(random_sampler(), "a red puppyzz")
    assert done.stdout == f"{tokens}\n"
    with Image.open("tokens.png") as picture:
        assert picture.tobytes() == tokens.picture().tobytes()


def test_a_wrong_scheduler_or_file_is_told(model):
    assert "Did you mean 'euler'" in call("view", "schedule", "eular", "--model", model).stderr
    done = call("view", "tokens", "a cat", "--model", model, "--out", "tokens.txt")
    assert "cannot write tokens.txt" in done.stderr
