"""What the command line is given: every option, place, run and signal that cannot be."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

import pilotfish
from pilotfish import InputError, Run
from pilotfish.cli import main, trust
from pilotfish.runs.metadata import holding
from pilotfish.runs.pictures import whole_file
from pilotfish.runs.toml import read_toml

RUN = 'prompt = "a cat"\nsteps = 1\nseed = 5\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    """What a command prints, with its exit code; nothing but a line comes of a mistake."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (0, 1, 2), done.exception
    assert not done.exit_code or isinstance(done.exception, SystemExit)
    return done


# ---- arguments ----

NUMBERS = ["0", "-1", "1" * 400, "1" * 5000, "nan", "inf", "1e999", "x", "b'x'", "", "a\0b"]
TEXTS = [*NUMBERS, "\udcff\udcfe", "[" * 2000, "[" * 1500 + "]" * 1500, "{a=" * 999, "~nosuchuser"]
OPTIONS = [
    *("size", "steps", "seed", "num-images", "guidance-scale", "true-cfg-scale", "scheduler"),
    *("max-sequence-length", "preset", "decoder", "checkpointing", "on-error", "use", "set"),
    *("model", "config", "dtype", "offload", "device", "run", "prompts", "negative-prompt"),
]


@pytest.mark.parametrize("option", OPTIONS)
def test_whatever_an_option_is_given_comes_to_a_run_or_a_line(model, option):
    usual = () if option == "model" else ("--model", model)
    prompt = () if option == "prompts" else ("a cat",)
    for text in TEXTS:
        for value in ("", "steps=", "rho=", "plugins.blue.scale=") if option == "set" else ("",):
            call("generate", *prompt, *usual, "--dry-run", f"--{option}={value}{text}")


@pytest.mark.parametrize("setting", ["scale", "every", "start", "mask", "target", "gradient"])
def test_whatever_a_plugins_setting_is_given_comes_to_a_run_or_a_line(setting):
    for text in TEXTS:
        call("generate", "a cat", "--dry-run", "--use", f"blue:{setting}={text}")


def test_words_that_are_no_text_are_told_by_the_table_of_tokens_too(model):
    pytest.importorskip("pilotfish_view")
    done = call("view", "tokens", "a \udcff", "--model", model)
    assert done.exit_code == 1 and "a prompt must be text in UTF-8" in done.stderr


# ---- places ----


@pytest.mark.parametrize("option", ["--out", "--save-run", "--film"])
@pytest.mark.parametrize(
    "place", ["", "a\0.png", "cat/", "file/a.png", "x" * 300 + ".gif", "..", "."]
)
def test_a_place_that_cannot_be_is_told_at_once_and_no_folder_is_left(option, place):
    Path("file").touch()
    Path("cat").mkdir()
    done = call("generate", "a cat", "--model", "./nothing", option, place)
    assert done.exit_code == 1 and "\nerror: cannot write " in done.stderr
    assert sorted(os.listdir()) == ["cat", "file"]


def test_a_run_that_fails_leaves_no_folder(model):
    assert call("generate", "a cat", "--model", model, "--scheduler", "x").exit_code == 1
    assert os.listdir() == []


def test_a_folder_for_a_grid_or_a_table_is_told_before_the_work(monkeypatch):
    pytest.importorskip("pilotfish_view")
    Path("cat.png").mkdir()
    Path("run.toml").write_text(RUN)
    monkeypatch.setattr(pilotfish, "load", lambda *_, **__: 1 / 0)  # never asked
    for command in (["grid", "run.toml", "--x", "seed=1,2"], ["view", "schedule", "ddim"]):
        done = call(*command, "--out", "cat.png")
        assert done.exit_code == 1 and "it is a folder; add a file's name" in done.stderr


def test_what_a_kill_left_half_written_goes_with_the_next_file_an_hour_later():
    old, new, other = (
        Path(f".{name}.png") for name in ("a.pilotfish-part", "b.pilotfish-part", "c")
    )
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    with whole_file(Path("cat.png")) as part:
        part.touch()
    assert sorted(os.listdir()) == [new.name, other.name, "cat.png"]


# ---- runs ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".".join("a" * 100_000) + " = 1", "a key of more than 32 parts"),
        ('x = {"a" . ' + "'b'." * 50 + "c = 1}", "a key of more than 32 parts"),
        ("x" * 250_000, "not valid TOML"),
        ("steps = " + "1" * 5000, "not valid TOML"),
        ("steps = 0x" + "f" * 5000, "a number of more than 300 digits"),
        ("preset = " + "[" * 3000 + "]" * 3000, "more than 32 tables or lists"),
        ("preset = " + "[" * 40 + "]" * 40, "more than 32 tables or lists"),
        ("preset = " + "{base = " * 40 + "1" + "}" * 40, "more than 32 tables or lists"),
    ],
)
def test_a_run_that_would_take_the_reader_long_is_refused_at_once(text, words):
    begin = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        Run.parse(text)
    assert time.process_time() - begin < 1 and len(str(caught.value)) < 500


