"""`weights`: the embeddings of both dialects, by compel itself and by a transcription."""

import functools
import itertools

import pytest
import torch
from compel import Compel, DownweightMode, ReturnedEmbeddingsType
from compel.embeddings_provider import SplitLongTextMode
from pilotfish_kit import parametrize_with_checks
from pilotfish_prompt import LongPrompt, Weights

from pilotfish import InputError, ModelError, Plugin, Run, Sampler
from pilotfish.testing import random_pipeline

AUTOMATIC, COMPEL = Weights(dialect="automatic1111"), Weights(dialect="compel")
INK = torch.randn(2, 16, generator=torch.Generator().manual_seed(9))


@functools.cache
def sampler_of(family):
    """A random model whose text encoders' output has a mean, as those of trained ones have."""
    pipeline = random_pipeline(family=family)
    generator = torch.Generator().manual_seed(5)
    for part in pipeline.components.values():
        for module in part.modules() if "CLIPText" in type(part).__name__ else ():
            if isinstance(module, torch.nn.LayerNorm):
                module.bias.data.uniform_(0.1, 0.5, generator=generator)
    return Sampler.from_pipeline(pipeline)


@pytest.fixture
def sampler():
    return sampler_of("stable-diffusion")


class Watch(Plugin):
    """Keeps what the encoders give."""

    def __init__(self, seen):
        super().__init__()
        self._seen = seen

    def embedding_transform(self, embedding):
        self._seen[embedding.stage, embedding.role, embedding.encoder] = embedding


class Ink(Plugin):
    """A word of two vectors."""

    def vocabulary(self):
        return {"<ink>": INK}


def embedding(sampler, prompt, *plugins, role="positive", encoder="text_encoder", **options):
    seen = {}
    options = {"steps": 1, "seed": 0, "height": 32, "width": 32, **options}
    next(sampler.stream(prompt, plugins=[*plugins, Watch(seen)], **options))
    return seen["prompt", role, encoder]


def theirs(encoder, prompt, **options):
    """compel's embedding."""
    kind = ReturnedEmbeddingsType
    hidden = kind.LAST_HIDDEN_STATES_NORMALIZED
    if encoder.layer == -2:
        hidden = kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    provider = Compel(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.network,
        returned_embeddings_type=hidden,
        downweight_mode=DownweightMode.MASK,
        **options,
    )
    with torch.no_grad():
        return provider.build_conditioning_tensor(prompt)


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize(
    "prompt",
    ["a red+ cat", "a (red cat)1.5 on white", "a red- cat", "(a red)0.4 cat++, white--", "red0- a"],
)
def test_compels_dialect_gives_compels_embeddings(family, prompt):
    for encoder in sampler_of(family).model.text_encoders[:2]:
        ours = embedding(sampler_of(family), prompt, COMPEL, encoder=encoder.name).values
        torch.testing.assert_close(ours, theirs(encoder, prompt), rtol=1e-4, atol=1e-5)


