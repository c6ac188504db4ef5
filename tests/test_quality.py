"""The quality benchmark: its plan, its pictures, and its scores."""

import json
import math
import os
import pickle
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pilotfish
from pilotfish.hooks.registry import resolve
from pilotfish.testing import random_sampler

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

needs_font = pytest.mark.skipif(
    not Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").is_file()
    and "PILOTFISH_EMOJI_FONT" not in os.environ,
    reason="needs the font of fonts-noto-color-emoji",
)


@pytest.fixture
def curves(monkeypatch):
    """The modules of the quality benchmark; they need the emoji model's names."""
    pytest.importorskip("pilotfish_emoji")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from curves import drawings, pictures, points, scores

    return SimpleNamespace(drawings=drawings, pictures=pictures, points=points, scores=scores)


def test_the_prompts_hold_every_object_once_and_no_pair_left_out_of_training(curves):
    from pilotfish_emoji import BACKGROUNDS, HELD_OUT_PAIRS, OBJECTS

    points, series = curves.points, curves.points.Series("blue", "balanced")
    labels = [pair for batch in range(points.BATCHES) for pair in points.labels(series, batch)]
    assert sorted(o for o, _ in labels) == list(range(len(OBJECTS)))
    assert not {(OBJECTS[o], BACKGROUNDS[b]) for o, b in labels} & set(HELD_OUT_PAIRS)


@pytest.mark.parametrize("model", ["emoji", "emoji-flow"])
def test_every_preset_for_any_loss_is_measured_for_a_label_and_for_a_colour(curves, model):
    """The others sample posteriors, go along flows only, or are too dear to be compared again."""
    series = [(series.task, series.name) for series in curves.points.all_series(model)]
    others = {name for name, preset in pilotfish.PRESETS.items() if preset.variance != "none"}
    others |= {"ugd", "lgd"} if model == "emoji-flow" else {"flowchef", "flowdps"}
    names = pilotfish.PRESETS.keys() - others
    wanted = {(task, name) for task in ("label", "blue") for name in names}
    assert wanted <= set(series)
    assert not {name for _, name in series} & others
    assert len(series) == len(set(series))


def test_the_plan_finds_the_best_scale_within_a_factor_of_two_and_then_measures_around_it(curves):
    points = curves.points
    series = points.Series("label", "balanced", start=1.0)
    done = set()

    def merit(point):  # highest at 900, far from where the search starts
        return -abs(math.log(point.scale / 900)) if (point, 0) in done else None

    while missing := [wish for wish in points.plan([series], merit) if wish not in done]:
        done.add(missing[0])
    whole = {p.scale for p, batch in done if p.series is series and batch == points.BATCHES - 1}
    assert len(whole) == 5
    assert min(whole) < 900 / 2 < 900 * 2 < max(whole)
    assert points.best(series, merit).scale in whole
    assert 1 / 2 <= points.best(series, merit).scale / 900 <= 2


def test_a_batch_is_made_again_when_anything_that_it_depends_on_changes(curves):
    points, guided = curves.points, {"preset": {"base": "balanced", "trust": 2}}
    names = {
        points.Point(points.Series(*series, **changes), scale).file(weights, batch)
        for series, changes, scale, weights, batch in [
            (("blue", "balanced"), {}, 1.0, "a", 0),
            (("blue", "balanced"), {}, 1.0, "b", 0),
            (("blue", "balanced"), {}, 1.0, "a", 1),
            (("blue", "balanced"), {}, 2.0, "a", 0),
            (("blue", "balanced"), guided, 1.0, "a", 0),
            (("blue", "balanced"), {"run": {"steps": 60}}, 1.0, "a", 0),
            (("blue", "balanced"), {"guide": {"stop": 0.6}}, 1.0, "a", 0),
            (("palette", "balanced"), {}, 1.0, "a", 0),
        ]
    }
    assert len(names) == 8
    same = [points.Series(task, "unguided") for task in ("blue", "palette")]
    assert len({points.Point(s).file("a", 0) for s in same}) == 1