def test_a_prompt_of_many_points_and_tables_as_runs_have_them_are_read():
    run = {"prompt": "a.b . c... " * 20, "preset": {"base": {"base": {"base": "tfg"}}}}
    text = f'prompt = "{run["prompt"]}"\npreset = {{base = {{base = {{base = "tfg"}}}}}}'
    assert read_toml(text, "it") == run


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("plugins = [" + '"blue",' * 5000 + "]", "5000 plugins"),
        (
            '[[plugins]]\nuse = "palette"\ncolors = [' + '"#fa0",' * 20_000 + "]",
            "20000 words and numbers in colors of plugin 'palette'",
        ),
        (
            '[[plugins]]\nuse = "blend"\nprompts = [' + '"a b",' * 10_000 + "]",
            "20000 words and numbers in prompts of plugin 'blend'",
        ),
        (f'negative_prompt = "{"cat " * 9000}"', "9000 words and numbers in negative_prompt"),
        ("max_sequence_length = 100000", "max_sequence_length = 100000"),
        (
            "steps = 100\npreset = {base = 'tfg', recurrence = 10, iterations = 10, samples = 10}",
            "the network 100,000 times for pictures of 512x512, some 2 hours",
        ),
        ("steps = 900\nnum_images = 800\nheight = 128\nwidth = 128", "45,000 times"),
        ("steps = 900\n[[plugins]]\nuse = 'best-of'\nparticles = 1000", "900,000 times"),
    ],
)
def test_work_without_bounds_in_a_strangers_picture_is_told_and_not_done(monkeypatch, run, words):
    monkeypatch.setattr("pilotfish.models.loading.load", None)  # never asked
    Image.new("RGB", (8, 8)).save("cat.png", **holding(run, "PNG"))
    begin = time.process_time()
    done = call("replay", "cat.png")
    assert done.exit_code == 1 and words in done.stderr and "add --yes" in done.stderr
    assert time.process_time() - begin < 5


def test_work_as_people_ask_for_it_needs_no_yes():
    for run in (
        {"steps": 250, "height": 1024, "width": 1024, "num_images": 4},
        {"preset": {"base": "lgd"}, "prompt": "a cat " * 100},
        {
            "preset": "freedom",
            "steps": 100,
            "scheduler": {"name": "ddim", "trained_betas": [0.1] * 9},
        },
    ):
        assert [*trust.asks({"plugins": [], **run})] == []


# ---- signals ----

STOPS = """
import os
from pilotfish import Plugin

class Stops(Plugin):
    class Settings(Plugin.Settings):
        number: int
        seed: int

    def after_step(self, step):
        if step.run.seed == self.settings.seed:
            os.kill(os.getpid(), self.settings.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["generate", "replay", "grid"])
def test_a_signal_while_a_plugin_works_ends_every_command_by_its_own_code(model, command, number):
    Path("stops.py").write_text(STOPS)
    plugin = f'[[plugins]]\nuse = "./stops.py:Stops"\nnumber = {int(number)}\nseed = 6\n'
    Path("run.toml").write_text(RUN.replace("seed = 5", "seed = 6") + plugin)
    Image.new("RGB", (8, 8)).save("cat.png", **holding(Path("run.toml").read_text(), "PNG"))
    there = sorted(os.listdir())
    done = CliRunner().invoke(
        main,
        {
            "generate": ["generate", "--run", "run.toml", "--out", "new.png"],
            "replay": ["replay", "cat.png", "--yes", "--anyway", "--out", "new.png"],
            "grid": ["grid", "run.toml", "--x", "seed=5,6,7", "--out", "new.png"],
        }[command]
        + ["--model", model],
    )
    assert done.exit_code == 128 + number, done.output
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    # Of a grid, the cells that were finished are kept.
    kept = ["new.png"] if command == "grid" else []
    assert sorted({*os.listdir()} - {"__pycache__"}) == sorted([*there, *kept])


# ---- memory ----


def test_latents_whose_decode_does_not_fit_are_kept_and_decoded_later(model, monkeypatch):
    from pilotfish.models.stable_diffusion import StableDiffusion

    run = ("generate", "a cat", "--model", model, "--steps", "2", "--seed", "5", "--out")
    call(*run, "whole.png")

    def decode(self, latents):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "decode", decode)
        done = call(*run, "cat.png")
        assert call(*run, "dog.png", "--use", "blue").exit_code == 1  # whose guide needs it too
    assert done.exit_code == 1 and not Path("cat.png").exists()
    assert "The finished latents are not lost: cat.latents.safetensors" in done.stderr
    assert not Path("dog.latents.safetensors").exists()
    with safe_open("cat.latents.safetensors", "pt") as file:
        assert 'prompt = "a cat"' in file.metadata()["pilotfish"]
    exec(done.stderr.partition("on the CPU: ")[2])
    with Image.open("cat.png") as later, Image.open("whole.png") as whole:
        assert later.tobytes() == whole.tobytes()
