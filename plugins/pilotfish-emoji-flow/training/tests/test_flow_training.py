"""How the flow model is trained: words, times, what the transformer is told, and the judge."""

from __future__ import annotations

import pytest
import torch
from emoji_training import tokenizer as emoji
from emoji_training.score import held_out_wishes, plain_wishes
from emoji_training.tokenizer import token_ids
from flow_training.export import pipeline
from flow_training.judge import build_judge
from flow_training.pictures import WORLD
from flow_training.text import MAX_LENGTH, build_encoders, build_tokenizer, extend
from flow_training.transformer import (
    Captions,
    Latents,
    build_transformer,
    draw_batch,
    draw_times,
    read_captions,
    split_optimizers,
)
from pilotfish_emoji import OBJECTS as KNOWN
from pilotfish_emoji import judge as judges
from pilotfish_emoji_flow import HELD_OUT_PAIRS, OBJECTS

LONGEST = "a pencil sketch of a cat on a red background"


def test_the_longest_captions_have_room() -> None:
    tokenizer = build_tokenizer()
    rows = token_ids(tokenizer, [LONGEST, "a cat on a red background in some style"])
    assert {len(row) for row in rows} == {MAX_LENGTH}
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)


def test_known_words_keep_their_embeddings_and_new_ones_have_their_own() -> None:
    known, wanted = emoji.build_tokenizer(), build_tokenizer()
    rows = torch.randn(len(known), 128, generator=torch.Generator().manual_seed(0))
    extended = extend(rows, known, wanted, seed=1)
    cat, wolf = ("cat</w>", "wolf</w>")
    assert torch.equal(
        extended[wanted.convert_tokens_to_ids(cat)], rows[known.convert_tokens_to_ids(cat)]
    )
    assert wolf not in known.get_vocab()
    assert torch.cdist(extended, extended).fill_diagonal_(1).min() > 0


def test_the_second_encoder_pools_as_the_emoji_models_clip_does() -> None:
    open_clip = pytest.importorskip("open_clip")
    from pilotfish_emoji import FOLDER

    place = f"local-dir:{FOLDER / 'clip'}"
    clip, read = open_clip.create_model(place).eval(), open_clip.get_tokenizer(place)
    ids = torch.tensor(token_ids(build_tokenizer(), [LONGEST]))
    with torch.no_grad():
        pooled = build_encoders()[1].eval()(ids).text_embeds
        torch.testing.assert_close(pooled, clip.encode_text(read([LONGEST])))


@torch.no_grad()
def test_training_reads_captions_as_the_pipeline_does() -> None:
    texts = ["a cat on a red background", "", "a wolf on a teal background"]
    told = read_captions(build_encoders(), build_tokenizer(), texts)
    pipe = pipeline(build_transformer())
    values, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    # One batch against another: float32's rounding.
    torch.testing.assert_close(told.values[told.rows], values[:, :MAX_LENGTH])
    torch.testing.assert_close(told.pooled[told.rows], pooled)
    assert not values[:, MAX_LENGTH:].any()


def test_times_are_spread_evenly_over_their_normal_quantiles() -> None:
    times = draw_times(1_000, torch.Generator().manual_seed(0))
    assert 0 < times.min() < times.max() < 1
    quantiles = torch.special.ndtr(times.logit())
    torch.testing.assert_close(
        quantiles.diff(), torch.full((999,), 1e-3), rtol=0, atol=1.01e-3
    )  # one draw in each thousandth


def test_a_batch_is_told_its_own_captions_or_nothing() -> None:
    number = torch.arange(400.0)
    latents = Latents(number.view(-1, 1, 1, 1).expand(-1, 4, 2, 2), torch.zeros(400, 4, 2, 2))
    marks = torch.cat([torch.tensor([-1.0]), number])
    captions = Captions(
        marks.view(-1, 1, 1).expand(-1, 3, 5), marks.view(-1, 1).expand(-1, 5), torch.arange(1, 401)
    )
    x0, values, pooled = draw_batch(latents, captions, 400, torch.Generator().manual_seed(0))
    told = values[:, 0, 0]
    empty = told == -1
    assert torch.equal(told[~empty], x0[~empty, 0, 0, 0])
    assert torch.equal(pooled[:, 0], told)
    assert 0.05 < empty.float().mean() < 0.2


def test_each_parameter_has_one_optimizer() -> None:
    transformer = build_transformer()
    groups = [g for o in split_optimizers(transformer, 1e-3, 0.0) for g in o.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in transformer.parameters())


@torch.no_grad()
def test_the_new_judge_begins_with_what_the_emoji_models_knows() -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    objects, backgrounds, styles = build_judge().eval()(images)
    expected = judges.load()(images)
    torch.testing.assert_close(objects[:, : len(KNOWN)], expected[0])
    torch.testing.assert_close((backgrounds, styles), expected[1:])


def test_wishes_cover_every_object_and_keep_held_out_pairs_apart() -> None:
    seen, held_out = plain_wishes(192, 0, WORLD), held_out_wishes(96, WORLD)
    assert {wish.object for wish in seen} == set(OBJECTS)
    assert not {(wish.object, wish.background) for wish in seen} & set(HELD_OUT_PAIRS)
    assert {(wish.object, wish.background) for wish in held_out} == set(HELD_OUT_PAIRS)
