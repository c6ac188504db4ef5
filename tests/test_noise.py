"""Noise levels and conversions of every scheduler."""

import inspect

import diffusers
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from pilotfish import Sampler
from pilotfish.guidance.noise import NoiseLevel
from pilotfish.sampling.schedule import Schedule, noise_level
from pilotfish.testing import GaussianModel

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2-ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmsolver-multistep": diffusers.DPMSolverMultistepScheduler,
    "dpmsolver-singlestep": diffusers.DPMSolverSinglestepScheduler,
    "deis-multistep": diffusers.DEISMultistepScheduler,
    "unipc-multistep": diffusers.UniPCMultistepScheduler,
}
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


UNSUPPORTED = {(n, "sample") for n in ("pndm", "kdpm2", "kdpm2-ancestral")}
UNSUPPORTED |= {(n, "sample") for n in ("lms", "heun", "euler-ancestral")}


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_is_exact_for_a_perfect_network_at_every_step(name, prediction_type):
    """An oracle says the truth; the scheduler carries the latents on, and x0 must remain."""
    if (name, prediction_type) in UNSUPPORTED:
        pytest.skip("diffusers does not take x0 as the network's answer there")
    carried(made(name, prediction_type), prediction_type)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("pndm", {"skip_prk_steps": True}),
        ("heun", {"use_karras_sigmas": True}),
        ("kdpm2", {"use_karras_sigmas": True}),
        ("kdpm2-ancestral", {"timestep_spacing": "trailing"}),
        ("dpmsolver-singlestep", {"use_karras_sigmas": True}),
        ("dpmsolver-multistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmsolver-multistep", {"solver_order": 3, "use_lu_lambdas": True}),
        ("unipc-multistep", {"use_exponential_sigmas": True}),
    ],
)
def test_x0_is_exact_however_the_levels_are_spaced(name, config):
    carried(made(name, **config), "epsilon")


def carried(scheduler, prediction_type):
    """Latents along a whole run at the levels of the table, with an oracle for a network."""
    schedule = Schedule(scheduler, 6)
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first = schedule.levels[0]
    draws = "generator" in inspect.signature(scheduler.step).parameters
    latents = first.alpha * x0 + first.sigma * noise
    for level, timestep in zip(schedule.levels, schedule.timesteps, strict=True):
        scheduler.scale_model_input(latents, timestep)
        output = exact_output(level, latents, x0, prediction_type)
        # float32 with 1/alpha up to 15 in front
        torch.testing.assert_close(level.x0(latents, output), x0, atol=2e-4, rtol=1e-4)
        found = float((latents - level.alpha * x0).std() / noise.std())
        # PNDM takes the mean of v at several levels, which is the v of none.
        if (schedule.name, prediction_type) != ("PNDMScheduler", "v_prediction"):
            near = 0.25 if draws else 0.01  # new noise is 256 numbers
            assert found == pytest.approx(level.sigma, rel=near, abs=2e-3)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, x0, atol=0.2, rtol=0)


@pytest.mark.parametrize("name", [*SCHEDULERS, "edm-euler", "LCMScheduler", "TCDScheduler"])
def test_the_level_that_a_step_announces_is_that_of_the_next(name):
    steps = [*Sampler(GaussianModel()).stream(scheduler=name, steps=6, seed=0, guidance_scale=1)]
    told = [(step.next_alpha, step.next_sigma) for step in steps]
    assert told == [*((step.alpha, step.sigma) for step in steps[1:]), (1, 0)]


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


def test_at_sigma_0_there_is_no_noise_and_x0_is_the_latents():
    level = NoiseLevel.of(1.0, 0.0, "epsilon")
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(level.x0(latents, torch.ones_like(latents)), latents)
    assert torch.equal(level.eps(latents, latents + 1), torch.zeros_like(latents))


def test_at_alpha_0_nothing_of_x0_is_in_the_latents():
    level = NoiseLevel.of(0.0, 1.0, "v_prediction")
    assert level.per_alpha == 0 and NoiseLevel.of(0.5, 0.5, "v_prediction").per_alpha == 2
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    cleaner = torch.full_like(noise, 7.0)
    # All of what was there is gone, whatever it was.
    assert torch.equal(level.noised(cleaner, NoiseLevel.of(0.6, 0.8, "epsilon"), noise), noise)


def test_a_schedule_whose_first_two_timesteps_are_one_begins_at_the_first(sampler):
    """Where it looks for its first timestep it would find the second, and end one step too far."""
    config = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    run = {"steps": 20, "seed": 0, "guidance_scale": 1}
    stream = sampler.stream("a", scheduler={"name": "dpmsolver-multistep", **config}, **run)
    steps = [*stream]
    assert steps[0].timestep == steps[1].timestep and len(steps) == 20
    assert stream.result().latents.isfinite().all()
