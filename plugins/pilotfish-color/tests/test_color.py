"""What `blue` and `palette` promise."""

from __future__ import annotations

import tomllib
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from PIL import Image
from pilotfish_color import Blue, Palette, oklab, transport_cost
from pilotfish_kit import check_plugin
from torch import Tensor

from pilotfish import SettingsError
from pilotfish.testing import random_sampler

NAVY, AMBER = (0, 0x33 / 255, 0x55 / 255), (1, 0xAA / 255, 0)


def picture_of(*colors: tuple[float, ...]) -> Tensor:
    """An 8 x 8 picture of the colours in turn, (1, 3, 8, 8)."""
    cells = [colors[i % len(colors)] for i in range(64)]
    return torch.tensor(cells, dtype=torch.float64).T.reshape(1, 3, 8, 8)


def random_picture(batch: int = 1, side: int = 8) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).double()


def loss(guide: Blue | Palette, image: Tensor) -> Tensor:
    return guide.loss_guidance(SimpleNamespace(image=image, rgb=image))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


# ---- blue ----


def test_blue_is_the_loss_of_the_deep_dive_talk():
    image = random_picture(3) * 3 - 1  # not clamped
    talks = torch.stack([torch.abs(single[2] - 0.9).mean() for single in image])
    torch.testing.assert_close(loss(Blue(), image), talks)


def test_blue_is_zero_at_its_target():
    assert loss(Blue(target=0.25), picture_of((0.7, 0.1, 0.25))).item() == 0


# ---- the palette's loss ----


@pytest.mark.parametrize("weights", [None, [1, 1]])
def test_palette_is_zero_for_a_picture_made_of_it_in_the_asked_shares(weights):
    guide = Palette(colors=["#035", "#fa0"], weights=weights)
    assert abs(loss(guide, picture_of(NAVY, AMBER)).item()) < 1e-6


def test_palette_asks_for_the_given_shares():
    guide = Palette(colors=["#035", "#fa0"], weights=[3, 1])
    asked = loss(guide, picture_of(NAVY, NAVY, NAVY, AMBER))
    even = loss(guide, picture_of(NAVY, AMBER))
    a_quarter_moves = 0.25 * (oklab(torch.tensor(NAVY)) - oklab(torch.tensor(AMBER))).square().sum()
    assert abs(asked.item()) < 1e-6
    assert even.item() == pytest.approx(a_quarter_moves.item(), rel=0.03)  # the softness


def test_palette_without_weights_leaves_the_shares_free_above_half_an_even_share():
    guide = Palette(colors=["#035", "#fa0"])
    assert abs(loss(guide, picture_of(NAVY, NAVY, NAVY, AMBER)).item()) < 1e-6
    assert loss(guide, picture_of(*[NAVY] * 7, AMBER)).item() > 0.01


@pytest.mark.parametrize("weights", [None, [1, 1]])
def test_a_picture_of_one_colour_loses_against_one_of_both(weights):
    guide = Palette(colors=["#035", "#fa0"], weights=weights)
    assert loss(guide, picture_of(NAVY)).item() > loss(guide, picture_of(NAVY, AMBER)).item() + 0.05


def test_one_colour_costs_its_mean_squared_oklab_distance():
    image = random_picture()
    expected = (oklab(image.movedim(1, -1)) - oklab(image.new_tensor(AMBER))).square().sum(-1)
    torch.testing.assert_close(loss(Palette(colors="#fa0"), image), expected.mean((1, 2)))


def test_colour_of_weight_zero_is_as_if_not_there():
    with_zero = Palette(colors=["#035", "#0f0", "#fa0"], weights=[2, 0, 1])
    without = Palette(colors=["#035", "#fa0"], weights=[2, 1])
    torch.testing.assert_close(loss(with_zero, random_picture()), loss(without, random_picture()))


def test_places_do_not_matter():
    image = random_picture()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = image.flatten(2)[..., order].view_as(image)
    guide = Palette(colors=["#035", "#fa0", "#fff"])
    torch.testing.assert_close(loss(guide, image), loss(guide, shuffled))


def test_order_of_colours_does_not_matter():
    one = Palette(colors=["#035", "#fa0", "#fff"], weights=[1, 2, 3])
    other = Palette(colors=["#fff", "#035", "#fa0"], weights=[3, 1, 2])
    torch.testing.assert_close(loss(one, random_picture()), loss(other, random_picture()))


