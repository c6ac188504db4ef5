"""What `clip` promises, on small random open_clip models that open_clip itself reads from files."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest
import tomli_w
import torch
from PIL import Image
from pilotfish_clip import Clip, networks, spherical_distance
from pilotfish_clip.networks import Networks, load
from pilotfish_kit import check_plugin
from safetensors.torch import save_file
from torch import Tensor

import pilotfish
from pilotfish import ModelError, SettingsError
from pilotfish.testing import random_pipeline, random_sampler

# cuBLAS reads it when it starts, and is not deterministic without.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
CPU = torch.device("cpu")
VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "resnet": {"image_size": 32, "width": 8, "head_width": 32, "layers": [1, 1, 1, 1]},
}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
LOOKS = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25]}


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def clips(sampler, tmp_path_factory):
    """open_clip's names of two random models, each in a folder with its own configuration.

    "vit" has a tokenizer of its own in the folder, "resnet" uses open_clip's.
    """
    folders = {name: tmp_path_factory.mktemp(name) for name in VISION}
    tokenizer = sampler.model.tokenizer
    tokenizer.save_pretrained(folders["vit"])
    own = {**TEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": "beside this file"}
    write_clip(folders["vit"], VISION["vit"], own, "bicubic")
    write_clip(folders["resnet"], VISION["resnet"], {**TEXT, "vocab_size": 49408}, "bilinear")
    names = {name: f"local-dir:{folder}" for name, folder in folders.items()}
    kept = [load(name, None, CPU, torch.float32) for name in names.values()]  # to save time
    yield names
    del kept


def write_clip(folder: Path, vision, text, interpolation: str) -> None:
    import open_clip

    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    looks = {**LOOKS, "interpolation": interpolation}
    content = {"model_cfg": config, "preprocess_cfg": looks}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


@pytest.fixture
def vit(clips):
    return clips["vit"]


@pytest.fixture
def picture_file(tmp_path):
    Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 50).save(tmp_path / "set.png")
    return tmp_path / "set.png"


def random_images(batch: int = 1, height: int = 40, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def loss(guide: Clip, sampler, images: Tensor, seed: int = 0) -> Tensor:
    """The guide's loss of images, as in a run of their own."""
    state = guide.setup(SimpleNamespace(model=sampler.model))
    seeds = range(seed, seed + len(images))
    return guide.loss_guidance(SimpleNamespace(image=images, generator=generators(*seeds)), state)


# ---- the distance ----


def test_distance_is_half_the_squared_angle_whatever_the_lengths():
    angles = torch.linspace(0, math.pi - 0.01, 50, dtype=torch.float64)
    turned = 7 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    distance = spherical_distance(turned, turned.new_tensor([0.1, 0]))
    torch.testing.assert_close(distance, angles.square() / 2)


def test_gradient_of_the_distance_is_the_derivative():
    one, other = torch.randn(2, 5, 8, generator=generators(0)[0], dtype=torch.float64)
    assert torch.autograd.gradcheck(spherical_distance, (one.requires_grad_(), other))


@pytest.mark.parametrize("turn", [1.0, -1.0, 1 + 1e-6, -1 - 1e-6], ids=str)
def test_distance_and_gradient_are_finite_for_equal_and_opposite_vectors(turn):
    other = torch.randn(100, 64, generator=generators(0)[0])
    one = (other * turn).requires_grad_()
    distance = spherical_distance(one, other)
    (gradient,) = torch.autograd.grad(distance.sum(), one)
    assert distance.isfinite().all() and gradient.isfinite().all()
    assert distance.max() <= math.pi**2 / 2


# ---- what CLIP is shown ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradient_on_cuda_is_deterministic(vit):
    clip = Networks(vit, None, torch.device("cuda"), torch.float32)
    images = random_images(2).float().cuda().requires_grad_()

    def gradient() -> Tensor:
        views = clip.views(images, 8, generators(0, 1))
        return torch.autograd.grad(clip.see(views.flatten(0, 1)).sum(), images)[0]

    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(gradient(), gradient(), rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the models ----


@pytest.mark.parametrize("name", VISION)
def test_pictures_are_seen_as_open_clips_own_transform_shows_them(name, clips, tmp_path):
    import open_clip

    Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(
        tmp_path / "a.png"
    )
    model, _, transform = open_clip.create_model_and_transforms(clips[name])
    with torch.no_grad(), Image.open(tmp_path / "a.png") as picture:
        expected = model.eval().encode_image(transform(picture)[None])
    guide = Clip(image=tmp_path / "a.png", model=clips[name])
    run = SimpleNamespace(model=SimpleNamespace(device=CPU, dtype=torch.float32))
    ours = guide.setup(run).features
    # Pillow rounds to 8 bits between its two passes.
    assert spherical_distance(ours, expected).item() < 1e-4


def test_texts_are_read_as_open_clip_reads_them(vit):
    import open_clip

    model = open_clip.create_model(vit).eval()
    texts = ["a cat", "the moon, at night"]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(vit)(texts))
    torch.testing.assert_close(load(vit, None, CPU, torch.float32).read(texts), expected)


