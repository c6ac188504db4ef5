"""The pictures and the tokenizer of the emoji world."""

from __future__ import annotations

from random import Random

import pytest
import torch
from emoji_training import tokenizer, world
from pilotfish_emoji import BACKGROUNDS, FOLDER, HELD_OUT_PAIRS, OBJECTS

needs_font = pytest.mark.skipif(
    not world.FONT.is_file(), reason="needs the font of fonts-noto-color-emoji"
)


@needs_font
def test_training_pictures_never_show_a_held_out_pair() -> None:
    labels = world.dataset(1_500, seed=3).labels
    named = labels[labels[:, 0] < len(OBJECTS)]
    drawn = {(OBJECTS[o], BACKGROUNDS[b]) for o, b, _ in named.tolist()}
    assert not drawn & set(HELD_OUT_PAIRS)


@needs_font
def test_held_out_pairs_are_drawn_when_asked_for() -> None:
    labels = world.dataset(1_500, seed=3, held_out=True).labels
    named = labels[labels[:, 0] < len(OBJECTS)]
    drawn = {(OBJECTS[o], BACKGROUNDS[b]) for o, b, _ in named.tolist()}
    assert drawn & set(HELD_OUT_PAIRS)


@needs_font
def test_the_same_seed_draws_the_same_pictures() -> None:
    first, second = (world.dataset(40, seed=5) for _ in range(2))
    assert first.captions == second.captions
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, world.dataset(40, seed=6).images)


@needs_font
def test_unnamed_styles_are_in_pictures_but_in_no_caption() -> None:
    samples = [world.draw(Random(seed)) for seed in range(300)]
    unnamed = [s for s in samples if world.ALL_STYLES[s.labels.style] in world.UNNAMED_STYLES]
    assert unnamed
    assert all(sample.caption.endswith("in some style") for sample in unnamed)
    assert not any(name in s.caption for s in samples for name in world.UNNAMED_STYLES)


@needs_font
def test_a_jittered_background_stays_near_its_color() -> None:
    image = world.pixels(world.render("🔑", (60, 100, 220), "plain", Random(0)))
    corner = image[:, 0, 0].int()
    assert (corner - torch.tensor([60, 100, 220])).abs().max() <= world.JITTER


def test_a_missing_font_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(world.FONT_VARIABLE, "/nowhere/emoji.ttf")
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        world.font_path()


def test_captions_read_as_sentences() -> None:
    assert world.caption("cat", "teal") == "a cat on a teal background"
    styled = world.caption("cat", "teal", "pixel art")
    assert styled == "a pixel art of a cat on a teal background"
    assert world.caption("cat", "teal", "sepia") == "a cat on a teal background in some style"


def test_a_contact_sheet_has_a_cell_for_each_picture() -> None:
    assert world.sheet(torch.zeros(20, 3, 64, 64), columns=16).size == (16 * 66, 2 * 66)


def test_every_word_of_the_world_is_one_token() -> None:
    built = tokenizer.build_tokenizer()
    pieces = {word: built.tokenize(word) for word in tokenizer.world_words()}
    assert {word: parts for word, parts in pieces.items() if len(parts) != 1} == {}


def test_an_unknown_word_falls_into_pieces_that_spell_it() -> None:
    pieces = tokenizer.build_tokenizer().tokenize("birb")
    assert len(pieces) > 1
    assert "".join(pieces) == "birb</w>"


def test_start_and_end_have_the_two_highest_ids() -> None:
    built = tokenizer.build_tokenizer()
    assert (built.bos_token_id, built.eos_token_id) == (len(built) - 2, len(built) - 1)
    assert built.pad_token_id == built.eos_token_id


def test_captions_are_padded_to_77_tokens() -> None:
    built = tokenizer.build_tokenizer()
    row = tokenizer.token_ids(built, ["a cat"])[0]
    assert len(row) == 77
    assert row[0] == built.bos_token_id
    assert row[3:] == [built.eos_token_id] * 74


def test_the_shipped_tokenizer_is_the_one_the_code_builds() -> None:
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    assert shipped.get_vocab() == tokenizer.build_tokenizer().get_vocab()
    assert shipped.model_max_length == 77
