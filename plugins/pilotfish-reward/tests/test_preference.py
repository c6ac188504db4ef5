"""Rewards of published checkpoints, on random weights in the published layouts.

What they must be equal to is transformers, open_clip and timm, called directly.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pilotfish_kit import check_plugin
from pilotfish_reward import Aesthetic, Hps, ImageReward, PickScore, networks
from torch import Tensor, nn

import pilotfish
from pilotfish import ModelError, SettingsError, mend_torchvision
from pilotfish.testing import random_sampler

TEXT = "a red cat"
SIDE = 32
RUN = {"steps": 3, "seed": 1}


def random(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def hugging(sampler, tmp_path_factory):
    """A small CLIP as transformers writes it, with its tokenizer."""
    mend_torchvision()
    from transformers import CLIPConfig, CLIPModel

    folder, tokenizer = tmp_path_factory.mktemp("hugging"), sampler.model.tokenizer
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    words |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(
        text_config={**shape, **words, "num_hidden_layers": 1, "max_position_embeddings": 16},
        vision_config={**shape, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 8},
        projection_dim=24,
    )
    random(lambda: CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published_head(width: int) -> nn.Module:
    """As its authors write it: nothing but linear layers and dropout."""
    layers = nn.Sequential(
        *(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    return nn.Sequential(OrderedDict(layers=layers))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    file = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(random(lambda: published_head(24)).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A small CLIP of open_clip, as HPSv2's checkpoint is written."""
    mend_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("hps")
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            **{"image_size": SIDE, "patch_size": 8},
            **{"width": 32, "head_width": 16, "layers": 2},
        },
        "text_cfg": {
            **{"context_length": 12, "vocab_size": 49408},
            **{"width": 16, "heads": 2, "layers": 1},
        },
    }
    clip = random(lambda: open_clip.CLIP(**config))
    tensors = {f"module.{name}": value for name, value in clip.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": tensors}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder, clip


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """ImageReward's file: BLIP's picture encoder by timm, its text encoder by BERT, and a head."""
    mend_torchvision()
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("image-reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split(), "dog", "blue"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    vision = random(
        lambda: VisionTransformer(
            img_size=SIDE,
            patch_size=8,
            embed_dim=128,
            depth=2,
            num_heads=2,
            num_classes=0,
            global_pool="",
        )
    )
    config = BertConfig(
        **{"vocab_size": len(words), "hidden_size": 64, "num_attention_heads": 1},
        **{"num_hidden_layers": 2, "intermediate_size": 96, "encoder_width": 128},
        **{"is_decoder": True, "add_cross_attention": True, "max_position_embeddings": 40},
    )
    text = random(lambda: BertModel(config, add_pooling_layer=False))
    for layer in text.encoder.layer:  # BERT's own has one width for words and pictures
        for part in ("key", "value"):
            setattr(layer.crossattention.self, part, random(lambda: nn.Linear(128, 64)))
    text.embeddings.token_type_embeddings.weight.data.zero_()  # BLIP's has none
    judge = random(lambda: published_head(64))
    parts = {"blip.visual_encoder": vision, "blip.text_encoder": text, "mlp": judge}
    tensors = {f"{at}.{n}": t for at, part in parts.items() for n, t in part.state_dict().items()}
    del tensors["blip.text_encoder.embeddings.token_type_embeddings.weight"]
    torch.save(tensors, folder / "ImageReward.pt")
    return folder, vision, text, judge, tokenizer


@pytest.fixture(scope="module")
def rewards(hugging, head, open_clip_folder, blip):
    """Each reward on its small checkpoint."""
    return {
        "aesthetic": Aesthetic(model=str(head), clip=str(hugging)),
        "pickscore": PickScore(model=str(hugging)),
        "hps": Hps(model=str(open_clip_folder[0])),
        "image-reward": ImageReward(model=str(blip[0])),
    }


NAMES = ("aesthetic", "pickscore", "hps", "image-reward")
every_reward = pytest.mark.parametrize("name", NAMES)


def run_of(sampler, dtype=torch.float32, prompt=TEXT):
    model = SimpleNamespace(device=torch.device("cpu"), dtype=dtype)
    return SimpleNamespace(model=model, prompt=prompt)


def score(reward, sampler, images: Tensor, **run) -> Tensor:
    state = reward.setup(run_of(sampler, **run))
    return -reward.loss_guidance(SimpleNamespace(image=images), state)


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def tensor(shown: Image.Image) -> Tensor:
    return torch.tensor(np.asarray(shown) / 255, dtype=torch.float32).permute(2, 0, 1)[None]


# ---- scores are those of the libraries ----


def by_transformers(folder, shown: Image.Image):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    own = CLIPImageProcessor(**size)(shown, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval()(**tokens, **own)


def test_pickscore_is_the_logit_of_transformers_clip(sampler, rewards, hugging):
    expected = by_transformers(hugging, picture()).logits_per_image[0]
    torch.testing.assert_close(score(rewards["pickscore"], sampler, tensor(picture())), expected)


@pytest.mark.parametrize("size", [(50, 70), (90, 40)])
def test_a_picture_of_another_shape_is_cropped_as_transformers_does(sampler, hugging, size):
    shown = picture(*size)
    clip = PickScore.MODEL.place(str(hugging))
    assert clip == (str(hugging), False)
    expected = by_transformers(hugging, shown).logits_per_image[0]
    ours = score(PickScore(model=str(hugging)), sampler, tensor(shown))
    # Pillow rounds to 8 bits, and crops whole pixels after it resized.
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_aesthetic_is_the_published_head_on_clips_embedding(sampler, rewards, hugging, head):
    embedding = by_transformers(hugging, picture()).image_embeds
    layers = published_head(24).eval()
    layers.load_state_dict(torch.load(head))
    unit = embedding / embedding.norm(dim=-1, keepdim=True)
    expected = layers(unit)[:, 0].detach()
    torch.testing.assert_close(score(rewards["aesthetic"], sampler, tensor(picture())), expected)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (60, 40), (37, 61)])
