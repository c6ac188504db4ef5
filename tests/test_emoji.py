"""The core on the trained model that ships: guidance that can be seen."""

import pytest
import torch
from pilotfish_emoji import FOLDER
from pilotfish_emoji import judge as judges

import pilotfish
from pilotfish.registry import resolve

pytestmark = pytest.mark.slow

PROMPTS = {
    name: f"a {name} on a {background} background"
    for name, background in (
        ("campfire", "black"),
        ("frog", "gray"),
        ("panda", "white"),
        ("rocket", "red"),
        ("tiger", "purple"),
        ("mushroom", "green"),
        ("castle", "yellow"),
        ("strawberry", "pink"),
    )
}
PALETTE = {"use": "palette", "colors": ["#003355", "#ffaa00"]}
RUN = {"steps": 25, "scheduler": "ddim", "guidance_scale": 4, "num_images": 8, "seed": 100}


@pytest.fixture(scope="module")
def sampler():
    return pilotfish.load()


@pytest.fixture(scope="module")
def plain(sampler):
    """64 unguided pictures' latents, eight seeds of each prompt."""
    return {name: sampler(prompt, **RUN).latents for name, prompt in PROMPTS.items()}


def loss_of(sampler, guide, latents):
    """A guide's own loss on final pictures, (B,): one step at noise level zero."""
    item = resolve(guide).plugin
    with torch.no_grad():
        image = sampler.model.decode(latents)

    class View:
        pass

    View.image = image
    return item.loss_guidance(View())


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
    assert kept >= 0.85 * 64


def test_a_batch_of_four_equals_four_single_runs_within_1e_4(sampler):
    run = {"steps": 10, "plugins": ["blue", PALETTE], "scheduler": "euler-ancestral"}
    batch = sampler(PROMPTS["frog"], seed=5, num_images=4, **run).latents
    singles = [sampler(PROMPTS["frog"], seed=5 + i, **run).latents for i in range(4)]
    # Convolutions sum in another order for another batch size.
    torch.testing.assert_close(batch, torch.cat(singles), atol=1e-4, rtol=0)


def test_the_talks_numbers_turn_the_scene_blue_and_keep_the_fire(sampler, plain):
    talk = {"steps": 50, "scheduler": "lms", "guidance_scale": 8, "num_images": 8, "seed": 100}
    prompt = PROMPTS["campfire"]
    unguided = sampler(prompt, **talk).latents
    guided = sampler(prompt, plugins=["blue:scale=200,every=5"], preset="deep-dive", **talk).latents
    losses = [float(loss_of(sampler, "blue", x).mean()) for x in (unguided, guided)]
    assert losses[1] < 0.7 * losses[0]


def test_no_guide_leaves_the_pictures_equal_to_diffusers(sampler):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(32)
    theirs = pipeline(PROMPTS["campfire"], num_inference_steps=10, generator=generator).images[0]
    ours = sampler(PROMPTS["campfire"], steps=10, seed=32).images[0]
    assert ours.tobytes() == theirs.tobytes()
