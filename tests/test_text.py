"""Prompt -> embeddings, with words that exist for one run only."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from pilotfish import InputError, Plugin, PluginError, Sampler
from pilotfish.testing import random_sampler

INK = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))


class Word(Plugin):
    """Adds `<ink>`, a word of as many vectors as asked for."""

    class Settings(Plugin.Settings):
        vectors: int = 1
        word: str = "<ink>"

    def vocabulary(self, run):
        return {self.settings.word: INK[: self.settings.vectors]}


class Swap(Plugin):
    """Puts one token's vector in another's place."""

    class Settings(Plugin.Settings):
        word: str
        by: str

    def embedding_transform(self, embedding, run):
        if embedding.stage != "token" or embedding.role != "positive":
            return None
        encoder = run.model.text_encoders[0]
        row = encoder.tokenizer.convert_tokens_to_ids(f"{self.settings.by}</w>")
        values = embedding.values.clone()
        values[:, embedding.tokens.index(f"{self.settings.word}</w>")] = (
            encoder.network.get_input_embeddings().weight[row]
        )
        return replace(embedding, values=values)


def test_swapping_a_token_embedding_equals_writing_the_other_word(sampler, latents_of):
    swapped = latents_of(Swap(word="cat", by="puppy"))
    assert torch.equal(swapped, sampler("a red puppy", steps=4, seed=3).latents)


@pytest.mark.parametrize("vectors", [1, 3])
def test_an_added_word_equals_textual_inversion_in_diffusers(pipeline, sampler, vectors):
    theirs = copy.deepcopy(pipeline)
    # An embedding file of several vectors, as diffusers reads it.
    theirs.load_textual_inversion({"<ink>": INK[:vectors]}, token="<ink>")
    expected = theirs(
        "a red <ink> cat",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    before = (len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().weight.clone())
    ours = sampler("a red <ink> cat", plugins=[Word(vectors=vectors)], steps=3, seed=1).latents
    assert torch.equal(ours, expected)
    assert len(pipeline.tokenizer) == before[0]
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, before[1])


def test_words_of_a_pipelines_own_textual_inversions_are_kept(pipeline):
    theirs = copy.deepcopy(pipeline)
    theirs.load_textual_inversion({"<ink>": INK}, token="<ink>")
    run = {"num_inference_steps": 3, "output_type": "latent"}
    expected = theirs("a <ink>", generator=torch.Generator().manual_seed(1), **run).images
    assert torch.equal(Sampler.from_pipeline(theirs)("a <ink>", steps=3, seed=1).latents, expected)


def test_two_runs_with_different_words_interleave(sampler):
    def alone(vectors):
        return sampler("a <ink>", plugins=[Word(vectors=vectors)], steps=3, seed=1).latents

    one = sampler.stream("a <ink>", plugins=[Word(vectors=1)], steps=3, seed=1)
    three = sampler.stream("a <ink>", plugins=[Word(vectors=3)], steps=3, seed=1)
    for _ in zip(one, three, strict=True):
        pass
    assert torch.equal(one.result().latents, alone(1))
    assert torch.equal(three.result().latents, alone(3))


def test_a_word_that_exists_or_is_added_twice_is_refused(sampler):
    with pytest.raises(ValueError, match="'cat</w>' cannot be added"):
        sampler("a cat", plugins=[Word(word="cat</w>")], steps=1)
    with pytest.raises(PluginError, match="'Word#2': .*adds '<ink>', as 'Word' does already"):
        sampler("a cat", plugins=[Word(), Word()], steps=1)


def test_vectors_of_another_width_are_refused_with_both_widths(sampler):
    class Wide(Plugin):
        def vocabulary(self):
            return {"<ink>": torch.zeros(1, 768)}

    with pytest.raises(PluginError, match=r"\(1, 768\) for|gave \(1, 768\); .* of shape \(n, 16\)"):
        sampler("a <ink>", plugins=[Wide()], steps=1)


def test_a_word_is_placed_where_it_stands_and_the_end_token_stays_highest(sampler):
    encoder = sampler.model.text_encoders[0]
    tokens = encoder.with_words({"<ink>": INK[:2]}).tokenize("a <ink> cat")
    assert tokens.pieces[1:5] == ("a</w>", "<ink>", "<ink>_1", "cat</w>")
    assert sorted(tokens.added) == [2, 3]
    assert torch.equal(tokens.added[3], INK[1])
    assert int(tokens.ids.argmax()) == 5  # "<|endoftext|>" right behind the words


def vectors_of(sampler, prompt, words):
    """The vectors (n, D) that added words put into a prompt, and the other tokens, in order."""
    tokens = sampler.model.text_encoders[0].with_words(words).tokenize(prompt)
    end = tokens.pieces.index("<|endoftext|>")
    return [tokens.added.get(at, tokens.pieces[at]) for at in range(1, end)]


def vector(number, count=1):
    return torch.full((count, 16), float(number))


def test_a_word_that_looks_like_a_piece_of_another_one_is_itself(sampler):
    """A word of two vectors <x> is shown as <x> and <x>_1; another file teaches <x>_1."""
    for words in (
        {"<x>": vector(1, 2), "<x>_1": vector(9)},
        {"<x>_1": vector(9), "<x>": vector(1, 2)},
    ):
        found = vectors_of(sampler, "<x> cat <x>_1", words)
        assert [v if isinstance(v, str) else v[0].item() for v in found] == [1, 1, "cat</w>", 9]


@pytest.mark.parametrize("prompt", ["ink inkpot pot", "inkpot pot ink", "pot ink inkpot"])
def test_words_that_begin_like_or_stand_inside_another_one_are_told_apart(sampler, prompt):
    values = {"ink": 1, "inkpot": 2, "pot": 3}
    for order in itertools.permutations(values):
        words = {word: vector(values[word], 2) for word in order}
        found = [v[0].item() for v in vectors_of(sampler, prompt, words)]
        assert found == [values[word] for word in prompt.split() for _ in "12"]


def test_a_word_inside_one_that_the_pipeline_has_loaded_leaves_it_whole(pipeline):
    theirs = copy.deepcopy(pipeline)
    theirs.load_textual_inversion({"<ink>": INK[:1]}, token="<ink>")
    found = vectors_of(Sampler.from_pipeline(theirs), "a <ink> ink", {"ink": vector(7)})
    assert [v if isinstance(v, str) else v[0].item() for v in found] == ["a</w>", "<ink>", 7]


def test_words_count_in_both_prompts(sampler):
    class Watch(Plugin):
        def setup(self):
            return []

        def embedding_transform(self, embedding, state):
            if embedding.stage == "token":
                seen[embedding.role] = embedding.tokens[1:3]

    seen = {}
    run = {"plugins": [Word(), Watch()], "negative_prompt": "a <ink>", "steps": 1}
    sampler("<ink> cat", **run)
    assert seen == {"positive": ("<ink>", "cat</w>"), "negative": ("a</w>", "<ink>")}


def test_text_that_is_no_utf_8_is_refused_before_the_first_step(sampler):
    class Bad(Plugin):
        def prompt_transform(self, prompt):
            return prompt + "\udce9"

    for run in ({"prompt": "caf\udce9"}, {"negative_prompt": "caf\udce9"}):
        with pytest.raises(InputError, match=r"prompt must be text in UTF-8; got 'caf\\udce9'"):
            sampler(**run, steps=1)
    with pytest.raises(PluginError, match=r"'Bad': .*expected text in UTF-8"):
        sampler("caf", plugins=[Bad()], steps=1)
    with pytest.raises(InputError, match="word must be text in UTF-8"):
        Word(word="<\udce9>")


def test_a_prompt_that_is_too_long_warns_and_names_the_dropped_words(sampler):
    with pytest.warns(
        UserWarning, match=r"80 tokens long; text_encoder takes 75. Dropped: 'a a a a red'"
    ):
        sampler(" ".join(["a"] * 79) + " red", steps=1, seed=0)


@pytest.mark.parametrize("prompts", [("a (red) cat", ""), ("a cat", "(red:1.2)")])
def test_a_bracket_that_nothing_reads_is_told_once_with_what_would_read_it(sampler, prompts):
    with pytest.warns(UserWarning) as told:
        sampler(prompts[0], negative_prompt=prompts[1], steps=2, seed=0)
    (hint,) = told
    assert "brackets in a prompt are text" in str(hint.message)
    assert "--use weights:dialect=automatic1111" in str(hint.message)
    sampler(
        prompts[0],
        negative_prompt=prompts[1],
        plugins=["weights:dialect=automatic1111"],
        steps=1,
        seed=0,
    )


def test_added_words_that_are_dropped_are_named_as_they_were_written(sampler):
    with pytest.warns(UserWarning, match=r"Dropped: 'a <ink> <ink>_1 red'"):
        sampler(" ".join(["a"] * 76) + " <ink> red", plugins=[Word(vectors=2)], steps=1, seed=0)


def test_an_embedding_is_offered_at_both_stages_for_both_roles(sampler):
    seen = []

    class Watch(Plugin):
        def embedding_transform(self, embedding):
            seen.append((embedding.role, embedding.stage, tuple(embedding.values.shape)))
            assert (embedding.pooled is None) == (embedding.stage == "token")
            assert len(embedding.tokens) == 77

    sampler("a cat", plugins=[Watch()], steps=1, num_images=2)
    assert seen == [
        (role, stage, (1, 77, 16))
        for role in ("positive", "negative")
        for stage in ("token", "prompt")
    ]


def test_each_image_may_have_its_own_prompt_embedding(sampler):
    class Fade(Plugin):
        def embedding_transform(self, embedding, run):
            if (embedding.stage, embedding.role) == ("prompt", "positive"):
                weights = torch.linspace(0, 1, run.num_images).view(-1, 1, 1)
                return replace(embedding, values=embedding.values * weights)

    batch = sampler("a cat", plugins=[Fade()], steps=2, num_images=2, seed=0).latents
    whole = sampler("a cat", steps=2, seed=1).latents
    torch.testing.assert_close(batch[1:], whole, rtol=1e-4, atol=1e-3)


def test_the_shared_encoder_has_no_hooks_left_after_an_error(sampler):
    class Bad(Plugin):
        def embedding_transform(self, embedding):
            raise RuntimeError("no")

    with pytest.raises(PluginError):
        sampler("a cat", plugins=[Bad()], steps=1)
    assert not sampler.model.text_encoder.get_input_embeddings()._forward_hooks


def test_a_plugin_that_takes_the_step_changes_the_prompt_at_each_step(sampler):
    class Fade(Plugin):
        def embedding_transform(self, embedding, step):
            if (embedding.stage, embedding.role) == ("prompt", "positive"):
                factor = 1 if step is None else step.index
                return replace(embedding, values=embedding.values * factor)

    class Watch(Plugin):
        def embedding_transform(self, embedding):
            stages.append((embedding.role, embedding.stage))

    def embeddings(*plugins):
        run = sampler.stream("a cat", plugins=plugins, steps=3, seed=0)
        return [step.embeddings for step in run]

    stages = []
    for index, (faded, plain) in enumerate(
        zip(embeddings(Fade(), Watch()), embeddings(), strict=True)
    ):
        assert torch.equal(faded, plain * index)
    before = [(role, stage) for role in ("positive", "negative") for stage in ("token", "prompt")]
    assert stages == before + 3 * [("positive", "prompt"), ("negative", "prompt")]


def test_embeddings_that_do_not_change_give_the_same_picture_at_each_step(latents_of):
    class Still(Plugin):
        def embedding_transform(self, embedding, step):
            return None

    assert torch.equal(latents_of(Still()), latents_of())


def test_another_prompt_is_encoded_as_if_it_were_the_runs_own(sampler, latents_of):
    class Other(Plugin):
        def embedding_transform(self, embedding, encode):
            if (embedding.stage, embedding.role) == ("prompt", "positive"):
                return replace(embedding, values=encode("a <ink> puppy").values)

    plugins = [Word(vectors=3), Swap(word="puppy", by="cat"), Other()]
    replaced = sampler("a puppy", plugins=plugins, steps=4, seed=3).latents
    assert torch.equal(
        replaced, sampler("a <ink> cat", plugins=[Word(vectors=3)], steps=4, seed=3).latents
    )


def test_an_error_at_a_later_step_names_the_step(sampler):
    class Bad(Plugin):
        def embedding_transform(self, embedding, step):
            if step is not None and step.index == 2:
                raise RuntimeError("no")

    with pytest.raises(PluginError, match=r"'Bad': .*RuntimeError: no \(at step 2 of 4"):
        sampler("a cat", plugins=[Bad()], steps=4)


def test_an_embedding_for_another_number_of_images_is_refused(sampler):
    class Two(Plugin):
        def embedding_transform(self, embedding):
            if embedding.stage == "prompt":
                return replace(embedding, values=embedding.values.expand(2, -1, -1))

    assert sampler("a cat", plugins=[Two()], steps=1, num_images=2).latents.isfinite().all()
    with pytest.raises(PluginError, match=r"'Two': .*shape \(2, 77, 16\)"):
        sampler("a cat", plugins=[Two()], steps=1, num_images=3)


def test_an_encoder_without_vectors_reads_the_word_as_text_and_an_unknown_one_is_refused():
    sampler = random_sampler(family="sdxl")

    class Partial(Plugin):
        class Settings(Plugin.Settings):
            encoder: str

        def vocabulary(self, run):
            width = 24 if self.settings.encoder == "text_encoder_2" else 16
            return {"cat": {self.settings.encoder: torch.ones(1, width)}}

        def embedding_transform(self, embedding, state):
            if embedding.stage == "token" and embedding.role == "positive":
                seen[embedding.encoder] = embedding.values[:, 2], embedding.tokens[2]

    seen = {}
    sampler("a cat", plugins=[Partial(encoder="text_encoder_2")], steps=1)
    first, _ = sampler.model.text_encoders
    row = first.network.get_input_embeddings().weight[first.ids("cat")]
    assert torch.equal(seen["text_encoder"][0], row)
    assert seen["text_encoder"][1] == "cat</w>"
    assert torch.equal(seen["text_encoder_2"][0], torch.ones(1, 24))
    message = r"vectors for \['text_encoder_3'\] for 'cat'; text encoders are \['text_encoder', 't"
    with pytest.raises(PluginError, match=message):
        sampler("a cat", plugins=[Partial(encoder="text_encoder_3")], steps=1)
