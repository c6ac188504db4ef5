"""The core on the trained model that ships: guidance that can be seen."""

from types import SimpleNamespace

import pytest
import torch
from pilotfish_emoji import FOLDER

import pilotfish
from pilotfish.registry import resolve

pytestmark = pytest.mark.slow

CAMPFIRE = "a campfire on a black background"


@pytest.fixture(scope="module")
def sampler():
    return pilotfish.load()


def loss_of(sampler, guide, latents):
    """A guide's own loss on final pictures, (B,): one step at noise level zero."""
    with torch.no_grad():
        image = sampler.model.decode(latents)
    return resolve(guide).plugin.loss_guidance(SimpleNamespace(image=image))


def test_the_talks_numbers_lower_the_blue_loss(sampler):
    talk = {"steps": 50, "scheduler": "lms", "guidance_scale": 8, "num_images": 4, "seed": 100}
    unguided = sampler(CAMPFIRE, **talk).latents
    guided = sampler(
        CAMPFIRE, plugins=["blue:scale=200,every=5"], preset="deep-dive", **talk
    ).latents
    losses = [float(loss_of(sampler, "blue", x).mean()) for x in (unguided, guided)]
    assert losses[1] < losses[0]


def test_no_guide_leaves_the_pictures_equal_to_diffusers(sampler):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(32)
    theirs = pipeline(CAMPFIRE, num_inference_steps=10, generator=generator).images[0]
    ours = sampler(CAMPFIRE, steps=10, seed=32).images[0]
    assert ours.tobytes() == theirs.tobytes()
