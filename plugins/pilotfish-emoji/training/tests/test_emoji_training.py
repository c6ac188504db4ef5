"""Training runs resume, share their work, and write whole folders."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emoji_training import loop, muon
from emoji_training.export import export
from emoji_training.judge import IGNORED, judged_labels
from emoji_training.loop import Run
from emoji_training.tokenizer import build_tokenizer
from emoji_training.unet import (
    Denoiser,
    Latents,
    build_text_encoder,
    build_unet,
    caption_ids,
    min_snr_weight,
    train_denoiser,
)
from emoji_training.vae import build_vae, encode, normalise, train_decoder
from pilotfish_emoji.judge import JUDGED_STYLES
from torch import Tensor, nn


def tiny_denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(build_unet((8, 16)), build_text_encoder(build_tokenizer()))


def tiny_latents() -> Latents:
    tokenizer, generator = build_tokenizer(), torch.Generator().manual_seed(1)
    ids = caption_ids(tokenizer, ["a cat on a red background", "a key on a blue background"])
    means = torch.randn(2, 4, 16, 16, generator=generator)
    return Latents(means, 0.1 * torch.ones_like(means), ids, caption_ids(tokenizer, [""])[0])


def regression(tmp_path: Path, *, workers: int = 1) -> Run:
    def loss(module: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        inputs = torch.randn(6, 3, generator=generator)
        error: Tensor = module(inputs) - inputs.sum(1, keepdim=True)
        return error.square().mean()

    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    return Run(module, loss, 200, 0.05, tmp_path / "run.pt", workers=workers, ema_decay=0.9)


def trained(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int | None]) -> Any:
    """The weights after one run for each stop, all with the same checkpoint."""
    for stop in stops:
        denoiser = tiny_denoiser()
        monkeypatch.setattr("emoji_training.unet.train", partial(loop.train, stop_after=stop))
        train_denoiser(denoiser, tiny_latents(), num_steps=4, batch=2, checkpoint=checkpoint)
    return denoiser.state_dict()


def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole.pt", monkeypatch, [None])
    stopped = trained(tmp_path / "stopped.pt", monkeypatch, [2, None])
    torch.testing.assert_close(stopped, whole, rtol=0, atol=0)


def test_a_checkpoint_of_another_length_is_refused(tmp_path: Path) -> None:
    run = regression(tmp_path)
    loop.train(run, stop_after=1)
    run.num_steps = 5
    with pytest.raises(ValueError, match="belongs to a run of 200 steps, not 5"):
        loop.train(run)


@pytest.mark.parametrize("workers", [1, 2])
def test_training_reaches_the_minimum(tmp_path: Path, workers: int) -> None:
    module = loop.train(regression(tmp_path, workers=workers))
    assert isinstance(module, nn.Linear)
    torch.testing.assert_close(module.weight.detach(), torch.ones(1, 3), rtol=0, atol=0.02)


def test_replicas_share_weights_but_not_gradients() -> None:
    first, second = loop.replicate(nn.Linear(2, 2), 2)
    second(torch.ones(1, 2)).sum().backward()
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert first.weight.grad is None


def test_the_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    rates = [loop.one_cycle(step, 100, 1.0) for step in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 5
    assert rates[100] == pytest.approx(0.01)


def test_averaged_weights_are_undone() -> None:
    module = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    with loop.averaged(module, [torch.zeros(2, 2), torch.zeros(2)]):
        assert module.weight.abs().sum() == 0
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(16, 144), (64, 16), (32, 32)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(matrix))
    assert values.max() < 1.25
    assert values.median() > 0.6  # five steps leave the smallest values of a square matrix behind


def test_muon_lowers_a_quadratic() -> None:
    weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = muon.Muon([weight], lr=0.1, weight_decay=0.0)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_min_snr_weights_never_exceed_one_and_fall_with_less_noise() -> None:
    weights = min_snr_weight(torch.tensor([0.01, 0.5, 0.9, 0.999]))
    torch.testing.assert_close(weights[:2], torch.ones(2))
    assert 1 > weights[2] > weights[3] > 0


def test_normalise_changes_latents_but_no_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae((8, 16, 16)).eval()
    images = torch.randint(0, 256, (12, 3, 64, 64)).byte()
    with torch.no_grad():
        before = vae.decode(encode(vae, images)[0] / vae.config.scaling_factor).sample
        normalise(vae, images)
        means, stds = encode(vae, images)
        after = vae.decode(means / vae.config.scaling_factor).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)  # rounding of float32
    total = means.var((0, 2, 3)) + stds.square().mean((0, 2, 3))
    torch.testing.assert_close(total, torch.ones(4), rtol=1e-3, atol=0)


def test_training_the_decoder_leaves_the_encoder_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae((8, 16, 16)).eval()
    images = torch.randint(0, 256, (4, 3, 64, 64)).byte()
    means, _ = encode(vae, images)
    before = copy.deepcopy(vae.decoder.state_dict())
    train_decoder(vae, images, means, num_steps=2, batch=2, checkpoint=tmp_path / "decoder.pt")
    torch.testing.assert_close(encode(vae, images)[0], means, rtol=1e-4, atol=1e-4)
    after = vae.decoder.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_export_replaces_the_folder_whole(tmp_path: Path) -> None:
    vae, tokenizer = build_vae((8, 16, 16)), build_tokenizer()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale.txt").write_text("old", "utf-8")
    export(folder, vae, tiny_denoiser(), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (folder / "stale.txt").exists()
    assert (folder / "model_index.json").exists()


def test_the_judge_is_not_asked_what_a_picture_cannot_tell() -> None:
    sepia = JUDGED_STYLES.index("sepia")
    truths = judged_labels(torch.tensor([[64, 3, 0], [5, 2, sepia]]))
    assert truths.tolist() == [[IGNORED, 3, 0], [5, IGNORED, sepia]]
