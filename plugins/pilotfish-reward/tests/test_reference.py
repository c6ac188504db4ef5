"""`clip-style` and `perceptual`: equal to open_clip's and lpips' own forward, on random weights."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pilotfish_kit import check_plugin
from pilotfish_reward import ClipStyle, Perceptual
from pilotfish_reward.reference import gram
from safetensors.torch import save_file
from torch import Tensor

from pilotfish import ModelError, SettingsError, mend_torchvision, pixels
from pilotfish.testing import random_sampler

SIDE = 32
RUN = {"steps": 3, "seed": 1}
LOOKS = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "set.png"
    Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(file)
    return file


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    mend_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            **{"image_size": SIDE, "patch_size": 8},
            **{"width": 32, "head_width": 16, "layers": 3},
        },
        "text_cfg": {
            **{"context_length": 12, "vocab_size": 100},
            **{"width": 16, "heads": 2, "layers": 1},
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": LOOKS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """torchvision's networks of random weights, and the files of their weights."""
    mend_torchvision()
    from torchvision import models

    folder, made = tmp_path_factory.mktemp("trunks"), {}
    for net, build in (("alex", models.alexnet), ("squeeze", models.squeezenet1_1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build(weights=None).eval()
        kept = {n: t for n, t in network.state_dict().items() if n != "classifier.1.weight"}
        torch.save(kept, folder / f"{net}.pth")  # without the largest tensor, which nobody needs
        made[net] = network, folder / f"{net}.pth"
    return made


def images(batch: int = 2, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, SIDE, SIDE, generator=generator, dtype=dtype)


def run_of(dtype=torch.float32):
    model = SimpleNamespace(device=torch.device("cpu"), dtype=dtype, folder=None)
    return SimpleNamespace(model=model, height=SIDE, width=SIDE)


def loss(guide, shown: Tensor, dtype=torch.float32) -> Tensor:
    return guide.loss_guidance(SimpleNamespace(image=shown), guide.setup(run_of(dtype)))


@pytest.fixture(scope="module")
def guides(picture_file, clip_folder, trunks):
    return {
        "clip-style": ClipStyle(image=picture_file, model=str(clip_folder), layer=1),
        "perceptual": Perceptual(
            image=picture_file, net="squeeze", model=str(trunks["squeeze"][1])
        ),
    }


every_guide = pytest.mark.parametrize("name", ["clip-style", "perceptual"])


# ---- equal to the libraries ----


@pytest.mark.parametrize("compare", ["gram", "features"])
@pytest.mark.parametrize("layer", [0, 2])
def test_style_compares_what_a_layer_of_open_clip_answers(
    clip_folder, picture_file, compare, layer
):
    import open_clip

    clip = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    caught = []
    clip.visual.transformer.resblocks[layer].register_forward_hook(lambda *a: caught.append(a[2]))
    mean, std = (torch.tensor(LOOKS[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad(), Image.open(picture_file) as wanted:
        for shown in (images(), pixels(wanted)):
            clip.encode_image((shown - mean) / std)
    ours, theirs = (tokens[:, 1:] for tokens in caught)  # the first token is the class's
    if compare == "gram":
        ours, theirs = (torch.einsum("bni,bnj->bij", t, t) / t.shape[1] for t in (ours, theirs))
    distance = torch.linalg.matrix_norm(ours - theirs).square()
    expected = distance / torch.linalg.matrix_norm(theirs).square()
    guide = ClipStyle(image=picture_file, model=str(clip_folder), layer=layer, compare=compare)
    torch.testing.assert_close(loss(guide, images()), expected)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_perceptual_is_lpips_of_the_package_on_torchvisions_weights(net, trunks, picture_file):
    import lpips

    trunk, file = trunks[net]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for slice_ in (part for name, part in network.net.named_children() if "slice" in name):
        for index, layer in slice_.named_children():
            layer.load_state_dict(trunk.features[int(index)].state_dict())
    with torch.no_grad(), Image.open(picture_file) as wanted:
        expected = network(images(), pixels(wanted), normalize=True).flatten()
    guide = Perceptual(image=picture_file, net=net, model=str(file))
    torch.testing.assert_close(loss(guide, images()), expected, rtol=1e-4, atol=1e-7)


def test_linear_layers_are_those_of_the_package(trunks):
    from pilotfish_reward.reference import read_lpips

    weights = read_lpips("squeeze", str(trunks["squeeze"][1])).lins[0].model[-1].weight
    assert weights.shape == (1, 64, 1, 1) and (weights >= 0).all() and weights.any()


@every_guide
def test_the_picture_itself_has_no_loss(guides, name, picture_file):
    with Image.open(picture_file) as wanted:
        assert loss(guides[name], pixels(wanted)).item() < 1e-9
    assert loss(guides[name], images()).min() > 1e-4


def test_style_does_not_see_where_things_are():
    features = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gram(features), gram(features[:, order]))


# ---- gradients and runs ----


@every_guide
def test_gradient_is_the_derivative(guides, name):
    state = guides[name].setup(run_of(torch.float64))

    def of(shown: Tensor) -> Tensor:
        return guides[name].loss_guidance(SimpleNamespace(image=shown), state)

    shown = images(1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(of, shown, fast_mode=True)


def test_gradient_of_perceptual_is_finite_where_no_feature_answers(trunks, picture_file, tmp_path):
    """lpips' own is NaN there."""
    tensors = torch.load(trunks["squeeze"][1])
    tensors["features.0.weight"].zero_()
    tensors["features.0.bias"].fill_(-1)
    torch.save(tensors, tmp_path / "dead.pth")
    guide = Perceptual(image=picture_file, net="squeeze", model=str(tmp_path / "dead.pth"))
    shown = images().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(guide, shown).sum(), shown)
    assert gradient.isfinite().all()


@every_guide
def test_it_keeps_the_contract_of_plugins(guides, name):
    check_plugin(guides[name])


@every_guide
def test_scale_0_changes_nothing_and_latents_are_reached_beside_blue(guides, name, sampler):
    plain = sampler("a cat", plugins=["blue"], **RUN)
    kind, settings = type(guides[name]), guides[name].settings.model_dump(exclude_unset=True)
    off = sampler("a cat", plugins=["blue", kind(**settings, scale=0)], **RUN)
    assert torch.equal(off.latents, plain.latents)
    found = sampler("a cat", plugins=["blue", kind(**settings, gradient="latents")], **RUN)
    assert not torch.equal(found.latents, plain.latents) and found.latents.isfinite().all()
    assert all(min(r.gradient_norm) > 0 for r in found.trace.of(kind.__name__))


def test_style_is_seen_by_the_clip_that_the_model_brings(emoji_sampler, picture_file):
    plugin = {"use": "clip-style", "image": str(picture_file)}
    options = {"steps": 8, "seed": 3}
    guided = emoji_sampler("a fox", plugins=[plugin], **options)
    plain = emoji_sampler("a fox", plugins=[plugin | {"gradient": "none"}], **options)
    assert guided.trace.losses("clip-style")[-1] < plain.trace.losses("clip-style")[-1]


# ---- what is wrong is told ----


def test_a_layer_that_there_is_not_is_told(guides, clip_folder, picture_file):
    with pytest.raises(SettingsError, match="layer must be one of this CLIP's; got 7"):
        loss(ClipStyle(image=picture_file, model=str(clip_folder), layer=7), images())


def test_without_a_clip_of_the_model_one_must_be_named(picture_file):
    with pytest.raises(SettingsError, match="model must be named"):
        ClipStyle(image=picture_file).setup(run_of())


def test_a_clip_that_is_not_whole_is_told(clip_folder, picture_file, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(clip_folder / "open_clip_model.safetensors")
    del tensors["visual.conv1.weight"]
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    config = (clip_folder / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(ModelError, match=r"open_clip cannot load .*visual\.conv1\.weight"):
        ClipStyle(image=picture_file, model=str(tmp_path)).setup(run_of())


def test_a_trunk_that_is_not_whole_is_told(trunks, picture_file, tmp_path):
    tensors = torch.load(trunks["squeeze"][1])
    del tensors["features.3.squeeze.weight"]
    tensors["features.0.weight"] = torch.zeros(3, 5)
    torch.save(tensors, tmp_path / "part.pth")
    guide = Perceptual(image=picture_file, net="squeeze", model=str(tmp_path / "part.pth"))
    with pytest.raises(ModelError, match="trunk squeeze of LPIPS is not whole: 1 tensors are miss"):
        guide.setup(run_of())


def test_nothing_is_downloaded_that_no_setting_names(picture_file, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for missing in (None, "nowhere.pth"):
        with pytest.raises(ModelError, match="Perceptual: model: .* cannot be read"):
            Perceptual(image=picture_file, model=missing).setup(run_of())


def test_torchvision_is_asked_where_the_setting_says_so(trunks, picture_file, monkeypatch):
    from torchvision.models import _api

    asked = []

    def download(url, *args, **options):
        asked.append(url)
        return torch.load(trunks["alex"][1])

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    Perceptual(image=picture_file, net="alex", model="torchvision").setup(run_of())
    assert ["alexnet-owt" in url for url in asked] == [True]
