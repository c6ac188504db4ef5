"""Model folders that are not as they should be: an error that names the part, and no picture."""

import json
import shutil
from pathlib import Path

import pytest

import pilotfish
from pilotfish import ModelError


@pytest.fixture
def folder(model, tmp_path):
    """A copy of a model's folder, to be spoiled."""
    return shutil.copytree(model, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def told_of(folder):
    """What the error says, and nothing else may come of it."""
    with pytest.raises(ModelError) as caught:
        pilotfish.load(folder)("a cat", steps=1)
    return str(caught.value)


PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_empty_is_named(folder, part):
    (folder / part / PARTS[part]).rename(folder / "kept")
    assert part in told_of(folder)
    (folder / part / PARTS[part]).touch()
    assert part in told_of(folder) or PARTS[part] in told_of(folder)
    shutil.rmtree(folder / part)
    assert part in told_of(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_cut_off_or_anothers_are_named(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    whole = file.read_bytes()
    others = {p: next((folder / p).glob("*.safetensors")) for p in ("unet", "vae")}
    foreign = others["vae" if part == "unet" else "unet"].read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-4], foreign):
        file.write_bytes(content)
        assert f"the {part} " in told_of(folder)
    file.unlink()
    assert f"the {part} cannot be read" in told_of(folder)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "3", '"x"', "[[]]", "[" * 100_000, '{"a": 1}', "\0"]
)
def test_an_index_that_is_none_is_told(folder, text):
    (folder / "model_index.json").write_text(text)
    assert str(folder) in told_of(folder)


@pytest.mark.parametrize("value", [None, 0, -1, "x", [], ["diffusers"], {"a": 1}])
def test_an_index_whose_part_is_no_part_names_it(folder, value):
    for part in (*PARTS, "feature_extractor"):
        change(folder / "model_index.json", **{part: value})
        assert f"the {part} in model_index.json must be a library and a class" in told_of(folder)
        shutil.copy(Path(folder.parent / "index"), folder / "model_index.json")


@pytest.fixture(autouse=True)
def index(folder):
    shutil.copy(folder / "model_index.json", folder.parent / "index")


@pytest.mark.parametrize(
    "name",
    [
        *("StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusion3Pipeline"),
        *("ZImagePipeline", "QwenImagePipeline", "Flux2KleinPipeline", "AudioLDMPipeline"),
        *("DiffusionPipeline", "os", "", None, 3, ["a", "b"]),
    ],
)
def test_a_class_of_another_family_is_told(folder, name):
    change(folder / "model_index.json", _class_name=name)
    assert len(told_of(folder)) < 3000
