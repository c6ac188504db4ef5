"""The core on the trained model that ships: guidance that can be seen."""

from types import SimpleNamespace

import pytest
import torch
from pilotfish_emoji import FOLDER
from pilotfish_emoji import judge as judges

import pilotfish
from pilotfish import Sampler
from pilotfish.hooks.registry import resolve
from pilotfish.models.schedulers import diffusers  # with torchvision mended first

pytestmark = pytest.mark.slow

CAMPFIRE = "a campfire on a black background"
PROMPTS = {
    "campfire": CAMPFIRE,
    "frog": "a frog on a gray background",
    "panda": "a panda on a white background",
    "rocket": "a rocket on a red background",
}
PALETTE = {"use": "palette", "colors": ["#14213d", "#fca311", "#e5e5e5"]}
RUN = {"steps": 25, "scheduler": "ddim", "guidance_scale": 4, "num_images": 2, "seed": 100}


@pytest.fixture(scope="module")
def sampler():
    return pilotfish.load()


@pytest.fixture(scope="module")
def plain(sampler):
    """Eight unguided pictures' latents, two seeds of each prompt."""
    return {name: sampler(prompt, **RUN).latents for name, prompt in PROMPTS.items()}


def loss_of(sampler, guide, latents):
    """A guide's own loss on final pictures, (B,): one step at noise level zero."""
    with torch.no_grad():
        image = sampler.model.decode(latents)
    return resolve(guide).plugin.loss_guidance(SimpleNamespace(image=image))


@pytest.mark.parametrize("guide", ["blue", PALETTE], ids=["blue", "palette"])
def test_at_the_default_scale_a_colour_guide_halves_its_loss_and_keeps_the_object(
    sampler, plain, guide
):
    judge = judges.load()
    before, after, kept = [], [], 0
    for name, prompt in PROMPTS.items():
        latents = sampler(prompt, plugins=[guide], **RUN).latents
        before.append(loss_of(sampler, guide, plain[name]))
        after.append(loss_of(sampler, guide, latents))
        with torch.no_grad():
            verdict = judge.judge(sampler.model.decode(latents).clamp(0, 1))
        kept += sum(found == name for found, *_ in verdict.names)
    assert torch.cat(after).mean() <= 0.5 * torch.cat(before).mean()
    assert kept >= 0.85 * 8  # benchmarks/quality.py has 64 prompts


@pytest.mark.parametrize("guide", ["blue", PALETTE], ids=["blue", "palette"])
def test_a_batch_of_four_equals_four_single_runs_within_1e_4(guide):
    # In float64: in float32 a guide whose loss is nearly met makes full-size steps of rounding,
    # which differs with the batch's size and the processor (docs/guidance.md).
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    exact = Sampler.from_pipeline(pipeline.to(dtype=torch.float64))
    run = {"steps": 5, "plugins": [guide], "scheduler": "euler-ancestral"}
    batch = exact(CAMPFIRE, seed=5, num_images=4, **run).latents
    singles = [exact(CAMPFIRE, seed=5 + i, **run).latents for i in range(4)]
    torch.testing.assert_close(batch, torch.cat(singles), atol=1e-4, rtol=0)


def test_the_talks_numbers_lower_the_blue_loss(sampler):
    # But guidance 4: at the talk's 8, fourth-order LMS is unstable on this model in 50 steps.
    talk = {"steps": 50, "scheduler": "lms", "guidance_scale": 4, "num_images": 4, "seed": 100}
    unguided = sampler(CAMPFIRE, **talk).latents
    guided = sampler(
        CAMPFIRE, plugins=["blue:scale=200,every=5"], preset="deep-dive", **talk
    ).latents
    losses = [float(loss_of(sampler, "blue", x).mean()) for x in (unguided, guided)]
    assert losses[1] < 0.95 * losses[0]


def test_no_guide_leaves_the_pictures_equal_to_diffusers(sampler):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(32)
    theirs = pipeline(CAMPFIRE, num_inference_steps=10, generator=generator).images[0]
    ours = sampler(CAMPFIRE, steps=10, seed=32, guidance_scale=7.5).images[0]
    assert ours.tobytes() == theirs.tobytes()
