"""The page that compares: its plugins do what they stand for in the other tools."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

import pilotfish
from pilotfish import Plugin, Sampler
from pilotfish.testing import random_pipeline, random_sampler

PAGE = (Path(__file__).parents[1] / "docs" / "compare.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
ABOUT = {"steps": 5, "guidance_scale": 4.0, "seed": 3}


@pytest.fixture(scope="module")
def page():
    """The names of the page, after all its blocks."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilotfish, "load", random_sampler)  # the page's own model takes longer
        for block in BLOCKS:
            exec(compile(block, "compare.md", "exec"), names)
    return names


def test_without_guidance_after_a_part_the_picture_is_that_of_diffusers_callback(page):
    pipeline = random_pipeline()
    theirs = pipeline(
        "a cat",
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4),
        output_type="latent",
    ).images
    sampler = Sampler.from_pipeline(pipeline)
    ours = sampler("a cat", plugins=[page["Cutoff"](after=0.4)], **ABOUT).latents
    # The callback's last steps call the network with half the batch: another order of sums.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - sampler("a cat", **ABOUT).latents).abs().max() > 1e-2


def test_a_guider_is_asked_with_what_the_network_said_and_the_step(page):
    seen = []

    class Sees(Plugin):
        def combine_predictions(self, prediction, cond, uncond, step):
            seen.append((prediction, cond, uncond))

    random_sampler()("a cat", plugins=[page["Apg"](guidance_scale=4.0), Sees()], **ABOUT)
    guider = diffusers.guiders.AdaptiveProjectedGuidance(guidance_scale=4.0)
    for index, (prediction, cond, uncond) in enumerate(seen):
        guider.set_state(index, 5, torch.tensor(0))
        torch.testing.assert_close(prediction, guider.forward(cond, uncond).pred)


def test_all_of_a_channels_mean_can_go(page):
    seen = []

    class Sees(Plugin):
        def on_predicted_x0(self, x0, step):
            seen.append(x0.mean(dim=(2, 3)).abs().max())

    random_sampler()("a cat", plugins=[page["Centre"](amount=1.0), Sees()], **ABOUT)
    assert max(seen) < 1e-5


def test_the_guided_picture_comes_nearer_to_what_was_measured(page):
    losses = page["result"].trace.losses("residual")
    watching = page["measured"](page["smaller"], page["y"], gradient="none")
    about = {"preset": "dps", "scheduler": "ddpm", "steps": 10, "seed": 2}
    free = page["sampler"]("a fox", plugins=[watching], **about).trace.losses("residual")
    assert losses[0] == pytest.approx(free[0]) and losses[-1] < free[-1]


def test_every_source_is_used_and_every_mark_has_a_source():
    sources = set(re.findall(r"^\| ([A-Z]\d+) \|", PAGE, re.M))
    assert sources == set(re.findall(r"\[([A-Z]\d+)\]", PAGE))
