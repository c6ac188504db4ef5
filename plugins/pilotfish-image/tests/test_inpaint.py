"""What `inpaint` promises: outside the mask the picture stays, with every scheduler."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from pilotfish_image import Img2Img, Inpaint, Optimize, inpaint
from pilotfish_image.inpaint import Scene

from pilotfish import Guide, Plugin, SettingsError, keep_outside, mend_torchvision, pixels
from pilotfish.testing import random_sampler

mend_torchvision()

import diffusers  # noqa: E402
from diffusers.schedulers import KarrasDiffusionSchedulers  # noqa: E402

SCHEDULERS = sorted(
    member.name
    for member in KarrasDiffusionSchedulers
    if issubclass(getattr(diffusers, member.name), diffusers.SchedulerMixin)
)
PROMPT, LEFT = "a red cat", (0, 0, 0.5, 1)


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "set.png"
    Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def known(sampler, picture_file):
    """The picture's own latents (1, 4, 16, 16)."""
    with Image.open(picture_file) as picture, torch.no_grad():
        return sampler.model.encode(pixels(picture))


@pytest.fixture
def latents_of(sampler, picture_file, monkeypatch):
    """Latents as they are before the last correction, which random networks make no sense of."""
    monkeypatch.setattr(inpaint, "keep_outside", lambda model, latents, *_: latents)

    def run(*others, mask=LEFT, image=picture_file, **options):
        plugins = [*others, Inpaint(image=image, mask=mask)]
        return sampler(PROMPT, plugins=plugins, **{"steps": 4, "seed": 3, **options}).latents

    return run


class Towards(Guide):
    """Pulls everything to one value."""

    def loss_guidance(self, step):
        return (step.x0 - 5).square().mean(dim=(1, 2, 3))


# ---- the known part ----


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_outside_the_mask_the_latents_are_the_pictures_own(latents_of, known, scheduler):
    latents = latents_of(scheduler=scheduler)
    torch.testing.assert_close(latents[..., 8:], known[..., 8:])
    assert not torch.isclose(latents[..., :8], known[..., :8]).any(dim=1).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_at_every_step_the_known_part_has_that_steps_noise_level(
    sampler, picture_file, known, scheduler
):
    levels = []

    class Look(Plugin):
        def before_step(self, step):
            outside = (step.latents - step.alpha * known)[..., 8:]
            levels.append(float(outside.square().mean().sqrt() / step.sigma))

    plugins = [Inpaint(image=picture_file, mask=LEFT), Look()]
    run = {"steps": 6, "seed": 1, "num_images": 8}
    sampler(PROMPT, plugins=plugins, scheduler=scheduler, **run)
    # 4096 values: the standard error of their root mean square is 1.1 %.
    assert levels == pytest.approx([1] * len(levels), rel=0.05)