def test_unit_of_weights_does_not_matter():
    one, other = (Palette(colors="#035 #fa0", weights=w) for w in ([1, 3], [25, 75]))
    torch.testing.assert_close(loss(one, random_picture()), loss(other, random_picture()))


@pytest.mark.parametrize("guide", [Blue(), Palette(colors=["#035", "#fa0"])])
def test_a_batch_equals_its_singles(guide):
    images = random_picture(4, side=70)
    singles = torch.cat([loss(guide, image[None]) for image in images])
    assert singles.shape == (4,)
    torch.testing.assert_close(loss(guide, images), singles)


def test_large_pictures_are_averaged_and_no_pixel_is_left_out():
    image = random_picture(side=70).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(Palette(colors="#035 #fa0"), image).sum(), image)
    assert (gradient != 0).any(dim=1).all()


def test_soft_cost_lies_just_below_the_exact_one():
    scipy = pytest.importorskip("scipy.optimize")
    distance = torch.rand(1, 60, 3, generator=torch.Generator().manual_seed(1)).double()
    rows, columns = scipy.linear_sum_assignment(distance[0].repeat_interleave(20, 1).numpy())
    exact = distance[0].repeat_interleave(20, 1)[rows, columns].mean().item()
    soft = transport_cost(distance, torch.full((3,), 1 / 3).double(), exact=True).item()
    assert exact - 0.005 * torch.tensor(3.0).log().item() <= soft <= exact


# ---- gradients ----


@pytest.mark.parametrize("weights", [None, [1, 2, 1]])
def test_gradient_is_the_derivative(weights, monkeypatch):
    # At fixed bonus it is, where the iteration has converged: soon, with more softness.
    monkeypatch.setattr("pilotfish_color.SOFTNESS", 0.1)
    guide = Palette(colors=["#035", "#fa0", "#fff"], weights=weights)
    image = (random_picture(2, side=3) * 1.4 - 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(guide, x), image)
    assert torch.autograd.gradcheck(lambda x: loss(Blue(), x), image)


@pytest.mark.parametrize("weights", [None, [1, 1]])
@pytest.mark.parametrize(
    "image",
    [
        picture_of(NAVY, AMBER),
        picture_of((0, 0, 0)),
        picture_of((0.5, 0.5, 0.5)),
        random_picture() * 20 - 10,
        picture_of((1e-9, -1e-9, 0.04045)),
    ],
    ids=["the palette", "black", "gray", "far outside", "around zero"],
)
def test_loss_and_gradient_are_finite_everywhere(image, weights):
    image = image.float().requires_grad_()
    value = loss(Palette(colors=["#035", "#fa0"], weights=weights), image)
    (gradient,) = torch.autograd.grad(value.sum(), image)
    assert value.dtype == torch.float32
    assert value.isfinite().all() and gradient.isfinite().all()


def test_following_the_gradient_reaches_the_palette():
    guide, image = Palette(colors=["#035", "#fa0"], weights=[1, 1]), random_picture()
    before = loss(guide, image).item()
    for _ in range(100):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(guide, image).sum(), image)
        image = (image - 5 * gradient).detach()
    assert loss(guide, image).item() < 0.05 * before


# ---- oklab ----


def test_oklab_has_its_published_values():
    # W3C css-color-4 sample values: white, red, lime, blue.
    rgb = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    expected = [
        [1, 0, 0],
        [0.62796, 0.22486, 0.12585],
        [0.86644, -0.23389, 0.17950],
        [0.45201, -0.03246, -0.31153],
    ]
    torch.testing.assert_close(oklab(rgb), rgb.new_tensor(expected), atol=1e-4, rtol=0)


