"""The shipped weights: they load, they are small, and they draw what they are asked for."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from emoji_training import score, world
from emoji_training.export import sample
from emoji_training.judge import accuracies
from emoji_training.vae import encode
from pilotfish_emoji import BACKGROUNDS, FOLDER, OBJECTS, STYLES, judge

needs_font = pytest.mark.skipif(
    not world.FONT.is_file(), reason="needs the font of fonts-noto-color-emoji"
)


@lru_cache
def pipe() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, clip_sample=False)
    loaded.set_progress_bar_config(disable=True)
    loaded.unet.to(memory_format=torch.channels_last)
    return loaded


def test_diffusers_loads_the_folder_as_float32() -> None:
    dtypes = {part.dtype for part in (pipe().unet, pipe().vae, pipe().text_encoder)}
    assert dtypes == {torch.float32}


def test_the_package_is_smaller_than_30_megabytes() -> None:
    files = [path for path in FOLDER.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6


def test_the_text_encoder_ends_where_the_tokenizer_does() -> None:
    config, tokenizer = pipe().text_encoder.config, pipe().tokenizer
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def test_the_folder_has_a_model_card() -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card


def test_pictures_show_what_the_prompts_ask_for() -> None:
    wishes = score.plain_wishes(8, seed=7)
    images = sample(pipe(), [wish.prompt for wish in wishes], seed=7)
    found = score.rates(judge.load(), images, wishes)
    assert found["object"] >= 7 / 8
    assert found["background"] >= 7 / 8


def test_the_shipped_scores_were_taken_as_the_card_says() -> None:
    scores = json.loads((FOLDER / score.FILE).read_text("utf-8"))
    assert scores["settings"] == score.SETTINGS
    assert scores["seen"]["prompts"] == score.PROMPTS
    assert scores["seen"]["both"] >= 0.98
    assert scores["held_out"]["both"] >= 0.95
    assert scores["styled"]["style"] >= 0.95


@needs_font
def test_scaled_latents_have_unit_variance() -> None:
    means, stds = encode(pipe().vae, world.dataset(96, seed=11).images)
    total = means.var((0, 2, 3)) + stds.square().mean((0, 2, 3))
    torch.testing.assert_close(total, torch.ones(4), rtol=0.25, atol=0)  # 96 pictures are few


@needs_font
def test_reconstructions_keep_the_picture() -> None:
    images = world.dataset(64, seed=12).images
    latents, _ = encode(pipe().vae, images)
    with torch.no_grad():
        decoded = pipe().vae.decode(latents / pipe().vae.config.scaling_factor).sample
    assert (decoded - (images.float() / 127.5 - 1)).abs().mean() < 0.06


@needs_font
def test_the_judge_knows_fresh_renders() -> None:
    data = world.dataset(512, seed=13, held_out=True)
    named = data.labels[:, 2] <= len(STYLES)  # plain, or in a style that has a name
    found = accuracies(judge.load(), data.images[named], data.labels[named])
    assert min(found.values()) > 0.99


def test_the_judge_gives_probabilities_in_the_order_of_the_names() -> None:
    verdict = judge.load().judge(torch.rand(2, 3, 64, 64))
    assert verdict.object.shape == (2, len(OBJECTS))
    assert verdict.background.shape == (2, len(BACKGROUNDS))
    assert verdict.style.shape == (2, len(judge.JUDGED_STYLES))
    torch.testing.assert_close(verdict.object.sum(1), torch.ones(2))


def test_the_judge_says_which_shape_it_expects() -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 3, 64, 64\)"):
        judge.load().judge(torch.rand(3, 64, 64))


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40_000, 3, generator=generator)
    second = 2 * torch.randn(40_000, 3, generator=generator) + torch.tensor([3.0, 0, 0])
    # |mean difference|^2 + 3 (1 - 2)^2; the sampling error of 40,000 draws is about 0.05
    assert score.frechet_distance(first, second) == pytest.approx(9 + 3, abs=0.2)


def test_the_frechet_distance_of_fewer_pictures_than_features_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 40, generator=generator, dtype=torch.float64)
    second = torch.randn(90, 40, generator=generator, dtype=torch.float64) + 1
    centred = first - first.mean(0), second - second.mean(0)
    # The root's trace is the sum of the singular values of one set's deviations times the other's.
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / (15 * 89) ** 0.5
    spreads = centred[0].square().sum() / 15 + centred[1].square().sum() / 89
    between = (first.mean(0) - second.mean(0)).square().sum()
    expected = float(between + spreads - 2 * overlap)
    assert score.frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
