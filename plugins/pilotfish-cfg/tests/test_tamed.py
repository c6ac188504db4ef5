"""What `threshold`, `cfg-rescale` and `cfg-interval` promise."""

from __future__ import annotations

import math

import pytest
import torch
from pilotfish_cfg import CfgInterval, CfgRescale, Threshold

from pilotfish import Plugin, Sampler, SettingsError, mend_torchvision
from pilotfish.testing import random_pipeline

mend_torchvision()

import diffusers  # noqa: E402

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def pipeline():
    return random_pipeline()


@pytest.fixture(scope="module")
def sampler(pipeline):
    return Sampler.from_pipeline(pipeline)


@pytest.fixture
def latents_of(sampler):
    def run(*plugins, sampler=sampler, **options):
        options = {"steps": 4, "seed": 3, **options}
        return sampler(PROMPT, plugins=plugins, **options).latents

    return run


# ---- threshold ----


def latents(*scales: float) -> torch.Tensor:
    """Latents (B, 4, 8, 8) of these standard deviations."""
    noise = torch.randn(len(scales), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor(scales).view(-1, 1, 1, 1)


def imagen(values: list[float], percentile: float, limit: float) -> list[float]:
    """Section 2.3 of the paper for one image, number by number; there the limit is 1."""
    ordered = sorted(map(abs, values))
    place = percentile * (len(ordered) - 1)
    below, part = math.floor(place), place % 1
    s = ordered[below] + part * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])
    s = max(s, limit)
    return [max(-s, min(s, value)) / s * limit for value in values]


@pytest.mark.parametrize(("percentile", "limit"), [(0.995, 3.0), (0.9, 1.0), (1.0, 2.0)])
def test_threshold_is_the_papers(percentile, limit):
    x0 = latents(0.5, 1.5, 4.0)
    ours = Threshold(percentile=percentile, limit=limit).on_predicted_x0(x0)
    for image, expected in zip(ours, x0, strict=True):
        flat = imagen(expected.flatten().tolist(), percentile, limit)
        torch.testing.assert_close(image.flatten(), torch.tensor(flat))


def test_threshold_leaves_nothing_above_the_limit(latents_of):
    class Look(Plugin):
        def on_predicted_x0(self, x0):
            self.largest = float(x0.abs().max())

    look = Look()
    latents_of(look)
    assert look.largest > 10  # of this model of random weights
    latents_of(Threshold(limit=2.5), look)
    assert 2 < look.largest < 2.5 + 1e-5


def test_threshold_that_nothing_reaches_leaves_the_picture_bit_identical(latents_of):
    assert torch.equal(latents_of(Threshold(limit=1e4)), latents_of())


def test_threshold_takes_each_image_apart():
    threshold, x0 = Threshold(limit=1.0), latents(0.5, 1.5, 4.0)
    together = threshold.on_predicted_x0(x0)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], threshold.on_predicted_x0(x0[i : i + 1]))


def test_thresholds_gradient_is_the_derivative_with_the_size_held():
    x0 = latents(4.0).double().requires_grad_()
    ours = Threshold(percentile=0.9, limit=1.0).on_predicted_x0(x0)
    (gradient,) = torch.autograd.grad(ours.sum(), x0)
    size = float(x0.detach().abs().flatten().quantile(0.9))
    torch.testing.assert_close(gradient, (x0.abs() < size).double() / size)


# ---- cfg-rescale ----


CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmsolver-multistep": diffusers.DPMSolverMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


def theirs(pipeline, scheduler, rescale, **options):
    made = CLASSES[scheduler].from_config(pipeline.scheduler.config)  # which does not clip
    pipe = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": made}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPT,
        num_inference_steps=4,
        guidance_rescale=rescale,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver-multistep", "heun"])
def test_rescale_equals_guidance_rescale_of_diffusers(pipeline, latents_of, scheduler, rescale):
    ours = latents_of(CfgRescale(rescale=rescale), scheduler=scheduler)
    assert torch.equal(ours, theirs(pipeline, scheduler, rescale))


@pytest.mark.parametrize(
    "options",
    [{"prediction_type": "v_prediction"}, {"dtype": torch.bfloat16}],
    ids=["v_prediction", "bfloat16"],
)
def test_rescale_equals_diffusers_on_other_models(latents_of, options):
    pipeline = random_pipeline(**options)
    ours = latents_of(CfgRescale(), sampler=Sampler.from_pipeline(pipeline), scheduler="ddim")
    assert torch.equal(ours, theirs(pipeline, "ddim", 0.7))


@pytest.mark.parametrize("plugin", [CfgRescale(), CfgInterval()])
def test_without_guidance_there_is_nothing_to_tame(latents_of, plugin):
    assert torch.equal(latents_of(plugin, guidance_scale=1), latents_of(guidance_scale=1))


def test_rescaled_fully_the_prediction_has_the_prompts_own_contrast():
    cond, uncond = latents(1.0), latents(3.0).flip(1)
    guided = uncond + 7.5 * (cond - uncond)
    ours = CfgRescale(rescale=1.0).combine_predictions(guided, cond, uncond)
    torch.testing.assert_close(ours, guided * (cond.std() / guided.std()))


# ---- cfg-interval ----


