"""Folders as people have them: the weights are those of the files, or the part at fault is named.

The references are the networks that were saved.
"""

import json
import re
import shutil
import socket

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import pilotfish
from pilotfish import InputError, ModelError, Sampler
from pilotfish.testing.random_models import families, random_pipeline

FAMILIES = sorted(families())
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A family's random pipeline, and the folder that it was saved to, once for all tests."""
    made = {}

    def of(family="stable-diffusion"):
        if family not in made:
            pipeline, folder = random_pipeline(family=family), tmp_path_factory.mktemp(family)
            pipeline.save_pretrained(folder)
            made[family] = pipeline, folder
        return made[family]

    return of


@pytest.fixture
def copied(saved, tmp_path):
    """The same, with a folder that a test may spoil."""

    def of(family="stable-diffusion"):
        pipeline, folder = saved(family)
        return pipeline, shutil.copytree(folder, tmp_path / family)

    return of


def networks(pipeline):
    return {n: p for n, p in pipeline.components.items() if isinstance(p, torch.nn.Module)}


def weight_files(folder):
    return sorted(folder.glob("*/*.safetensors"))


def assert_same_weights(sampler, pipeline):
    for name, network in networks(pipeline).items():
        found, expected = getattr(sampler.model, name).state_dict(), network.state_dict()
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert torch.equal(found[tensor], value), (name, tensor)


@every_family
@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_a_folder_gives_the_weights_that_were_saved(family, size, tmp_path):
    pipeline = random_pipeline(family=family)
    pipeline.save_pretrained(tmp_path, max_shard_size=size)
    assert bool([*tmp_path.glob("*/*.index.json")]) == (size == "20KB")
    assert_same_weights(pilotfish.load(tmp_path), pipeline)


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl", "flux"])
def test_a_folder_of_bin_files_gives_the_same(family, copied):
    pipeline, folder = copied(family)
    for file in weight_files(folder):
        name = file.name.replace("model.safetensors", "model.bin")
        if file.parent.name.startswith("text"):
            name = f"pytorch_{name}"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    assert_same_weights(pilotfish.load(folder), pipeline)


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",)])
def test_a_variant_is_loaded_where_a_part_has_it(parts, copied):
    _, folder = copied()
    expected, changed = random_pipeline(), random_pipeline(seed=1)
    for name in parts:
        getattr(changed, name).save_pretrained(folder / name, variant="fp16")
        setattr(expected, name, getattr(changed, name))
    assert_same_weights(pilotfish.load(folder, variant="fp16"), expected)


def test_a_variant_that_no_part_has_is_a_models_error(saved):
    with pytest.raises(ModelError, match="variant=fp16.*no such modeling files"):
        pilotfish.load(saved()[1], variant="fp16")


def put(file, content):
    """Write bytes or tensors as a new file: what was read of the old one still lies in it."""
    file.unlink(missing_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file, {"format": "pt"})


def spoilt(folder, file, match):
    """The message of the error, which names the part whose file was spoilt."""
    with pytest.raises(
        ModelError, match=f"cannot load the model .* the {file.parent.name} {match}"
    ):
        pilotfish.load(folder)


@every_family
def test_a_part_without_one_of_its_tensors_is_named_with_the_tensor(family, copied):
    pipeline, folder = copied(family)
    files = weight_files(folder)
    assert {file.parent.name for file in files} == set(networks(pipeline))
    for file in files:
        whole = file.read_bytes()
        tensors = load_file(file)
        gone = [n for n in sorted(tensors) if "layer" in n or "norm" in n][-1]
        put(file, {n: t for n, t in tensors.items() if n != gone})
        last = re.escape(".".join(gone.split(".")[-3:]))
        spoilt(folder, file, rf"is not whole: 1 of its \d+ tensors are missing: \S*{last}\.")
        put(file, whole)


