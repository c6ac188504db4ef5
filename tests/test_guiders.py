"""The benchmark of guidance plugins: its points, its choice of the best, and the page."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def guiders(monkeypatch):
    """The benchmark's module."""
    pytest.importorskip("pilotfish_emoji_flow")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "guiders", raising=False)
    return importlib.import_module("guiders")


@pytest.fixture
def result():
    """What its last run measured."""
    return json.loads((BENCHMARKS / "results" / "guiders.json").read_text("utf-8"))


@pytest.mark.parametrize("model", ["emoji", "emoji-flow"])
def test_every_plugin_of_both_packages_is_measured(guiders, model):
    from importlib.metadata import entry_points

    packages = {"pilotfish_cfg", "pilotfish_perturb"}
    entries = entry_points(group="pilotfish.plugins")
    wanted = {e.name for e in entries if e.value.partition(":")[0].partition(".")[0] in packages}
    used = {p.plugin["use"] for p in guiders.points(guiders.MODELS[model]) if p.plugin}
    assert used == wanted - {"nag"}  # which is for runs without guidance: measured with its package


def test_the_best_is_the_least_distance_where_both_are_right(guiders):
    def row(method, right, distance):
        return {"method": method, "right": right, "distance": distance}

    rows = [row("a", 0.9, 80), row("a", 0.96, 100), row("a", 0.99, 101), row("b", 0.8, 10)]
    rows += [row("b", 0.9, 99), row("fresh pictures", 1, 120), row("c", 0.97, 99)]
    found = [(r["method"], r["distance"]) for r in guiders.best(rows)]
    assert found == [("fresh pictures", 120), ("c", 99), ("a", 100), ("b", 99)]


def test_the_tables_of_the_page_are_those_of_the_results(guiders, result):
    page = (ROOT / "docs" / "guidance.md").read_text("utf-8")
    assert result.keys() == guiders.MODELS.keys()
    for model, found in result.items():
        text = f"<!-- guiders: {model} -->\n{guiders.table(found['points'])}\n<!-- end -->"
        assert text in page, "run python benchmarks/guiders.py"


def test_the_results_are_of_the_weights_that_ship(guiders, result):
    for name, model in guiders.MODELS.items():
        parts = ("unet", "transformer", "vae", "text_encoder*")
        assert result[name]["weights"] == guiders.digest(model.folder, *parts)