def test_deterministic_schedulers_keep_the_noise_of_the_first_step(sampler, picture_file, known):
    noises = []

    class Look(Plugin):
        def before_step(self, step):
            noises.append((step.latents - step.alpha * known)[..., 8:] / step.sigma)

    plugins = [Inpaint(image=picture_file, mask=LEFT), Look()]
    for scheduler in ("ddim", "euler", "heun", "pndm", "dpmsolver-multistep", "unipc"):
        noises.clear()
        sampler(PROMPT, plugins=plugins, scheduler=scheduler, steps=5, seed=1)
        for noise in noises[1:]:  # the last levels lie close to zero
            torch.testing.assert_close(noise, noises[0], rtol=0.01, atol=0.02)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_on_a_flow_the_known_part_has_every_steps_noise_and_ends_as_the_picture(
    family, picture_file, monkeypatch
):
    """(1 - t) of the picture and t of the first noise, from nothing but noise at t = 1 on."""
    monkeypatch.setattr(inpaint, "keep_outside", lambda model, latents, *_: latents)
    sampler, noises = random_sampler(family=family), []
    with Image.open(picture_file) as picture, torch.no_grad():
        known = sampler.model.encode(pixels(picture))
    half = known.shape[3] // 2

    class Look(Plugin):
        def before_step(self, step):
            assert step.alpha == pytest.approx(1 - step.sigma)
            outside = step.latents - (1 - step.sigma) * known
            noises.append(outside[..., half:] / step.sigma)

    plugins = [Inpaint(image=picture_file, mask=LEFT), Look()]
    run = {"steps": 5, "seed": 1, "height": 32, "width": 32}
    latents = sampler(PROMPT, plugins=plugins, **run).latents
    for noise in noises[1:]:  # float32, divided by sigma
        torch.testing.assert_close(noise, noises[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents[..., half:], known[..., half:])
    assert not torch.isclose(latents[..., :half], known[..., :half]).any(dim=1).all()


@pytest.mark.parametrize("preset", ["balanced", "deep-dive", "dps"])
def test_guides_move_only_what_is_drawn(latents_of, known, preset):
    run = {"scheduler": "ddim", "preset": preset}
    guided = latents_of(Towards(), **run)
    torch.testing.assert_close(guided[..., 8:], known[..., 8:])
    inside = (guided - latents_of(**run))[..., :8]
    assert inside.abs().mean() > 1e-3


def test_it_works_from_an_image_to_image_start(latents_of, known, picture_file):
    start = Img2Img(image=picture_file, strength=0.5)
    latents = latents_of(start)
    torch.testing.assert_close(latents[..., 8:], known[..., 8:])
    assert not torch.allclose(latents[..., :8], latents_of()[..., :8])


@pytest.mark.parametrize("tolerance", [0.0, 1e3])  # to the last step, and ended by the optimiser
def test_it_works_with_steps_that_an_optimiser_takes(latents_of, known, tolerance):
    latents = latents_of(Optimize(tolerance=tolerance), Towards())
    torch.testing.assert_close(latents[..., 8:], known[..., 8:])


class Leaky:
    """A VAE that keeps every pixel, but each depends on the mean of all."""

    def encode(self, image):
        return torch.cat([image, image[:, :1]], dim=1)

    def decode(self, latents):
        image = latents[:, :3]
        return image + 0.2 * (image.mean(dim=(2, 3), keepdim=True) - 0.5)


@pytest.fixture
def scene():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    drawn = torch.zeros(1, 1, 8, 8)
    drawn[..., :4] = 1
    return Scene(image, Leaky().encode(image), drawn)


def test_what_is_drawn_does_not_show_around_it(scene):
    model = Leaky()
    dark = torch.cat([scene.around(torch.full((1, 4, 8, 8), value)) for value in (0.0, 1.0)])
    corrected = keep_outside(model, dark, scene.image, scene.drawn)
    assert torch.equal(corrected[..., :4], dark[..., :4])
    errors = [
        (model.decode(latents) - scene.image)[..., 4:].square().mean(dim=(1, 2, 3)).sqrt()
        for latents in (dark, corrected)
    ]
    assert (errors[1] < 0.25 * errors[0]).all()


def test_an_image_that_the_correction_would_make_worse_stays(scene):
    model = Leaky()
    model.encode = lambda image: -Leaky().encode(image)
    latents = scene.around(torch.zeros(1, 4, 8, 8))
    assert torch.equal(keep_outside(model, latents, scene.image, scene.drawn), latents)


# ---- masks ----


def test_all_white_keeps_nothing_of_the_picture(latents_of, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    everything = (0, 0, 1, 1)
    assert torch.equal(
        latents_of(mask=everything), latents_of(mask=everything, image=tmp_path / "red.png")
    )


def test_a_box_is_the_mask_with_that_box_in_white(latents_of, tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 64))
    mask.save(tmp_path / "mask.png")
    boxed = latents_of(mask=(0.25, 0.125, 0.75, 1))
    torch.testing.assert_close(latents_of(mask=tmp_path / "mask.png"), boxed)


def test_where_the_mask_is_grey_the_result_is_between(sampler, latents_of, known, tmp_path):
    Image.new("L", (32, 32), 102).save(tmp_path / "grey.png")  # 0.4

    class Look(Plugin):
        def on_predicted_x0(self, x0):
            self.x0 = x0

    look = Look()
    latents = latents_of(look, mask=tmp_path / "grey.png")
    torch.testing.assert_close(latents, known + 0.4 * (look.x0 - known), rtol=1e-4, atol=1e-4)


def test_picture_and_mask_are_cut_alike(latents_of, picture_file, tmp_path):
    wide, mask = Image.new("RGB", (64, 32), "red"), Image.new("L", (64, 32))
    with Image.open(picture_file) as picture:
        wide.paste(picture, (16, 0))
    mask.paste(255, (16, 0, 32, 32))
    wide.save(tmp_path / "wide.png")
    mask.save(tmp_path / "mask.png")
    cut = latents_of(image=tmp_path / "wide.png", mask=tmp_path / "mask.png")
    torch.testing.assert_close(cut, latents_of())


def test_a_mask_of_another_shape_or_all_black_is_refused(latents_of, tmp_path):
    Image.new("L", (32, 24), "white").save(tmp_path / "flat.png")
    with pytest.raises(SettingsError, match=r"shape of image, 32 x 32 pixels.*has 32 x 24"):
        latents_of(mask=tmp_path / "flat.png")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    with pytest.raises(SettingsError, match=r"white somewhere; .*black\.png is all black"):
        latents_of(mask=tmp_path / "black.png")
    with pytest.raises(SettingsError, match=r"Inpaint: mask must be a picture.*'none\.png'"):
        latents_of(mask="none.png")


@pytest.mark.parametrize("mask", [(0, 0, 2, 1), (0.5, 0, 0.5, 1), (0, 1), None])
def test_a_wrong_box_is_named(mask):
    with pytest.raises(SettingsError, match=r"mask must be a picture file, or \[left, top, .*got"):
        Inpaint(image="a.png", mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral"])
def test_on_a_real_model_the_picture_outside_is_within_the_vaes_own_error(tmp_path, scheduler):
    import pilotfish

    emoji = pilotfish.load()
    run = {"steps": 15, "guidance_scale": 4, "seed": 32, "scheduler": scheduler}
    emoji("a fox on a teal background", **run).images[0].save(tmp_path / "fox.png")
    plugin = Inpaint(image=tmp_path / "fox.png", mask=(0, 0, 0.5, 1))
    with Image.open(tmp_path / "fox.png") as picture, torch.no_grad():
        original = pixels(picture)
        passed = emoji.model.decode(emoji.model.encode(original))
        drawn = emoji.model.decode(emoji("a cat", plugins=[plugin], **run).latents)

    def error(image, columns):
        return (image - original)[..., columns].square().mean().sqrt()

    # A cell of latents is four pixels wide: the nearest ones to the edge show both sides.
    beyond, outside = slice(36, None), slice(32, None)
    assert error(drawn, beyond) < error(passed, beyond)
    assert error(drawn, outside) < 2 * error(passed, outside)
    assert error(drawn, slice(0, 32)) > 5 * error(passed, outside)