@every_family
def test_a_part_that_was_cut_off_or_is_of_another_model_is_named(family, copied):
    _, folder = copied(family)
    for file in weight_files(folder):
        whole = file.read_bytes()
        tensors = load_file(file)
        put(file, whole[:-64])
        spoilt(folder, file, "cannot be read: ")
        put(file, whole[:100])
        spoilt(folder, file, "cannot be read: ")
        put(file, {n: torch.zeros(7, 5) for n in tensors})
        total = len(tensors)
        spoilt(
            folder, file, rf"is not whole: {total} tensors are of another shape: \S+ \(7, 5\) for"
        )
        put(file, {f"other.{n}": t for n, t in tensors.items()})
        spoilt(folder, file, r"is not whole: \d+ of its \d+ tensors are missing: .*, \.\.\.")
        file.unlink()
        spoilt(folder, file, "cannot be read: .*no file named")
        put(file, whole)


def test_layers_that_the_configuration_leaves_out_are_of_another_model(copied):
    _, folder = copied()
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": 1}))
    spoilt(folder, file, r"is not whole: 16 tensors are of layers that its config.json leaves out")


def test_a_shard_that_lacks_what_its_index_lists_is_told(tmp_path):
    random_pipeline().save_pretrained(tmp_path, max_shard_size="20KB")
    for part in ("unet", "vae", "text_encoder"):
        file = sorted((tmp_path / part).glob("*.safetensors"))[0]
        whole, tensors = file.read_bytes(), load_file(file)
        first = min(tensors)
        put(file, {n: t for n, t in tensors.items() if n != first})
        spoilt(tmp_path, file, r"is not whole: 1 of its \d+ tensors are missing")
        file.unlink()
        spoilt(tmp_path, file, r"cannot be read: ")
        put(file, whole)


def test_names_of_older_releases_and_a_buffer_too_many_are_no_fault(copied):
    pipeline, folder = copied()
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    put(file, tensors)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {n.replace(f"0.{new}.", f"0.{name}."): t for n, t in tensors.items()}
    assert any(".query." in n for n in tensors)
    put(file, tensors)
    assert_same_weights(pilotfish.load(folder), pipeline)


def test_a_tiny_decoder_that_lacks_tensors_is_told(saved, tmp_path):
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    gone = next(n for n in tensors if n.startswith("decoder"))
    put(file, {n: t for n, t in tensors.items() if n != gone})
    model = Sampler.from_pipeline(saved()[0]).model
    with pytest.raises(ModelError, match=f"the AutoencoderTiny .* is not whole: 1 .*: {gone}"):
        model.decoder(f"tiny:{tmp_path}")


# huggingface_hub tells diffusers of its own arguments.
@pytest.mark.filterwarnings("ignore:The `(local_dir_use_symlinks|proxies)` argument")
@pytest.mark.parametrize("spoil", [False, True])
def test_a_model_of_the_hubs_cache_is_loaded_and_checked_without_a_network(
    spoil, saved, tmp_path, monkeypatch
):
    pipeline, folder = saved()
    place = tmp_path / "models--somebody--tiny"
    snapshot = shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if spoil:
        (snapshot / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08")
        with pytest.raises(ModelError, match="'somebody/tiny': the vae cannot be read"):
            pilotfish.load("somebody/tiny", cache_dir=tmp_path)
        return
    sampler = pilotfish.load("somebody/tiny", cache_dir=tmp_path)
    assert_same_weights(sampler, pipeline)
    assert (sampler.model.id, sampler.model.folder) == ("somebody/tiny", snapshot)


def test_a_name_that_nothing_has_is_told_at_once_with_the_models_that_there_are(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", None)  # the network is not even tried
    with pytest.raises(InputError, match=r"no model called 'emojy'. Did you mean 'emoji'\?.*OWNER"):
        pilotfish.load("emojy")


def test_without_a_network_the_hub_is_asked_once(tmp_path, monkeypatch, saved):
    asked = []

    def no_network(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.lower(), raising=False)
    where = (
        "nobody/nothing is no folder here, nor in the hub's cache, and the hub does not .*such host"
    )
    with pytest.raises(ModelError, match=f"cannot load the model 'nobody/nothing': {where}"):
        pilotfish.load("nobody/nothing", cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = Sampler.from_pipeline(saved()[0]).model
    with pytest.raises(ModelError, match=f"AutoencoderTiny from 'nobody/nothing': {where}"):
        model.decoder("tiny:nobody/nothing")
    assert len(asked) == 2
