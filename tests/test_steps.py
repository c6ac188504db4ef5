"""Any number of steps with any scheduler: it runs as in diffusers, or is refused before it begins.

Schedulers here know 40 timesteps instead of 1000, so that all of them can be passed in no time.
"""

import copy
import inspect

import diffusers
import pytest
import torch

from pilotfish import PilotfishError, Plugin, Sampler
from pilotfish.testing import GaussianModel

pytestmark = pytest.mark.slow  # each is short, together they are not

SCHEDULERS = [
    *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete"),
    *("EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "DEISMultistep", "UniPCMultistep", "EDMEuler", "LCM", "TCD"),
    *("SASolver", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"),
]
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = [
    {},
    {"steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
    {"skip_prk_steps": True},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


class Wave(GaussianModel):
    """A network of one line, and any scheduler."""

    def __init__(self, scheduler):
        super().__init__()
        self.made, self.dtype = scheduler, torch.float32

    def new_scheduler(self, spec):
        return copy.deepcopy(self.made)

    def predict(self, latents, timestep, conditioning, **inputs):
        return 0.3 * latents + 0.01 * torch.sin(timestep.float() / 10)


class Late(Plugin):
    """Begins three steps before the end: where two-stage schedulers have a first stage."""

    def __init__(self, num_steps):
        super().__init__()
        self.first = max(0, num_steps - 3)

    def start_latents(self, run):
        return torch.ones(1, 3, 4, 4), self.first


def configured(name):
    kind = getattr(diffusers, f"{name}Scheduler")
    takes = inspect.signature(kind).parameters
    for config in CONFIGS:
        if config.keys() <= takes.keys():
            base = {**SCALED, "clip_sample": False, "num_train_timesteps": 40}
            base |= {"original_inference_steps": 20, **config}
            yield kind(**{key: value for key, value in base.items() if key in takes})


def by_hand(scheduler, steps):
    """The latents as a pipeline of diffusers makes them; None where it cannot."""
    scheduler, generator = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"eta": 0.0, "generator": generator}
    options = {key: value for key, value in options.items() if key in accepted}
    network = Wave(None).predict
    try:
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 3, 4, 4, generator=generator)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            output = network(scaled, timestep, None)
            latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
    except (IndexError, ValueError, RuntimeError, AssertionError):
        return None
    return latents if latents.isfinite().all() else None


def begun(scheduler, steps, *plugins):
    """A run whose options have all been checked; None where it is refused."""
    options = {"steps": steps, "seed": 0, "guidance_scale": 1, "scheduler": "any"}
    try:
        return Sampler(Wave(scheduler)).stream(plugins=plugins, **options)
    except PilotfishError:
        return None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_few_steps_equal_diffusers_or_are_refused_before_the_first(name):
    compared = 0
    for scheduler in configured(name):
        for steps in (1, 2, 3, 4):
            expected, stream = by_hand(scheduler, steps), begun(scheduler, steps)
            if expected is not None:
                assert stream is not None, (scheduler.config, steps)
                assert torch.equal(stream.result().latents, expected), (scheduler.config, steps)
                compared += 1
            elif stream is not None:
                assert stream.result().latents.isfinite().all(), (scheduler.config, steps)
    assert compared


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [39, 40, 41, 100])
def test_many_steps_run_from_the_first_to_the_last_or_are_refused_before(name, steps):
    for scheduler in configured(name):
        stream = begun(scheduler, steps)
        if stream is None:
            assert by_hand(scheduler, steps) is None, scheduler.config
            continue
        for _ in range(3):
            assert next(stream).latents.isfinite().all()
        late = begun(scheduler, steps, Late(len(stream)))
        assert late.result().latents.isfinite().all(), scheduler.config


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "LCMScheduler"])
def test_a_number_of_steps_that_the_model_does_not_know_is_named(sampler, scheduler):
    with pytest.raises(PilotfishError, match="1001 steps"):
        sampler.stream("a", steps=1001, scheduler=scheduler)
