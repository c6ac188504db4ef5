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


@pytest.mark.parametrize("layers", [1, 0, -1])
def test_layers_that_a_config_leaves_out_are_told(folder, layers):
    change(folder / "text_encoder/config.json", num_hidden_layers=layers)
    assert "tensors are of layers that its config.json leaves out" in told_of(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_encoder/config.json", "layer_norm_eps", None),
        ("text_encoder/config.json", "num_attention_heads", -1),
        ("text_encoder/config.json", "eos_token_id", None),
        ("tokenizer/tokenizer_config.json", "model_max_length", None),
        ("tokenizer/tokenizer_config.json", "model_max_length", -1),
        ("tokenizer/tokenizer_config.json", "model_max_length", {}),
        ("unet/config.json", "norm_eps", "x"),
        ("unet/config.json", "freq_shift", None),
        ("unet/config.json", "downsample_padding", -1),
        ("unet/config.json", "norm_num_groups", -1),
        ("unet/config.json", "sample_size", -1),
        ("unet/config.json", "sample_size", "x"),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "shift_factor", "x"),
        ("vae/config.json", "layers_per_block", -1),
        ("vae/config.json", "up_block_types", []),
    ],
)
def test_a_number_in_a_config_that_is_none_is_told(folder, file, key, value):
    change(folder / file, **{key: value})
    assert len(told_of(folder)) < 1500
