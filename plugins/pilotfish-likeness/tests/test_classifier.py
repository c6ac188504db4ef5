"""What `classifier` promises, on small random networks that transformers reads from files."""

from __future__ import annotations

import gc
import json
import math
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest
import tomli_w
import torch
from PIL import Image
from pilotfish_kit import check_plugin
from pilotfish_likeness import Classifier, networks
from pilotfish_likeness.classifier import SMALLEST
from pilotfish_likeness.networks import Network, class_of, load
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import pilotfish
from pilotfish import ModelError, PluginError, SettingsError, cutouts
from pilotfish.testing import random_pipeline, random_sampler

CPU = torch.device("cpu")
NAMES = ("fox", "cat", "tench, Tinca tinca", "crane", "crane", "7", "traffic light")
LOOKS = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 24, "width": 40},
    "resample": 2,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.3, 0.2, 0.25],
}


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def folder(sampler, tmp_path_factory):
    """A random ResNet as transformers writes it; its pictures are not square."""
    folder = tmp_path_factory.mktemp("resnet")
    write_resnet(folder, classes=True)
    kept = load(str(folder), CPU, torch.float32)  # to save time
    yield str(folder)
    del kept


def write_resnet(folder: Path, *, classes: bool, **looks) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

    names = dict(enumerate(NAMES))
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (ResNetForImageClassification if classes else ResNetModel)(config)
        for value in model.state_dict().values():  # batch norms at rest would hide their wiring
            if value.ndim == 1:
                value.copy_(0.5 + torch.rand(value.shape))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**LOOKS, **looks}))


def random_images(batch: int = 1, height: int = 40, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def loss(guide: Classifier, sampler, images: Tensor, seed: int = 0) -> Tensor:
    """The guide's loss of images, as in a run of their own."""
    state = guide.setup(SimpleNamespace(model=sampler.model))
    seeds = range(seed, seed + len(images))
    return guide.loss_guidance(SimpleNamespace(image=images, generator=generators(*seeds)), state)


def corners(images: Tensor) -> Tensor:
    """A classifier of five classes that any pixel reaches: a callable with no names."""
    means = interpolate(images, (2, 2), mode="area").flatten(1)  # (B, 12)
    mixed = torch.linspace(-3, 3, 60, dtype=images.dtype).view(12, 5).sin()
    return means @ mixed * 4


# ---- the networks ----


def test_pictures_are_seen_as_transformers_own_processor_shows_them(folder):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    picture = Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        expected = model(**pixels).logits
    network = load(folder, CPU, torch.float32)
    image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(48, 48, 3)
    whole = image.movedim(-1, 0)[None].float() / 255
    shown = cutouts(whole, network.size, 0, [], smallest=1)[:, 0]
    assert network.size == (24, 40)
    # Pillow rounds to 8 bits between its two passes.
    torch.testing.assert_close(network(shown), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("looks", "size"),
    [
        ({"size": {"shortest_edge": 30}}, (30, 30)),
        ({"size": {"height": 36, "width": 20}, "do_center_crop": False}, (36, 20)),
        (
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 36},
                "do_center_crop": True,
                "crop_size": {"height": 32, "width": 28},
            },
            (32, 28),
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}},
            (28, 28),
        ),
    ],
    ids=["shortest edge", "height and width", "crop", "convnext"],
)
def test_the_size_is_what_the_processor_gives_out(looks, size, sampler, tmp_path):
    write_resnet(tmp_path, classes=True, **looks)
    assert Network(str(tmp_path), CPU, torch.float32).size == size


def test_the_network_is_frozen_and_in_evaluation_mode(folder, monkeypatch):
    made = []
    read = networks._hugging
    monkeypatch.setattr(networks, "_hugging", lambda *a: made.append(read(*a)) or made[-1])
    Network(folder, CPU, torch.float32)
    (source,) = made
    assert not any(p.requires_grad for p in source.module.parameters())
    assert not any(m.training for m in source.module.modules())


@pytest.fixture
def loads(monkeypatch):
    """What transformers is asked to load, in order; nothing is loaded before."""
    monkeypatch.setattr(networks, "_loaded", WeakValueDictionary())
    asked, read = [], networks._hugging

    def counted(name, dtype):
        asked.append((name, dtype))
        return read(name, dtype)

    monkeypatch.setattr(networks, "_hugging", counted)
    return asked