def test_oklab_of_gray_rises_without_a_jump_from_below_black_to_above_white():
    gray = torch.linspace(-0.5, 1.5, 20_001, dtype=torch.float64)
    lightness = oklab(gray[:, None].expand(-1, 3))[:, 0]
    rise = lightness.diff()
    assert (rise > 0).all() and rise.max() < 3e-4  # steps of 1e-4; slope below 3


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"colors": ["#035", "#zz"]},
            "colors must be one or more hex colours .*'#zz' is none.*got",
        ),
        ({"colors": ["#0355"]}, "'#0355' is none"),
        ({"colors": []}, r"colors must be one or more hex colours such as '#fa0'.*got \[\]"),
        ({"colors": ""}, "colors must be one or more hex"),
        (
            {"colors": ["#035"], "weights": [1, 2]},
            r"one number for each colour \(1\); got \[1, 2\]",
        ),
        ({"colors": "#035 #fa0", "weights": [1, -1]}, r"weights must be numbers >= 0.*\[1, -1\]"),
        ({"colors": "#035 #fa0", "weights": [0, 0]}, "not all of them 0; got"),
        ({"colors": "#035", "weights": []}, "weights must be numbers >= 0"),
        ({"colors": "#035", "weights": [float("inf")]}, "weights.0 must be a finite number"),
        ({"colors": "#035", "image": "a.png"}, "give colors, .* or image, .*; got both"),
        ({}, "Palette: give colors, such as .* or image, a picture file .*; got neither"),
        (
            {"image": "no such.png"},
            "image must be a picture that Pillow can read; got 'no such.png'",
        ),
        ({"colors": "#035", "space": "oklab"}, "space must be 'image' or 'latent'; got 'oklab'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Palette(**settings)


def test_colours_may_be_a_list_or_one_string_short_or_long():
    image = random_picture()
    spelled = (["#035", "#fa0"], "#035 #fa0", "#003355, #FFAA00")
    first, *others = [loss(Palette(colors=colors), image) for colors in spelled]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.fixture
def picture_file(tmp_path):
    """Three quarters #c81e1e, a quarter #1e1ec8."""
    picture = Image.new("RGB", (400, 400), "#c81e1e")
    picture.paste("#1e1ec8", (0, 0, 100, 400))
    picture.save(tmp_path / "two.png")
    return tmp_path / "two.png"


def test_colours_come_from_a_picture_with_their_shares(picture_file):
    settings = Palette(image=picture_file, count=2).settings
    assert settings.colors == ["#c81e1e", "#1e1ec8"]
    assert settings.weights == pytest.approx([0.75, 0.25], abs=0.01)


def test_given_weights_stand_before_a_pictures_own(picture_file):
    guide = Palette(image=str(picture_file), count=2, weights=[1, 1])
    assert guide.settings.weights == [1, 1]
    with pytest.raises(SettingsError, match=r"weights must be one number for each colour \(2\)"):
        Palette(image=picture_file, count=2, weights=[1, 1, 1])


def test_pictures_of_other_modes_are_read(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", (16, 16), "#999999").convert(mode).save(tmp_path / f"gray.{suffix}")
        (color,) = Palette(image=tmp_path / f"gray.{suffix}").settings.colors
        assert list(bytes.fromhex(color[1:])) == pytest.approx([153] * 3, abs=2)  # JPEG rounds


def test_a_file_that_is_no_picture_or_too_large_is_refused(tmp_path, picture_file, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SettingsError, match=r"text\.png' \(UnidentifiedImageError"):
        Palette(image=tmp_path / "text.png")
    monkeypatch.setattr("pilotfish.runs.pictures.PIXELS", 400 * 399)
    with pytest.raises(SettingsError, match=r"\(400, 400\) pixels; at most 159600"):
        Palette(image=picture_file)


def test_settings_survive_toml_also_without_the_picture(picture_file):
    guide = Palette(image=picture_file, count=2)
    kept = {k: v for k, v in guide.settings.model_dump(mode="json").items() if v is not None}
    picture_file.unlink()
    again = Palette(**tomllib.loads(tomli_w.dumps(kept)))
    assert again.settings == guide.settings


# ---- in a run ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide",
    [
        Blue(),
        Palette(colors=["#035", "#fa0"]),
        # Gently: the random model's rgb lies tens outside [0, 1], where rounding grows.
        Palette(colors=["#035", "#fa0"], weights=[1, 2], space="latent", scale=0.05),
    ],
    ids=["blue", "palette", "palette in latent space"],
)
def test_guides_keep_the_contract_of_plugins(guide, sampler):
    check_plugin(guide, sampler)


@pytest.mark.parametrize(("space", "decodes"), [("latent", 0), ("image", 3)])
def test_latent_space_decodes_nothing(space, decodes, sampler, monkeypatch):
    calls = []
    decode = sampler.model.decode
    monkeypatch.setattr(sampler.model, "decode", lambda latents: calls.append(1) or decode(latents))
    guide = Palette(colors=["#035", "#fa0"], space=space)
    for _ in sampler.stream("a red cat", plugins=[guide], steps=3, seed=0):
        pass
    assert len(calls) == decodes


@pytest.mark.parametrize(
    "use", ["blue", "palette:colors=[#035,#fa0]", "palette:colors='#035 #fa0'"]
)
def test_guides_are_installed_and_lower_their_loss(use, sampler):
    result = sampler("a red cat", plugins=[use], steps=8, seed=0)
    losses = [record.loss[0] for record in result.trace]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
