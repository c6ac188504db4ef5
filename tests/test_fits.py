"""The memory that is computed for the models' page, held to counts by hand and to real tensors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from pilotfish.testing import random_pipeline

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture(scope="module")
def fits():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fits

        yield fits
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tiny(fits):
    """A tiny Stable Diffusion 3 as a published model is written down."""
    pipeline = random_pipeline(family="sd3")
    networks = {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}

    def config(network):
        found = network.config.to_dict() if hasattr(network.config, "to_dict") else network.config
        return {k: v for k, v in dict(found).items() if not k.startswith("_")}

    configs = {name: config(network) for name, network in networks.items()}
    told = {"values": (1, 77 + 12, 48), "pooled": (1, 40)}
    return pipeline, networks, fits.Model("sd3", configs, told, pixels=32, tiny=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_kept_is_counted_once_and_without_weights(device, fits):
    layers = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4), nn.Tanh()).to(device)
    layers.requires_grad_(False)
    kept = fits.Kept(layers)
    with kept.counting():
        layers(torch.zeros(5, 8, device=device).requires_grad_())
    # SiLU keeps its input, (5, 16), and tanh its output, (5, 4); frozen layers need no input.
    assert kept.bytes == 4 * (5 * 16 + 5 * 4)


def test_attention_keeps_no_matrix_of_its_own(fits):
    q, k, v = torch.zeros(3, 1, 2, 64, 8, device="meta", dtype=torch.bfloat16).unbind()
    kept = fits.Kept()
    with kept.counting():
        output = scaled_dot_product_attention(q.requires_grad_(), k, v)
    assert output.shape == (1, 2, 64, 8)
    seen = 3 * 2 * 2 * 64 * 8  # q, k and v lie in one storage
    log_sums, dropout = 4 * 2 * 64, 2 * 8
    assert kept.bytes == seen + 2 * 2 * 64 * 8 + log_sums + dropout


def test_numbers_of_a_tiny_model_are_those_of_its_real_tensors(tiny, fits):
    _, networks, model = tiny
    found = fits.computed(model)
    for name, network in networks.items():
        assert found["weights"][name] == 2 * sum(p.numel() for p in network.parameters())
    # The same count over tensors that have values.
    real = fits.Sampler.from_pipeline(random_pipeline(family="sd3", dtype=torch.bfloat16)).model
    ready = real.differentiable("off")
    kept = fits.Kept(ready.vae)
    latents = torch.zeros(1, 16, 16, 16, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        ready.decode(latents)
    assert found["decoder"]["vae"] == pytest.approx(kept.bytes, rel=0.05)
    assert found["kept"]["on"] < found["kept"]["off"]
    assert found["decoder"]["linear"] == 0


def test_a_checkpointed_layer_keeps_its_input_alone(fits):
    layer = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8), nn.Tanh())
    layer.requires_grad_(False).to("meta")
    kept = fits.Kept(layer)
    with kept.counting():
        checkpoint(layer, torch.zeros(5, 8, device="meta").requires_grad_(), use_reentrant=False)
    assert kept.bytes == 4 * 5 * 8


def test_the_computed_graph_of_stable_diffusions_unet_is_the_one_that_was_measured():
    """On the CPU in float32, by torch's profiler: see the README of the benchmarks."""
    read = [json.loads((RESULTS / f"{n}.json").read_text()) for n in ("memory", "speed-memory")]
    computed = read[0]["Stable Diffusion 1.5"]["kept"]["off"]
    measured = read[1]["unet_graph"]["kept_bytes"]["off"]
    assert 2 * computed == pytest.approx(measured, rel=0.01)


def test_ways_are_tried_in_order_and_the_table_tells_the_first_that_fits(fits):
    numbers = {
        "pixels": 512,
        "predictions": 2,
        "weights": {"unet": 4 * fits.GIB, "vae": fits.GIB, "text_encoder": 3 * fits.GIB},
        "kept": {"off": 10 * fits.GIB, "on": fits.GIB},
        "decoder": {"vae": 6 * fits.GIB, "vae, checkpointed": 3 * fits.GIB, "linear": 0},
    }
    peaks = {how: peak / fits.GIB for how, peak in fits.ways(numbers)}
    assert peaks["as it is"] == 8 + 10 + 6
    assert peaks["text off"] == 5 + 10 + 6
    assert peaks["checkpointing"] == 8 + 1 + 3
    assert peaks["text off, checkpointing, linear"] == 8  # all weights, while prompts are encoded
    assert [fits.fitting(numbers, card) for card in (8, 9, 12, 14, 80)] == [
        "-",
        "text off, checkpointing, linear",
        "text off, checkpointing",
        "checkpointing",
        "as it is",
    ]


def test_the_page_and_what_doctor_tells_are_those_of_the_results(fits, tmp_path):
    results = json.loads((RESULTS / "memory.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "models.md").read_text()
    (tmp_path / "page.md").write_text("<!-- memory -->\n<!-- /memory -->")
    fits.write(results, tmp_path / "page.md", tmp_path / "memory.json")
    assert (tmp_path / "page.md").read_text() in page
    shipped = BENCHMARKS.parent / "src" / "pilotfish" / "cli" / "memory.json"
    assert (tmp_path / "memory.json").read_text() == shipped.read_text()


def test_the_published_sizes_have_as_many_parameters_as_their_makers_say():
    results = json.loads((RESULTS / "memory.json").read_text())
    network = {name: next(iter(r["weights"].values())) / 2e9 for name, r in results.items()}
    told = {
        "Stable Diffusion 1.5": 0.86,
        "Stable Diffusion XL": 2.6,
        "Stable Diffusion 3.5 medium": 2.5,
        "FLUX.1 dev": 12,
        "Z-Image": 6,
        "Qwen-Image": 20,
        "FLUX.2 Klein 4B": 4,
    }
    for name, billions in told.items():
        assert network[name] == pytest.approx(billions, rel=0.12), name


@pytest.mark.parametrize(
    ("device", "gib", "flux", "z_image"),
    [
        ("cuda", 24, "no: 31.4 GiB at least, of 24", "text off, checkpointing"),
        ("cpu", 24, "no: 31.8 GiB at least, of 24", "no: 22"),
        ("cuda", 80, "as it is", "checkpointing"),
        ("mps", 32, "no: 31.8", "checkpointing"),
    ],
)
def test_doctor_tells_what_the_machine_can_guide(device, gib, flux, z_image, monkeypatch):
    from pilotfish.cli import doctor

    monkeypatch.setattr(doctor, "room", lambda: (device, gib))
    found = {finding.name: finding.detail for finding in doctor.guiding()}
    assert len(found) == 7
    assert found["FLUX.1 dev"].startswith(f"on {device}: {flux}")
    assert found["Z-Image"].startswith(f"on {device}: {z_image}")


def test_the_memory_of_this_machine_is_a_sensible_number():
    from pilotfish.cli.doctor import room

    device, gib = room()
    assert device in ("cuda", "mps", "cpu")
    assert gib == 0 or 0.5 < gib < 1e5


def test_a_machine_that_does_not_say_is_told_nothing_wrong(monkeypatch):
    from pilotfish.cli import doctor

    monkeypatch.setattr(doctor, "room", lambda: ("cpu", 0.0))
    assert not [*doctor.guiding()]
