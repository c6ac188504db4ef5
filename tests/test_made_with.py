"""What a picture was made with, and what replay says where that is not here."""

import base64
import gc
import hashlib
import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner
from PIL import Image

from pilotfish import InputError, Run, Sampler
from pilotfish.cli import main
from pilotfish.hooks import registry
from pilotfish.runs.made_with import MadeWith
from pilotfish.runs.metadata import holding, read_run
from pilotfish.testing import random_pipeline

pytest.importorskip("pilotfish_color")
MASKED = "blue:scale=2,mask=mask.png"
MY_LOSS = """
from pilotfish import Guide

class Cheap(Guide):
    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(MY_LOSS)
    mask(tmp_path / "mask.png", 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The folder of a model of the same kind with other weights."""
    random_pipeline(seed=1).save_pretrained(folder := tmp_path_factory.mktemp("other"))
    return str(folder)


def mask(path, grey):
    Image.new("L", (32, 32), grey).save(path)


def pixels(path):
    with Image.open(path) as picture:
        return picture.tobytes()


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def replay(*arguments):
    return CliRunner().invoke(main, ["replay", "cat.png", "--out", "again.png", *arguments])


def made(sampler, *plugins, **options):
    """A picture, saved as cat.png."""
    result = sampler("a red cat", plugins=plugins, **{"steps": 2, "seed": 5, **options})
    result.save("cat.png")
    return result


def edited(change):
    """cat.png, with another run in it."""
    content = tomllib.loads(read_run("cat.png"))
    change(content)
    Image.new("RGB", (8, 8)).save("cat.png", **holding(tomli_w.dumps(content), "PNG"))


