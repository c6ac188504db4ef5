"""`edges`, `sharpness` and `symmetry` on pictures whose loss is known in closed form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pilotfish_kit import check_plugin
from pilotfish_reward import Edges, Sharpness, Symmetry

import pilotfish
from pilotfish.testing import random_sampler, random_step

RUN = {"steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


def loss(guide, image, state=None):
    step = SimpleNamespace(image=image)
    return (
        guide.loss_guidance(step, state) if isinstance(guide, Edges) else guide.loss_guidance(step)
    )


def ramp(slope: float, size: int = 64) -> torch.Tensor:
    """Rises to the right by that much a pixel, in float64."""
    return (slope * torch.arange(size).double()).expand(1, 3, size, size)


def checkerboard(size: int = 64) -> torch.Tensor:
    places = torch.arange(size)
    return ((places[:, None] + places) % 2).double().expand(1, 3, size, size)


@pytest.mark.parametrize("slope", [0.001, 0.01])
def test_edges_of_a_ramp_are_its_slope(slope):
    from pilotfish_reward.form import edges

    found = edges(ramp(slope))
    inner = found[..., 1:-1]  # at the border the last pixel is repeated
    # kornia adds 1e-6 under the root.
    torch.testing.assert_close(inner, torch.full_like(inner, (slope**2 + 1e-6) ** 0.5))


def test_a_black_and_a_white_half_have_more_edges_than_a_grey_picture_and_turning_keeps_them():
    halves = torch.zeros(1, 3, 16, 16).double()
    halves[..., 8:] = 1
    grey = torch.full_like(halves, 0.5)
    assert loss(Edges(), halves) < loss(Edges(), grey)
    # Two columns of slope 1/2 in 16.
    torch.testing.assert_close(
        loss(Edges(), halves), torch.tensor([-1 / 16.0]).double(), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(loss(Edges(), halves), loss(Edges(), halves.mT))


def test_edges_of_a_given_picture_are_missed_by_the_squared_difference(tmp_path, sampler):
    Image.new("RGB", (32, 32), "gray").save(tmp_path / "gray.png")
    guide = Edges(image=tmp_path / "gray.png")
    model = SimpleNamespace(device="cpu")
    state = guide.setup(SimpleNamespace(model=model, height=32, width=32))
    assert loss(guide, torch.full((1, 3, 32, 32), 0.2), state).item() < 1e-12
    inner = loss(guide, ramp(0.01, 32).float(), state)
    torch.testing.assert_close(
        inner, torch.tensor([0.01**2]), rtol=0.25, atol=0
    )  # border, and root


def test_sharpness_of_a_checkerboard_is_a_sixteenth_and_of_a_ramp_inside_nothing():
    # The kernel of eight neighbours answers 4 to a black field and -4 to a white one, of 16.
    torch.testing.assert_close(
        loss(Sharpness(), checkerboard()), torch.tensor([-1 / 16.0]).double()
    )
    assert loss(Sharpness(), torch.full((1, 3, 8, 8), 0.3)).item() == pytest.approx(0, abs=1e-12)


def test_blurring_lowers_sharpness():
    from kornia.filters import gaussian_blur2d

    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    soft = gaussian_blur2d(image, (5, 5), (1.0, 1.0))
    assert (loss(Sharpness(), soft) > loss(Sharpness(), image)).all()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [("vertical", 1.0), ("horizontal", 0.0), ("both", 0.5), ("point", 1.0)],
)
def test_asymmetry_of_a_black_and_a_white_half_is_known(axis, expected):
    halves = torch.zeros(1, 3, 8, 8)
    halves[..., 4:] = 1
    assert loss(Symmetry(axis=axis), halves).item() == expected


@pytest.mark.parametrize("axis", ["vertical", "horizontal", "both", "point"])
def test_a_picture_and_its_mirror_image_together_are_symmetrical(axis):
    image = torch.rand(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    across, along = image.flip(3), image.flip(2)
    whole = {
        "vertical": image + across,
        "horizontal": image + along,
        "both": image + across + along + image.flip((2, 3)),
        "point": image + image.flip((2, 3)),
    }[axis]
    assert loss(Symmetry(axis=axis), whole).abs().max() < 1e-12
    assert loss(Symmetry(axis=axis), image).min() > 0.01


GUIDES = [Edges(), Sharpness(), *(Symmetry(axis=axis) for axis in ("vertical", "both", "point"))]


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_gradient_is_the_derivative(guide):
    image = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda i: loss(guide, i), image.requires_grad_())


def test_edges_of_a_flat_picture_have_a_finite_gradient():
    step = random_step(image=torch.full((1, 3, 8, 8), 0.5))
    (gradient,) = torch.autograd.grad(Edges().loss_guidance(step, None).sum(), step.image)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("guide", [Edges(), Sharpness(), Symmetry(axis="both")], ids=repr)
def test_it_keeps_the_contract_of_plugins(guide):
    check_plugin(guide)


@pytest.mark.parametrize("name", ["edges", "sharpness", "symmetry"])
def test_scale_0_changes_nothing_and_latents_are_reached_beside_blue(name, sampler):
    plain = sampler("a cat", plugins=["blue"], **RUN)
    off = sampler("a cat", plugins=["blue", f"{name}:scale=0"], **RUN)
    assert torch.equal(off.latents, plain.latents)
    found = sampler("a cat", plugins=["blue", f"{name}:gradient=latents"], **RUN)
    assert not torch.equal(found.latents, plain.latents) and found.latents.isfinite().all()
    assert all(min(record.gradient_norm) > 0 for record in found.trace.of(name))


@pytest.mark.parametrize("name", ["edges", "sharpness", "symmetry"])
def test_the_guided_picture_of_the_emoji_model_has_less_loss(name, emoji_sampler):
    prompt = "a fox on a white background"
    guided = emoji_sampler(prompt, plugins=[name], seed=3).trace.losses(name)
    plain = emoji_sampler(prompt, plugins=[f"{name}:gradient=none"], seed=3).trace.losses(name)
    assert guided[-1] < plain[-1]


def test_edges_come_out_where_a_picture_has_them(emoji_sampler, tmp_path):
    drawing = Image.new("RGB", (64, 64), "white")
    drawing.paste("black", (16, 16, 48, 48))
    drawing.save(tmp_path / "square.png")
    plugin = {"use": "edges", "image": str(tmp_path / "square.png")}
    options = {"steps": 8, "seed": 3}
    guided = emoji_sampler("", plugins=[plugin], **options)
    plain = emoji_sampler("", plugins=[plugin | {"gradient": "none"}], **options)
    assert guided.trace.losses("edges")[-1] < 0.8 * plain.trace.losses("edges")[-1]
    assert pilotfish.Run.parse(guided.run.to_toml())["plugins"][0]["image"]