@pytest.mark.parametrize("family", ["stable-diffusion", "sd3"])
def test_each_image_of_a_batch_has_the_prompt_that_it_would_have_alone(curves, family):
    sampler = random_sampler(family=family)
    texts, run = ["a red cat", "blue"], {"steps": 2, "guidance_scale": 4}
    prompts = curves.pictures.Prompts(texts)
    together = sampler(plugins=[prompts], num_images=2, seed=5, **run).latents
    alone = [sampler(text, seed=5 + i, **run).latents for i, text in enumerate(texts)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cutouts", [0, 3])
def test_one_run_of_many_labels_has_the_losses_of_a_classifier_for_each(curves, cutouts):
    from pilotfish_emoji import FOLDER

    lab = curves.pictures.Lab(FOLDER, Path())
    wanted = [4, 10, 63]
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = SimpleNamespace(model=SimpleNamespace(folder=FOLDER, device="cpu", dtype=torch.float32))

    def loss(label, rows, **settings):
        guide = resolve(
            {"use": "classifier", "label": label, "cutouts": cutouts, **settings}
        ).plugin
        generators = [torch.Generator().manual_seed(row) for row in rows]
        step = SimpleNamespace(run=run, image=image[rows], generator=generators)
        return guide.loss_guidance(step, guide.setup(run))

    together = loss(0, [0, 1, 2], model=curves.pictures.Turned(lab.classifier, wanted))
    alone = [loss(label, [row]) for row, label in enumerate(wanted)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_batch_is_kept_and_its_calls_of_the_network_are_counted(curves, tmp_path, monkeypatch):
    from pilotfish_emoji import FOLDER

    for module in (curves.points, curves.pictures):
        monkeypatch.setattr(module, "BATCH", 2)
    recurring = {"base": "balanced", "recurrence": 3, "recurrence_stop": 0.5}
    series = curves.points.Series("label", "often", 1.0, recurring, run={"steps": 2})
    lab, point = curves.pictures.Lab(FOLDER, tmp_path), curves.points.Point(series, 1.0)
    lab.measure(point, 0)
    kept = lab.read(point, 0)
    assert kept["pictures"].shape == (curves.points.BATCH, 64, 64, 3)
    assert kept["calls"] == 3 + 1
    assert kept["seconds"] > 0
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"]  # nothing half done
    assert curves.pictures.Lab(FOLDER, tmp_path).read(point, 0).keys() == kept.keys()


@needs_font
def test_fresh_pictures_are_as_good_as_can_be_and_noise_is_not(curves, monkeypatch):
    from emoji_training.world import render
    from pilotfish_emoji import FOLDER
    from pilotfish_emoji.names import COLORS, GLYPHS, OBJECTS

    monkeypatch.setattr(curves.scores, "FRESH", 128)
    random = Random(5)
    point = curves.points.Point(curves.points.Series("label", "balanced"), 1.0)
    cards = [
        np.asarray(render(GLYPHS[OBJECTS[o]], COLORS["teal"], "plain", random))
        for o, _ in curves.points.labels(point.series, 0)
    ]
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)

    def row(pictures):
        kept = {"pictures": np.stack(pictures), "seconds": 1.0, "calls": 25}
        monkeypatch.setattr(lab, "read", lambda *_: kept)
        return curves.scores.Scores(lab, batches=1).row(point)

    lab = curves.pictures.Lab(FOLDER, Path())
    monkeypatch.setattr(lab, "file", lambda point, batch: Path(FOLDER if not batch else "none"))
    good, bad = row(cards), row(noise)
    least = curves.scores.Scores(lab, batches=1).least_distance("label")
    assert good["object"]["mean"] > 0.9 > 0.2 > bad["object"]["mean"]
    assert good["label"]["mean"] < bad["label"]["mean"]
    assert least < good["distance"] < 2 * least < bad["distance"]


def test_a_run_that_breaks_is_the_least_of_all(curves, monkeypatch):
    from pilotfish_emoji import FOLDER

    lab = curves.pictures.Lab(FOLDER, Path())
    kept = {"pictures": np.zeros((0, 64, 64, 3), np.uint8), "seconds": 1.0, "calls": 25}
    monkeypatch.setattr(lab, "read", lambda *_: kept)
    monkeypatch.setattr(lab, "file", lambda *_: FOLDER)
    scores = curves.scores.Scores(lab)
    point = curves.points.Point(curves.points.Series("label", "balanced"), 1e9)
    assert scores.merit(point) == -math.inf
    assert scores.row(point) is None


def test_a_worker_knows_a_point_by_the_same_file(curves):
    points = curves.points
    for series in (*points.floors("emoji"), *points.all_series("emoji")):
        point = points.Point(series, 1.0)
        assert pickle.loads(pickle.dumps(point)).file("w", 0) == point.file("w", 0)


@pytest.fixture(params=["emoji", "emoji-flow"])
def model(request):
    """A model that ships."""
    return request.param


@pytest.fixture
def result(model):
    """What the last run of the benchmark measured."""
    name = {"emoji": "quality", "emoji-flow": "quality-flow"}[model]
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text()) | {"name": name}


def test_the_tables_of_the_docs_are_those_of_the_results(curves, result):
    found = curves.drawings.filled((ROOT / "docs" / "guidance.md").read_text(), result["name"])
    assert found == curves.drawings.tables(result), "run python benchmarks/quality.py"
    assert found.keys() == curves.points.TASKS.keys()


def test_every_preset_has_results_of_64_pictures(curves, result, model):
    whole = {(row["task"], row["series"]) for row in result["points"] if row["count"] >= 64}
    wanted = {(series.task, series.name) for series in curves.points.all_series(model)}
    assert wanted <= whole


def test_the_results_are_of_the_weights_that_ship(curves, result, model):
    folder = pilotfish.load(model).model.folder
    assert result["weights"] == curves.pictures.Lab(folder, Path()).weights
