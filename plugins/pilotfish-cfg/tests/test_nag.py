"""What `nag` promises: the paper's attention, on every family that names its own to the text."""

from __future__ import annotations

import functools

import pytest
import torch
from pilotfish_cfg import Nag
from torch.nn import functional

from pilotfish import ModelError, Plugin, Sampler, SettingsError, guide, mend_torchvision, testing

mend_torchvision()

from diffusers.models.transformers import (  # noqa: E402
    transformer_flux,
    transformer_flux2,
    transformer_qwenimage,
    transformer_z_image,
)

PROMPT, NEGATIVE = "a red cat", "a red dog"  # as many tokens of bytes
EXACT = {"rtol": 1e-6, "atol": 1e-6}
STRONG = {"scale": 4.0, "tau": 1.0, "alpha": 0.5}
FAMILIES = ("stable-diffusion", "sdxl", "sd3", "flux", "qwen-image", "flux2-klein", "z-image")
OFF = {"steps": 1, "seed": 3, "guidance_scale": 1, "height": 32, "width": 32}
sampler_of = functools.cache(testing.random_sampler)


class Keep(Plugin):
    """Writes down both predictions of each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def combine_predictions(self, cond, uncond, step):
        self.seen.append((cond, uncond, step.latents, step.timestep))


def predicted(sampler, *plugins, prompt=PROMPT, **options):
    """Cond, uncond, latents and timestep of a run's first step."""
    keep = Keep()
    sampler(prompt, plugins=[*plugins, keep], **{**OFF, **options})
    return keep.seen[0]


class Papers:
    """Algorithm 1, and on how many tokens the norm was cut."""

    def __init__(self):
        self.cut = []

    def __call__(self, told, negative):
        away = 4 * told - 3 * negative
        ratio = away.abs().sum(-1, keepdim=True) / told.abs().sum(-1, keepdim=True)
        self.cut.append((ratio > 1).double().mean())
        return 0.5 * away * torch.clamp(ratio, max=1) / ratio + 0.5 * told


def test_of_a_unet_it_is_the_papers_in_each_attention_to_the_text():
    pipeline = testing.random_pipeline(dtype=torch.float64)
    cond, _, latents, timestep = predicted(
        Sampler.from_pipeline(pipeline), Nag(negative_prompt=NEGATIVE, **STRONG)
    )
    texts = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in (PROMPT, NEGATIVE)]
    papers = Papers()

    class Explicit:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            def heads(values):
                return values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

            def attended(text):
                query, key, value = (
                    heads(layer(inputs))
                    for layer, inputs in (
                        (attn.to_q, hidden_states),
                        (attn.to_k, text),
                        (attn.to_v, text),
                    )
                )
                map_ = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
                return (map_ @ value).transpose(1, 2).flatten(2)

            return attn.to_out[0](papers(attended(texts[0]), attended(texts[1])))

    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Explicit())
    with torch.no_grad():
        expected = pipeline.unet(latents, timestep, texts[0]).sample
    torch.testing.assert_close(cond, expected, **EXACT)
    assert 0 < sum(papers.cut) / len(papers.cut) < 1


JOINT = {  # where the family calls attention, and its image tokens behind so many of the text
    "sd3": (functional, "scaled_dot_product_attention"),
    "flux": (transformer_flux, "dispatch_attention_fn"),
    "qwen-image": (transformer_qwenimage, "dispatch_attention_fn"),
    "flux2-klein": (transformer_flux2, "dispatch_attention_fn"),
}


def told(sampler, prompt, *plugins):
    """What the network was given in a run of one step, by name, and what it answered."""
    calls = []
    hook = sampler.model.denoiser.register_forward_hook(
        lambda _, args, given, output: calls.append((given, output[0])), with_kwargs=True
    )
    try:
        sampler(prompt, plugins=plugins, **OFF)
    finally:
        hook.remove()
    return calls[0]


@pytest.mark.parametrize("family", JOINT)
def test_of_joint_attention_it_is_the_papers_for_the_image_tokens(family, monkeypatch):
    sampler = sampler_of(family=family, dtype=torch.float64)
    _, came = told(sampler, PROMPT, Nag(negative_prompt=NEGATIVE, **STRONG))
    (first, _), (second, _) = (told(sampler, prompt) for prompt in (PROMPT, NEGATIVE))
    text = "encoder_hidden_states"
    both = {
        name: torch.cat([value, second[name] if name == text else value])
        if isinstance(value, torch.Tensor) and len(value) == 1
        else 2 * value
        if name == "img_shapes"
        else value
        for name, value in first.items()
    }
    owner, function = JOINT[family]
    attention, papers = getattr(owner, function), Papers()

    def mixed(query, key, value, **options):
        values = attention(query, key, value, **options)
        rows = values.transpose(1, 2) if family == "sd3" else values  # (2, tokens, heads, D)
        length, out = both[text].shape[1], rows.clone()
        image = slice(0, rows.shape[1] - length) if family == "sd3" else slice(length, None)
        out[:, image] = papers(*rows[:, image].flatten(2)).unflatten(-1, rows.shape[2:])
        return out.transpose(1, 2) if family == "sd3" else out

    monkeypatch.setattr(owner, function, mixed)
    with torch.no_grad():
        expected = sampler.model.denoiser(**both)[0]
    torch.testing.assert_close(came[:1], expected[:1], **EXACT)
    assert sum(papers.cut) > 0


