"""`step.x0` is what the scheduler will use, where it clips and where it thresholds too."""

import diffusers
import pytest
import torch

from pilotfish import Plugin, Sampler
from pilotfish.testing import random_pipeline

CLIPS = {"clip_sample": True, "clip_sample_range": 1.5}
THRESHOLDS = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
TELLS = {  # those whose step tells the x0 that it used
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "LCMScheduler": diffusers.LCMScheduler,
    "DDIMInverseScheduler": diffusers.DDIMInverseScheduler,  # has no thresholding
}
CONVERTS = {  # those that tell it by convert_model_output
    "dpmsolver-multistep": diffusers.DPMSolverMultistepScheduler,
    "dpmsolver-singlestep": diffusers.DPMSolverSinglestepScheduler,
    "unipc-multistep": diffusers.UniPCMultistepScheduler,
    "SASolverScheduler": diffusers.SASolverScheduler,
}


class Look(Plugin):
    """Writes down what each step began with, and the network's answer."""

    def __init__(self):
        super().__init__()
        self.met = []

    def combine_predictions(self, prediction, step):
        self.met.append((step.latents, prediction))


def met(pipeline, name, config):
    """For each step: (timestep, latents, output, x0)."""
    look = Look()
    options = {"steps": 4, "seed": 3, "scheduler": {"name": name, **config}, "plugins": [look]}
    x0s = [(s.timestep, s.x0) for s in Sampler.from_pipeline(pipeline).stream("a cat", **options)]
    return [(t, *seen, x0) for (t, x0), seen in zip(x0s, look.met, strict=True)]


def theirs(pipeline, kind, config):
    scheduler = kind.from_config(pipeline.scheduler.config, **config)
    scheduler.set_timesteps(4)
    return scheduler


def assert_alike(x0, expected, config):
    limit = 1.5 if config is CLIPS else 1.0
    assert float(expected.abs().max()) <= limit + 1e-6  # it was clipped at all
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        (name, config)
        for name in TELLS
        for config in (CLIPS, THRESHOLDS)
        if (name, config) != ("DDIMInverseScheduler", THRESHOLDS)
    ],
)
def test_x0_is_the_one_that_the_step_tells(name, config, prediction_type):
    pipeline = random_pipeline(prediction_type)
    scheduler = theirs(pipeline, TELLS[name], config)
    for timestep, latents, output, x0 in met(pipeline, name, config):
        if name == "LCMScheduler":
            told = lcm(scheduler, timestep, latents, output)
        else:
            told = scheduler.step(output, timestep, latents).pred_original_sample
        if config is CLIPS:
            assert_alike(x0, told, config)
        else:
            torch.testing.assert_close(x0, told, rtol=1e-4, atol=1e-4)


def lcm(scheduler, timestep, latents, output):
    """Its x0 before the boundary condition mixes the latents in."""
    abar = scheduler.alphas_cumprod[timestep]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        x0 = (latents - sigma * output) / alpha
    else:
        x0 = alpha * latents - sigma * output
    if scheduler.config.thresholding:
        return scheduler._threshold_sample(x0)
    return x0.clamp(-1.5, 1.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CONVERTS)
def test_x0_is_what_the_model_output_is_converted_to(name, prediction_type):
    pipeline = random_pipeline(prediction_type)
    scheduler = theirs(pipeline, CONVERTS[name], THRESHOLDS)
    for index, (_, latents, output, x0) in enumerate(met(pipeline, name, THRESHOLDS)):
        scheduler._step_index = index
        told = scheduler.convert_model_output(output, sample=latents)
        torch.testing.assert_close(x0, told, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_of_deis_is_thresholded_as_it_does(prediction_type):
    """It converts to noise: `(latents - alpha * x0) / sigma`."""
    pipeline = random_pipeline(prediction_type)
    scheduler = theirs(pipeline, diffusers.DEISMultistepScheduler, THRESHOLDS)
    for index, seen in enumerate(met(pipeline, "deis-multistep", THRESHOLDS)):
        _, latents, output, x0 = seen
        scheduler._step_index = index
        eps = scheduler.convert_model_output(output, sample=latents)
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        torch.testing.assert_close((latents - alpha * x0) / sigma, eps, rtol=1e-4, atol=1e-3)


def test_x0_of_heun_is_clipped_as_it_does():
    pipeline = random_pipeline()
    scheduler = theirs(pipeline, diffusers.HeunDiscreteScheduler, CLIPS)
    for index, (_, latents, output, x0) in enumerate(met(pipeline, "heun", CLIPS)):
        sigma = scheduler.sigmas[index]
        expected = (latents - sigma * output).clamp(-1.5, 1.5)
        torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "lms", "pndm"])
def test_a_scheduler_that_does_not_clip_leaves_x0_although_the_models_own_clips(name):
    pipeline = random_pipeline()
    expected = [x0 for *_, x0 in met(pipeline, name, {})]
    pipeline.scheduler.register_to_config(**CLIPS)
    for (*_, x0), other in zip(met(pipeline, name, {}), expected, strict=True):
        assert torch.equal(x0, other)
        assert float(x0.abs().max()) > 1.5
