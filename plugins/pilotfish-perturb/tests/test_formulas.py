"""Each prediction and its gradient against the paper's formula, written out; in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pilotfish_perturb import Autoguidance, Pag, Sag, Seg, Slg
from pilotfish_perturb.attention import attending, own_token, smoothed
from pilotfish_perturb.layers import all_layers, chosen
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate

from pilotfish import Guide, Plugin, Sampler
from pilotfish.testing import random_pipeline, random_sampler

PROMPT, SCALE = "a red cat", 2.5


@pytest.fixture(scope="module")
def sampler():
    return random_sampler(dtype=torch.float64)


@pytest.fixture
def unet():
    """The sampler's network once more."""
    return random_pipeline(dtype=torch.float64).unet


@pytest.fixture(scope="module")
def weaker(tmp_path_factory):
    """The folder of another model of that kind."""
    folder = tmp_path_factory.mktemp("weaker")
    random_pipeline(seed=7).save_pretrained(folder)
    return folder


class Red(Guide):
    def loss_guidance(self, step):
        return step.x0.square().mean(dim=(1, 2, 3))


class Probe(Plugin):
    """Keeps what the network was asked first, what the plugins before it made of the answer, and
    the gradient of that."""

    asked = None

    def network_inputs(self, step):
        if self.asked is None:
            self.asked = (step.timestep, step.conditioning["values"])

    def combine_predictions(self, prediction, uncond, step):
        leaf, self.guided = step._state.latents, uncond is not None
        self.latents, self.abar = leaf.detach(), step.alpha**2
        self.prediction, self.gradient = prediction.detach(), gradient(prediction, leaf)


class Around(Plugin):
    """With one of these no further prediction goes in one batch with the others."""

    def around_network(self):
        pass


def gradient(prediction, latents):
    weights = torch.linspace(-1, 1, prediction.numel(), dtype=prediction.dtype)
    loss = (prediction * weights.reshape(prediction.shape)).sum()
    return torch.autograd.grad(loss, latents, retain_graph=True)[0]


