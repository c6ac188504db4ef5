"""What `img2img` promises: the numbers of diffusers' image-to-image pipeline."""

from __future__ import annotations

import inspect

import pytest
import torch
from PIL import Image
from pilotfish_image import Img2Img

from pilotfish import InputError, Sampler, SettingsError, mend_torchvision
from pilotfish.testing import random_pipeline

mend_torchvision()

import diffusers  # noqa: E402
from diffusers.schedulers import KarrasDiffusionSchedulers  # noqa: E402

pytestmark = pytest.mark.slow  # each is short, together they are not

# All that the pipeline accepts and that can be used here; a stand-in says what is not installed.
SCHEDULERS = sorted(
    member.name
    for member in KarrasDiffusionSchedulers
    if issubclass(getattr(diffusers, member.name), diffusers.SchedulerMixin)
)
PROMPT = "a red cat"


@pytest.fixture(scope="module")
def pipeline():
    return random_pipeline()


@pytest.fixture(scope="module")
def sampler(pipeline):
    return Sampler.from_pipeline(pipeline)


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory):
    """A picture with structure, of the model's own size."""
    path = tmp_path_factory.mktemp("picture") / "set.png"
    Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return path


@pytest.fixture
def latents_of(sampler, picture_file):
    def run(scheduler="EulerDiscreteScheduler", sampler=sampler, image=picture_file, **options):
        settings = {k: options.pop(k) for k in ("strength", "start_step") if k in options}
        options = {"steps": 5, "seed": 3, "scheduler": scheduler, **options}
        plugin = Img2Img(**{"image": image, "strength": 0.6, **settings})
        return sampler(PROMPT, plugins=[plugin], **options).latents

    return run


def theirs(pipeline, picture_file, scheduler, seeds=(3,), strength=0.6, **options):
    kind = getattr(diffusers, scheduler)
    clips = {"clip_sample": False} if "clip_sample" in inspect.signature(kind).parameters else {}
    made = kind.from_config(pipeline.scheduler.config, **clips)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **{**pipeline.components, "scheduler": made}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with Image.open(picture_file) as picture:
        return pipe(
            PROMPT,
            image=picture.convert("RGB"),
            strength=strength,
            num_inference_steps=5,
            num_images_per_prompt=len(seeds),
            generator=generators if len(seeds) > 1 else generators[0],
            output_type="latent",
            **options,
        ).images


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_equal_those_of_diffusers(
    pipeline, picture_file, latents_of, scheduler, guidance_scale
):
    expected = theirs(pipeline, picture_file, scheduler, guidance_scale=guidance_scale)
    assert torch.equal(latents_of(scheduler, guidance_scale=guidance_scale), expected)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_every_strength_equals_that_of_diffusers(
    pipeline, picture_file, latents_of, scheduler, strength
):
    expected = theirs(pipeline, picture_file, scheduler, strength=strength)
    assert torch.equal(latents_of(scheduler, strength=strength), expected)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_several_images_equal_those_of_diffusers_and_single_runs(
    pipeline, picture_file, latents_of, scheduler
):
    both = latents_of(scheduler, num_images=2)
    assert torch.equal(both, theirs(pipeline, picture_file, scheduler, seeds=(3, 4)))
    singles = torch.cat([latents_of(scheduler, seed=seed) for seed in (3, 4)])
    # Convolutions sum in another order for another batch size; these latents are tens in size.
    size = float(singles.abs().max())
    torch.testing.assert_close(both / size, singles / size, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"prediction_type": "v_prediction"}, {"dtype": torch.bfloat16}],
    ids=["v_prediction", "bfloat16"],
)
def test_other_models_equal_diffusers(picture_file, latents_of, options):
    pipeline = random_pipeline(**options)
    expected = theirs(pipeline, picture_file, "DDIMScheduler")
    ours = latents_of("DDIMScheduler", sampler=Sampler.from_pipeline(pipeline))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
def test_on_a_flow_latents_equal_those_of_diffusers(picture_file, latents_of, strength):
    pipeline = random_pipeline(family="sd3")
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    with Image.open(picture_file) as picture:
        expected = pipe(
            PROMPT,
            image=picture.convert("RGB"),
            height=32,
            width=32,
            strength=strength,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
    sampler = Sampler.from_pipeline(pipeline)
    run = {"scheduler": None, "sampler": sampler, "strength": strength}
    ours = latents_of(**run, guidance_scale=7.0, height=32, width=32)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_start_step_is_the_first_that_is_taken(sampler, picture_file, latents_of, scheduler):
    assert torch.equal(
        latents_of(scheduler, strength=None, start_step=2), latents_of(scheduler, strength=0.6)
    )
    plugin = Img2Img(image=picture_file, start_step=4)
    steps = list(sampler.stream(PROMPT, plugins=[plugin], steps=5, scheduler=scheduler))
    assert len(steps) == 1 and steps[0].index == steps[0].num_steps - 1


def test_without_strength_four_fifths_of_the_steps_are_taken(sampler, picture_file):
    stream = sampler.stream(PROMPT, plugins=[Img2Img(image=picture_file)], steps=10)
    assert [step.index for step in stream] == list(range(2, 10))


def test_a_picture_of_another_shape_is_its_middle(latents_of, picture_file, tmp_path):
    wide = Image.new("RGB", (64, 32), "red")
    with Image.open(picture_file) as picture:
        wide.paste(picture, (16, 0))
    wide.save(tmp_path / "wide.png")
    assert torch.equal(latents_of(image=tmp_path / "wide.png"), latents_of())


def test_a_run_may_have_another_size_than_the_picture(latents_of):
    assert latents_of(height=32, width=48).shape == (1, 4, 16, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.1}, r"strength 0.1 of 5 steps is less than one.* or strength >= 0.2"),
        ({"strength": None, "start_step": 5}, "start_step must be below 5, the run's steps; got 5"),
    ],
)
def test_a_start_that_leaves_no_step_is_refused_with_the_numbers(latents_of, settings, message):
    with pytest.raises(InputError, match=message):
        latents_of(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "image must be given"),
        ({"image": "a.png", "strength": 0}, "strength must be greater than 0; got 0"),
        ({"image": "a.png", "strength": 1.5}, "strength must be less than or equal to 1; got 1.5"),
        ({"image": "a.png", "start_step": -1}, "start_step must be greater than or equal to 0"),
        (
            {"image": "a.png", "strength": 0.5, "start_step": 1},
            "start_step must be left out where strength is given; got 1",
        ),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Img2Img(**settings)


def test_a_file_that_is_no_picture_is_named(latents_of):
    with pytest.raises(SettingsError, match=r"Img2Img: image must be a picture.*'none\.png'"):
        latents_of(image="none.png")


@pytest.mark.slow
def test_the_more_strength_the_less_is_left_of_the_picture(tmp_path):
    import pilotfish

    emoji = pilotfish.load()
    run = {"steps": 10, "guidance_scale": 4, "seed": 32}
    fox = emoji("a fox on a teal background", **run)
    fox.images[0].save(tmp_path / "fox.png")

    def distance(strength):
        plugin = Img2Img(image=tmp_path / "fox.png", strength=strength)
        drawn = emoji("a cat on a teal background", plugins=[plugin], **run).latents
        return float((drawn - fox.latents).square().mean())

    distances = [distance(strength) for strength in (0.2, 0.5, 0.8, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.4 * distances[-1]