def test_a_model_is_loaded_once_however_many_guides_use_it_and_freed_after(sampler, folder, loads):
    guides = [Classifier(label=label, model=folder) for label in ("fox", "cat", 2)]
    stream = sampler.stream("a red cat", plugins=guides, steps=3, seed=0)
    next(stream)
    sampler("a red cat", plugins=guides[:2], steps=2, seed=0)
    assert loads == [(folder, torch.float32)]
    stream.close()
    gc.collect()
    assert not networks._loaded


def test_each_number_format_is_a_network_of_its_own(folder, loads):
    kept = [load(folder, CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert loads == [(folder, torch.float32), (folder, torch.bfloat16)]
    assert kept[0] is load(folder, CPU, torch.float32)


def test_loading_leaves_the_random_state_alone(folder):
    before = torch.random.get_rng_state()
    Network(folder, CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_answers_nearly_the_same_in_float32(dtype, folder):
    whole, half = (Network(folder, CPU, d) for d in (torch.float32, dtype))
    images = random_images(2, 24, 40).float().requires_grad_()
    logits = half(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole(images), atol=0.15, rtol=0.02)
    gradients = [
        torch.autograd.grad(cross_entropy(network(images), torch.tensor([0, 1])), images)[0]
        for network in (half, whole)
    ]
    assert gradients[0].dtype == torch.float32
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.98


def test_gradients_in_float16_do_not_vanish(folder):
    half = Network(folder, CPU, torch.float16)
    images = random_images(1, 24, 40).float().requires_grad_()
    gradients = [
        torch.autograd.grad(size * half(images)[:, 0].sum(), images)[0] for size in (1, 1e-6)
    ]
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.98


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [no_processor, no_config, no_weights, truncated_weights], ids=lambda d: d.__name__
)
def test_a_damaged_folder_is_refused_before_the_first_step(damage, sampler, tmp_path):
    write_resnet(tmp_path, classes=True)
    damage(tmp_path)
    stream = sampler.stream("", plugins=[Classifier(label=0, model=str(tmp_path))])
    with pytest.raises(ModelError, match=f"transformers cannot load the classifier {tmp_path}: ."):
        next(stream)


def test_a_network_without_classes_is_refused_not_filled_with_random_numbers(sampler, tmp_path):
    write_resnet(tmp_path, classes=False)
    with pytest.raises(ModelError, match="it holds no weights for classifier.1.bias, classifier"):
        sampler("", plugins=[Classifier(label=0, model=str(tmp_path))])


def test_missing_timm_says_what_to_install(sampler, monkeypatch):
    for module in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"pip install 'pilotfish-likeness\[timm\]'"):
        sampler("", plugins=["classifier:label=0,model=timm:resnet18"])


def test_timm_models_are_shown_their_own_size_mean_and_std(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=5).eval()
    looks = {"input_size": [3, 48, 40], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    names = ["fox", "cat", "frog", "owl", "bee"]
    config = {"architecture": "test_resnet", "num_classes": 5, "label_names": names}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "pretrained_cfg": {**looks, "num_classes": 5}})
    )
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    network = Network(f"timm:local-dir:{tmp_path}", CPU, torch.float32)
    assert (network.size, network.labels) == ((48, 40), names)
    images = random_images(2, 48, 40).float()
    mean, std = (torch.tensor(looks[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(network(images), model((images - mean) / std))


def test_timm_models_of_imagenet_bring_its_names(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    network = Network("timm:test_resnet", CPU, torch.float32)
    assert len(network.labels) == 1000
    assert class_of("red fox", network.labels) == 277


# ---- classes ----


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("fox", 0),
        (" Fox", 0),
        (1, 1),
        ("1", 1),
        ("tench", 2),
        ("tinca tinca", 2),
        ("tench, Tinca tinca", 2),
        ("7", 5),
        (3, 3),
        (0, 0),
    ],
)
def test_a_class_is_found_by_name_synonym_or_index(label, index):
    assert class_of(label, NAMES) == index


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("foks", "one of the classifier's 7 classes, by name or index; got 'foks'. Did you mean"),
        ("tinka tinca", "got 'tinka tinca'. Did you mean 'Tinca tinca'?"),
        ("zzz", "got 'zzz'. Available: fox, cat, tench, Tinca tinca, crane, crane, 7, traffic"),
        (8, "got 8"),
        (-1, "got -1"),
        ("crane", r"the name of 2 classes; give an index: 3 \(crane\), 4 \(crane\)"),
    ],
)
def test_an_unknown_class_is_refused_with_the_nearest_and_some_choices(label, message):
    with pytest.raises(SettingsError, match=f"Classifier: label.*{message}"):
        class_of(label, NAMES)