class Explicit:
    """Self-attention written out."""

    def __init__(self, queries=lambda queries: queries, weights=lambda weights: weights):
        self.queries, self.weights = queries, weights

    def __call__(self, attn, hidden_states, *args, **kwargs):
        parts = [part(hidden_states) for part in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = (attn.head_to_batch_dim(part) for part in parts)
        self.map = (self.queries(query) @ key.mT * attn.scale).softmax(dim=-1)
        return attn.to_out[0](attn.batch_to_head_dim(self.weights(self.map) @ value))


def blur_matrix(height, width, deviation, reach):
    """What scipy's Gaussian makes of each cell, (HW, HW)."""
    cells = np.eye(height * width).reshape(-1, height, width)
    maps = [gaussian_filter(c, deviation, mode="mirror", radius=reach) for c in cells]
    return torch.from_numpy(np.stack(maps).reshape(height * width, -1)).mT


def middle(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0]


def pag(unet, ask, abar, own):
    middle(unet).attn1.set_processor(Explicit(weights=lambda w: torch.eye(w.shape[-1]).to(w)))
    return own - ask()


def seg(unet, ask, abar, own):
    middle(unet).attn1.set_processor(Explicit(lambda q: q.mean(dim=1, keepdim=True).expand_as(q)))
    return own - ask()


def seg_blurred(unet, ask, abar, own):
    # 6 * 0.7 is 4.2: five tokens, two on each side.
    middle(unet).attn1.set_processor(Explicit(lambda q: blur_matrix(8, 8, 0.7, 2) @ q))
    return own - ask()


def slg(unet, ask, abar, own):
    middle(unet).forward = lambda hidden_states, **kwargs: hidden_states
    return own - ask()


def autoguidance(unet, ask, abar, own):
    other = random_pipeline(seed=7).unet.to(torch.float64)
    unet.forward = other.forward
    return own - ask()


def sag(unet, ask, abar, own):
    """Algorithm 1, of the prediction for the negative prompt where there is one (equation 25)."""
    look = Explicit()
    middle(unet).attn1.set_processor(look)
    own = ask(negative=True)
    heads = middle(unet).attn1.heads
    got = look.map.reshape(-1, heads, 64, 64).mean(dim=1).sum(dim=1)  # by the queries
    salient = interpolate((got.reshape(-1, 1, 8, 8) > 1).double(), (16, 16))
    latents = ask.latents
    x0 = (latents - math.sqrt(1 - abar) * own) / math.sqrt(abar)
    blurred = (x0.flatten(2) @ blur_matrix(16, 16, 1.0, 4).mT).reshape(x0.shape)
    mixed = salient * blurred + (1 - salient) * x0
    return own - ask(math.sqrt(abar) * mixed + math.sqrt(1 - abar) * own, negative=True)


CASES = {
    "pag": (Pag, pag),
    "seg": (Seg, seg),
    "seg blurred": (lambda **s: Seg(blur=0.7, **s), seg_blurred),
    "slg": (lambda **s: Slg(stop=1, **s), slg),
    "autoguidance": (Autoguidance, autoguidance),
    "autoguidance by layers": (Autoguidance, slg),
    "sag": (Sag, sag),
}


@pytest.mark.parametrize("others", [[], [Around()]], ids=["in one batch", "apart"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("case", CASES)
def test_predictions_and_gradients_are_those_of_the_formula_from_the_first_step(
    sampler, unet, weaker, case, guidance_scale, others
):
    make, formula = CASES[case]
    more = {"model": str(weaker)} if case == "autoguidance" else {}
    run = {"steps": 1, "seed": 3, "num_images": 2, "guidance_scale": guidance_scale}
    probe = Probe()
    plugins = [make(scale=SCALE, **more), probe, Red(gradient="latents"), *others]
    sampler(PROMPT, plugins=plugins, **run)

    timestep, values = probe.asked
    latents = probe.latents.requires_grad_()

    def ask(noisy=latents, negative=False):
        told = values[:2] if negative and probe.guided else values[-2:]
        return unet(noisy, timestep, told, return_dict=False)[0]

    ask.latents = latents
    cond, uncond = ask(), ask(negative=True)
    guided = uncond + guidance_scale * (cond - uncond)
    expected = guided + SCALE * formula(unet, ask, probe.abar, cond)
    # The scheduler keeps its noise levels in float32.
    torch.testing.assert_close(probe.prediction, expected.detach(), rtol=1e-6, atol=1e-6)
    slope = gradient(expected, latents)
    torch.testing.assert_close(
        probe.gradient, slope, rtol=1e-6, atol=1e-6 * float(slope.abs().max())
    )
    assert not torch.allclose(expected, guided, atol=1e-3)


def explicit_joint(module, image, text, queries, logits):
    """Joint attention without positions: as a row has no order then, the image goes first."""

    def split(tokens):
        return tokens.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    names = {"q": ("to_q", "add_q_proj"), "k": ("to_k", "add_k_proj"), "v": ("to_v", "add_v_proj")}
    parts = {}
    for name, projections in names.items():
        both = [
            split(getattr(module, p)(t)) for p, t in zip(projections, (image, text), strict=True)
        ]
        if name != "v":
            norms = (getattr(module, f"norm_{name}"), getattr(module, f"norm_added_{name}"))
            both = [norm(part) if norm else part for norm, part in zip(norms, both, strict=True)]
        parts[name] = torch.cat(both, dim=2)
    count = image.shape[1]
    query = torch.cat([queries(parts["q"][:, :, :count]), parts["q"][:, :, count:]], dim=2)
    weights = logits(query @ parts["k"].mT / math.sqrt(query.shape[-1]), count).softmax(dim=-1)
    output = (weights @ parts["v"]).transpose(1, 2).flatten(2)
    image, text = output[:, :count], output[:, count:]
    return module.to_out[0](image), text if module.to_add_out is None else module.to_add_out(text)


def own_tokens(logits, count):
    among = logits[..., :count, :count]
    kept = among.masked_fill(~torch.eye(count, dtype=torch.bool), -math.inf)
    return torch.cat(
        [torch.cat([kept, logits[..., :count, count:]], -1), logits[..., count:, :]], -2
    )


def same(values, *_):
    return values


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen-image", "flux2-klein"])
@pytest.mark.parametrize(
    ("attend", "queries", "logits"),
    [
        (own_token, same, own_tokens),
        (
            lambda *a: smoothed(None, (6, 8), *a),
            lambda q: q.mean(dim=2, keepdim=True).expand_as(q),
            same,
        ),
        (lambda *a: smoothed(1.2, (6, 8), *a), lambda q: blur_matrix(3, 4, 1.2, (1, 2)) @ q, same),
    ],
    ids=["pag", "seg", "seg blurred"],
)
def test_image_tokens_are_told_from_text_tokens_in_joint_attention(family, attend, queries, logits):
    sampler = Sampler.from_pipeline(random_pipeline(family=family, dtype=torch.float64))
    layer = all_layers(sampler.model)[0]
    module = layer.block.attn
    generator = torch.Generator().manual_seed(0)
    width = module.to_q.in_features
    # Twelve tokens, three by four, of six by eight latents; five of the text.
    image, text = (torch.randn(2, n, width, generator=generator).double() * 3 for n in (12, 5))
    with torch.no_grad():
        plain = module(hidden_states=image, encoder_hidden_states=text)
        with attending([layer], attend):
            ours = module(hidden_states=image, encoder_hidden_states=text)
        expected = explicit_joint(module, image, text, queries, logits)
    for our, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours[0], plain[0], atol=1e-4)
    torch.testing.assert_close(ours[1], plain[1])  # text tokens see as before


@pytest.mark.parametrize(
    ("family", "name", "image"),
    [
        ("flux", "single_transformer_blocks.0", slice(5, 53)),
        ("flux2-klein", "single_transformer_blocks.0", slice(5, 53)),
        ("z-image", "noise_refiner.0", slice(0, 48)),
        ("z-image", "layers.0", slice(0, 48)),
    ],
)
def test_image_tokens_are_told_from_others_in_one_row(family, name, image):
    """48 of them, six by eight, and five of the text behind or before, or of padding."""
    sampler = Sampler.from_pipeline(random_pipeline(family=family, dtype=torch.float64))
    sampler.model.size = (24, 32)
    (layer,) = chosen(sampler.model, [name])
    (site,) = layer.sites
    generator = torch.Generator().manual_seed(0)
    width = next(site.module.parameters()).shape[-1]
    width = getattr(site.module, "query_dim", width)
    row = torch.randn(1, 53, width, generator=generator).double().requires_grad_()
    plain = site.module(hidden_states=row)
    with attending([layer], own_token):
        perturbed = site.module(hidden_states=row)
    with attending([layer], lambda *a: smoothed(None, (12, 16), *a)):
        blurred = site.module(hidden_states=row)
    others = [i for i in range(53) if i not in range(53)[image]]
    for ours in (perturbed, blurred):  # the others see as before
        torch.testing.assert_close(ours[:, others], plain[:, others])
        assert not torch.allclose(ours[:, image], plain[:, image], atol=1e-6)
    token = image.start + 7
    (seen,) = torch.autograd.grad(perturbed[0, token].sum(), row)
    reached = {i for i in range(53) if seen[0, i].any()}
    assert reached == {token, *others}