@pytest.mark.parametrize("name", VISION)
def test_networks_are_frozen_and_in_evaluation_mode(name, clips):
    model = Networks(clips[name], None, CPU, torch.float32)._model
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


@pytest.fixture
def loads(monkeypatch):
    """What open_clip is asked to load, in order; nothing is loaded before."""
    import open_clip

    monkeypatch.setattr(networks, "_loaded", WeakValueDictionary())
    asked, create = [], open_clip.create_model

    def counted(name, *args, **options):
        asked.append((name, options["precision"]))
        return create(name, *args, **options)

    monkeypatch.setattr(open_clip, "create_model", counted)
    return asked


def test_a_model_is_loaded_once_however_many_guides_use_it_and_freed_after(sampler, vit, loads):
    guides = [Clip(text=text, model=vit, cutouts=0) for text in ("a cat", "a dog", "a fox")]
    stream = sampler.stream("a red cat", plugins=guides, steps=3, seed=0)
    next(stream)
    sampler("a red cat", plugins=guides[:2], steps=2, seed=0)
    assert loads == [(vit, "fp32")]
    stream.close()
    gc.collect()
    assert not networks._loaded


def test_each_number_format_is_a_model_of_its_own(vit, loads):
    kept = [load(vit, None, CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert loads == [(vit, "fp32"), (vit, "bf16")]
    assert kept[0] is load(vit, None, CPU, torch.float32)


def test_loading_leaves_the_random_state_and_the_root_logger_alone(vit, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    before = torch.random.get_rng_state()
    Networks(vit, None, CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert logging.root.handlers == []


@pytest.mark.parametrize(
    ("model", "pretrained", "quick"),
    [("ViT-B/32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False)],
)
def test_checkpoints_trained_with_quickgelu_get_it(model, pretrained, quick, sampler, monkeypatch):
    import open_clip

    def create(name, checkpoint, *, force_quick_gelu, **_):
        raise OSError(f"offline: {name} {checkpoint} {force_quick_gelu}")

    monkeypatch.setattr(open_clip, "create_model", create)
    message = rf"cannot load ViT-B-32 \({pretrained}\): offline: ViT-B-32 {pretrained} {quick}"
    with pytest.raises(ModelError, match=message):
        sampler("", plugins=[Clip(text="a cat", model=model, pretrained=pretrained)])


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sees_nearly_the_same_and_answers_in_float32(name, dtype, clips):
    whole, half = (Networks(clips[name], None, CPU, d) for d in (torch.float32, dtype))
    images = random_images(2, 32, 32).float().requires_grad_()
    seen = half.see(images)
    assert seen.dtype == torch.float32
    assert spherical_distance(seen, whole.see(images)).max() < 1e-3
    (gradient,) = torch.autograd.grad(seen.square().sum(), images)
    (expected,) = torch.autograd.grad(whole.see(images).square().sum(), images)
    assert gradient.dtype == torch.float32
    assert spherical_distance(gradient.flatten(1), expected.flatten(1)).max() < 0.02


def test_gradients_in_float16_do_not_vanish(vit):
    half = Networks(vit, None, CPU, torch.float16)
    images = random_images(1, 32, 32).float().requires_grad_()
    (gradient,) = torch.autograd.grad(half.see(images).square().sum(), images)
    (small,) = torch.autograd.grad(1e-6 * half.see(images).square().sum(), images)
    assert spherical_distance(small.flatten(), gradient.flatten()) < 0.01


# ---- settings, checked before the first step ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Clip: give text, what the picture should show, or image, .*; got neither"),
        ({"text": "a cat", "image": "a.png"}, "give text, .* or image, .*; got both"),
        ({"text": ""}, "text must be one or more texts, none of them empty"),
        ({"text": []}, r"text must be one or more texts.*got \[\]"),
        ({"text": {"a cat": 0}}, "not all of weight 0"),
        ({"text": {"a cat": float("nan")}}, "text.a cat must be a finite number"),
        ({"text": 5}, "text must be a text, a list of texts, or a table of texts and weights"),
        ({"text": ["a", ["b"]]}, "text must be a text, a list of texts, or a table"),
        ({"text": "a cat", "cutouts": -1}, "cutouts must be greater than or equal to 0; got -1"),
        ({"text": "a cat", "modell": "RN50"}, "no setting 'modell'. Did you mean 'model'?"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Clip(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "vit-b-23"}, "got 'vit-b-23'. Did you mean 'ViT-B-32'"),
        ({"model": "VIT_B_32"}, "got 'VIT_B_32'. Did you mean 'ViT-B-32'"),
        ({"model": "qqqq"}, r"got 'qqqq'. open_clip.list_models\(\) lists all \d+"),
        (
            {"model": "RN50", "pretrained": "open-ai"},
            "must be a checkpoint of RN50, or a file; got 'open-ai'. Did you mean 'openai'",
        ),
        (
            {"model": "RN50"},
            "checkpoint of RN50, or a file; got 'laion2b_s34b_b79k'.*Available: openai, yfcc15m",
        ),
        ({"pretrained": "laion9b"}, "checkpoint of ViT-B-32, or a file; got 'laion9b'"),
        ({"model": "local-dir:x", "pretrained": "openai"}, "'local-dir:x' does; got 'openai'"),
    ],
)
def test_unknown_models_and_checkpoints_are_named_with_the_nearest(settings, message, sampler):
    with pytest.raises(SettingsError, match=message):
        sampler("", plugins=[Clip(text="a cat", **settings)])


def test_a_folder_that_was_given_as_a_name_is_told_how_to_be_written(sampler, vit):
    folder = vit.removeprefix("local-dir:")
    with pytest.raises(SettingsError, match=f"For the folder write 'local-dir:{folder}'"):
        sampler("", plugins=[Clip(text="a cat", model=folder)])


def no_config(folder: Path) -> None:
    (folder / "open_clip_config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{")


def other_config(folder: Path) -> None:
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(
        text.replace('"patch_size": 8', '"patch_size": 4')
    )


def no_weights(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "config file missing"),
        (broken_config, "Could not load valid config"),
        (other_config, "size mismatch for visual.conv1.weight"),
        (no_weights, "pretrained weights .* could not be loaded"),
        (truncated_weights, "deserializing header: incomplete metadata"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused_before_the_first_step(damage, message, sampler, vit, tmp_path):
    for file in Path(vit.removeprefix("local-dir:")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    stream = sampler.stream("", plugins=[Clip(text="a cat", model=f"local-dir:{tmp_path}")])
    with pytest.raises(
        ModelError, match=rf"(?s)open_clip cannot load local-dir:{tmp_path}: .*{message}"
    ):
        next(stream)


def test_a_file_that_is_no_picture_or_too_large_is_refused(
    sampler, vit, tmp_path, picture_file, monkeypatch
):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SettingsError, match=r"text\.png' \(UnidentifiedImageError"):
        sampler("", plugins=[Clip(image=tmp_path / "text.png", model=vit)])
    monkeypatch.setattr("pilotfish.runs.pictures.PIXELS", 48 * 40 - 1)
    with pytest.raises(SettingsError, match=r"\(48, 40\) pixels; at most 1919"):
        sampler("", plugins=[Clip(image=picture_file, model=vit)])


@pytest.mark.parametrize("name", VISION)
def test_a_text_that_is_too_long_is_told(name, clips):
    clip = load(clips[name], None, CPU, torch.float32)
    clip.read(["a cat " * 7])  # 14 tokens, and two for the ends
    with pytest.warns(
        UserWarning, match="reads 16 tokens: the end of 'a cat a .* red' is left out"
    ):
        clip.read(["a red cat", "a cat " * 7 + "red"])


def test_texts_may_be_one_several_or_weighted(sampler, vit):
    image = random_images().float()

    def of(text) -> Tensor:
        return loss(Clip(text=text, model=vit), sampler, image)

    cat, dog = of("a cat"), of("a dog")
    torch.testing.assert_close(of(["a cat"]), cat)
    torch.testing.assert_close(of({"a cat": 3}), cat)
    torch.testing.assert_close(of(["a cat", "a dog"]), (cat + dog) / 2)
    torch.testing.assert_close(of(["a cat", "a dog", "a cat"]), (2 * cat + dog) / 3)
    torch.testing.assert_close(of({"a cat": 3, "a dog": -1}), 0.75 * cat - 0.25 * dog)


def test_settings_survive_toml(picture_file):
    for guide in (
        Clip(text={"a cat": 2, "a dog, blurred": -0.5}, cutouts=3),
        Clip(image=picture_file),
    ):
        kept = {k: v for k, v in guide.settings.model_dump(mode="json").items() if v is not None}
        assert Clip(**tomllib.loads(tomli_w.dumps(kept))).settings == guide.settings


def test_the_clip_in_the_models_own_folder_is_the_default(vit, tmp_path, loads):
    random_pipeline().save_pretrained(tmp_path)
    (tmp_path / "clip").symlink_to(vit.removeprefix("local-dir:"))
    pilotfish.load(tmp_path, device="cpu")("", plugins=[Clip(text="a cat")], steps=1, seed=0)
    assert loads == [(f"local-dir:{tmp_path / 'clip'}", "fp32")]


# ---- in a run ----


@pytest.mark.parametrize("cutouts", [0, 4])
@pytest.mark.parametrize("name", VISION)
def test_loss_is_one_float32_value_for_each_image_whatever_its_neighbours(
    name, cutouts, clips, sampler
):
    guide, images = Clip(text="a cat", model=clips[name], cutouts=cutouts), random_images(3).float()
    together = loss(guide, sampler, images, seed=5)
    assert together.shape == (3,) and together.dtype == torch.float32
    apart = [loss(guide, sampler, images[i : i + 1], seed=5 + i) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_following_the_gradient_reaches_a_picture_that_looks_the_same(sampler, vit, picture_file):
    guide, image = Clip(image=picture_file, model=vit, cutouts=0), random_images().float()
    before = loss(guide, sampler, image).item()
    for _ in range(60):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(guide, sampler, image).sum(), image)
        image = (image - 0.03 * gradient / gradient.square().mean().sqrt()).detach()
    assert loss(guide, sampler, image).item() < 0.1 * before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "cutouts"),
    [("vit", "text", 2), ("vit", "image", 0), ("resnet", "text", 0), ("resnet", "image", 2)],
)
def test_the_guide_keeps_the_contract_of_plugins(name, what, cutouts, clips, sampler, picture_file):
    aim = {"text": "a cat"} if what == "text" else {"image": picture_file}
    check_plugin(Clip(**aim, model=clips[name], cutouts=cutouts), sampler)


@pytest.mark.parametrize("gradient", ["x0", "latents"])
def test_guiding_lowers_the_loss_and_a_negative_scale_raises_it(gradient, sampler, vit):
    def final(scale: float) -> float:
        guide = Clip(text="a cat", model=vit, scale=scale, gradient=gradient)
        result = sampler("a red cat", plugins=[guide], steps=8, seed=0)
        return loss(guide, sampler, sampler.model.decode(result.latents)).item()

    assert final(0.5) < final(0) < final(-0.5)


def test_one_guide_serves_two_runs_at_a_time(sampler, vit):
    guide = Clip(text="a cat", model=vit)
    expected = [sampler("", plugins=[guide], steps=3, seed=seed).latents for seed in (1, 2)]
    streams = [sampler.stream("", plugins=[guide], steps=3, seed=seed) for seed in (1, 2)]
    for _ in range(3):
        for stream in streams:
            next(stream)
    for stream, latents in zip(streams, expected, strict=True):
        torch.testing.assert_close(stream.result().latents, latents, rtol=0, atol=0)
    assert vars(guide).keys() == {"settings"}  # nothing of a run is kept in it


def test_two_guides_draw_different_cutouts(sampler, vit):
    guides = [Clip(text="a cat", model=vit) for _ in range(2)]
    result = sampler("", plugins=guides, steps=1, seed=0)
    first, second = result.trace
    assert (first.plugin, second.plugin) == ("clip", "clip#2")
    assert first.loss != second.loss


def test_the_guide_is_installed_and_lowers_its_loss(sampler, vit):
    use = f"clip:text=[a cat, a fox],model={vit},cutouts=0"
    losses = [r.loss[0] for r in sampler("a red cat", plugins=[use], steps=8, seed=0).trace]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_a_run_in_bfloat16_is_guided_in_bfloat16(vit, loads):
    half = random_sampler(dtype=torch.bfloat16)
    result = half("a red cat", plugins=[Clip(text="a cat", model=vit)], steps=3, seed=0)
    assert loads == [(vit, "bf16")]
    assert result.latents.dtype == torch.bfloat16
    assert all(math.isfinite(record.gradient_norm[0]) for record in result.trace)
