"""The table of every plugin on both models: its scenes, its measures, and what the page shows."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import pilotfish

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODELS = ("emoji", "emoji-flow")


@pytest.fixture
def table(monkeypatch):
    """The script; it needs both models, and the font that draws their world."""
    pytest.importorskip("pilotfish_emoji_flow")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "every_plugin", raising=False)
    module = importlib.import_module("every_plugin")
    from emoji_training.world import font_path

    try:
        font_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture
def result():
    """What the last run measured."""
    return json.loads((BENCHMARKS / "results" / "every_plugin.json").read_text("utf-8"))


def painted(table, lab, monkeypatch, pictures):
    """Let a lab's rows be these pictures: `{row: (3, 64, 64)}`."""
    none = torch.zeros(1)
    drawn = {name: table.Drawn(p.unsqueeze(0), none, none) for name, p in pictures.items()}
    monkeypatch.setattr(lab, "drawn", lambda row, scene: drawn[row])


def test_no_scene_is_of_a_pair_that_either_model_left_out_of_training(table):
    for package in table.MODELS.values():
        for name, background, other in table.SCENES:
            assert {name, other} <= set(package.OBJECTS)
            assert not {(name, background), (other, background)} & set(package.HELD_OUT_PAIRS)


def test_the_lesson_shows_no_object_of_the_scenes(table):
    assert not set(table.LESSON) & {name for name, *_ in table.SCENES}


@pytest.mark.parametrize("model", MODELS)
def test_a_rows_pictures_are_those_of_the_run_that_it_tells_of(table, model, tmp_path):
    table.Lab(model, 1, tmp_path, steps=2).drawn("token-swap", 2)
    found = table.Lab(model, 2, tmp_path, steps=2).drawn("token-swap", 2)  # one more
    run = {"plugins": ["token-swap:word=frog,by=owl"], "steps": 2, "num_images": 2}
    sampler = pilotfish.load(model)
    result = sampler("a frog on a pink background", seed=2 * table.SEEDS, **run)
    # Batches, and another memory layout, sum in another order.
    torch.testing.assert_close(found.latents, result.latents, atol=1e-4, rtol=0)
    lab = table.Lab(model, 2, tmp_path, steps=2)
    lab.sampler = SimpleNamespace(model=sampler.model)  # which can make none
    assert torch.equal(lab.drawn("token-swap", 2).latents, found.latents)


def test_pictures_are_made_again_when_anything_that_they_depend_on_changes(
    table, tmp_path, monkeypatch
):
    lab = table.Lab("emoji", 1, tmp_path)
    files = {lab.file("blue", 0), lab.file("blue", 1), lab.file("blue, scale 2", 0)}
    others = (table.Lab("emoji", 1, tmp_path, steps=2), table.Lab("emoji-flow", 1, tmp_path))
    files |= {other.file("blue", 0) for other in others}
    monkeypatch.setattr(table.moves, "UNPROMPTED_PULL", 0.5)
    files |= {lab.file("blue", 0)}
    monkeypatch.setattr(lab, "weights", "others")
    files |= {lab.file("blue", 0)}
    assert len(files) == 7


def test_loss_left_is_the_guides_own_loss_beside_that_of_unguided_pictures(
    table, tmp_path, monkeypatch
):
    lab = table.Lab("emoji", 1, tmp_path)
    pictures = {"blue": torch.full((3, 64, 64), 0.8), "no plugin": torch.full((3, 64, 64), 0.4)}
    painted(table, lab, monkeypatch, pictures)
    assert table.loss_left(lab, "blue") == pytest.approx(0.1 / 0.5, rel=1e-5)  # to 0.9


def test_distances_are_to_the_picture_that_was_given_and_errors_only_outside_of_the_box(
    table, tmp_path, monkeypatch
):
    monkeypatch.setattr(table, "SCENES", table.SCENES[:1])
    lab, black = table.Lab("emoji", 1, tmp_path), torch.zeros(3, 64, 64)
    Image.new("RGB", (64, 64)).save(lab.picture("cat", "teal"))
    # A VAE that makes a picture brighter by 0.05.
    vae = SimpleNamespace(encode=lambda image: image, decode=lambda latents: latents + 0.05)
    lab.sampler = SimpleNamespace(model=vae)
    redrawn = black + 0.1
    redrawn[:, 8:56, 8:56] = 1
    pictures = {"img2img": black + 0.1, "no plugin": black + 0.4, "inpaint": redrawn}
    painted(table, lab, monkeypatch, pictures)
    assert table.distance_left(lab, "img2img") == pytest.approx(0.1 / 0.4, rel=1e-5)
    assert table.error_outside(lab, "inpaint") == pytest.approx(0.1 / 0.05, rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_judge_of_each_model_is_asked_for_the_scenes_own_words(
    table, model, tmp_path, monkeypatch
):
    lab, names = (
        table.Lab(model, 1, tmp_path),
        [("cat", "teal", "plain"), ("fox", "red", "blueprint")],
    )
    monkeypatch.setattr(lab, "judge", SimpleNamespace(judge=lambda _: SimpleNamespace(names=names)))
    monkeypatch.setattr(table, "SCENES", table.SCENES[:2])  # a fox on teal, a cat on red
    painted(table, lab, monkeypatch, {"blend": torch.zeros(3, 64, 64)})
    found = table.measured(lab, "blend")
    assert (found["own"], found["object"], found["background"]) == (0.5, 1.0, 0.5)


def test_the_table_of_the_page_is_that_of_the_results(table, result):
    page = (ROOT / "docs" / "guidance.md").read_text("utf-8")
    assert table.table(result) in page, "run python benchmarks/every_plugin.py"


def test_the_results_are_of_the_weights_that_ship(table, result):
    assert tuple(result) == MODELS
    for model, found in result.items():
        assert found["weights"] == table.weights(model), "run python benchmarks/every_plugin.py"
        assert set(found["rows"]) <= set(table.ROWS)
