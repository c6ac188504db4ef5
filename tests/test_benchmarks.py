"""The benchmarks run, and what they compare with is independent of pilotfish."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = {"U0", "U1", "U2", "O0", "H1", "O1", "H1L", "O1L"}


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """The result of the shortest run, and the table that it printed."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    options = ["--model", "random", "--rounds", "1", "--steps", "3", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_the_hand_written_baseline_imports_only_torch_and_diffusers():
    tree = ast.parse((BENCHMARKS / "handwritten.py").read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names | froms} == {"torch", "diffusers"}


def test_the_speed_benchmark_reports_all_rows(speed):
    result, printed = speed
    assert set(result["rows"]) == ROWS
    assert all(f"| {name} |" in printed for name in ROWS)


def test_the_rows_that_are_compared_compute_the_same(speed):
    apart = speed[0]["largest_difference"]
    assert apart["U1/U0"] == apart["U1/U2"] == apart["O0/U1"] == 0
    assert apart["O1/H1"] < 1e-4  # one gradient is added up in another order
    assert apart["O1L/H1L"] < 1e-4


def test_guided_rows_cost_what_their_work_predicts(speed):
    rows = speed[0]["rows"]
    assert rows["U1"]["flops"] == rows["U0"]["flops"] == rows["U2"]["flops"]
    assert rows["O1"]["flops"] == rows["H1"]["flops"] > rows["U0"]["flops"]
    assert rows["O1L"]["flops"] == rows["H1L"]["flops"] > rows["O1"]["flops"]


def test_the_result_names_no_host_and_no_folder(speed):
    machine = speed[0]["machine"]
    versions = {"python", "torch", "diffusers", "pilotfish"}
    assert set(machine) == {"cpu", "cores", "threads", "gpu", *versions}
    assert str(BENCHMARKS.parent) not in json.dumps(speed[0])


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
