"""All three in one run, with guides and a perturbed attention."""

import importlib.util
import logging
import warnings

import pytest
import torch
from pilotfish_control import ControlNet, IPAdapter, Lora
from transformers.utils.logging import is_progress_bar_enabled

MODELS = [
    "stable-diffusion",
    pytest.param(
        "emoji",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                importlib.util.find_spec("pilotfish_clip") is None, reason="no pilotfish-clip"
            ),
        ],
    ),
]


@pytest.fixture(params=MODELS)
def sampler(request, samplers):
    """The random model, and the emoji model, which brings a CLIP."""
    if request.param == "emoji":
        return request.getfixturevalue("emoji_sampler")
    return samplers(request.param)


@pytest.fixture
def steering(make, pictures, tmp_path):
    """One of each for a model."""

    def of(model):
        pipeline = model.pipeline()
        make.adapter(pipeline.unet, tmp_path / "a.safetensors", "plain", 0)
        make.image_encoder().save_pretrained(tmp_path / "image_encoder")
        file = make.lora(model.differentiable("off").pipeline(), tmp_path, 1)
        net = make.controlnet(pipeline, factor=model.factor)
        return [
            ControlNet(model=net, image=pictures[0], scale=0.2),
            Lora(file=file, weight=[[0, 0.3], [1, 0.1]]),
            IPAdapter(model=str(tmp_path), file="a.safetensors", image=pictures[1], scale=0.3),
        ]

    return of


def latents(sampler, plugins, **options):
    run = {"steps": 2, "seed": 1, "guidance_scale": 3.0, **options}
    return sampler("a cat", plugins=plugins, **run).latents


def test_their_gradient_together_is_finite_and_the_same_checkpointed(sampler, steering, make):
    clip = ["clip:text='a cat',gradient=latents,cutouts=1"] if sampler.model.id == "emoji" else []
    plugins = [
        *steering(sampler.model),
        make.perturbed(),
        make.blue(gradient="latents"),
        *clip,
    ]
    plain, again = (latents(sampler, plugins, checkpointing=c) for c in ("off", "on"))
    assert torch.isfinite(plain).all()
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


def test_each_of_them_counts_and_each_may_be_left_out(samplers, steering, make):
    sampler = samplers("stable-diffusion")
    plugins = [*steering(sampler.model), make.blue(gradient="latents")]
    whole = latents(sampler, plugins)
    for i in range(len(plugins)):
        rest = latents(sampler, plugins[:i] + plugins[i + 1 :])
        assert not torch.allclose(rest, whole, atol=1e-3)
    # The order of unlike ones is of no account: each adds to what the network is told.
    torch.testing.assert_close(latents(sampler, plugins[::-1]), whole, rtol=1e-5, atol=1e-4)


def test_the_loaders_leave_no_logger_and_no_warning_silent(samplers, steering):
    names = ("diffusers", "transformers", "peft")
    before = [logging.getLogger(name).level for name in names]
    filters, bars = list(warnings.filters), is_progress_bar_enabled()
    sampler = samplers("stable-diffusion")
    latents(sampler, steering(sampler.model), steps=1)
    assert [logging.getLogger(name).level for name in names] == before
    assert warnings.filters == filters and is_progress_bar_enabled() == bars
