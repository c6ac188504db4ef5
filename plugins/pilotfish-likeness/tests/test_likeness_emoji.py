"""Both guides on the trained model that ships."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pilotfish_emoji import judge as judges
from pilotfish_likeness import Reference

import pilotfish

pytestmark = pytest.mark.slow

RUN = {"steps": 25, "scheduler": "ddim", "num_images": 4, "seed": 100}


@pytest.fixture(scope="module")
def sampler():
    return pilotfish.load()


@pytest.fixture(scope="module")
def picture_file(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "fox.png"
    drawn = sampler("a fox on a teal background", guidance_scale=4, **{**RUN, "num_images": 1})
    drawn.images[0].save(path)
    return path


def seen(sampler, latents):
    with torch.no_grad():
        image = sampler.model.decode(latents)
        return image, [names[0] for names in judges.load().judge(image.clamp(0, 1)).names]


@pytest.mark.parametrize("space", ["latent", "image"])
@pytest.mark.parametrize("prompt", ["a frog on a gray background", "a rocket on a red background"])
def test_at_the_default_scale_reference_halves_its_distance(space, prompt, sampler, picture_file):
    guide = Reference(image=picture_file, space=space)
    distances = []
    for plugins in ([], [guide]):
        latents = sampler(prompt, plugins=plugins, guidance_scale=4, **RUN).latents
        image, _ = seen(sampler, latents)
        run = SimpleNamespace(model=sampler.model, height=64, width=64)
        with torch.no_grad():
            state, step = guide.setup(run), SimpleNamespace(x0=latents, image=image)
            distances.append(guide.loss_guidance(step, state).mean().item())
    assert distances[1] <= 0.5 * distances[0]


@pytest.mark.parametrize("label", ["fox", "frog"])
def test_without_a_prompt_the_models_own_classifier_makes_its_class(label, sampler):
    strong = {"scale": 6, "cutouts": 2, "stop": 0.6, "gradient": "x0"}
    guide = {"use": "classifier", "label": label, **strong}
    run = {**RUN, "scheduler": "euler-ancestral", "steps": 40, "guidance_scale": 1}
    latents = sampler("", plugins=[guide], **run).latents
    assert seen(sampler, latents)[1].count(label) >= 3  # docs/measure.py has 64 pictures