def test_of_many_classes_only_some_are_shown():
    names = [f"class number {i}" for i in range(1000)]
    with pytest.raises(SettingsError, match="Available: class number 0, .* number 7, [.]{3}$"):
        class_of("zzz", names)


def test_a_class_of_a_nameless_classifier_needs_an_index():
    assert class_of(9, []) == 9
    with pytest.raises(SettingsError, match="must be an index.*have no names; got fox"):
        class_of("fox", [])


# ---- the loss ----


def test_loss_is_the_cross_entropy_of_the_label(sampler, folder):
    images = random_images(3, 24, 40).float()
    logits = load(folder, CPU, torch.float32)(images)
    expected = cross_entropy(logits, torch.tensor([1, 1, 1]), reduction="none")
    torch.testing.assert_close(
        loss(Classifier(label="cat", model=folder), sampler, images), expected
    )


@pytest.mark.parametrize("cutouts", [0, 4])
def test_loss_is_one_float32_value_for_each_image_whatever_its_neighbours(cutouts, folder, sampler):
    guide = Classifier(label="fox", model=folder, cutouts=cutouts)
    images = random_images(3).float()
    together = loss(guide, sampler, images, seed=5)
    assert together.shape == (3,) and together.dtype == torch.float32
    apart = [loss(guide, sampler, images[i : i + 1], seed=5 + i) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_with_cutouts_the_loss_is_the_mean_over_all_views(folder, sampler):
    images = random_images().float()
    views = cutouts(images, (24, 40), 3, generators(0), smallest=SMALLEST)[0]
    apart = loss(Classifier(label="fox", model=folder), sampler, views)
    together = loss(Classifier(label="fox", model=folder, cutouts=3), sampler, images)
    torch.testing.assert_close(together, apart.mean()[None])


@pytest.mark.parametrize("cutouts", [0, 2])
def test_gradient_of_the_loss_is_the_derivative(cutouts, sampler):
    guide = Classifier(label=3, model=corners, cutouts=cutouts)
    image = random_images(2, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(guide, sampler, x), image)


@pytest.mark.parametrize("size", [1e-3, 1, 1e4], ids=str)
def test_loss_and_gradient_are_finite_however_sure_the_classifier_is(size, sampler):
    images = random_images(2).float().requires_grad_()
    for label in range(5):
        value = loss(Classifier(label=label, model=lambda x: size * corners(x)), sampler, images)
        (gradient,) = torch.autograd.grad(value.sum(), images)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_following_the_gradient_comes_nearer_to_the_class(sampler, folder):
    guide, image = Classifier(label="cat", model=folder), random_images().float()
    before = loss(guide, sampler, image).item()
    for _ in range(40):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(guide, sampler, image).sum(), image)
        image = (image - 0.05 * gradient / gradient.square().mean().sqrt()).detach()
    assert loss(guide, sampler, image).item() < 0.5 * before


# ---- a callable ----


def test_a_callable_may_bring_names(sampler):
    images, names = random_images(2), ["a", "b", "c", "d", "e"]
    named = loss(Classifier(label="d", model=corners, labels=names), sampler, images)
    expected = cross_entropy(corners(images), torch.tensor([3, 3]), reduction="none")
    torch.testing.assert_close(named, expected)
    torch.testing.assert_close(loss(Classifier(label=3, model=corners), sampler, images), expected)


@pytest.mark.parametrize(
    ("model", "label", "message"),
    [
        (lambda x: corners(x)[0], 0, r"shape \(1, classes\); got \(5,\)"),
        (lambda x: corners(x)[:0], 0, r"shape \(1, classes\); got \(0, 5\)"),
        (lambda x: None, 0, "got NoneType"),
        (corners, 5, "label must be below 5, the number of classes; got 5"),
        (corners, "fox", "label must be an index"),
    ],
)
def test_a_callable_that_does_not_fit_is_told(model, label, message, sampler):
    with pytest.raises(SettingsError, match=f"Classifier: .*{message}"):
        sampler("", plugins=[Classifier(label=label, model=model)], steps=2, seed=0)


def test_a_callable_that_fails_is_named_with_its_step(sampler):
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("no such layer")

    with pytest.raises(PluginError, match="plugin 'classifier'.*no such layer.*step 0 of 2"):
        sampler("", plugins=[Classifier(label=0, model=broken)], steps=2, seed=0)