@pytest.fixture
def no_model(monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded a model")

    monkeypatch.setattr("pilotfish.models.loading.load", never)


def test_a_run_holds_the_weights_the_packages_and_the_input_files_it_was_made_with(sampler):
    content = tomllib.loads(made(sampler, MASKED, "./my_loss.py:Cheap").run.to_toml())
    assert content["made_with"] == {
        "pilotfish": version("pilotfish"),
        "weights": sampler.model.fingerprint(),
        "packages": {"blue": f"pilotfish-color {version('pilotfish-color')}"},
        "files": {"mask.png": sha("mask.png"), "./my_loss.py": sha("my_loss.py")},
    }


def test_words_that_happen_to_name_a_file_are_no_input():
    Path("cat").write_text("no input")
    table = {"use": "clip", "text": "cat", "images": [{"mask.png": 1}], "name": "my_loss.py"}
    assert MadeWith.here([table]).files == {"mask.png": sha("mask.png")}


def test_a_large_file_is_hashed_again_when_it_has_changed():
    Path("lora.safetensors").write_bytes(bytes(1_000_001))
    table = {"use": "lora", "file": "lora.safetensors"}
    before = MadeWith.here([table])
    Path("lora.safetensors").write_bytes(bytes(1_000_002))
    after = MadeWith.here([table]).files["lora.safetensors"]
    assert after == sha("lora.safetensors") != before.files["lora.safetensors"]


def test_a_picture_of_a_pipeline_without_a_name_is_not_replayed_on_another_model(
    sampler, model, other
):
    result = made(sampler)
    done = replay()
    assert done.exit_code == 1 and "has no name: give its folder or name by --model" in done.stderr
    done = replay("--model", other)
    assert done.exit_code == 1 and not Path("again.png").exists()
    assert (
        f"other weights, or another dtype: made with {sampler.model.fingerprint()}" in done.stderr
    )
    assert "--anyway" in done.stderr
    done = replay("--model", model)
    assert done.exit_code == 0, done.output
    assert pixels("again.png") == result.images[0].tobytes()


@pytest.mark.filterwarnings("default::UserWarning")
def test_anyway_goes_on_and_tells_what_differs(sampler, other):
    result = made(sampler)
    done = replay("--model", other, "--anyway")
    assert done.exit_code == 0, done.output
    assert "warning: another picture: the model has other weights" in done.stderr
    assert pixels("again.png") != result.images[0].tobytes()


def test_a_picture_that_names_no_model_and_holds_no_fingerprint_is_refused(sampler, model):
    made(sampler)
    edited(lambda content: content["made_with"].pop("weights"))
    done = replay("--model", model)
    assert done.exit_code == 1 and "nothing tells whether it was" in done.stderr


def test_python_refuses_another_model_too(sampler):
    content = Run.parse(made(sampler).run.to_toml())
    del content["dtype"]
    another = Sampler.from_pipeline(random_pipeline(seed=1))
    with pytest.raises(InputError, match="the model has other weights"):
        another.stream(**content)
    with pytest.warns(UserWarning, match="the model has other weights"):
        assert another(**content, anyway=True).run.made_with.weights == another.model.fingerprint()


def test_a_result_is_judged_by_another_model_without_a_word(sampler):
    another = Sampler.from_pipeline(random_pipeline(seed=1))
    assert another.losses(made(sampler), ["blue"])["blue"]


@pytest.mark.parametrize(
    ("plugin", "change", "line"),
    [
        (MASKED, lambda: mask("mask.png", 200), "'mask.png' has changed: put the file there"),
        (MASKED, lambda: os.unlink("mask.png"), "'mask.png' is missing: put the file there"),
        (
            "./my_loss.py:Cheap",
            lambda: Path("my_loss.py").write_text(f"{MY_LOSS}# 2"),
            "'./my_loss.py' has changed",
        ),
    ],
)
def test_an_input_file_that_is_not_what_it_was_is_told_before_the_model_is_loaded(
    sampler, model, no_model, plugin, change, line
):
    made(sampler, plugin)
    change()
    done = replay("--model", model, "--yes")
    assert done.exit_code == 1 and f"\n  {line}" in done.stderr and "--anyway" in done.stderr


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_run_file_may_be_changed_and_what_differs_is_told(sampler, model):
    Path("run.toml").write_text(made(sampler, MASKED).run.to_toml())
    mask("mask.png", 200)
    done = CliRunner().invoke(
        main, ["generate", "--run", "run.toml", "--model", model, "--out", "again.png"]
    )
    assert done.exit_code == 0, done.output
    assert "warning: another picture: 'mask.png' has changed" in done.stderr


def test_a_plugin_that_is_not_installed_is_told_with_its_package(
    sampler, model, no_model, monkeypatch
):
    made(sampler, "blue")
    entries = registry._entry_points

    def without(group):
        return tuple(e for e in entries(group) if e.name != "blue")

    monkeypatch.setattr(registry, "_entry_points", without)
    done = replay("--model", model)
    package = f"pilotfish-color {version('pilotfish-color')}"
    assert done.exit_code == 1
    assert f"plugin 'blue' is not installed: made with {package}: pip install" in done.stderr


@pytest.mark.filterwarnings("default::UserWarning")
def test_another_version_is_told_and_the_picture_made(sampler, model):
    made(sampler, "blue")
    edited(lambda content: content["made_with"]["packages"].update(blue="pilotfish-color 0.0.1"))
    done = replay("--model", model)
    assert done.exit_code == 0, done.output
    here = f"here is pilotfish-color {version('pilotfish-color')}"
    assert f"made with pilotfish-color 0.0.1: pip install pilotfish-color==0.0.1; {here}" in (
        done.stderr
    )


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_a_strangers_picture_calls_a_package_is_no_command(sampler, model):
    made(sampler, "blue")
    edited(lambda content: content["made_with"]["packages"].update(blue="x; rm -rf ~"))
    done = replay("--model", model)
    assert "made with 'x; rm -rf ~'; here is" in done.stderr and "pip install" not in done.stderr


def test_small_input_files_travel_in_the_picture(sampler, model, folder, monkeypatch):
    made(sampler, MASKED, embed_inputs=True)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    (folder / "mask.png").unlink()
    os.rename(folder / "cat.png", "cat.png")
    done = replay("--model", model)
    assert done.exit_code == 0, done.output
    assert pixels("again.png") == pixels("cat.png")
    gc.collect()
    assert not [*folder.glob("pilotfish-inputs-*")]


def test_the_file_that_travelled_is_used_and_not_what_lies_in_its_place(sampler, model):
    made(sampler, MASKED, embed_inputs=True)
    mask("mask.png", 255)
    done = replay("--model", model)
    assert done.exit_code == 0, done.output
    assert pixels("again.png") == pixels("cat.png")


def test_the_command_line_lets_inputs_travel(sampler, model):
    line = f"generate cat --model {model} --use {MASKED} --embed-inputs --steps 1 --out cat.png"
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 0, done.output
    carried = tomllib.loads(read_run("cat.png"))["made_with"]["embedded"]
    assert base64.b64decode(carried["mask.png"]) == Path("mask.png").read_bytes()


def test_what_is_too_large_or_no_picture_stays_where_it_is_and_is_told(sampler):
    Path("mask.png").write_bytes(Path("mask.png").read_bytes() + bytes(256_000))
    with pytest.warns(
        UserWarning, match=r"'mask.png' does not travel in the run \(256\d\d\d bytes"
    ):
        assert not made(sampler, MASKED, embed_inputs=True).run.made_with.embedded


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evil.py", b"raise SystemExit", "a run carries no input such as 'evil.py'"),
        ("words.bin", b"a pickle", "a run carries no input such as 'words.bin'"),
        ("mask.png", b"another", "the input 'mask.png' in the run is broken"),
        ("mask.png", bytes(256_001), "the input 'mask.png' in the run is broken"),
        ("mask.png", None, "the input 'mask.png' in the run is broken"),
        ("mask.png", bytes(1_100_000), "too large; at most 1000000 bytes|"),
    ],
)
def test_inputs_of_a_stranger_that_are_not_as_they_should_be_are_refused(
    sampler, model, no_model, name, content, words
):
    made(sampler, MASKED, embed_inputs=True)

    def change(run):
        told = "!" if content is None else base64.b64encode(content).decode()
        run["made_with"]["embedded"] = {name: told}
        if len(content or b"") > 256_000:  # even with the right hash
            run["made_with"]["files"][name] = hashlib.sha256(content).hexdigest()
        run["plugins"][0]["mask"] = name

    edited(change)
    done = replay("--model", model)
    assert done.exit_code == 1 and any(w in done.stderr for w in words.split("|")), done.output


def test_a_strangers_input_is_read_from_the_run_also_where_it_is_called_like_a_file_here(
    sampler, model, folder
):
    """A name is but a name: nothing is written to it, and no --yes is needed."""
    made(sampler, MASKED, embed_inputs=True)
    secret = str(folder / "secret.png")
    mask(secret, 255)
    before = sha(secret)

    def change(run):
        for table in (run["made_with"]["files"], run["made_with"]["embedded"]):
            table[secret] = table.pop("mask.png")
        run["plugins"][0]["mask"] = secret

    original = pixels("cat.png")
    edited(change)
    done = replay("--model", model)
    assert done.exit_code == 0, done.output
    assert sha(secret) == before
    assert pixels("again.png") == original


@pytest.mark.parametrize(
    "table", ["3", "{weights = 3}", "{embedded = 3}", '{files = ["a"]}', "{x = 1}"]
)
def test_a_broken_made_with_is_our_own_error(model, no_model, table):
    Image.new("RGB", (8, 8)).save(
        "cat.png", **holding(f'model = "emoji"\nmade_with = {table}', "PNG")
    )
    done = replay("--model", model, "--anyway")
    assert done.exit_code == 1 and "made_with" in done.stderr, done.output
