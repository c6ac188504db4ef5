"""Noise levels and conversions of every scheduler."""

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from pilotfish.guidance.noise import NoiseLevel
from pilotfish.models.schedulers import available
from pilotfish.sampling.schedule import noise_level

SCHEDULERS = {n: c for n, c in available().items() if n != "edm-euler"}
TYPES = ["epsilon", "v_prediction", "sample"]


def made(name, prediction_type="epsilon", **config):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **config}
    scheduler = SCHEDULERS[name](**config, prediction_type=prediction_type)
    for flag in ("clip_sample", "thresholding"):
        if flag in scheduler.config:
            scheduler.register_to_config(**{flag: False})
    scheduler.set_timesteps(6)
    return scheduler


def exact_output(level, latents, x0, prediction_type):
    """What a perfect network would say, from the definitions in variance-preserving space."""
    eps = (latents - level.alpha * x0) / level.sigma
    norm = (level.alpha**2 + level.sigma**2) ** 0.5
    alpha, sigma = level.alpha / norm, level.sigma / norm
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction_type]


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_is_exact_for_a_perfect_network_at_every_step(name, prediction_type):
    """An oracle says the truth; the scheduler carries the latents on, and x0 must remain."""
    unsupported = {("pndm", "sample"), ("kdpm2", "sample"), ("kdpm2-ancestral", "sample")}
    unsupported |= {(n, "sample") for n in ("lms", "heun", "euler-ancestral")}
    scheduler = made(name, prediction_type)
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first = noise_level(scheduler, 0)
    latents = first.alpha * x0 + first.sigma * noise
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        level = noise_level(scheduler, index)
        output = exact_output(level, latents, x0, prediction_type)
        # float32 with 1/alpha up to 15 in front
        torch.testing.assert_close(level.x0(latents, output), x0, atol=2e-4, rtol=1e-4)
        if (name, prediction_type) in unsupported:
            return
        step = scheduler.step(output, timestep, latents, return_dict=True)
        told = getattr(step, "pred_original_sample", None)
        if told is not None and told.shape == x0.shape and name != "ddpm":
            torch.testing.assert_close(told, x0, atol=2e-3, rtol=1e-3)
        latents = step.prev_sample


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-ancestral", "lms"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_equals_the_schedulers_own_where_it_tells_one(name, prediction_type):
    scheduler = made(name, prediction_type)
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(scheduler.timesteps):
        latents = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
        output = torch.randn(2, 4, 8, 8, generator=generator)
        scheduler.scale_model_input(latents, timestep)
        x0 = noise_level(scheduler, index).x0(latents, output)
        told = scheduler.step(output, timestep, latents).pred_original_sample
        torch.testing.assert_close(x0, told, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_output_to_x0_and_back_is_the_identity(name, prediction_type):
    scheduler = made(name, prediction_type)
    level = noise_level(scheduler, 2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
    output = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
    x0 = level.x0(latents, output)
    torch.testing.assert_close(level.output(latents, x0), output)
    again = level.alpha * x0 + level.sigma * level.eps(latents, x0)
    torch.testing.assert_close(again, latents)


def test_variance_preserving_families_preserve_variance_and_sigma_space_has_alpha_one():
    for name in SCHEDULERS:
        level = noise_level(made(name), 1)
        squared = level.alpha**2 + level.sigma**2
        assert level.alpha == 1 or squared == pytest.approx(1, abs=1e-6), name


def test_flow_matching_interpolates_linearly():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    level = noise_level(scheduler, 2)
    assert level.alpha == pytest.approx(1 - level.sigma)
    x0, noise = torch.tensor([[[[0.3]]]]), torch.tensor([[[[-1.2]]]])
    latents = level.alpha * x0 + level.sigma * noise
    torch.testing.assert_close(level.x0(latents, noise - x0), x0)


def test_flow_sigmas_of_dpm_solver_are_flow_matching():
    scheduler = made("dpmsolver-multistep", "flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    level = noise_level(scheduler, 2)
    assert level.alpha == pytest.approx(1 - level.sigma)
    assert (level.skip, level.out) == (1.0, -level.sigma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_preconditioning_equals_the_schedulers(prediction_type):
    scheduler = EDMEulerScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(5)
    level = noise_level(scheduler, 1)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = scheduler.precondition_outputs(latents, latents * 2, level.sigma)
    torch.testing.assert_close(level.x0(latents, latents * 2), expected)


def test_half_precision_is_computed_in_float32():
    level = NoiseLevel(0.6, 0.8, 1 / 0.6, -0.8 / 0.6, "epsilon")
    half = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    assert level.x0(half, half).dtype == torch.float32
