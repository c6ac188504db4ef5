"""The shipped weights: they load, they are small, and they draw what they are asked for."""

from __future__ import annotations

import json
import tomllib
from functools import lru_cache

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from emoji_training.score import FILE, plain_wishes, rates
from flow_training import score
from flow_training.export import GUIDANCE, STEPS, load, sample
from flow_training.pictures import WORLD
from flow_training.transformer import EMPTY_TOKENS
from pilotfish_emoji import judge
from pilotfish_emoji_flow import BACKGROUNDS, FOLDER, OBJECTS, STYLES

import pilotfish


@lru_cache
def pipe() -> StableDiffusion3Pipeline:
    return load(FOLDER)


def test_diffusers_loads_the_folder_as_float32() -> None:
    parts = pipe().transformer, pipe().vae, pipe().text_encoder, pipe().text_encoder_2
    assert {part.dtype for part in parts} == {torch.float32}


def test_the_package_is_smaller_than_60_megabytes() -> None:
    files = [path for path in FOLDER.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6


def test_the_folder_has_a_model_card() -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card


def test_the_models_defaults_are_those_that_it_was_scored_with() -> None:
    defaults = tomllib.loads((FOLDER / "pilotfish.toml").read_text("utf-8"))
    assert defaults == {
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": EMPTY_TOKENS,
        "height": 64,
        "width": 64,
    }


@pytest.mark.parametrize("number", ["", "_2"])
def test_each_word_of_the_world_is_one_token(number: str) -> None:
    tokenizer = getattr(pipe(), f"tokenizer{number}")
    words = " ".join((*OBJECTS, *BACKGROUNDS, *STYLES)).split()
    assert {word for word in words if len(tokenizer.tokenize(word)) != 1} == set()


@pytest.mark.parametrize("number", ["", "_2"])
def test_the_text_encoders_end_where_the_tokenizers_do(number: str) -> None:
    tokenizer = getattr(pipe(), f"tokenizer{number}")
    config = getattr(pipe(), f"text_encoder{number}").config
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == tokenizer.model_max_length
    assert (config.bos_token_id, config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def test_the_scheduler_steps_through_the_times_as_they_were_trained() -> None:
    assert pipe().scheduler.config.shift == 1.0


def test_the_prompt_of_the_pipelines_default_size_is_drawn_on_its_background() -> None:
    image = pipe()(
        "a wolf on a red background",
        num_inference_steps=8,
        max_sequence_length=EMPTY_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert image.shape == (1, 3, 64, 64)
    assert judge.load().judge(image.float()).names[0][1] == "red"


def test_the_shipped_scores_were_taken_as_the_card_says() -> None:
    scores = json.loads((FOLDER / FILE).read_text("utf-8"))
    assert scores["settings"] == score.SETTINGS
    assert scores["seen"]["prompts"] == score.PROMPTS


def test_the_judge_gives_probabilities_for_all_objects() -> None:
    verdict = judge.load(FOLDER, objects=OBJECTS).judge(torch.rand(2, 3, 64, 64))
    assert verdict.object.shape == (2, len(OBJECTS))
    assert {name for name, _, _ in verdict.names} <= set(OBJECTS)


def test_pilotfish_loads_it_by_name_with_its_own_defaults_and_equals_diffusers() -> None:
    sampler = pilotfish.load("emoji-flow")
    found = sampler("a wolf on a red background", steps=3, seed=0).latents
    expected = pipe()(
        "a wolf on a red background",
        num_inference_steps=3,
        guidance_scale=GUIDANCE,
        max_sequence_length=EMPTY_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_blue_at_its_default_scale_halves_its_loss_and_keeps_the_object() -> None:
    sampler = pilotfish.load("emoji-flow")
    run = {"num_images": 4, "seed": 1}
    pictures = [
        sampler("a campfire on a black background", plugins=plugins, **run).latents
        for plugins in ([], ["blue"])
    ]
    with torch.no_grad():
        plain, guided = (sampler.model.decode(latents).clamp(0, 1) for latents in pictures)
    before, after = ((image[:, 2] - 0.9).abs().mean() for image in (plain, guided))
    assert after <= 0.5 * before
    names = [name for name, _, _ in judge.load().judge(guided).names]
    assert names.count("campfire") >= 3


@pytest.mark.slow
def test_pictures_show_what_the_prompts_ask_for() -> None:
    wishes = plain_wishes(32, 7, WORLD)
    images = sample(pipe(), [wish.prompt for wish in wishes], seed=7)
    found = rates(judge.load(FOLDER, objects=OBJECTS), images, wishes)
    assert found["object"] >= 0.9
    assert found["background"] >= 0.95
