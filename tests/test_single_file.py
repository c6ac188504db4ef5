"""One file of a whole checkpoint gives the pictures of the folder that it was made of.

Files are written here in the layout of the models' makers, from tiny random networks.
"""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import pilotfish
from pilotfish import InputError, ModelError, Run
from pilotfish.cli import main
from pilotfish.models.single_file import check_text_encoders
from pilotfish.testing.random_models import random_pipeline

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_name(name, layers):
    """A tensor of a UNet as the CompVis code names it: blocks are counted through."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs)
    side, rest = name.split("_block", 1)
    if side == "mid":
        kind, number, rest = re.fullmatch(r"\.(resnets|attentions)\.(\d)\.(.*)", rest).groups()
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(number)}"
    else:
        block, kind, number, rest = re.fullmatch(r"s\.(\d)\.(\w+)\.(\d)\.(.*)", rest).groups()
        at, block = int(number), int(block)
        each = layers + 1
        slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1}[kind]
        if side == "down":
            first = 1 + block * each
            place = f"input_blocks.{first + (layers if kind == 'downsamplers' else at)}.{slot}"
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        else:
            place = (
                f"output_blocks.{block * each + (layers if kind == 'upsamplers' else at)}.{slot}"
            )
    if kind == "resnets":
        part, end = rest.rsplit(".", 1)
        rest = f"{RESNET[part]}.{end}"
    return f"{place}.{rest}"


def in_unets_layout(unet):
    layers, attends = unet.config.layers_per_block, unet.config.up_block_types
    named = {unet_name(name, layers): tensor for name, tensor in unet.state_dict().items()}
    for block, kind in enumerate(attends):  # an upsampler stands after the attention
        last = f"output_blocks.{block * (layers + 1) + layers}"
        if kind.startswith("Cross"):
            named = {n.replace(f"{last}.1.conv.", f"{last}.2.conv."): t for n, t in named.items()}
    return {f"model.diffusion_model.{n}": t for n, t in named.items()}


def in_vaes_layout(vae):
    blocks, named = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in ATTENTION.items():
                name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name
        )
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0",
            lambda m: f"up.{blocks - 1 - int(m[1])}.upsample",
            name,
        )
        named[f"first_stage_model.{name}"] = tensor
    return named


def in_clips_layout(encoder, prefix):
    names = encoder.state_dict().items()
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": t for n, t in names}


def in_openclips_layout(encoder, prefix):
    found = {n.removeprefix("text_model."): t for n, t in encoder.state_dict().items()}
    named = {
        "token_embedding.weight": found.pop("embeddings.token_embedding.weight"),
        "positional_embedding": found.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": found.pop("final_layer_norm.weight"),
        "ln_final.bias": found.pop("final_layer_norm.bias"),
        "text_projection": found.pop("text_projection.weight").T,
    }
    for end in ("weight", "bias"):
        for layer in range(encoder.config.num_hidden_layers):
            place = f"encoder.layers.{layer}.self_attn"
            joined = [found.pop(f"{place}.{part}_proj.{end}") for part in "qkv"]
            named[f"transformer.resblocks.{layer}.attn.in_proj_{end}"] = torch.cat(joined)
    for name, tensor in found.items():
        for ours, theirs in OPENCLIP.items():
            name = name.replace(ours, theirs)
        named[name.replace("encoder.layers", "transformer.resblocks")] = tensor
    return {f"{prefix}{n}": t for n, t in named.items()}


def stable_diffusion():
    pipeline = random_pipeline()
    tensors = {
        **in_unets_layout(pipeline.unet),
        **in_vaes_layout(pipeline.vae),
        **in_clips_layout(pipeline.text_encoder, "cond_stage_model.transformer."),
    }
    return pipeline, tensors


def sdxl():
    """With ten layers in the second text encoder, by which diffusers knows an SDXL."""
    pipeline = random_pipeline(family="sdxl")
    config = pipeline.text_encoder_2.config
    config.num_hidden_layers = 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.text_encoder_2 = transformers.CLIPTextModelWithProjection(config).eval()
    tensors = {
        **in_unets_layout(pipeline.unet),
        **in_vaes_layout(pipeline.vae),
        **in_clips_layout(pipeline.text_encoder, "conditioner.embedders.0.transformer."),
        **in_openclips_layout(pipeline.text_encoder_2, "conditioner.embedders.1.model."),
    }
    return pipeline, tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each family the folder, and the file's tensors."""
    found = {}
    for build in (stable_diffusion, sdxl):
        pipeline, tensors = build()
        folder = tmp_path_factory.mktemp(build.__name__)
        pipeline.save_pretrained(folder)
        found[build.__name__] = folder, {n: t.contiguous().clone() for n, t in tensors.items()}
    return found


