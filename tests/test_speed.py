"""The speed benchmark runs, compares what is the same, and with what does not know pilotfish."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def timing():
    """What the script is made of: `timing("rows")`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield lambda name: importlib.import_module(f"timing.{name}")
    for name in [n for n in sys.modules if n.split(".")[0] in ("timing", "handwritten")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The result of the shortest run, and the page that it printed."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    options = ["--model", "random", "--rounds", "1", "--steps", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), "--profile", "smoke", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def counted(smoke):
    """What was counted of each row of the smoke profile."""
    scenes = [scene for scene in smoke[0]["scenes"] if scene["scene"]["model"] == "random"]
    rows = {name: row for scene in scenes for name, row in scene["rows"].items()}
    return {name: row["counted"] for name, row in rows.items()}


def test_the_hand_written_baseline_knows_torch_diffusers_and_open_clip_only():
    tree = ast.parse((BENCHMARKS / "handwritten.py").read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert packages == {"torch", "diffusers", "open_clip"}


@pytest.mark.slow
def test_every_row_of_the_profile_is_on_the_page(smoke, timing):
    result, page = smoke
    scenes = timing("profiles").PROFILES["smoke"]
    assert [set(scene["rows"]) for scene in result["scenes"]] == [set(s.rows) for s in scenes]
    assert all(f"| {row} |" in page for scene in scenes for row in scene.rows)


@pytest.mark.slow
def test_rows_without_a_guide_are_the_same_to_the_bit_and_the_others_to_rounding(smoke):
    apart = [pair for scene in smoke[0]["scenes"] for pair in scene["largest_difference"].items()]
    exact = {pair for pair in apart if pair[0].endswith("/U0 latents")}
    assert exact == {(f"{name}/U0 latents", 0) for name in ("U1", "U2", "O0", "None")}
    close = dict(set(apart) - exact)
    assert {"O1/H1", "O3/H3", "N3/H3", "R3/H3", "O1 x0/H1 x0"} < close.keys()
    assert all(difference < 1e-5 for _, difference in set(apart) - exact)


@pytest.mark.parametrize("model", ["random sd3", "random flux"])
def test_on_flows_rows_are_their_pipelines_to_the_bit_and_the_hand_written_loops(model, timing):
    scenes, profiles = timing("scenes"), timing("profiles")
    rows = (*profiles.FLOW, "U2")
    result = scenes.play(scenes.Scene(model, model, rows, 2, 2, rounds=1), CPU, "euler")
    apart = result["largest_difference"]
    assert apart["U1/U0 latents"] == apart["U2/U0 latents"] == 0
    assert 0 < apart["O1/H1"] < 1e-5 and 0 < apart["O3/H3"] < 1e-5
    counted = {name: row["counted"] for name, row in result["rows"].items()}
    calls = {n: (c["network_calls"], c["decoder_calls"]) for n, c in counted.items()}
    assert (calls["U0"], calls["U1"], calls["H3"], calls["O3"]) == ((1, 1), (1, 1), (1, 2), (1, 2))
    assert counted["U1"]["flops"] == counted["U0"]["flops"] < counted["O1"]["flops"]
    aims = {aim.what: aim.bound for aim in timing("report").Scene(result).aims()}
    assert {"U1 / U0": 1.01, "O1 / H1": 1.02, "O3 / H3": 1.02}.items() <= aims.items()


@pytest.mark.slow
def test_rows_cost_what_their_work_predicts(counted):
    flops = {name: row["flops"] for name, row in counted.items()}
    assert flops["U0"] == flops["U1"] == flops["U2"] == flops["O0"] == flops["None"]
    assert flops["O1"] == flops["H1"] > flops["O1 x0"] == flops["H1 x0"] > flops["U0"]
    for name in ("3", "3 mixed"):  # the cosines between guides are ours alone
        assert flops[f"H{name}"] < flops[f"O{name}"] < 1.001 * flops[f"H{name}"]
    assert flops["N3"] > flops["R3"] > flops["H3"]
    assert flops["O1"] > flops["O1 linear"] > flops["O1 x0 linear"]
    assert flops["O1 checkpointed"] > flops["O1"]


@pytest.mark.slow
def test_guides_share_one_call_of_the_network_and_one_decode(counted):
    calls = {n: (c["network_calls"], c["decoder_calls"]) for n, c in counted.items()}  # in one step
    assert calls["U0"] == calls["None"] == (1, 1)  # the finished picture is decoded once
    assert calls["O1"] == calls["O3"] == calls["O3 mixed"] == (1, 2)
    assert calls["N3"] == (4, 4)


@pytest.mark.slow
def test_a_guide_that_reads_colours_only_decodes_nothing(counted):
    assert counted["O1 rgb"]["decoder_calls"] == 1  # the finished picture
    assert counted["O1 rgb"]["flops"] < 1.001 * counted["U0"]["flops"]


@pytest.mark.slow
def test_checkpointing_lowers_the_peak_of_memory(counted):
    assert counted["O1 checkpointed"]["peak_bytes"] < counted["O1"]["peak_bytes"]


@pytest.mark.slow
def test_the_result_names_no_host_and_no_folder(smoke):
    versions = {"python", "torch", "diffusers", "pilotfish"}
    assert set(smoke[0]["machine"]) == {"cpu", "cores", "threads", "gpu", *versions}
    assert str(BENCHMARKS.parent) not in json.dumps(smoke[0])


def test_rows_that_differ_are_refused(timing):
    rows, measure = timing("rows"), timing("measure")
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def row(latents, **options):
        return rows.Row("", lambda work: (latents, []), **options)

    plain, close = row(noise), {"same_as": "H1", "tolerance": 1e-4}
    moved = noise + 0.1
    good = {"U0 latents": plain, "H1": row(moved), "O1": row(moved + 1e-6, **close)}
    assert 0 < measure.check(good, None)["O1/H1"] < 1e-5
    for wrong, message in (
        ({"U1": row(noise + 1e-7, same_as="U0 latents")}, "U1 and U0 latents differ"),
        ({"O1": row(moved + 0.01, **close)}, "O1 and H1 differ"),
        ({"O1": row(moved * float("nan"), **close)}, "O1 and H1 differ"),
        ({"H1": plain, "O1": row(noise, **close)}, "O1: the guide changes too little"),
    ):
        with pytest.raises(RuntimeError, match=message):
            measure.check({**good, **wrong}, None)


def test_ratios_are_of_one_round_and_the_slope_is_in_unguided_steps(timing):
    measure = timing("measure")
    seconds = {
        "S": {0: 1.0, 1: 2.0},
        "U0": {0: 3.0, 1: 6.0},
        "O1": {0: 4.0, 1: 8.0},
        "O3": {0: 5.0, 1: 10.0},
        "N3": {1: 12.0},
    }
    assert measure.ratio(seconds, "N3", "O3")["median"] == pytest.approx(1.2)
    ratio = measure.ratio(seconds, "O1", "U0", without="S")
    assert (ratio["median"], ratio["count"]) == (pytest.approx(1.5), 2)
    slope = measure.slope(seconds, "O", [1, 3], "U0", "S")
    assert slope["median"] == pytest.approx(0.25)


def test_rows_are_timed_in_rounds_in_changing_orders_and_dear_ones_seldom(timing):
    rows, measure, work = timing("rows"), timing("measure"), timing("scenes").Work("a cat", 4)
    order = []

    def row(name, **options):
        return rows.Row("", lambda work: order.append((name, work.steps)), **options)

    table = {"a": row("a"), "b": row("b"), "c": row("c"), "dear": row("dear", every=3)}
    seconds = measure.measure(table, work, rounds=4)
    assert [len(seconds[name]) for name in table] == [4, 4, 4, 2]
    assert order[:4] == [("a", 1), ("b", 1), ("c", 1), ("dear", 1)]  # warming up
    assert {steps for _, steps in order[4:]} == {4}
    cheap = [name for name, _ in order[4:] if name != "dear"]
    assert len({tuple(cheap[i : i + 3]) for i in (0, 3, 6, 9)}) > 1
    assert list(measure.measure(table, work, rounds=9, minutes=0)["a"]) == [0]


def test_the_memory_of_a_guided_run_is_told_as_it_becomes_known(timing):
    memory, report = timing("memory"), timing("report")
    known = []
    for result in memory.run("random"):
        known.append(set(result["runs"]))
    assert known == [set(), {"on"}, {"on", "off"}]
    on, off = result["runs"]["on"], result["runs"]["off"]
    assert 0 < on["peak_bytes"] < off["peak_bytes"]
    kept = result["unet_graph"]["kept_bytes"]
    assert 0 < kept["on"] < kept["off"] < off["peak_bytes"]
    page = report.page({"machine": report.machine(CPU), **result})
    assert "random, 32 pixels, float32, batch 1, 2 steps" in page


def test_bytes_kept_are_what_is_still_held_and_the_peak_is_the_most(timing):
    measure, held = timing("measure"), []

    def run():
        held.append(torch.ones(1000) + torch.ones(1000))  # 4 kB each, and one stays

    assert measure.kept_bytes(run) == 4000
    assert measure.peak_bytes(run, CPU) == 12000


def test_a_result_tells_what_was_met_and_what_was_missed(timing):
    report = timing("report")

    def scene(**seconds):
        rows = {
            name: {
                "what": name,
                "seconds": {"0": spent},
                "counted": {"flops": 1 if name[0] == "S" else 2, "steps": 1, "peak_bytes": 0},
            }
            for name, spent in seconds.items()
        }
        return {
            "scene": {"name": "toy", "dtype": "float32"},
            "work": {"batch": 1, "steps": 1},
            "largest_difference": {},
            "rows": rows,
        }

    hooks = {"hooks": {"median": 120.0, "min": 90.0, "max": 150.0, "count": 3}}
    toy = scene(S=0.0, U0=1.0, U1=1.005, H1=5.0, O1=5.2, O3=6.0, N3=18.0)
    result = {"scenes": [toy], "host_microseconds_per_step": hooks}
    met = {goal["what"]: goal["met"] for goal in report.reached(result)}
    hooks = report.HOST["hooks"][0]
    assert met == {"U1 / U0": True, "O1 / H1": False, "N3 / O3, steps alone": True, hooks: False}
    page = report.summary({"machine": report.machine(CPU), **result})
    assert "| O1 / H1 | 1.040 (1.040 to 1.040) | 1.000 | <= 1.02, **missed** |" in page
    assert "| >= 3, met |" in page


def test_the_sizes_are_those_of_stable_diffusion(timing):
    models = timing("models")
    sizes = {n: size for n, size in models.SIZES.items() if isinstance(size, models.Size)}
    diffusers = models.diffusers
    with torch.device("meta"):
        unets = {n: diffusers.UNet2DConditionModel(**size.unet) for n, size in sizes.items()}
        decoder = diffusers.AutoencoderKL(**sizes["sd15"].vae)
    counts = {name: sum(p.numel() for p in unet.parameters()) for name, unet in unets.items()}
    assert counts["sd15"] == 859_520_964
    assert counts["sdxl"] == 2_567_463_684 - 5_245_440  # without the added embedding
    assert sum(p.numel() for p in decoder.parameters()) == 83_653_863


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what dynamo says about itself
def test_the_gpu_profile_runs_on_a_small_model(timing, monkeypatch):
    """On the CPU; networks are traced, not compiled. What differs by model and batch only is one
    scene here, of two pictures and in its own number format; what the smoke profile plays in
    float32 is not played again in bfloat16."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager")
    )
    rows, models = {}, timing("models")
    profiles, ends = timing("profiles").PROFILES, timing("profiles").ENDS
    played = {name for scene in profiles["smoke"] for name in scene.rows} - {*ends, "H1", "O1"}
    for scene in profiles["gpu"]:
        apart = any(name.endswith(("compiled", "channels last")) for name in scene.rows)
        new = [n for n in scene.rows if scene.dtype != "bfloat16" or n not in played]
        rows.setdefault((scene.dtype, apart), {}).update(dict.fromkeys(new))
    assert len(rows) == 3  # bfloat16, float16, and changed networks
    for (dtype, apart), names in rows.items():
        scene = timing("scenes").Scene(
            "small", "random", tuple(names), 2, 1 if apart else 2, dtype, 1, large=models.TINY_CLIP
        )
        result = timing("scenes").play(scene, CPU, "euler")
        assert set(result["rows"]) == set(names)
        table = timing("report").Scene(result).table()
        assert len(table) == 2 + len(names)


def test_the_pages_show_the_results(timing, tmp_path):
    copy, before = tmp_path / "benchmarks", BENCHMARKS
    shutil.copytree(before / "results", copy / "results")
    shutil.copy(before / "README.md", copy)
    timing("report").write_tables(copy / "README.md", copy / "results")
    for name in ("README.md", *(f"results/{p.name}" for p in copy.glob("results/speed-*.md"))):
        assert (copy / name).read_text() == (before / name).read_text(), name
