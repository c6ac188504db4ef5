"""Pictures made again from the run that they hold, from friends and from strangers."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from pilotfish import Run
from pilotfish.cli import main
from pilotfish.cli.trust import asks
from pilotfish.hooks import registry
from pilotfish.runs.metadata import holding, read_run

MY_LOSS = '''
from pathlib import Path
from pilotfish import Guide

Path("imported").touch()

class Cheap(Guide):
    """Reads no picture."""
    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(MY_LOSS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(main, arguments)


def generate(model, *arguments):
    return call(
        "generate", "a red cat", "--model", model, "--seed", "5", "--steps", "2", *arguments
    )


def test_a_replayed_picture_is_the_same_file(model):
    assert generate(model, "--out", "one.png", "--guidance-scale", "3").exit_code == 0
    done = call("replay", "one.png", "--model", model, "--out", "two.png")
    assert done.exit_code == 0, done.output
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert "two.png  32x32, seed 5" in done.stdout


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_a_picture_of_another_format_is_replayed_too(model, ending):
    generate(model, "--out", f"one.{ending}")
    generate(model, "--out", "one.png")
    done = call("replay", f"one.{ending}", "--model", model, "--out", "two.png")
    assert done.exit_code == 0, done.output
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_a_change_on_the_way_makes_another_picture(model):
    generate(model, "--out", "one.png")
    done = call("replay", "one.png", "--model", model, "-s", "seed=6", "--out", "two.png")
    assert done.exit_code == 0, done.output
    assert "seed = 6" in read_run("two.png") and "seed = 5" in read_run("one.png")


def test_show_prints_a_run_file_and_runs_nothing(model):
    generate(model, "--out", "one.png", "--save-run", "run.toml")
    done = call("replay", "one.png", "--show")
    assert done.stdout == Path("run.toml").read_text()
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ('model = "./tiny"', "model './tiny', a folder or a download"),
        ('model = "someone/model"', "model 'someone/model', a folder or a download"),
        ('[[plugins]]\nuse = "./my_loss.py:Cheap"', "plugin './my_loss.py:Cheap', code outside"),
        ('[[plugins]]\nuse = "my_loss.py"', "plugin 'my_loss.py', code outside"),
        ('[[plugins]]\nuse = "os:system"', "plugin 'os:system', code outside"),
        ('plugins = ["my_loss:Cheap:scale=1"]', "plugin 'my_loss:Cheap', code outside"),
        ('[[plugins]]\nuse = "blue"\nmask = "../cat"', "mask = '../cat' of plugin 'blue', a file"),
        ('[[plugins]]\nuse = "blue"\nmask = ["my_loss.py"]', "mask = 'my_loss.py' of plugin"),
        ('[[plugins]]\nuse = "best-of"\nreward = "os:system"', "reward = 'os:system' of plugin"),
        ('[[plugins]]\nuse = "clip"\ntext = {"http://a.b" = 1}', "text = 'http://a.b'"),
        ('decoder = "tiny:someone/taesd"', "decoder 'tiny:someone/taesd', a folder or a download"),
        ('scheduler = "os:system"', "scheduler 'os:system', code outside of diffusers"),
        ('scheduler = {name = "my_loss:Cheap"}', "scheduler 'my_loss:Cheap', code outside"),
        ('preset = "mine.toml"', "preset 'mine.toml', a file"),
        ('preset = {base = {base = "mine.toml"}}', "preset 'mine.toml', a file"),
        ("steps = 100000000", "steps = 100000000"),
        ("scheduler = {name = 'ddim', num_train_timesteps = 10000000}", "num_train_timesteps"),
        ("height = 100000\nwidth = 100000", "10000 megapixels"),
    ],
)  # fmt: skip
def test_what_a_strangers_picture_asks_for_is_shown_and_not_done(monkeypatch, tmp_path, run, words):
    def never(*_, **__):
        raise AssertionError("loaded a model")

    monkeypatch.setattr("pilotfish.models.loading.load", never)
    monkeypatch.syspath_prepend(str(tmp_path))
    Image.new("RGB", (8, 8)).save("cat.png", **holding(run, "PNG"))
    done = call("replay", "cat.png")
    assert done.exit_code == 1 and words in done.stderr
    assert "`pilotfish replay cat.png --show`" in done.stderr and "--yes" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("imported").exists()


CURIOUS = """
import socket
from pilotfish import Plugin, Setting

class Curious(Plugin):
    class Settings(Plugin.Settings):
        flavour: str = Setting("vanilla", description="asks an address for it")
        tolerant: bool = Setting(False, description="goes on without")
    def setup(self, run):
        try:
            socket.create_connection((self.settings.flavour, 1), timeout=1)
        except OSError:
            if not self.settings.tolerant:
                raise
"""


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("flavour", ["no.such.host.invalid", "127.0.0.1"])
@pytest.mark.parametrize("tolerant", [True, False])
def test_the_network_is_closed_whatever_the_setting_that_asks_for_it_is_called(
    model, monkeypatch, tmp_path, flavour, tolerant
):
    (tmp_path / "curious.py").write_text(CURIOUS)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("curious", "curious:Curious", registry.PLUGIN_GROUP)
    known = registry._entry_points
    monkeypatch.setattr(
        registry,
        "_entry_points",
        lambda group: (entry,) if group == registry.PLUGIN_GROUP else known(group),
    )
    settings = f'flavour = "{flavour}"\ntolerant = {str(tolerant).lower()}'
    run = f'prompt = "a cat"\nsteps = 1\nseed = 1\n[[plugins]]\nuse = "curious"\n{settings}'
    Image.new("RGB", (8, 8)).save("cat.png", **holding(run, "PNG"))
    done = call("replay", "cat.png", "--model", model, "--out", "again.png", "--anyway")
    assert done.exit_code == (0 if tolerant else 1)
    assert f"cat.png asks for the network ({flavour})" in done.stderr and "add --yes" in done.stderr
    assert ("It went on without" in done.stderr) == tolerant
    done = call("replay", "cat.png", "--model", model, "--out", "again.png", "--yes", "--anyway")
    assert (done.exit_code == 0) == tolerant, done.output
    assert "pilotfish does for nobody" not in done.stderr


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_name_that_a_library_would_download_is_refused_before_anything_is_asked_for(model):
    pytest.importorskip("pilotfish_clip")
    run = 'prompt = "a"\nsteps = 1\n[[plugins]]\nuse = "clip"\nmodel = "ViT-B-32"\ntext = "b"'
    Image.new("RGB", (8, 8)).save("cat.png", **holding(run, "PNG"))
    done = call("replay", "cat.png", "--model", model, "--anyway")
    assert done.exit_code == 1 and "cat.png asks for the network (" in done.stderr


def test_plugins_that_are_installed_and_models_by_name_need_no_yes():
    asked = asks(
        Run.parse(
            'model = "emoji"\nprompt = "a/b; rm -rf ~"\npreset = {base = "tfg", rho = 2}\n'
            '[[plugins]]\nuse = "blue"\nscale = 0.5\nmask = [0, 0, 1, 0.5]\n'
            '[[plugins]]\nuse = "palette"\ncolors = ["#035", "#fa0"]\n'
        )
    )
    assert [*asked] == []


def test_yes_runs_it_all(model):
    generate(model, "--use", "./my_loss.py:Cheap:scale=2", "--out", "one.png")
    assert call("replay", "one.png", "--out", "two.png").exit_code == 1
    done = call("replay", "one.png", "--out", "two.png", "--yes")
    assert done.exit_code == 0, done.output
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