@pytest.fixture
def file(tmp_path):
    """Writes tensors as `model.safetensors`."""

    def write(tensors, name="model.safetensors"):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def settled(sampler):
    """With its weights in new memory: products round otherwise where they lie as in a file."""
    for name in sampler.model._networks:
        setattr(sampler.model._pipeline, name, copy.deepcopy(getattr(sampler.model, name)))
    return sampler


def without_weights(folder, to):
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))


RUN = {"steps": 2, "seed": 3, "width": 32, "height": 32}


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_a_file_gives_the_pictures_of_the_folder_of_its_configuration(family, made, file, tmp_path):
    folder, tensors = made[family]
    bare = without_weights(folder, tmp_path / "bare")
    sampler = settled(pilotfish.load(file(tensors), config=bare))
    expected = settled(pilotfish.load(folder))
    for name in sampler.model._networks:
        found = getattr(sampler.model, name).state_dict()
        for tensor, value in getattr(expected.model, name).state_dict().items():
            assert torch.equal(found[tensor], value), (name, tensor)
    for plugins in ([], ["blue"]):
        ours, theirs = (s("a red cat", plugins=plugins, **RUN) for s in (sampler, expected))
        assert torch.equal(ours.latents, theirs.latents)
        assert np.array_equal(np.asarray(ours.images[0]), np.asarray(theirs.images[0]))
    assert sampler("a cat", **RUN, scheduler="ddim").run.config == str(bare)


def test_the_command_line_and_a_run_file_name_file_and_configuration(made, file, tmp_path):
    folder, tensors = made["stable_diffusion"]
    checkpoint, run, out = file(tensors), tmp_path / "run.toml", tmp_path / "a.png"
    command = ["generate", "a cat", "--model", str(checkpoint), "--config", str(folder)]
    more = ["--steps", "2", "--seed", "3", "--out", str(out)]
    result = CliRunner().invoke(main, [*command, *more, "--save-run", str(run)])
    assert result.exit_code == 0, result.output
    content = Run.read(run)
    assert (content["model"], content["config"]) == (str(checkpoint), str(folder))
    again = tmp_path / "again.png"
    for repeat in (["generate", "--run", str(run)], ["replay", str(out), "--yes"]):
        result = CliRunner().invoke(main, [*repeat, "--out", str(again)])
        assert result.exit_code == 0, result.output
        assert np.array_equal(*(np.asarray(Image.open(f)) for f in (again, out)))
        again.unlink()
    refused = CliRunner().invoke(main, ["replay", str(out)])
    assert f"config {str(folder)!r}, a folder or a download" in refused.output
    dry = CliRunner().invoke(main, [*command, "--dry-run"])
    assert "50" in dry.output
    whole = ["generate", "--run", str(run), "--model", str(folder), "--out", str(again)]
    other = CliRunner().invoke(main, whole)
    assert other.exit_code == 0, other.output


def test_text_encoders_and_vae_that_a_file_lacks_come_from_the_configurations_folder(
    made, file, tmp_path
):
    folder, tensors = made["stable_diffusion"]
    network = {n: t for n, t in tensors.items() if n.startswith("model.diffusion_model")}
    found = settled(pilotfish.load(file(network), config=folder))("a cat", **RUN)
    assert torch.equal(found.latents, settled(pilotfish.load(folder))("a cat", **RUN).latents)
    bare = without_weights(folder, tmp_path / "bare")
    with pytest.raises(
        ModelError, match="no whole checkpoint: it holds no text_encoder and no vae"
    ):
        pilotfish.load(file(network), config=bare)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_a_tensor_that_a_file_lacks_is_named_with_its_part(family, made, file):
    folder, tensors = made[family]
    gone = {
        "unet": "model.diffusion_model.middle_block.0.in_layers.2.bias",
        "vae": "first_stage_model.decoder.conv_in.weight",
    }
    if family == "sdxl":
        gone["text_encoder_2"] = "conditioner.embedders.1.model.ln_final.weight"
        gone["text_encoder"] = (
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"
        )
    else:
        gone["text_encoder"] = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    for part, name in gone.items():
        less = {n: t for n, t in tensors.items() if n != name}
        with pytest.raises(ModelError, match=rf"the {part} is not whole: 1 of its \d+ tensors"):
            pilotfish.load(file(less), config=folder)


def test_a_configuration_of_another_size_or_family_is_told(made, file, tmp_path):
    folder, tensors = made["stable_diffusion"]
    bare = without_weights(folder, tmp_path / "bare")
    config = json.loads((bare / "unet" / "config.json").read_text())
    config["block_out_channels"] = [16, 64]
    (bare / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"the unet is not whole: \d+ tensors are of another shape"
    ):
        pilotfish.load(file(tensors), config=bare)
    with pytest.raises(
        ModelError, match="layout is 'v1', and .* that of a StableDiffusionXLPipeline"
    ):
        pilotfish.load(file(tensors), config=made["sdxl"][0])
    with pytest.raises(InputError, match="config goes with one file"):
        pilotfish.load(folder, config=folder)
    with pytest.raises(InputError, match="no model folder ./nowhere"):
        pilotfish.load(file(tensors), config="./nowhere")