def test_hps_is_the_cosine_of_open_clip_on_a_letterboxed_picture(
    sampler, rewards, open_clip_folder, size
):
    import open_clip

    _, clip = open_clip_folder
    shown = picture(*size)
    transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest", fill_color=0)
    text = open_clip.SimpleTokenizer(context_length=12)([TEXT])
    with torch.no_grad():
        image = clip.encode_image(transform(shown)[None], normalize=True)
        expected = (image * clip.encode_text(text, normalize=True)).sum(dim=-1)
    ours = score(rewards["hps"], sampler, tensor(shown))
    exact = size == (SIDE, SIDE)  # else Pillow rounds to 8 bits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if exact else 0.01)


def test_image_reward_is_timms_and_berts_own_forward(sampler, rewards, blip):
    _, vision, text, judge, tokenizer = blip
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (tensor(picture()) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    tokens = tokenizer(TEXT, padding="max_length", truncation=True, max_length=35)
    mask = torch.tensor(tokens["attention_mask"])
    # BERT with cross-attention is a decoder: a mask of four axes keeps it from looking back only.
    both_ways = torch.zeros(1, 1, 35, 35).masked_fill(mask == 0, torch.finfo().min)
    with torch.no_grad():
        seen = vision(pixels)
        read = text(
            torch.tensor([tokens["input_ids"]]),
            attention_mask=both_ways,
            encoder_hidden_states=seen,
            use_cache=False,
        )
        raw = judge(read.last_hidden_state[:, 0])[:, 0]
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    ours = score(rewards["image-reward"], sampler, tensor(picture()))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---- what they are in a run ----


@every_reward
def test_a_reward_keeps_the_contract_of_plugins(rewards, name):
    check_plugin(rewards[name], prompt=TEXT)


@every_reward
def test_the_gradient_is_the_derivative(rewards, name, sampler):
    state = rewards[name].setup(run_of(sampler, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 8, 10, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(state, images.requires_grad_(), fast_mode=True)


@every_reward
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_scores_nearly_the_same_in_float32(rewards, name, dtype, sampler):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    half = score(rewards[name], sampler, images, dtype=dtype)
    (gradient,) = torch.autograd.grad(half.sum(), images)
    assert half.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()
    whole = score(rewards[name], sampler, images)
    torch.testing.assert_close(half, whole, rtol=0.03, atol=0.1)


@every_reward
def test_scale_0_changes_nothing_and_latents_are_reached_beside_blue(rewards, name, sampler):
    plain = sampler(TEXT, plugins=["blue"], **RUN)
    settings = rewards[name].settings.model_dump(exclude_unset=True)
    off = type(rewards[name])(**settings, scale=0)
    assert torch.equal(sampler(TEXT, plugins=["blue", off], **RUN).latents, plain.latents)
    on = type(rewards[name])(**settings, gradient="latents", scale=2)
    found = sampler(TEXT, plugins=["blue", on], **RUN)
    assert not torch.equal(found.latents, plain.latents) and found.latents.isfinite().all()
    own = type(on).__name__
    assert all(min(r.gradient_norm) > 0 and r.cosine for r in found.trace.of(own))


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_prompt_is_the_runs_unless_a_text_is_given(rewards, name, sampler):
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    settings = rewards[name].settings.model_dump(exclude_unset=True)
    told = type(rewards[name])(**settings, text="a blue dog")
    own = score(rewards[name], sampler, images, prompt="a blue dog")
    torch.testing.assert_close(score(told, sampler, images), own, rtol=0, atol=0)
    assert not torch.equal(score(rewards[name], sampler, images), own)
    for nothing in (" ", {"text_encoder": TEXT}):
        with pytest.raises(SettingsError, match="text must say what the picture is to show"):
            rewards[name].setup(run_of(sampler, prompt=nothing))


@every_reward
def test_it_is_a_reward_for_particles(rewards, name, sampler):
    settings = rewards[name].settings.model_dump(exclude_unset=True)
    measured = type(rewards[name])(**settings, gradient="none")
    own = type(measured).__name__
    found = sampler(TEXT, plugins=[measured, "best-of:particles=3"], **RUN)
    seeds = [sampler(TEXT, plugins=[measured], steps=3, seed=1 + k) for k in range(3)]
    best = min(seeds, key=lambda result: result.trace.losses(own)[-1])
    torch.testing.assert_close(found.latents, best.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_prompt_that_is_too_long_is_told(rewards, name, sampler):
    with pytest.warns(UserWarning, match="is left out"):
        rewards[name].setup(run_of(sampler, prompt="cat red a " * 30))


# ---- files ----


def test_networks_are_shared_by_guides_frozen_and_freed_after_the_run(rewards, sampler):
    again = [type(r)(**r.settings.model_dump(exclude_unset=True)) for r in rewards.values()]
    stream = sampler.stream(TEXT, plugins=[*rewards.values(), *again], **RUN)
    next(stream)
    assert len(networks._loaded) == 3  # aesthetic and pickscore have one CLIP
    for network in list(networks._loaded.values()):
        assert not any(p.requires_grad for p in network.module.parameters())
        assert not any(m.training for m in network.module.modules())
    del network
    stream.close()
    gc.collect()
    assert not networks._loaded


def test_loading_leaves_the_random_state_alone(rewards, sampler):
    before = torch.random.get_rng_state()
    for reward in rewards.values():
        reward.setup(run_of(sampler))
    assert torch.equal(torch.random.get_rng_state(), before)


BROKEN = {
    "aesthetic": ("layers.4.bias", "aesthetic predictor"),
    "hps": ("module.visual.proj", "CLIP HPS"),
    "image-reward": ("blip.text_encoder.encoder.layer.1.output.dense.weight", "text part"),
}


@pytest.mark.parametrize("fault", ["missing", "of another shape"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_tensor_that_does_not_fit_is_named(rewards, name, fault, sampler, tmp_path):
    reward, (key, part) = rewards[name], BROKEN[name]
    path = reward.HEAD.path(reward.settings.model) if name == "aesthetic" else None
    path = path or reward.MODEL.path(reward.settings.model)
    content = torch.load(path)
    tensors = content.get("state_dict", content)
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(3, 5)
    for file in path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(content, tmp_path / path.name)
    settings = reward.settings.model_dump(exclude_unset=True)
    broken = type(reward)(**{**settings, "model": str(tmp_path / path.name)})
    last = key.removeprefix("module.").removeprefix("blip.text_encoder.")
    shape = r" \(3, 5\) in place of" if fault != "missing" else ""
    with pytest.raises(ModelError, match=f"the {part}.* is not whole: .*{fault}: {last}{shape}"):
        broken.setup(run_of(sampler))


@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_a_tensor_of_transformers_clip_that_does_not_fit_is_named(
    hugging, fault, sampler, tmp_path
):
    from safetensors.torch import load_file, save_file

    for file in hugging.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    key = "visual_projection.weight"
    tensors = {n: torch.zeros(3, 5) if n == key else t for n, t in tensors.items()}
    if fault == "missing":
        del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"CLIP .* is not whole: 1 tensors are {fault}: {key}"):
        PickScore(model=str(tmp_path)).setup(run_of(sampler))


@every_reward
def test_nothing_is_downloaded_that_no_setting_names(name, sampler, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    kinds = dict(zip(NAMES, (Aesthetic, PickScore, Hps, ImageReward), strict=True))
    with pytest.raises(ModelError, match="cannot be read; (model|clip)='.*' downloads it"):
        kinds[name]().setup(run_of(sampler))


def test_a_hub_id_is_downloaded_also_with_a_files_name(monkeypatch, open_clip_folder, sampler):
    import huggingface_hub

    asked, folder = [], open_clip_folder[0]

    def download(repo, file, *, local_files_only):
        asked.append((repo, file, local_files_only))
        return str(folder / "HPS_v2.1_compressed.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for model in ("xswu/HPSv2", "xswu/HPSv2/HPS_v2_compressed.pt", None):
        Hps(model=model).setup(run_of(sampler))
    assert asked == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", False),
        ("xswu/HPSv2", "HPS_v2_compressed.pt", False),
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", True),
    ]


def test_what_is_neither_file_nor_hub_id_is_refused(sampler):
    with pytest.raises(SettingsError, match="Hps: model must be a file or folder that exists"):
        Hps(model="no such thing").setup(run_of(sampler))


def test_a_folder_without_the_file_and_a_file_of_something_else_are_told(sampler, tmp_path):
    with pytest.raises(ModelError, match="has no HPS_v2.1_compressed.pt"):
        Hps(model=str(tmp_path)).setup(run_of(sampler))
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="Hps: model: .* cannot be read"):
        Hps(model=str(tmp_path)).setup(run_of(sampler))


def test_the_setting_survives_a_run_file(rewards, sampler):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plugins = [{"use": "hps", "model": rewards["hps"].settings.model}]
        first = sampler(TEXT, plugins=plugins, **RUN)
    content = pilotfish.Run.parse(first.run.to_toml())
    assert content["plugins"][0]["model"] == rewards["hps"].settings.model
