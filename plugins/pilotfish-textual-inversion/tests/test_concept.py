"""A learned embedding, bound to its word for one run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tomli_w
import torch
from pilotfish_kit import check_plugin
from pilotfish_textual_inversion import Concept
from safetensors.torch import save_file

import pilotfish
from pilotfish import InputError, SettingsError

BIRB = Path(__file__).parent / "data" / "learned_embeds.bin"
INK = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def ink(tmp_path):
    """Files with the word `<ink>` of one vector and of three."""

    def file(count):
        path = tmp_path / f"ink{count}.safetensors"
        save_file({"<ink>": INK[:count].clone()}, path)
        return path

    return file


def prompt_embeddings(sampler, prompt, plugin):
    """What the network gets for the prompt in a run."""
    (step,) = sampler.stream(prompt, plugins=[plugin], steps=1, seed=0)
    return step.embeddings


def diffusers_embeddings(pipeline, prompt, file):
    """The same by diffusers, on a copy of the pipeline."""
    theirs = copy.deepcopy(pipeline)
    theirs.load_textual_inversion(str(file))
    with torch.no_grad():
        return theirs.encode_prompt(prompt, "cpu", 1, False)[0]


def snapshot(pipeline):
    """What of a pipeline a concept could change."""
    encoder = pipeline.text_encoder
    table = encoder.get_input_embeddings()
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    return weights, pipeline.tokenizer.get_vocab(), len(table._forward_hooks)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prompt", ["a red <ink> cat", "<ink>", "a cat, <ink> and <ink>"])
def test_prompt_embeddings_equal_those_of_diffusers(pipeline, sampler, ink, count, prompt):
    before = snapshot(pipeline)
    ours = prompt_embeddings(sampler, prompt, Concept(file=ink(count)))
    assert torch.equal(ours, diffusers_embeddings(pipeline, prompt, ink(count)))
    weights, vocabulary, hooks = snapshot(pipeline)
    torch.testing.assert_close(weights, before[0], rtol=0, atol=0)
    assert (vocabulary, hooks) == before[1:]


def test_a_real_file_of_stable_diffusion_1_equals_diffusers(wide_pipeline):
    prompt, sampler = "a cat in <birb-style>", pilotfish.Sampler.from_pipeline(wide_pipeline)
    ours = prompt_embeddings(sampler, prompt, Concept(file=BIRB))
    assert ours.shape == (1, 77, 768)
    assert torch.equal(ours, diffusers_embeddings(wide_pipeline, prompt, BIRB))


def test_an_automatic1111_file_equals_diffusers(pipeline, sampler, tmp_path):
    path = tmp_path / "embedding.pt"
    torch.save({"string_to_param": {"*": INK}, "name": "inky"}, path)
    ours = prompt_embeddings(sampler, "an inky cat", Concept(file=path))
    assert torch.equal(ours, diffusers_embeddings(pipeline, "an inky cat", path))


def test_a_renamed_word_is_the_same_word(sampler, ink):
    own = prompt_embeddings(sampler, "a <ink> cat", Concept(file=ink(3)))
    renamed = prompt_embeddings(sampler, "a <brush> cat", Concept(file=ink(3), token="<brush>"))
    assert torch.equal(own, renamed)


def test_the_word_may_be_written_in_capitals_where_the_tokenizer_does_not_tell(sampler, ink):
    own = prompt_embeddings(sampler, "a <ink> cat", Concept(file=ink(3)))
    assert torch.equal(own, prompt_embeddings(sampler, "a <INK> cat", Concept(file=ink(3))))


def test_the_word_works_in_the_negative_prompt_too(sampler, ink):
    options = {"steps": 2, "seed": 1, "negative_prompt": "a <ink>"}
    with_word = sampler("a cat", plugins=[Concept(file=ink(1))], **options).latents
    assert not torch.equal(with_word, sampler("a cat", **options).latents)


def test_two_runs_with_different_concepts_interleave(sampler, ink):
    def stream(count):
        return sampler.stream("a <ink>", plugins=[Concept(file=ink(count))], steps=3, seed=1)

    one, three = stream(1), stream(3)
    for _ in zip(one, three, strict=True):
        pass
    assert torch.equal(one.result().latents, stream(1).result().latents)
    assert torch.equal(three.result().latents, stream(3).result().latents)
    assert not torch.equal(one.result().latents, three.result().latents)


def test_one_instance_serves_runs_that_interleave(sampler, ink):
    concept = Concept(file=ink(1))
    runs = [sampler.stream(p, plugins=[concept], steps=2, seed=1) for p in ("<ink>", "a <ink>")]
    for _ in zip(*runs, strict=True):
        pass
    for run, prompt in zip(runs, ("<ink>", "a <ink>"), strict=True):
        alone = sampler(prompt, plugins=[concept], steps=2, seed=1).latents
        assert torch.equal(run.result().latents, alone)


@pytest.mark.slow
def test_a_concept_keeps_the_contract_of_plugins(sampler, ink):
    check_plugin(Concept(file=ink(3)), sampler, prompt="an <ink> cat")


def test_it_is_installed_and_comes_back_from_a_run_file(sampler, ink):
    result = sampler("a <ink>", plugins=[f"concept:file={ink(1)}"], steps=2, seed=1)
    content = pilotfish.Run.parse(result.run.to_toml())
    again = sampler("a <ink>", plugins=content["plugins"], steps=2, seed=1)
    assert torch.equal(result.latents, again.latents)
    assert tomli_w.dumps(content["plugins"][0]).splitlines()[0] == 'use = "concept"'


# ---- what cannot work ----


def test_a_word_that_the_prompt_lacks_is_warned_about_and_changes_nothing(sampler, ink):
    with pytest.warns(UserWarning, match=r"ink1\.safetensors teaches .*'<ink>'.*: 'a cat'\. Write"):
        result = sampler("a cat", plugins=[Concept(file=ink(1))], steps=2, seed=1)
    assert torch.equal(result.latents, sampler("a cat", steps=2, seed=1).latents)


def test_another_width_is_refused_with_the_file_and_both_widths(sampler):
    message = (
        r"plugin 'concept': .*learned_embeds\.bin holds vectors of width 768, but this model's "
        r"text_encoder takes 16\. It was made for another model family\."
    )
    with pytest.raises(InputError, match=message):
        sampler("a <birb-style>", plugins=[Concept(file=BIRB)], steps=1)


@pytest.mark.slow
def test_the_emoji_model_refuses_the_file_of_stable_diffusion_1():
    with pytest.raises(InputError, match="of width 768, but this model's text_encoder takes 128"):
        pilotfish.load()("a <birb-style>", plugins=[Concept(file=BIRB)], steps=1)


@pytest.mark.parametrize("count", [76, 500])
def test_more_vectors_than_a_prompt_has_room_for_are_refused(sampler, tmp_path, count):
    save_file({"<ink>": torch.ones(count, 16)}, tmp_path / "ink.safetensors")
    message = rf"ink\.safetensors holds {count} vectors for '<ink>'; a prompt has room for 75"
    with pytest.raises(InputError, match=message):
        sampler("a <ink>", plugins=[Concept(file=tmp_path / "ink.safetensors")], steps=1)


def test_wrong_settings_are_named(ink):
    with pytest.raises(SettingsError, match="token must be a word without spaces; got 'a b'"):
        Concept(file=ink(1), token="a b")
    with pytest.raises(SettingsError, match="file must be given"):
        Concept()
    with pytest.raises(InputError, match=r"no embedding file none\.pt"):
        Concept(file="none.pt")