# huggingface_hub tells diffusers of its own arguments.
@pytest.mark.filterwarnings("ignore:The `(local_dir_use_symlinks|proxies)` argument")
def test_without_a_network_and_a_configuration_one_sentence_names_config(
    made, file, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match="cannot be downloaded.*config='FOLDER', or --config FOLDER"
    ):
        pilotfish.load(file(made["stable_diffusion"][1]), cache_dir=tmp_path)


TOLD = {
    "auraflow": (
        ["double_layers.0.attn.w2q.weight", "double_layers.0.attn.w1q.weight"],
        ["cond_seq_linear.weight", "t_embedder.mlp.0.weight"],
    ),
    "xl_refiner": (["conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"], []),
    "controlnet": (["control_model.time_embed.0.weight"], []),
}


@pytest.mark.parametrize("layout", TOLD)
def test_a_file_of_a_family_that_is_not_here_is_refused_by_its_layout(layout, file):
    names = [name for part in TOLD[layout] for name in part]
    with pytest.raises(ModelError, match=f"layout is '{layout}'; expected one of v1, v2, xl_base"):
        pilotfish.load(file({name: torch.zeros(2, 2) for name in names}))


def test_an_inpainting_checkpoint_is_refused_by_its_layout(made, file):
    tensors = dict(made["stable_diffusion"][1])
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    with pytest.raises(ModelError, match="layout is 'inpainting'"):
        pilotfish.load(file(tensors))
    with pytest.raises(ModelError, match="layout is 'inpainting', and the configuration"):
        pilotfish.load(file(tensors), config=made["stable_diffusion"][0])


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    ],
)
def test_a_lora_alone_is_told_how_it_is_loaded(name, file):
    with pytest.raises(ModelError, match="it is a LoRA.*load_lora_weights.*from_pipeline"):
        pilotfish.load(file({name: torch.zeros(2, 2)}))


def test_a_vae_alone_is_no_whole_checkpoint(made, file):
    tensors = {
        n: t for n, t in made["stable_diffusion"][1].items() if n.startswith("first_stage_model")
    }
    with pytest.raises(ModelError, match="no whole checkpoint: none of its tensors .* predicts"):
        pilotfish.load(file(tensors))
    bare = {n.removeprefix("first_stage_model."): t for n, t in tensors.items()}
    with pytest.raises(ModelError, match="no whole checkpoint: none of its tensors .* predicts"):
        pilotfish.load(file(bare))


@pytest.mark.parametrize("kept", [4, 200, -50])
def test_a_file_that_was_cut_off_cannot_be_read(kept, made, file):
    path = file(made["stable_diffusion"][1])
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:kept])
    with pytest.raises(ModelError, match="cannot load the model .*: the file cannot be read"):
        pilotfish.load(path, config=made["stable_diffusion"][0])


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_unopened(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    for place in (tmp_path / name, name):
        with pytest.raises(InputError, match="is a pickle, which can run any code.*safetensors"):
            pilotfish.load(place)
        (tmp_path / name).touch()


def test_a_file_of_another_kind_or_that_is_not_there_is_told_however_it_is_named(
    tmp_path, monkeypatch
):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match="model.gguf is a file of another kind"):
        pilotfish.load(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    for name in ("models/sd.safetensors", "./sd.safetensors", "~/sd.safetensors"):
        with pytest.raises(InputError, match="sd.safetensors is not there"):
            pilotfish.load(name)


def test_a_t5_of_a_file_has_its_embedding_from_the_tensor_that_it_shares(tmp_path):
    """diffusers reads the shared tensor and leaves the encoder's own name for it without."""
    pipeline = random_pipeline(family="flux")
    pipeline.save_pretrained(tmp_path)
    layouts = pytest.importorskip("diffusers.loaders.single_file_utils")
    shared = load_file(tmp_path / "text_encoder_2" / "model.safetensors")
    for gone in (None, "encoder.final_layer_norm.weight"):
        found = {f"text_encoders.t5xxl.transformer.{n}": shared[n] for n in shared if n != gone}
        read = layouts.create_diffusers_t5_model_from_checkpoint
        kind, config = transformers.T5EncoderModel, str(tmp_path)
        t5 = read(kind, found, "text_encoder_2", config, torch_dtype=torch.float32)
        assert t5.encoder.embed_tokens.weight.is_meta
        expected, pipeline.text_encoder_2 = pipeline.text_encoder_2, t5
        if gone:
            with pytest.raises(ModelError, match=f"text_encoder_2 is not whole: 1 .* {gone}"):
                check_text_encoders(pipeline)
        else:
            check_text_encoders(pipeline)
            assert torch.equal(t5.encoder.embed_tokens.weight, expected.shared.weight)
