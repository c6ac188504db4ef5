"""All three in one run, with guides and a perturbed attention."""

import importlib.util

import pytest
import torch
from pilotfish_control import ControlNet, IPAdapter, Lora

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


def test_their_gradient_together_is_finite_and_the_same_checkpointed(
    sampler, make, pictures, tmp_path
):
    pipeline = sampler.model.pipeline()
    make.adapter(pipeline.unet, tmp_path / "a.safetensors", "plain", 0)
    make.image_encoder().save_pretrained(tmp_path / "image_encoder")
    file = make.lora(sampler.model.differentiable("off").pipeline(), tmp_path, 1)
    net = make.controlnet(pipeline, factor=sampler.model.factor)
    steering = [
        ControlNet(model=net, image=pictures[0], scale=0.2),
        Lora(file=file, weight=[[0, 0.3], [1, 0.1]]),
        IPAdapter(model=str(tmp_path), file="a.safetensors", image=pictures[1], scale=0.3),
    ]
    guides = [make.perturbed(), make.blue(gradient="latents")]
    if sampler.model.id == "emoji":
        guides.append("clip:text='a cat',gradient=latents,cutouts=1")
    run = {"steps": 2, "seed": 1, "guidance_scale": 3.0}

    def latents(*plugins, **options):
        return sampler("a cat", plugins=plugins, **run, **options).latents

    plain, again = (latents(*steering, *guides, checkpointing=c) for c in ("off", "on"))
    assert torch.isfinite(plain).all()
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    for i in range(len(steering)):  # each of them counts
        rest = steering[:i] + steering[i + 1 :]
        assert not torch.allclose(latents(*rest, *guides), plain, atol=1e-3)
    assert not torch.allclose(latents(*steering, guides[0]), plain, atol=1e-3)
