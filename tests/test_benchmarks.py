"""Pages show what the benchmarks measured. `test_speed.py` has the speed benchmark."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def decoders(monkeypatch):
    pytest.importorskip("pilotfish_emoji")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "decoders", raising=False)
    return importlib.import_module("decoders")


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