def test_a_callable_stands_in_a_run_file_by_name_and_must_be_passed_again(sampler):
    run = sampler("", plugins=[Classifier(label=0, model=corners)], steps=1, seed=0).run
    (table,) = tomllib.loads(run.to_toml())["plugins"]
    assert table["model"] == f"python:{__name__}:corners"
    with pytest.raises(SettingsError, match="model must be the callable itself: a run file holds"):
        sampler("", plugins=[table])
    network = torch.nn.Flatten()
    kept = Classifier(label=0, model=network).settings.model_dump(mode="json")
    assert kept["model"] == "python:torch.nn.modules.flatten:Flatten"


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "label must be given"),
        ({"label": 0, "cutouts": -1}, "cutouts must be greater than or equal to 0; got -1"),
        ({"label": 0, "modell": "x"}, "no setting 'modell'. Did you mean 'model'?"),
        ({"label": 0, "labels": ["a"]}, "labels must be left out, because this model brings"),
        ({"label": 0, "model": "x", "labels": ["a"]}, "labels must be left out"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Classifier(**settings)


def test_settings_survive_toml():
    for guide in (
        Classifier(label="tench, Tinca tinca", model="timm:resnet18", cutouts=3),
        Classifier(label=3),
    ):
        kept = {k: v for k, v in guide.settings.model_dump(mode="json").items() if v is not None}
        assert Classifier(**tomllib.loads(tomli_w.dumps(kept))).settings == guide.settings


def test_the_classifier_in_the_models_own_folder_is_the_default(folder, tmp_path, loads):
    random_pipeline().save_pretrained(tmp_path)
    (tmp_path / "classifier").symlink_to(folder)
    owner = pilotfish.load(tmp_path, device="cpu")
    owner("", plugins=["classifier:label=fox"], steps=1, seed=0)
    assert loads == [(str(tmp_path / "classifier"), torch.float32)]


@pytest.mark.parametrize("known", [True, False])
def test_a_model_without_a_classifier_of_its_own_asks_for_one(known, sampler, tmp_path):
    if known:
        random_pipeline().save_pretrained(tmp_path)
        sampler = pilotfish.load(tmp_path, device="cpu")
    with pytest.raises(SettingsError, match="model must be a folder or hub id.*got None, and the"):
        sampler("", plugins=[Classifier(label="fox")])


def test_an_unknown_class_is_refused_before_the_first_step(sampler, folder):
    stream = sampler.stream("", plugins=[Classifier(label="foks", model=folder)])
    with pytest.raises(SettingsError, match="got 'foks'. Did you mean 'fox'"):
        next(stream)


# ---- in a run ----


@pytest.mark.slow
@pytest.mark.parametrize("cutouts", [0, 2])
def test_the_guide_keeps_the_contract_of_plugins(cutouts, sampler, folder):
    check_plugin(Classifier(label="fox", model=folder, cutouts=cutouts), sampler)


@pytest.mark.parametrize("gradient", ["x0", "latents"])
def test_guiding_lowers_the_loss_and_a_negative_scale_raises_it(gradient, sampler, folder):
    def final(scale: float) -> float:
        guide = Classifier(label="fox", model=folder, scale=scale, gradient=gradient)
        result = sampler("a red cat", plugins=[guide], steps=8, seed=0)
        return loss(guide, sampler, sampler.model.decode(result.latents)).item()

    assert final(0.5) < final(0) < final(-0.5)


def test_one_guide_serves_two_runs_at_a_time(sampler, folder):
    guide = Classifier(label="fox", model=folder, cutouts=2)
    expected = [sampler("", plugins=[guide], steps=3, seed=seed).latents for seed in (1, 2)]
    streams = [sampler.stream("", plugins=[guide], steps=3, seed=seed) for seed in (1, 2)]
    for _ in range(3):
        for stream in streams:
            next(stream)
    for stream, latents in zip(streams, expected, strict=True):
        torch.testing.assert_close(stream.result().latents, latents, rtol=0, atol=0)
    assert vars(guide).keys() == {"settings"}  # nothing of a run is kept in it


def test_the_guide_is_installed_and_lowers_its_loss(sampler, folder):
    use = f"classifier:label=traffic light,model={folder}"
    result = sampler("a red cat", plugins=[use], steps=8, seed=0)
    losses = [record.loss[0] for record in result.trace]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert tomllib.loads(result.run.to_toml())["plugins"][0]["use"] == "classifier"


def test_a_run_in_bfloat16_is_guided_in_bfloat16(folder, loads):
    half = random_sampler(dtype=torch.bfloat16)
    result = half("a red cat", plugins=[Classifier(label=0, model=folder)], steps=3, seed=0)
    assert loads == [(folder, torch.bfloat16)]
    assert result.latents.dtype == torch.bfloat16
    assert all(math.isfinite(record.gradient_norm[0]) for record in result.trace)
