"""`long-prompt`: chunks, and as many of them in both prompts."""

import functools

import pytest
import torch
from pilotfish_kit import parametrize_with_checks
from pilotfish_prompt import LongPrompt

from pilotfish import InputError, Plugin, Run
from pilotfish.testing import random_sampler

CLIPS = ["stable-diffusion", "sdxl", "sd3"]
WORDS = ("a", "cat", "on", "campfire", "puppy", "background")  # a token each, also of the T5
LONG = " ".join(WORDS[i % 6] for i in range(200))
INK = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))
SMALL = {"steps": 2, "seed": 3, "height": 32, "width": 32}
sampler_of = functools.cache(lambda family: random_sampler(family=family))


class Watch(Plugin):
    """Keeps what the first encoder gives."""

    def __init__(self, seen):
        super().__init__()
        self._seen = seen

    def embedding_transform(self, embedding):
        if embedding.stage == "prompt" and embedding.encoder == "text_encoder":
            self._seen[embedding.role] = embedding


def embeddings(sampler, prompt, *plugins, **options):
    seen = {}
    run = sampler.stream(prompt, plugins=[*plugins, Watch(seen)], steps=1, seed=0, **options)
    step = next(run)
    return seen["positive"], seen["negative"], step.embeddings


def encoded(sampler, text):
    """One chunk's, by the network alone."""
    (encoder,) = sampler.model.text_encoders
    with torch.no_grad():
        ids = encoder.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        return encoder.network(ids).last_hidden_state


@pytest.mark.parametrize("family", CLIPS)
def test_two_hundred_tokens_give_another_picture_than_what_is_left_of_them(family):
    run = functools.partial(sampler_of(family), LONG, steps=2, seed=3)
    with pytest.warns(UserWarning, match="200 tokens long"):
        cut = run().latents
    whole = run(plugins=[LongPrompt()]).latents
    assert whole.isfinite().all()
    assert not torch.allclose(whole, cut, atol=1e-4)


def test_the_last_word_counts(random_sampler):
    run = functools.partial(random_sampler, plugins=[LongPrompt()], steps=2, seed=3)
    assert not torch.allclose(run(f"{LONG} cat").latents, run(f"{LONG} otter").latents, atol=1e-5)


@pytest.mark.parametrize("family", [*CLIPS, "flux"])
@pytest.mark.parametrize("count", [0, 3, 75])
def test_up_to_seventy_five_tokens_the_picture_is_the_plain_one_to_the_bit(family, count):
    run = functools.partial(sampler_of(family), " ".join(["cat"] * count), **SMALL)
    assert torch.equal(run(plugins=[LongPrompt()]).latents, run().latents)


def test_each_chunk_is_encoded_by_itself_and_the_shorter_prompt_filled_with_empty_ones(
    random_sampler,
):
    positive, negative, told = embeddings(random_sampler, LONG, LongPrompt(), negative_prompt="red")
    words = LONG.split()
    parts = [" ".join(words[i : i + 75]) for i in (0, 75, 150)]
    expected = torch.cat([encoded(random_sampler, part) for part in parts], dim=1)
    assert torch.equal(positive.values, expected)
    assert torch.equal(told, expected)
    short = torch.cat([encoded(random_sampler, text) for text in ("red", "", "")], dim=1)
    assert torch.equal(negative.values, short)
    assert len(positive.tokens) == len(negative.tokens) == 3 * 77


def test_a_longer_negative_prompt_fills_the_prompt(random_sampler):
    positive, negative, _ = embeddings(random_sampler, "red", LongPrompt(), negative_prompt=LONG)
    assert positive.values.shape == negative.values.shape == (1, 3 * 77, 16)


def test_a_negative_prompt_that_counts_for_nothing_fills_nothing(random_sampler):
    with pytest.warns(UserWarning, match="counts for nothing"):
        positive = embeddings_of_prompt(random_sampler, negative_prompt=LONG, guidance_scale=1)
    assert positive.values.shape[1] == 77


