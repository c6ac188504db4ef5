"""Pages show what the benchmarks measured. `test_speed.py` has the speed benchmark."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("costs", "curves", "decoders", "growth", "handwritten", "timing")


@pytest.fixture
def script(monkeypatch):
    """One of them, as a module."""
    pytest.importorskip("pilotfish_emoji")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [n for n in sys.modules if n.split(".")[0] in SCRIPTS]:
        del sys.modules[name]


@pytest.fixture
def decoders(script):
    return script("decoders")


def test_the_page_on_decoders_shows_what_was_measured(decoders):
    result = json.loads((BENCHMARKS / "results" / "decoders.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "guidance.md").read_text()
    assert decoders.cost_table(result) in page
    assert decoders.worth_table(result) in page
    flops = result["stable_diffusion_flops"]
    assert f"{flops['vae'] / 1e9:.0f} GFLOP with the VAE and {flops['tiny'] / 1e9:.0f}" in page
    assert f"mean over {result['pictures']} pictures" in page
    vae, tiny = (result["cost"][name]["milliseconds_per_image"] for name in ("vae", "tiny"))
    assert f"would save {vae - tiny:.0f} ms of a guided step" in page


def test_the_tiny_decoder_that_is_measured_is_small_and_fits_the_emoji_model(decoders):
    network = decoders.diffusers.AutoencoderTiny(**decoders.TINY)
    count = sum(p.numel() for p in network.parameters())
    assert f"{count / 1e6:.2f} million" == "0.12 million"
    assert network.decode(decoders.torch.zeros(1, 4, 16, 16)).sample.shape == (1, 3, 64, 64)


def test_the_page_on_costs_shows_what_was_measured(script):
    result = json.loads((BENCHMARKS / "results" / "costs.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "guidance.md").read_text()
    costs = script("costs")
    assert result.keys() == costs.ROWS.keys()
    assert costs.table(result) in page
    times, sizes = (
        [result[f"`best-of`, {count} particles"][key] for count in (2, 4, 8)]
        for key in ("milliseconds", "peak_bytes")
    )
    for values, most in ((times, 1.25), (sizes, 1.05)):  # a straight line through the three
        first, second = values[1] - values[0], (values[2] - values[1]) / 2
        assert 1 / most < second / first < most


def test_costs_are_counted_where_they_arise(script, monkeypatch, tmp_path):
    costs = script("costs")
    monkeypatch.setattr(costs, "STEPS", (1, 2))
    pipeline = costs.models.load("emoji", costs.CPU, costs.torch.float32)
    rows = costs.rows_of(pipeline, tmp_path)

    def counted(name):
        return tuple(costs.counted(pipeline, rows[name]).values())

    assert counted(costs.PLAIN) == (2, 1, 0)  # predictions, calls, decodes
    assert counted("`pag`") == (3, 1, 0)  # in one batch with the others
    assert counted("`sag`") == (3, 2, 0)
    assert counted("`blue`") == (2, 1, 1)
    assert counted("`best-of`, 2 particles") == (4, 1, 1)
    assert counted("`controlnet`") == counted("`lora`") == (2, 1, 0)


def test_the_page_on_growth_shows_what_was_measured(script):
    growth = script("growth")
    result = json.loads((BENCHMARKS / "results" / "growth.json").read_text())
    assert result.keys() == growth.AXES.keys()
    assert growth.table(result) in (BENCHMARKS / "README.md").read_text()
    orders = {axis: found["order"] for axis, found in result.items()}
    # A further guide costs its own loss alone; the rest is in proportion, memory but for steps.
    assert orders["guides"]["time"] < 0.2 and orders["guides"]["memory"] < 0.1
    for axis, expected in (("images", 1), ("particles", 1), ("side in pixels", 2)):
        assert orders[axis]["memory"] == pytest.approx(expected, abs=0.1)
        assert orders[axis]["time"] == pytest.approx(expected, abs=0.3)
    assert orders["steps"]["memory"] == pytest.approx(0, abs=0.02)
    assert orders["steps"]["time"] == pytest.approx(1, abs=0.15)


def test_an_order_is_the_power_of_the_last_points(script):
    order = script("growth").order
    assert order((1, 2, 4, 8), [7.0, 3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == 1.5
    assert order((1, 2, 4), [5.0, 5.0, 5.0]) == 0
