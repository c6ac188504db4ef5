"""Every scheduler that runs is saved, described and replayed to the bit, whatever it was made of.

The reference is the diffusers pipeline that holds this very object.
"""

import diffusers
import numpy as np
import pytest
import torch

from pilotfish import InputError, Run, Sampler
from pilotfish.testing import random_pipeline

pytestmark = pytest.mark.slow  # each is short, together they are not

BETAS = np.linspace(1e-4, 2e-2, 1000, dtype=np.float32)
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS = [
    *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete"),
    *("EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "DEISMultistep", "UniPCMultistep", "EDMEuler"),
]
OTHERS = [
    *("LCM", "TCD", "DDIMInverse", "DDIMParallel", "DDPMParallel", "SASolver"),
    *("DPMSolverMultistepInverse", "EDMDPMSolverMultistep"),
]


class Louder(diffusers.EulerDiscreteScheduler):
    """One that diffusers does not have, with a setting of its own."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, num_train_timesteps=1000, prediction_type="epsilon", louder=1.0):
        super().__init__(num_train_timesteps, prediction_type=prediction_type)

    def step(self, output, *args, **options):
        return super().step(output * self.config.louder, *args, **options)


class Outer:
    class Within(diffusers.DDIMScheduler):
        pass


def made(name, **config):
    kind = getattr(diffusers, f"{name}Scheduler")
    config = {**SCALED, "clip_sample": False, **config}
    takes = kind.__init__.__wrapped__.__code__.co_varnames
    return kind(**{key: value for key, value in config.items() if key in takes})


PIPELINE = random_pipeline()


def theirs(scheduler, steps=4):
    own, PIPELINE.scheduler = PIPELINE.scheduler, scheduler
    latents = PIPELINE(
        "a red cat",
        num_inference_steps=steps,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    PIPELINE.scheduler = own
    return latents


def ours_and_again(sampler, scheduler):
    """The latents of a run, and those of the run that its file holds."""
    result = sampler("a red cat", steps=4, guidance_scale=1, seed=3, scheduler=scheduler)
    options = Run.parse(result.run.to_toml())
    options = {key: value for key, value in options.items() if key not in ("model", "dtype")}
    return result.latents, sampler(**options).latents


@pytest.fixture
def check(sampler):
    def run(scheduler):
        ours, again = ours_and_again(sampler, scheduler)
        expected = theirs(scheduler)
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)
        assert torch.equal(again, expected)

    return run


@pytest.mark.parametrize("name", [*KARRAS, *OTHERS])
def test_an_object_is_repeated_to_the_bit_also_when_it_ran_elsewhere(check, name):
    scheduler = made(name, num_train_timesteps=900)
    theirs(scheduler, steps=5)
    check(scheduler)


@pytest.mark.parametrize("name", OTHERS)
def test_a_scheduler_that_the_pipelines_do_not_list_is_found_by_its_class_name(sampler, name):
    kind = getattr(diffusers, f"{name}Scheduler")
    expected = theirs(kind.from_config(PIPELINE.scheduler.config))
    for latents in ours_and_again(sampler, f"{name}Scheduler"):
        assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "UniPCMultistep"])
@pytest.mark.parametrize(
    "betas",
    [BETAS, BETAS.astype(np.float64), BETAS.tolist(), tuple(BETAS.tolist()), torch.tensor(BETAS)],
    ids=["array", "float64", "list", "tuple", "tensor"],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_trained_betas_of_any_kind_are_repeated_to_the_bit(check, name, betas):
    check(made(name, trained_betas=betas))


@pytest.mark.parametrize(
    "config",
    [
        {"beta_end": np.float64(0.013)},
        {"beta_end": np.float32(0.013)},
        {"beta_start": np.float16(0.001), "beta_schedule": "linear"},
        {"beta_end": torch.tensor(0.013), "beta_schedule": "linear"},
        {"num_train_timesteps": np.int64(900), "steps_offset": np.int32(1)},
        {"set_alpha_to_one": np.bool_(False)},
    ],
    ids=["float64", "float32", "float16", "tensor", "int", "bool"],
)
def test_numbers_of_numpy_and_torch_in_a_configuration_are_repeated_to_the_bit(check, config):
    check(made("DDIM", **config))


def test_a_table_with_numbers_of_numpy_is_what_diffusers_makes_of_it(sampler, pipeline):
    config = {"beta_end": np.float32(0.013), "num_train_timesteps": np.int64(900)}
    expected = theirs(diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **config))
    for latents in ours_and_again(sampler, {"name": "ddim", **config}):
        assert torch.equal(latents, expected)


def test_none_where_the_models_own_is_not_is_repeated_to_the_bit():
    pipeline = random_pipeline()
    pipeline.scheduler = made("DDIM", trained_betas=BETAS.tolist(), steps_offset=1)
    sampler, scheduler = Sampler.from_pipeline(pipeline), made("DDIM", steps_offset=1)
    expected = theirs(scheduler)
    for latents in ours_and_again(sampler, scheduler):
        assert torch.equal(latents, expected)
    assert not torch.equal(theirs(pipeline.scheduler), expected)


def test_an_object_that_keeps_settings_of_another_kind_is_repeated_to_the_bit(check):
    pndm = made("PNDM", skip_prk_steps=True)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pndm.config)
    assert "skip_prk_steps" in scheduler.config
    check(scheduler)


def test_a_solver_within_a_solver_is_repeated_to_the_bit(check):
    check(made("UniPCMultistep", solver_p=made("DDIM"), disable_corrector=[0, 1]))


def test_infinite_settings_are_repeated_to_the_bit(check):
    check(made("DPMSolverMultistep", lambda_min_clipped=-float("inf")))
    check(made("EulerDiscrete", sigma_min=0.05, sigma_max=9.0, use_karras_sigmas=True))


def test_a_class_of_ones_own_is_repeated_to_the_bit(check, sampler):
    check(Louder(louder=1.25))
    check(Outer.Within(**SCALED, clip_sample=False))
    assert not torch.equal(theirs(Louder(louder=1.25)), theirs(Louder()))
    result = sampler("a", steps=2, seed=0, scheduler=Louder(louder=1.25))
    assert result.run.scheduler == {"name": f"{__name__}:Louder", "louder": 1.25}


def test_a_class_within_a_function_is_refused(sampler):
    class Hidden(diffusers.DDIMScheduler):
        pass

    with pytest.raises(InputError, match="defined within a function"):
        sampler("a", steps=2, scheduler=Hidden(clip_sample=False))


def later_betas(scheduler):
    scheduler.betas = scheduler.betas / 2


def later_alphas(scheduler):
    scheduler.alphas_cumprod[10] = 0.5


def later_last_alpha(scheduler):
    scheduler.final_alpha_cumprod = torch.tensor(0.9)


def later_scale(scheduler):
    scheduler.init_noise_sigma = 2.0


@pytest.mark.parametrize("change", [later_betas, later_alphas, later_last_alpha, later_scale])
def test_an_object_that_was_changed_after_it_was_made_is_refused(sampler, change):
    scheduler = made("DDIM")
    change(scheduler)
    with pytest.raises(InputError, match="DDIMScheduler has other .* changed after it was made"):
        sampler("a", steps=4, scheduler=scheduler)


def test_a_setting_that_was_changed_after_it_was_made_counts(check):
    scheduler = made("DPMSolverMultistep")
    plain = theirs(scheduler)
    scheduler.register_to_config(use_karras_sigmas=True, solver_order=3)
    check(scheduler)
    assert not torch.equal(theirs(scheduler), plain)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_a_scheduler_by_name_does_not_clip_where_the_models_own_says_nothing_of_it(name):
    """Their class's own default is to clip, and latents are no pixels."""
    pipeline = random_pipeline()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        {k: v for k, v in pipeline.scheduler.config.items() if k != "clip_sample"}
    )
    assert "clip_sample" not in pipeline.scheduler.config
    run = {"steps": 3, "seed": 0, "scheduler": name.lower()}
    ours = Sampler.from_pipeline(pipeline)("a red cat", **run).latents
    kind = getattr(diffusers, f"{name}Scheduler")
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, clip_sample=False)
    theirs = pipeline(
        "a red cat", num_inference_steps=3, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert torch.equal(ours, theirs)