def scaled(encoder, parts):
    """AUTOMATIC1111's embedding: parts tokenised apart, output times weights, mean restored."""
    ids = [encoder.tokenizer(text, add_special_tokens=False).input_ids for text, _ in parts]
    before, after = [encoder.tokenizer.bos_token_id], [encoder.tokenizer.eos_token_id]
    before = before if encoder.tokenizer.bos_token_id is not None else []
    line = [*before, *itertools.chain(*ids), *after]
    weights = [1.0] * len(before)
    for (_, weight), tokens in zip(parts, ids, strict=True):
        weights += [weight] * len(tokens)
    length = 77 if before else 512
    padded = line + [encoder.tokenizer.pad_token_id] * (length - len(line))
    factors = torch.tensor(weights + [1.0] * (length - len(weights)))
    with torch.no_grad():
        hidden = encoder.network(torch.tensor([padded]), output_hidden_states=True)
    z = hidden.last_hidden_state if encoder.layer is None else hidden.hidden_states[encoder.layer]
    weighted = z * factors.reshape(1, -1, 1).expand(z.shape)
    return weighted * (z.mean() / weighted.mean())


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.3) cat", [("a", 1), ("red", 1.3), ("cat", 1)]),
        ("a [red] ((cat))", [("a", 1), ("red", 1 / 1.1), ("cat", 1.21)]),
        ("campfi(re:0.5)", [("campfi", 1), ("re", 0.5)]),
    ],
)
@pytest.mark.parametrize(
    ("family", "encoder"),
    [
        ("stable-diffusion", 0),
        ("sdxl", 0),
        ("sdxl", 1),
        ("sd3", 1),
        pytest.param("flux", 1, id="a T5"),
    ],
)
def test_automatic1111s_dialect_scales_the_output_and_keeps_its_mean(
    family, encoder, prompt, parts
):
    encoder = sampler_of(family).model.text_encoders[encoder]
    ours = embedding(sampler_of(family), prompt, AUTOMATIC, encoder=encoder.name)
    torch.testing.assert_close(ours.values, scaled(encoder, parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plugin", [AUTOMATIC, COMPEL], ids=repr)
@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl", "sd3", "flux"])
def test_a_prompt_without_signs_gives_the_picture_to_the_bit(family, plugin):
    size = {"height": 32, "width": 32}
    run = functools.partial(sampler_of(family), "a red cat", steps=2, seed=3, **size)
    assert torch.equal(run(plugins=[plugin]).latents, run().latents)


@pytest.mark.parametrize("plugin", [AUTOMATIC, COMPEL], ids=repr)
def test_a_bracket_behind_a_backslash_is_text(sampler, plugin):
    with pytest.warns(UserWarning, match="brackets in a prompt are text"):
        plain = sampler("a (red) cat", steps=2, seed=3).latents
    assert torch.equal(sampler(r"a \(red\) cat", plugins=[plugin], steps=2, seed=3).latents, plain)


def test_the_negative_prompt_is_read_too(sampler):
    text = "a (red:1.4) cat"
    positive = embedding(sampler, text, AUTOMATIC).values
    negative = embedding(sampler, "", AUTOMATIC, role="negative", negative_prompt=text)
    assert torch.equal(negative.values, positive)


def test_what_the_encoder_pools_has_no_weights():
    plain = embedding(sampler_of("sdxl"), "a red cat", encoder="text_encoder_2").pooled
    for plugin, text in ((AUTOMATIC, "a (red:1.4) cat"), (COMPEL, "a red-- cat")):
        ours = embedding(sampler_of("sdxl"), text, plugin, encoder="text_encoder_2").pooled
        assert torch.equal(ours, plain)


def test_a_learned_word_of_several_vectors_has_one_weight(sampler):
    plain = embedding(sampler, "a <ink> cat", Ink()).values
    ours = embedding(sampler, "a (<ink>:1.5) cat", Ink(), AUTOMATIC).values
    factors = torch.tensor([1, 1, 1.5, 1.5, *[1] * 73]).view(1, -1, 1)
    weighted = plain * factors
    torch.testing.assert_close(ours, weighted * plain.mean() / weighted.mean())


@pytest.mark.parametrize("plugins", [["token-blend", AUTOMATIC], [AUTOMATIC, "token-blend"]])
def test_a_mark_of_the_blends_may_stand_in_a_bracket_in_either_order(sampler, plugins):
    plain = embedding(sampler, "a [[puppy + cat]] on white", "token-blend").values
    ours = embedding(sampler, "a ([[puppy + cat]]:1.5) on white", *plugins).values
    weighted = plain * torch.tensor([1, 1, 1.5, *[1] * 74]).view(1, -1, 1)
    torch.testing.assert_close(ours, weighted * plain.mean() / weighted.mean())


def test_the_prompts_that_blend_mixes_in_are_read_too(sampler):
    text = "a (red:1.5) puppy"
    own = embedding(sampler, text, AUTOMATIC).values
    mixed = embedding(sampler, "a cat", {"use": "blend", "prompts": {text: 1}}, AUTOMATIC)
    assert torch.equal(mixed.values, own)


def test_a_long_prompt_has_weights_in_every_chunk_as_in_compel(sampler):
    prompt = " ".join(["a red cat"] * 30) + " puppy++ white-- " + " ".join(["a parrot"] * 30)
    (encoder,) = sampler.model.text_encoders
    expected = theirs(
        encoder, prompt, truncate_long_prompts=False, split_long_text_mode=SplitLongTextMode.WORDS
    )
    for plugins in ([COMPEL, LongPrompt()], [LongPrompt(), COMPEL]):
        ours = embedding(sampler, prompt, *plugins).values
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_words_that_are_cut_off_are_named_and_weigh_nothing(sampler):
    with pytest.warns(UserWarning, match=r"Dropped: 'red cat'"):
        cut = embedding(sampler, "a " * 75 + "(red cat:3)", AUTOMATIC).values
    torch.testing.assert_close(cut, embedding(sampler, "a " * 75).values)


def test_an_output_without_a_mean_is_scaled_alone(random_sampler):
    plain = embedding(random_sampler, "a red cat").values
    assert plain.mean().abs() < 1e-6
    ours = embedding(random_sampler, "a (red:1.5) cat", AUTOMATIC).values
    torch.testing.assert_close(ours, plain * torch.tensor([1, 1, 1.5, *[1] * 74]).view(1, -1, 1))


def test_a_model_whose_encoder_sees_a_template_is_refused():
    with pytest.raises(ModelError, match="this model's text_encoder is a qwen3"):
        sampler_of("z-image")("a (red) cat", plugins=[AUTOMATIC], steps=1)


def test_two_dialects_in_one_run_are_refused(sampler):
    with pytest.raises(InputError, match="weights is in this run twice"):
        sampler("a cat", plugins=[AUTOMATIC, COMPEL], steps=1)


def test_an_error_in_the_prompt_comes_before_the_first_step(sampler):
    with pytest.raises(InputError, match=r"\( has no partner, at character 3"):
        next(sampler.stream("a (red cat", plugins=[AUTOMATIC], steps=1))


def test_the_run_file_repeats_it_beside_a_guide(sampler):
    plugins = [AUTOMATIC, LongPrompt(), "blue:scale=2"]
    options = {"negative_prompt": "[white]", "steps": 3, "seed": 4}
    first = sampler("a (red:1.4) cat " * 20, plugins=plugins, **options)
    again = Run.parse(first.run.to_toml())
    again = {k: v for k, v in again.items() if k not in ("model", "dtype")}
    assert torch.equal(sampler(**again).latents, first.latents)
    plain = sampler("a red cat " * 20, plugins=plugins, **options)
    assert not torch.equal(plain.latents, first.latents)


@parametrize_with_checks([AUTOMATIC, COMPEL])
def test_it_keeps_the_contract_of_plugins(plugin, check, random_sampler):
    signs = {AUTOMATIC: "a (red:1.4) [cat]", COMPEL: "a red++ cat-"}
    check(plugin, random_sampler, signs[plugin])