def embeddings_of_prompt(sampler, **options):
    seen = {}
    next(sampler.stream("red", plugins=[LongPrompt(), Watch(seen)], steps=1, seed=0, **options))
    return seen["positive"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        # 70 words, and one of eight letters that would have been cut: each letter is a token.
        ("cat " * 70 + "xyzxyzxy red", 70),
        ("cat " * 60 + ", " + "cat " * 30, 61),
        ("cat " * 40 + ", " + "cat " * 50, 75),
        ("xyz" * 40, 75),
    ],
    ids=["a word is whole", "at a comma", "a comma too far back", "one word alone is cut"],
)
def test_chunks_end_at_words_and_near_a_comma_there(random_sampler, text, first):
    positive, _, _ = embeddings(random_sampler, text, LongPrompt())
    assert positive.tokens.index("<|endoftext|>") - 1 == first


def test_a_word_of_several_vectors_is_not_cut_and_counts_in_either_chunk(random_sampler):
    class Ink(Plugin):
        def vocabulary(self):
            return {"<ink>": INK}

    positive, _, _ = embeddings(random_sampler, "cat " * 73 + "<ink> red", Ink(), LongPrompt())
    assert positive.tokens[77:83] == (
        *("<|startoftext|>", "<ink>", "<ink>_1", "<ink>_2", "red</w>", "<|endoftext|>"),
    )
    near, _, _ = embeddings(random_sampler, "<ink> red", Ink())
    assert torch.equal(positive.values[:, 77:82], near.values[:, :5])


def test_the_longest_of_several_prompts_fills_all_of_them():
    prompts = {"text_encoder": "a cat", "text_encoder_2": LONG}
    result = sampler_of("sdxl")(prompts, plugins=[LongPrompt()], steps=1, seed=0)
    assert result.latents.isfinite().all()
    told = next(sampler_of("sdxl").stream(prompts, plugins=[LongPrompt()], steps=1)).embeddings
    assert told.shape[1] == 3 * 77


def test_a_t5_beside_the_clips_gets_its_prompt_as_ever():
    plain = {}
    long = "a " * 30 + "cat"
    for name, plugins in (("plain", []), ("long", [LongPrompt(chunks=2)])):
        step = next(sampler_of("sd3").stream(long, plugins=plugins, steps=1, seed=0))
        plain[name] = step.embeddings
    assert plain["long"].shape[1] == plain["plain"].shape[1] + 77
    assert torch.equal(plain["long"][:, 2 * 77 :], plain["plain"][:, 77:])


@pytest.mark.parametrize("family", ["z-image", "qwen-image", "flux2-klein"])
def test_models_whose_encoders_take_long_prompts_are_left_as_they_are(family):
    text = "a cat " * 15  # a token for each letter
    run = functools.partial(sampler_of(family), text, **SMALL)
    assert torch.equal(run(plugins=[LongPrompt()]).latents, run().latents)


def test_too_many_words_for_the_chunks_that_were_asked_for_are_refused(random_sampler):
    with pytest.raises(InputError, match="a text has 200 tokens, for which it takes 3 chunks"):
        random_sampler(LONG, plugins=[LongPrompt(chunks=2)], steps=1)


def test_a_longer_prompt_of_another_plugin_is_refused_with_what_helps(random_sampler):
    blend = {"use": "blend", "prompts": {LONG: 0.5}}
    with pytest.raises(InputError, match="prompts have 1. Set chunks=3"):
        random_sampler("a cat", plugins=[LongPrompt(), blend], steps=1)
    run = random_sampler("a cat", plugins=[LongPrompt(chunks=3), blend], steps=1)
    assert run.latents.isfinite().all()


def test_the_run_file_repeats_it_beside_a_guide(random_sampler):
    first = random_sampler(LONG, plugins=["blue:scale=2", LongPrompt()], steps=3, seed=4)
    again = Run.parse(first.run.to_toml())
    again = {k: v for k, v in again.items() if k not in ("model", "dtype")}
    assert torch.equal(random_sampler(**again).latents, first.latents)


@parametrize_with_checks([LongPrompt(), LongPrompt(chunks=2)])
def test_it_keeps_the_contract_of_plugins(plugin, check, random_sampler):
    check(plugin, random_sampler, LONG if plugin.settings.chunks is None else "a red cat")
