"""Attention where `sites` says it is: changed in a run, against networks changed by hand."""

from contextlib import contextmanager

import pytest
import torch

import pilotfish
from pilotfish.testing import random_sampler
from pilotfish.testing.random_models import random_pipeline

SIZE = {"height": 32, "width": 48}
CELLS = 16 * 24  # of the VAE
IMAGE = CELLS // 4
FAMILIES = {
    "sd3": {"max_sequence_length": 12, "guidance_scale": 1.0},
    "flux": {"max_sequence_length": 60},
    "z-image": {"max_sequence_length": 60, "guidance_scale": 0.0},
    "qwen-image": {"max_sequence_length": 250},
    "flux2-klein": {"max_sequence_length": 120, "guidance_scale": 1.0},
}
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
# Which tokens are the image's, said here: behind the prompt's 60 and 120 tokens, or first.
PLACES = [
    ("sd3", DOUBLE, slice(None)),
    ("flux", DOUBLE, slice(None)),
    ("flux", SINGLE, slice(60, None)),
    ("z-image", "noise_refiner.0.attention", slice(0, IMAGE)),
    ("z-image", "layers.0.attention", slice(0, IMAGE)),
    ("qwen-image", DOUBLE, slice(None)),
    ("flux2-klein", DOUBLE, slice(None)),
    ("flux2-klein", SINGLE, slice(120, None)),
]


class Halved:
    """A processor of attention that gives half for image tokens."""

    def __init__(self, own, image):
        self.own, self.image = own, image

    def __call__(self, attn, *arguments, **options):
        output = self.own(attn, *arguments, **options)
        several = isinstance(output, tuple)
        image, *text = output if several else (output,)
        image = image.clone()
        image[:, self.image] *= 0.5
        return (image, *text) if several else image


class Halves(pilotfish.Plugin):
    """Halves the attention of one site within this run's calls."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def around_network(self, step):
        (site,) = [s for s in step.run.model.sites if s.name == self.name]
        return halved(site)


@contextmanager
def halved(site):
    own = site.module.processor
    site.module.processor = Halved(own, site.image)
    try:
        yield
    finally:
        site.module.processor = own


def theirs(family, name, image):
    pipeline = random_pipeline(family=family)
    module = pipeline.transformer.get_submodule(name)
    module.processor = Halved(module.processor, image)
    found = pipeline(
        prompt="a cat",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        output_type="pt",
        **SIZE,
        **FAMILIES[family],
    ).images
    return found


@pytest.mark.parametrize(("family", "name", "image"), PLACES)
def test_attention_changed_at_a_site_is_that_of_a_network_changed_by_hand(family, name, image):
    sampler = random_sampler(family=family)
    run = {"steps": 2, "seed": 3, **SIZE, **FAMILIES[family]}
    changed = sampler.stream("a cat", plugins=[Halves(name)], **run)
    beside = sampler.stream("a cat", **run)
    for _ in zip(changed, beside, strict=True):
        pass
    plain = sampler("a cat", **run).latents
    assert torch.equal(beside.result().latents, plain)
    latents = changed.result().latents
    assert not torch.equal(latents, plain)
    with torch.no_grad():
        picture = sampler.model.decode(latents).clamp(0, 1)
    torch.testing.assert_close(picture, theirs(family, name, image), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_all_the_attention_that_sees_image_tokens_in_the_order_of_the_network(family):
    model = random_sampler(family=family).model
    names = [name for name, _ in model.denoiser.named_modules()]
    expected = [n for n in names if n.endswith((".attn", ".attention"))]
    found = [site.name for site in model.sites]
    assert sorted(found) == sorted(n for n in expected if not n.startswith("context_refiner"))
    called = []
    handles = [
        site.module.register_forward_hook(lambda *_, name=site.name: called.append(name))
        for site in model.sites
    ]
    sampler = pilotfish.Sampler(model)
    sampler("a cat", steps=1, seed=0, **SIZE, **FAMILIES[family])
    for handle in handles:
        handle.remove()
    assert called[: len(found)] == found