def test_a_window_of_all_levels_leaves_the_picture_bit_identical(latents_of):
    assert torch.equal(latents_of(CfgInterval(low=0, high=1000)), latents_of())


def test_a_window_of_none_is_no_guidance(latents_of):
    off = latents_of(guidance_scale=1)
    # Convolutions sum in another order for another batch size; these latents are tens in size.
    size = float(off.abs().max())
    ours = latents_of(CfgInterval(low=999, high=1000))
    torch.testing.assert_close(ours / size, off / size, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver-multistep", "heun"])
def test_a_window_means_the_same_noise_with_every_scheduler(sampler, scheduler):
    guided, window = [], CfgInterval(low=0.28, high=5.42)

    class Look(Plugin):
        def combine_predictions(self, prediction, cond, step):
            if not torch.equal(prediction, cond):
                guided.append(step.sigma / step.alpha)

    levels = [
        step.sigma / step.alpha
        for step in sampler.stream(PROMPT, plugins=[window, Look()], steps=12, scheduler=scheduler)
    ]
    assert guided == [level for level in levels if 0.28 < level <= 5.42]
    assert 0 < len(guided) < len(levels)


class Halve(Plugin):
    """What another plugin makes of a prediction."""

    def combine_predictions(self, prediction):
        return prediction / 2


class Keep(Plugin):
    """Writes down what came of each step, and whether it lies in the default window."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def combine_predictions(self, prediction, cond, uncond, step):
        self.seen.append((0.28 < step.sigma / step.alpha <= 5.42, prediction, cond, uncond))


def by_hand(cond, uncond, scale=7.5):
    """The guided prediction, and the paper's of rescale 0.7 for any prediction."""

    def rescaled(prediction):
        contrast = cond.std(dim=(1, 2, 3)) / prediction.std(dim=(1, 2, 3))
        return 0.7 * prediction * contrast.view(-1, 1, 1, 1) + 0.3 * prediction

    return uncond + scale * (cond - uncond), rescaled


@pytest.mark.parametrize(
    ("plugins", "inside", "outside"),
    [
        (lambda: (CfgInterval(), CfgRescale()), lambda g, c, r: r(g), lambda g, c, r: r(c)),
        (lambda: (CfgRescale(), CfgInterval()), lambda g, c, r: r(g), lambda g, c, r: c),
        (lambda: (CfgInterval(), Halve()), lambda g, c, r: g / 2, lambda g, c, r: c / 2),
        (lambda: (Halve(), CfgInterval()), lambda g, c, r: g / 2, lambda g, c, r: c),
        (lambda: (Halve(), CfgRescale()), lambda g, c, r: r(g / 2), lambda g, c, r: r(g / 2)),
        (lambda: (CfgRescale(), Halve()), lambda g, c, r: r(g) / 2, lambda g, c, r: r(g) / 2),
    ],
    ids=[
        *("interval, rescale", "rescale, interval", "interval, halve", "halve, interval"),
        *("halve, rescale", "rescale, halve"),
    ],
)
def test_each_takes_up_what_the_plugins_before_it_made(latents_of, plugins, inside, outside):
    keep = Keep()
    latents_of(*plugins(), keep, steps=12, num_images=2, guidance_scale=7.5)
    assert {lies_inside for lies_inside, *_ in keep.seen} == {True, False}
    for lies_inside, prediction, cond, uncond in keep.seen:
        guided, rescaled = by_hand(cond, uncond)
        expected = (inside if lies_inside else outside)(guided, cond, rescaled)
        torch.testing.assert_close(prediction, expected)


def test_threshold_acts_on_what_they_make_wherever_it_stands(latents_of):
    orders = [(Threshold(limit=2.5), CfgRescale()), (CfgRescale(), Threshold(limit=2.5))]
    one, other = (latents_of(*plugins) for plugins in orders)
    assert torch.equal(one, other)
    assert not torch.equal(one, latents_of(CfgRescale()))


# ---- settings, and a trained model ----


@pytest.mark.parametrize(
    ("plugin", "settings", "message"),
    [
        (Threshold, {"percentile": 1.5}, "percentile must be less than or equal to 1; got 1.5"),
        (Threshold, {"limit": 0}, "limit must be greater than 0; got 0"),
        (CfgRescale, {"rescale": 2}, "rescale must be less than or equal to 1; got 2"),
        (CfgInterval, {"low": 3, "high": 3}, r"high must be above low, 3.0; got 3"),
        (CfgInterval, {"low": -1}, "low must be greater than or equal to 0; got -1"),
    ],
)
def test_wrong_settings_are_named(plugin, settings, message):
    with pytest.raises(SettingsError, match=message):
        plugin(**settings)


@pytest.mark.slow
def test_threshold_and_interval_take_glare_out_of_an_overguided_picture():
    import pilotfish

    emoji = pilotfish.load()
    run = {"steps": 12, "guidance_scale": 25, "seed": 7, "num_images": 4}

    def glare(*plugins):
        result = emoji("a fox on a teal background", plugins=plugins, **run)
        with torch.no_grad():
            image = emoji.model.decode(result.latents)
        return float((image - image.clamp(0, 1)).abs().mean())

    burnt = glare()
    assert glare("threshold") < 0.5 * burnt
    assert glare("cfg-interval") < 0.5 * burnt
