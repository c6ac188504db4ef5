"""Without guidance, the same numbers as diffusers, to the bit."""

import diffusers
import pytest
import torch

from pilotfish import Guide, Sampler
from pilotfish.models.schedulers import available
from pilotfish.testing import random_pipeline

SCHEDULERS = sorted(available())


class Red(Guide):
    def loss_guidance(self, step):
        return step.image[:, 0].mean(dim=(1, 2))


def theirs(pipeline, scheduler, steps=4, seed=3, guidance_scale=7.5, **options):
    ours = Sampler.from_pipeline(pipeline).model.new_scheduler(scheduler)
    pipe = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": ours}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red cat",
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    ).images


def test_every_scheduler_the_issue_names_is_among_those_tested():
    wanted = (
        "ddim ddpm pndm lms euler euler-ancestral heun dpmsolver-multistep dpmsolver-singlestep "
        "unipc-multistep deis-multistep kdpm2 kdpm2-ancestral"
    )
    assert set(wanted.split()) <= set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_plugins_the_latents_equal_diffusers(pipeline, latents_of, scheduler):
    expected = theirs(pipeline, scheduler, negative_prompt="blue")
    assert torch.equal(latents_of(scheduler=scheduler, negative_prompt="blue"), expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_zero_scale_leaves_the_latents_bit_identical(pipeline, latents_of, scheduler):
    assert torch.equal(latents_of(Red(scale=0), scheduler=scheduler), theirs(pipeline, scheduler))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_guide_changes_the_latents(pipeline, latents_of, scheduler):
    guided = latents_of(Red(scale=1), scheduler=scheduler)
    assert guided.isfinite().all()
    assert not torch.equal(guided, theirs(pipeline, scheduler))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_v_prediction_equals_diffusers(scheduler):
    pipeline = random_pipeline("v_prediction")
    ours = Sampler.from_pipeline(pipeline)("a red cat", steps=4, seed=3, scheduler=scheduler)
    assert torch.equal(ours.latents, theirs(pipeline, scheduler))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_bfloat16_equals_diffusers_in_bfloat16(scheduler):
    pipeline = random_pipeline(dtype=torch.bfloat16)
    ours = Sampler.from_pipeline(pipeline)("a red cat", steps=4, seed=3, scheduler=scheduler)
    assert ours.latents.dtype == torch.bfloat16
    assert torch.equal(ours.latents, theirs(pipeline, scheduler))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_guidance_scale_means_what_it_means_in_diffusers(pipeline, latents_of, guidance_scale):
    expected = theirs(pipeline, "euler", guidance_scale=guidance_scale)
    assert torch.equal(latents_of(scheduler="euler", guidance_scale=guidance_scale), expected)


def test_a_size_that_is_not_square_equals_diffusers(pipeline, latents_of):
    expected = theirs(pipeline, "ddim", height=48, width=32)
    assert torch.equal(latents_of(scheduler="ddim", height=48, width=32), expected)


def test_the_pictures_equal_those_of_diffusers(pipeline, sampler):
    ours = sampler("a red cat", steps=4, seed=3).images[0]
    their = pipeline(
        "a red cat", num_inference_steps=4, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert ours.tobytes() == their.tobytes()


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler-ancestral", "kdpm2-ancestral"])
@pytest.mark.parametrize("preset", ["balanced", "deep-dive"])
def test_a_batch_of_four_equals_four_single_runs(latents_of, scheduler, preset):
    guide = Red(scale=1, gradient="latents")
    batch = latents_of(guide, num_images=4, scheduler=scheduler, preset=preset)
    for i in range(4):
        single = latents_of(guide, seed=3 + i, scheduler=scheduler, preset=preset)
        # Convolutions sum in another order for another batch size. This random model's latents
        # are tens in size, where a trained model's are one.
        size = float(single.abs().max())
        torch.testing.assert_close(batch[i : i + 1] / size, single / size, atol=1e-4, rtol=0)


def test_a_scheduler_may_be_given_by_name_class_name_or_object(pipeline, latents_of):
    expected = latents_of(scheduler="euler-ancestral")
    assert torch.equal(latents_of(scheduler="EulerAncestralDiscreteScheduler"), expected)
    object_ = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(latents_of(scheduler=object_), expected)
    assert object_.num_inference_steps is None  # the run used a copy


def test_an_unmistakable_beginning_of_a_name_is_enough(latents_of):
    assert torch.equal(latents_of(scheduler="unipc"), latents_of(scheduler="unipc-multistep"))


def test_a_table_changes_the_schedulers_configuration(latents_of):
    karras = {"name": "dpmsolver-multistep", "use_karras_sigmas": True}
    assert not torch.equal(
        latents_of(scheduler=karras), latents_of(scheduler="dpmsolver-multistep")
    )