def test_of_z_image_it_is_the_papers_where_image_and_text_are_in_one_row(monkeypatch):
    sampler = sampler_of(family="z-image", dtype=torch.float64)
    network, calls = sampler.model.denoiser, []
    hook = network.register_forward_hook(lambda _, args, output: calls.append((args, output[0])))
    for prompt, *plugins in (
        (PROMPT, Nag(negative_prompt=NEGATIVE, **STRONG)),
        (PROMPT,),
        (NEGATIVE,),
    ):
        sampler(prompt, plugins=plugins, **{**OFF, "guidance_scale": 0})
    hook.remove()
    (_, came), ((latents, time, told), _), ((_, _, negative), _) = calls
    attention, papers, count = transformer_z_image.dispatch_attention_fn, Papers(), []
    alone = len(network.noise_refiner) + len(network.context_refiner)
    tokens = latents[0].shape[-2] * latents[0].shape[-1] // 4

    def mixed(query, *args, **options):
        rows = attention(query, *args, **options).clone()  # (2, tokens, heads, D)
        count.append(1)
        if len(count) > alone:
            image = papers(*rows[:, :tokens].flatten(2)).unflatten(-1, rows.shape[2:])
            rows[:, :tokens] = image
        return rows

    monkeypatch.setattr(transformer_z_image, "dispatch_attention_fn", mixed)
    with torch.no_grad():
        expected = network(2 * latents, torch.cat([time] * 2), told + negative, return_dict=False)
    torch.testing.assert_close(came[0], expected[0][0], **EXACT)
    assert sum(papers.cut) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_away_from_the_prompt_itself_is_nowhere(family):
    sampler = sampler_of(family=family)
    plain = predicted(sampler)[0]
    same = predicted(sampler, Nag(negative_prompt=PROMPT, **STRONG))[0]
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    away = predicted(sampler, Nag(negative_prompt="a puppy on blue", **STRONG))[0]
    assert away.shape == plain.shape
    assert (away - plain).abs().max() > 10 * (same - plain).abs().max()


@pytest.mark.parametrize(
    "settings", [{"scale": 1}, {"alpha": 0}, {"start": 0.5, "stop": 0.5}], ids=str
)
def test_switched_off_it_leaves_the_picture_bit_identical(settings):
    sampler, run = sampler_of(), {**OFF, "steps": 2}
    off = sampler(PROMPT, plugins=[Nag(negative_prompt=NEGATIVE, **settings)], **run).latents
    assert torch.equal(off, sampler(PROMPT, **run).latents)


@pytest.mark.parametrize(
    ("family", "guidance"),
    [
        ("stable-diffusion", {"guidance_scale": 4}),
        ("sd3", {"guidance_scale": 4}),
        ("qwen-image", {"true_cfg_scale": 4}),
    ],
)
def test_beside_guidance_it_leaves_the_negative_prompts_own_prediction_alone(family, guidance):
    sampler = sampler_of(family=family, dtype=torch.float64)
    run = {"negative_prompt": "a blue puppy on red", "num_images": 2, **guidance}
    plain = predicted(sampler, **run)
    ours = predicted(sampler, Nag(negative_prompt=NEGATIVE, **STRONG), **run)
    torch.testing.assert_close(ours[1], plain[1])
    assert not torch.allclose(ours[0], plain[0])


def test_a_call_with_another_prompt_is_left_alone():
    class Ask(Plugin):
        def combine_predictions(self, step):
            self.other, self.own = step.predict("a green otter"), step.predict()

    sampler, ask, nag = sampler_of(), Ask(), Nag(negative_prompt=NEGATIVE, **STRONG)
    sampler(PROMPT, plugins=[ask], **OFF)
    other, own = ask.other, ask.own
    sampler(PROMPT, plugins=[nag, ask], **OFF)
    assert torch.equal(ask.other, other)
    assert not torch.allclose(ask.own, own)


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_layers_that_are_computed_again_give_the_gradient_of_those_that_are_kept(family):
    def away(checkpointing):
        loss = guide(lambda step: step.x0.square().mean(dim=(1, 2, 3)), gradient="latents")
        plugins = [Nag(negative_prompt=NEGATIVE, **STRONG), loss]
        options = {**OFF, "checkpointing": checkpointing, "num_images": 2}
        result = sampler_of(family=family, dtype=torch.float64)(PROMPT, plugins=plugins, **options)
        return result.trace[0].gradient_norm

    assert away("on") == pytest.approx(away("off"))


def test_words_that_plugins_add_count_in_the_negative_prompt_too():
    class Word(Plugin):
        def vocabulary(self, run):
            return {"<ink>": torch.full((1, 16), 3.0)}

    sampler = sampler_of()
    word, bare = (
        predicted(sampler, *plugins, Nag(negative_prompt="a <ink> cat", **STRONG))[0]
        for plugins in ((Word(),), ())
    )
    assert not torch.allclose(word, bare)


def test_a_family_without_sites_is_refused_before_the_first_step():
    with pytest.raises(ModelError, match="nag: this model's family names no attention"):
        Sampler(testing.GaussianModel())(
            PROMPT, plugins=[Nag()], **{**OFF, "height": 2, "width": 2}
        )


def test_a_scale_below_one_is_refused():
    with pytest.raises(SettingsError, match="scale must be greater than or equal to 1; got 0.5"):
        Nag(scale=0.5)
