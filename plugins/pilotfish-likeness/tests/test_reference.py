"""What `reference` promises."""

from __future__ import annotations

import math
import tomllib
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from PIL import Image
from pilotfish_kit import check_plugin
from pilotfish_likeness import Reference
from pilotfish_likeness.reference import Target, lowpass
from torch import Tensor

from pilotfish import SettingsError, pixels, read_picture
from pilotfish.testing import random_sampler


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture
def picture_file(tmp_path):
    """A picture with structure; 48 wide and 40 high."""
    Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 50).save(tmp_path / "set.png")
    return tmp_path / "set.png"


def mask_file(folder, *box: int, size: tuple[int, int] = (32, 32)):
    """A black picture, white in the box of pixels (left, top, right, bottom)."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(folder / "mask.png")
    return folder / "mask.png"


def content_of(path) -> Tensor:
    """What a run of 32 x 32 pixels compares with."""
    return pixels(read_picture(path, "a picture", size=(32, 32)))


def random_field(batch: int = 1, height: int = 10, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


def everywhere(content: Tensor, cutoff: float) -> Target:
    return Target(content, torch.ones(1, 1, *content.shape[2:]).to(content), cutoff)


def loss(guide: Reference, sampler, seen: Tensor, side: int = 32) -> Tensor:
    """The guide's loss of what it sees, as in a run of a square picture."""
    run = SimpleNamespace(model=sampler.model, height=side, width=side)
    with torch.no_grad():
        state = guide.setup(run)
    return guide.loss_guidance(SimpleNamespace(x0=seen, image=seen), state)


# ---- the filter ----


