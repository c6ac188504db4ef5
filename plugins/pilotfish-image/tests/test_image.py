"""What all three plugins keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pilotfish_image import Img2Img, Inpaint, Optimize
from pilotfish_kit import parametrize_with_checks

from pilotfish import Run
from pilotfish.testing import random_sampler

PICTURE = Path(__file__).parents[1] / "docs" / "drawing.png"
PLUGINS = {
    "img2img": Img2Img(image=PICTURE, strength=1),
    "inpaint": Inpaint(image=PICTURE, mask=(0.25, 0, 0.75, 0.6)),
    "optimize": Optimize(optimizer="adamw", schedule="cosine", weight_decay=0.1),
}


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.mark.slow
@parametrize_with_checks([*PLUGINS.values(), Img2Img(image=PICTURE, start_step=1), Optimize()])
def test_plugins_keep_the_contract_of_plugins(plugin, check, random_sampler):
    check(plugin, random_sampler)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_run_is_repeated_from_its_file(sampler, name):
    result = sampler("a red cat", plugins=[PLUGINS[name]], steps=3, seed=0)
    (table,) = Run.parse(result.run.to_toml())["plugins"]
    assert table["use"] == name
    again = sampler("a red cat", plugins=[table], steps=3, seed=0)
    assert torch.equal(again.latents, result.latents)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (f"img2img:image={PICTURE},strength=1", "img2img"),
        (f"inpaint:image={PICTURE},mask=[0.25,0,0.75,0.6]", "inpaint"),
        ("optimize:optimizer=adamw,schedule=cosine,weight_decay=0.1", "optimize"),
    ],
)
def test_settings_may_be_written_on_the_command_line(sampler, use, name):
    written, made = (
        sampler("a red cat", plugins=[plugin], steps=2, seed=0).latents
        for plugin in (use, PLUGINS[name])
    )
    assert torch.equal(written, made)


def test_one_instance_serves_two_runs_at_once(sampler):
    plugins = [PLUGINS["inpaint"], PLUGINS["optimize"]]
    prompts = ("a red cat", "a puppy")
    streams = [sampler.stream(p, plugins=plugins, steps=3, seed=5) for p in prompts]
    for _ in zip(*streams, strict=True):
        pass
    for prompt, stream in zip(prompts, streams, strict=True):
        alone = sampler(prompt, plugins=plugins, steps=3, seed=5).latents
        assert torch.equal(stream.result().latents, alone)
