"""Without guidance, the same numbers as diffusers, to the bit.

The reference is diffusers alone: its classes, made from the pipeline's configuration by hand.
"""

import inspect

import diffusers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

from pilotfish import Guide, Sampler
from pilotfish.testing import random_pipeline

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmsolver-multistep": "DPMSolverMultistepScheduler",
    "dpmsolver-singlestep": "DPMSolverSinglestepScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "deis-multistep": "DEISMultistepScheduler",
    "unipc-multistep": "UniPCMultistepScheduler",
    "edm-euler": "EDMEulerScheduler",
}
NEEDS_TORCHSDE = {"DPMSolverSDEScheduler"}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
STEPS = 4


class Red(Guide):
    def loss_guidance(self, step):
        return step.image[:, 0].mean(dim=(1, 2))


def made(pipeline, name, **config):
    """What a user of diffusers writes: the class, with the pipeline's configuration."""
    kind = getattr(diffusers, SCHEDULERS[name])
    if "clip_sample" in inspect.signature(kind).parameters:
        config = {"clip_sample": False, **config}
    return kind.from_config(pipeline.scheduler.config, **config)


def theirs(pipeline, scheduler, seeds=(3,), **options):
    mild = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": mild}, requires_safety_checker=False
    )
    pipe.scheduler = scheduler  # later: one that it is made with it may change
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red cat",
        num_inference_steps=STEPS,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images


@pytest.fixture
def ours(sampler):
    """The latents of a run: `ours(scheduler, plugin, ..., **options)`."""

    def run(scheduler, *plugins, sampler=sampler, **options):
        options = {"steps": STEPS, "seed": 3, "scheduler": scheduler, **options}
        return sampler("a red cat", plugins=plugins, **options).latents

    return run


def test_every_scheduler_that_the_pipeline_accepts_is_compared():
    accepted = {member.name for member in KarrasDiffusionSchedulers}
    assert accepted == {*SCHEDULERS.values(), *NEEDS_TORCHSDE}


@every_scheduler
def test_two_guided_images_that_are_not_square_equal_diffusers(pipeline, ours, name):
    options = {"negative_prompt": "blue", "height": 48, "width": 32, "guidance_scale": 7.5}
    expected = theirs(pipeline, made(pipeline, name), seeds=(3, 4), **options)
    assert torch.equal(ours(name, num_images=2, **options), expected)


@every_scheduler
def test_an_unguided_run_by_class_name_equals_diffusers(pipeline, ours, name):
    expected = theirs(pipeline, made(pipeline, name), guidance_scale=1.0)
    assert torch.equal(ours(SCHEDULERS[name], guidance_scale=1.0), expected)


@every_scheduler
def test_v_prediction_with_a_scheduler_object_equals_diffusers(ours, name):
    pipeline = random_pipeline("v_prediction")
    scheduler = made(pipeline, name)
    before = dict(vars(scheduler))
    latents = ours(scheduler, sampler=Sampler.from_pipeline(pipeline))
    assert all(vars(scheduler)[key] is value for key, value in before.items())  # a copy ran
    assert torch.equal(latents, theirs(pipeline, scheduler))


@every_scheduler
def test_bfloat16_with_a_table_equals_diffusers_in_bfloat16(ours, name):
    pipeline = random_pipeline(dtype=torch.bfloat16)
    config = {"num_train_timesteps": 900}
    latents = ours({"name": name, **config}, sampler=Sampler.from_pipeline(pipeline))
    assert latents.dtype == torch.bfloat16
    assert torch.equal(latents, theirs(pipeline, made(pipeline, name, **config)))


@every_scheduler
def test_a_guide_changes_the_latents_and_at_scale_zero_not_a_bit(pipeline, ours, name):
    expected = theirs(pipeline, made(pipeline, name), guidance_scale=1.0)
    assert torch.equal(ours(name, Red(scale=0), guidance_scale=1.0), expected)
    guided = ours(name, Red(scale=1), guidance_scale=1.0)
    assert guided.isfinite().all()
    assert not torch.equal(guided, expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_guidance_scale_means_what_it_means_in_diffusers(pipeline, ours, guidance_scale):
    expected = theirs(pipeline, made(pipeline, "euler"), guidance_scale=guidance_scale)
    assert torch.equal(ours("euler", guidance_scale=guidance_scale), expected)


def test_the_models_own_scheduler_is_the_pipelines(pipeline, ours):
    assert torch.equal(ours(None), theirs(pipeline, made(pipeline, "ddim")))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "euler"])
def test_a_model_whose_scheduler_clips_equals_diffusers(ours, name):
    pipeline = random_pipeline()
    pipeline.scheduler = made(pipeline, "ddim", clip_sample=True)
    kind = getattr(diffusers, SCHEDULERS[name])
    expected = theirs(pipeline, kind.from_config(pipeline.scheduler.config))
    assert torch.equal(ours(name, sampler=Sampler.from_pipeline(pipeline)), expected)


def test_the_pictures_equal_those_of_diffusers(pipeline, sampler):
    ours = sampler("a red cat", steps=STEPS, seed=3).images[0]
    their = pipeline(
        "a red cat", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert ours.tobytes() == their.tobytes()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler-ancestral", "kdpm2-ancestral"])
def test_a_batch_equals_single_runs(ours, name):
    guide = Red(scale=1, gradient="latents")
    batch = ours(name, guide, num_images=3)
    singles = torch.cat([ours(name, guide, seed=3 + i) for i in range(3)])
    # Convolutions sum in another order for another batch size. This random model's latents
    # are tens in size, where a trained model's are one.
    size = float(singles.abs().max())
    torch.testing.assert_close(batch / size, singles / size, atol=1e-4, rtol=0)


def test_an_unmistakable_beginning_of_a_name_is_enough(pipeline, ours):
    expected = theirs(pipeline, made(pipeline, "unipc-multistep"))
    assert torch.equal(ours("unipc"), expected)


def test_a_table_changes_the_schedulers_configuration(pipeline, ours):
    karras = made(pipeline, "dpmsolver-multistep", use_karras_sigmas=True)
    table = {"name": "dpmsolver-multistep", "use_karras_sigmas": True}
    expected = theirs(pipeline, karras)
    assert torch.equal(ours(table), expected)
    assert not torch.equal(ours("dpmsolver-multistep"), expected)