@pytest.mark.parametrize("cutoff", [0, 0.5, 3, 8, 1e6], ids=str)
@pytest.mark.parametrize(("side", "shorter"), [(10, 10), (48, 40), (1, 1)])
def test_a_constant_line_passes_unchanged(cutoff, side, shorter):
    line = torch.full((side,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(lowpass(side, shorter, cutoff) @ line, line, atol=1e-15, rtol=0)


@pytest.mark.parametrize(("side", "shorter", "cutoff"), [(64, 64, 8), (64, 64, 3), (96, 64, 8)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_response_is_a_gaussian_of_one_half_at_the_cutoff(side, shorter, cutoff, factor):
    wave = (2 * math.pi * factor * cutoff / shorter * torch.arange(side).double()).cos()
    passed = lowpass(side, shorter, cutoff) @ wave
    inner = slice(side // 4, 3 * side // 4)  # away from the borders
    torch.testing.assert_close(passed[inner], wave[inner] * 0.5 ** (factor**2), atol=0.02, rtol=0)


def test_cutoff_zero_leaves_the_mean_and_a_high_one_everything():
    field = random_field()[0, 0]
    mean = lowpass(10, 10, 0) @ field
    torch.testing.assert_close(mean, field.mean(0).expand_as(mean))
    torch.testing.assert_close(lowpass(10, 10, 1e4) @ field, field, rtol=0, atol=0)


# ---- the distance ----


def test_distance_of_two_constants_is_their_squared_difference_at_any_cutoff_and_size():
    for size, cutoff in (((10, 12), 0), ((10, 12), 4), ((31, 5), 8)):
        one, other = (torch.full((1, 3, *size), v, dtype=torch.float64) for v in (0.9, 0.4))
        torch.testing.assert_close(everywhere(one, cutoff).distance(other).item(), 0.25)


def test_distance_is_the_mean_square_of_the_blurred_difference_written_out():
    one, other = random_field(seed=1), random_field(2)
    cutoff, (height, width) = 2.0, one.shape[2:]
    spread = math.sqrt(math.log(2) / 2) / (math.pi * cutoff)  # in shorter sides
    expected = []
    for image in other:
        difference, total = image - one[0], 0.0
        for y in range(height):
            for x in range(width):
                down = (torch.arange(height)[:, None] - y) / min(height, width)
                right = (torch.arange(width) - x) / min(height, width)
                bell = torch.exp(-(down.square() + right.square()) / (2 * spread**2)).double()
                blurred = (bell / bell.sum() * difference).sum((1, 2))
                total += float(blurred.square().sum())
        expected.append(total / one.numel())
    ours = everywhere(one, cutoff).distance(other)
    torch.testing.assert_close(ours, torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_the_same_picture_is_at_distance_zero_and_fine_detail_does_not_count():
    field = random_field(height=32, width=32)
    target = everywhere(field, 4)
    assert target.distance(field).item() == 0
    checkers = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    assert target.distance(field + 0.2 * checkers).item() < 1e-4 * 0.04
    assert everywhere(field, 100).distance(field + 0.2 * checkers).item() == pytest.approx(0.04)


def test_a_higher_cutoff_sees_more():
    one, other = random_field(seed=1, height=32, width=32), random_field(height=32, width=32)
    distances = [everywhere(one, cutoff).distance(other).item() for cutoff in (0, 2, 4, 8, 100)]
    assert distances == sorted(distances)
    assert distances[-1] == pytest.approx((one - other).square().mean().item())


def test_distance_hardly_depends_on_the_pictures_size():
    def waves(side: int) -> Tensor:
        at = (torch.arange(side).double() + 0.5) / side
        return (at[:, None] * 4).sin().expand(1, 3, side, side) * (at * 7).cos()

    small, large = (everywhere(waves(s), 5).distance(waves(s) * 0.2).item() for s in (24, 96))
    assert small == pytest.approx(large, rel=0.02)


def test_gradient_is_the_derivative():
    weights = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(2)).double()
    weights[..., 0] = 0
    target = Target(random_field(1, 4, 5, seed=1), weights, 1.5)
    assert torch.autograd.gradcheck(target.distance, random_field(2, 4, 5).requires_grad_())


def test_a_batch_equals_its_singles():
    target, fields = everywhere(random_field(seed=1), 3), random_field(4)
    singles = torch.cat([target.distance(field[None]) for field in fields])
    assert singles.shape == (4,)
    torch.testing.assert_close(target.distance(fields), singles)


# ---- the region ----


def region_target(box: tuple[slice, slice], cutoff: float) -> Target:
    weights = torch.zeros(1, 1, 10, 12, dtype=torch.float64)
    weights[0, 0, box[0], box[1]] = 1
    return Target(random_field(seed=1), weights, cutoff)


@pytest.mark.parametrize("cutoff", [0, 2, 100], ids=str)
def test_nothing_outside_the_region_counts_or_has_a_gradient(cutoff):
    box = slice(2, 7), slice(5, 11)
    target, field = region_target(box, cutoff), random_field().requires_grad_()
    value = target.distance(field)
    (gradient,) = torch.autograd.grad(value, field)
    inside = gradient[..., box[0], box[1]].clone()
    gradient[..., box[0], box[1]] = 0
    assert inside.abs().min() > 0 and gradient.abs().max() == 0
    changed = field.detach().clone() + 9
    changed[..., box[0], box[1]] = field.detach()[..., box[0], box[1]]
    torch.testing.assert_close(target.distance(changed), value)


def test_distance_in_a_region_is_that_of_the_piece_cut_out():
    # The piece's sides are as fractions of the whole picture's: cutoff 4 of 10 is 2 of 5.
    box = slice(2, 7), slice(5, 11)
    piece = everywhere(random_field(seed=1)[..., box[0], box[1]], 2.0)
    field = random_field()
    torch.testing.assert_close(
        region_target(box, 4.0).distance(field), piece.distance(field[..., box[0], box[1]])
    )


@pytest.mark.parametrize("space", ["latent", "image"])
def test_a_box_equals_the_same_box_as_a_mask_picture(space, sampler, picture_file, tmp_path):
    channels, side = (4, 16) if space == "latent" else (3, 32)
    seen = torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    mask = mask_file(tmp_path, 8, 4, 24, 20)
    box, drawn, whole = (
        loss(Reference(image=picture_file, space=space, region=region), sampler, seen)
        for region in ([0.25, 0.125, 0.75, 0.625], mask, [0, 0, 1, 1])
    )
    torch.testing.assert_close(box, drawn)
    torch.testing.assert_close(
        whole, loss(Reference(image=picture_file, space=space), sampler, seen), rtol=0, atol=0
    )
    assert not torch.allclose(box, whole)


# ---- pictures ----


def test_in_image_space_the_picture_itself_is_at_distance_zero(sampler, picture_file):
    content = content_of(picture_file)
    assert loss(Reference(image=picture_file, space="image"), sampler, content).item() == 0


def test_in_latent_space_the_pictures_encoding_is_at_distance_zero(sampler, picture_file):
    with torch.no_grad():
        latents = sampler.model.encode(content_of(picture_file))
    guide = Reference(image=picture_file)
    assert loss(guide, sampler, latents).item() == 0
    assert loss(guide, sampler, latents + 0.5).item() == pytest.approx(0.25, rel=1e-4)


def test_a_file_that_is_no_picture_or_too_large_is_refused_before_the_first_step(
    sampler, tmp_path, picture_file, monkeypatch
):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SettingsError, match=r"image must be.*text\.png' \(UnidentifiedImageError"):
        next(sampler.stream("", plugins=[Reference(image=tmp_path / "text.png")]))
    with pytest.raises(SettingsError, match=r"region must be.*none\.png' \(FileNotFoundError"):
        next(sampler.stream("", plugins=[Reference(image=picture_file, region="none.png")]))
    monkeypatch.setattr("pilotfish.runs.pictures.PIXELS", 48 * 40 - 1)
    with pytest.raises(SettingsError, match=r"\(48, 40\) pixels; at most 1919"):
        next(sampler.stream("", plugins=[Reference(image=picture_file)]))


def test_a_black_mask_is_refused(sampler, picture_file, tmp_path):
    guide = Reference(image=picture_file, region=mask_file(tmp_path, 0, 0, 0, 0))
    with pytest.raises(SettingsError, match=r"region must be white somewhere; .*mask\.png is all"):
        sampler("", plugins=[guide])


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "image must be given"),
        ({"image": "a.png", "space": "pixel"}, "space must be 'latent' or 'image'; got 'pixel'"),
        ({"image": "a.png", "cutoff": -1}, "cutoff must be greater than or equal to 0; got -1"),
        ({"image": "a.png", "region": [0, 0, 1]}, r"region must be a picture file, or \[left, top"),
        ({"image": "a.png", "region": [0.5, 0, 0.5, 1]}, "left < right <= 1"),
        ({"image": "a.png", "region": [0, 0, 1, 1.5]}, "0 <= top < bottom <= 1"),
        ({"image": "a.png", "region": ["a", 0, 1, 1]}, "a picture file, or .*; got"),
        ({"image": "a.png", "region": 3}, "0 <= top < bottom <= 1; got 3"),
        ({"image": "a.png", "cutof": 3}, "no setting 'cutof'. Did you mean 'cutoff'?"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Reference(**settings)


def test_settings_survive_toml():
    for guide in (
        Reference(image="a.png", region=[0, 0.25, 0.5, 1], cutoff=3),
        Reference(image="a.png", region="mask.png", space="image"),
    ):
        kept = {k: v for k, v in guide.settings.model_dump(mode="json").items() if v is not None}
        assert Reference(**tomllib.loads(tomli_w.dumps(kept))).settings == guide.settings


# ---- in a run ----


@pytest.mark.slow
@pytest.mark.parametrize("space", ["latent", "image"])
@pytest.mark.parametrize("region", [None, [0, 0, 0.5, 0.7]])
def test_the_guide_keeps_the_contract_of_plugins(space, region, sampler, picture_file):
    check_plugin(Reference(image=picture_file, space=space, region=region), sampler)


@pytest.mark.parametrize(("space", "decodes"), [("latent", 0), ("image", 3)])
def test_latent_space_decodes_nothing(space, decodes, sampler, picture_file, monkeypatch):
    calls = []
    kind = type(sampler.model)  # a run has a model of its own
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda *args: calls.append(1) or decode(*args))
    guide = Reference(image=picture_file, space=space)
    for _ in sampler.stream("a red cat", plugins=[guide], steps=3, seed=0):
        pass
    assert len(calls) == decodes


@pytest.mark.parametrize("gradient", ["x0", "latents"])
@pytest.mark.parametrize("space", ["latent", "image"])
def test_guiding_lowers_the_loss_and_a_negative_scale_raises_it(
    space, gradient, sampler, picture_file
):
    def final(scale: float) -> float:
        guide = Reference(image=picture_file, space=space, scale=scale, gradient=gradient)
        latents = sampler("a red cat", plugins=[guide], steps=8, seed=0).latents
        with torch.no_grad():
            seen = latents if space == "latent" else sampler.model.decode(latents)
        return loss(guide, sampler, seen).item()

    assert final(0.5) < final(0) < final(-0.5)


def test_a_picture_that_is_not_square_is_compared_in_the_runs_own_size(sampler, picture_file):
    guide = Reference(image=picture_file, region=[0.5, 0, 1, 1])
    result = sampler("a red cat", plugins=[guide], steps=3, seed=0, height=24, width=40)
    assert result.latents.shape[2:] == (12, 20)
    assert all(math.isfinite(record.loss[0]) for record in result.trace)


def test_one_guide_serves_two_runs_at_a_time(sampler, picture_file):
    guide = Reference(image=picture_file)
    expected = [sampler("", plugins=[guide], steps=3, seed=seed).latents for seed in (1, 2)]
    streams = [sampler.stream("", plugins=[guide], steps=3, seed=seed) for seed in (1, 2)]
    for _ in range(3):
        for stream in streams:
            next(stream)
    for stream, latents in zip(streams, expected, strict=True):
        torch.testing.assert_close(stream.result().latents, latents, rtol=0, atol=0)
    assert vars(guide).keys() == {"settings"}  # nothing of a run is kept in it


def test_the_guide_is_installed_and_lowers_its_loss(sampler, picture_file):
    use = f"reference:image={picture_file},cutoff=3,region=[0,0,1,0.5]"
    result = sampler("a red cat", plugins=[use], steps=8, seed=0)
    losses = [record.loss[0] for record in result.trace]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert tomllib.loads(result.run.to_toml())["plugins"][0]["use"] == "reference"


def test_a_run_in_bfloat16_is_compared_in_float32(picture_file):
    half = random_sampler(dtype=torch.bfloat16)
    result = half("a red cat", plugins=[Reference(image=picture_file)], steps=3, seed=0)
    assert result.latents.dtype == torch.bfloat16
    assert all(math.isfinite(record.gradient_norm[0]) for record in result.trace)
