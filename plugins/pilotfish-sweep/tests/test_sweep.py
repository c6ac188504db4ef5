"""Sweeps with a real model, in this process: pictures, scores, results, report, commands."""

import contextlib
import csv
import html.parser
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pilotfish_sweep import Folder, Sweep, claims, command, drive, results, work
from pilotfish_sweep.work import Job, Models

from pilotfish import InputError
from pilotfish.cli import main
from pilotfish.testing import random_pipeline

SWEEP = """
prompt = "a red cat </script><b>"
steps = 2
guidance_scale = 3.0
num_images = 2
[[plugins]]
use = "./my_loss.py:Cheap"
name = "cheap"
[axes]
seed = [3, 7]
"plugins.cheap.scale" = [0, 1]
[[scores]]
use = "./my_loss.py:Cheap"
name = "flat"
[[scores]]
judge = "my_judge.py:judge"
"""
MY_LOSS = '''
from pilotfish import Guide

class Cheap(Guide):
    """Reads no picture."""
    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))

class Torn(Guide):
    """Breaks for one seed."""
    def loss_guidance(self, step):
        if step.run.seed == 7:
            raise ValueError("torn")
        return step.rgb.var(dim=(1, 2, 3))
'''
JUDGE = """
def judge(images, run):
    return {"red": images[:, 0].mean(dim=(1, 2)), "seed": [run.seed, run.seed + 1]}
def wrong(images, run):
    return 1.0
"""


class Here:
    """The one worker is this process."""

    workers = 1

    def __init__(self, *_):
        self.tasks = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, job, tasks):
        models = Models("cpu")
        for task in tasks:
            self.tasks.append([name for name, _ in task])
            yield job.work(task, models)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, random_sampler):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "load", lambda model, **_: random_sampler)
    Path("my_loss.py").write_text(MY_LOSS)
    Path("my_judge.py").write_text(JUDGE)
    Path("sweep.toml").write_text(SWEEP)


def run(folder="folder", **options):
    pool = Here()
    progress = drive.run(Sweep.read("sweep.toml"), Folder(folder), pool, pause=0.01, **options)
    return progress, pool


def files(folder="folder"):
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    kept = (path for path in found if "log" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


# ---- cells ----


def test_a_cell_has_the_pictures_of_its_run_alone_to_the_bit(random_sampler):
    run()
    cheap = {"use": "./my_loss.py:Cheap", "name": "cheap"}
    for cell in Sweep.read("sweep.toml").cells():
        seed, scale = cell.values
        alone = random_sampler(
            "a red cat </script><b>",
            steps=2,
            guidance_scale=3.0,
            num_images=2,
            seed=seed,
            plugins=[{**cheap, "scale": scale}],
        )
        for number, picture in enumerate(alone.images, 1):
            made = Folder("folder").cell(cell.name)
            assert np.array_equal(
                pixels(made.with_name(f"{cell.name}-{number}.png")), np.asarray(picture)
            )
        (record, _) = Folder("folder").trace(cell.name)["records"] if scale else (None, None)
        if scale:
            assert record["loss"] == list(alone.trace[0].loss)
            assert "seconds" not in record


def test_generate_takes_a_cells_run_file_and_makes_its_pictures(monkeypatch, random_sampler):
    run()
    monkeypatch.setattr("pilotfish.models.loading.load", lambda **_: random_sampler.model)
    trace = next(Path("folder").glob("cells/*/*.json"))
    done = CliRunner().invoke(
        main, ["generate", "--run", str(trace.with_suffix(".toml")), "--out", "out.png"]
    )
    assert done.exit_code == 0, done.output
    assert np.array_equal(pixels("out-1.png"), pixels(trace.with_name(f"{trace.stem}-1.png")))


def test_scores_are_minus_the_guides_losses_and_what_judges_say(random_sampler):
    run()
    for cell in Sweep.read("sweep.toml").cells():
        trace = Folder("folder").trace(cell.name)
        assert [*trace["scores"]] == ["flat", "judge.red", "judge.seed"]
        assert trace["scores"]["judge.seed"] == [cell.values[0], cell.values[0] + 1]
        for number, red in enumerate(trace["scores"]["judge.red"], 1):
            path = Folder("folder").cell(cell.name).with_name(f"{cell.name}-{number}.png")
            assert red == pytest.approx(pixels(path)[..., 0].mean() / 255, abs=1e-6)
        if cell.values[1] == 0:
            result = random_sampler(
                "a red cat </script><b>", steps=2, guidance_scale=3.0, num_images=2,
                seed=cell.values[0],
            )  # fmt: skip
            rgb = random_sampler.model.rgb(result.latents)
            losses = rgb.var(dim=(1, 2, 3))
            torch.testing.assert_close(torch.tensor(trace["scores"]["flat"]), -losses)


def test_the_same_sweep_again_makes_nothing_and_other_scores_make_the_same_pictures():
    first, _ = run()
    assert (first.planned, first.kept, first.failed) == (4, 0, [])
    before = files()
    again, pool = run()
    assert (again.kept, pool.tasks) == (4, [])
    assert files() == before
    Path("sweep.toml").write_text(SWEEP.partition("[[scores]]\njudge")[0])
    run()
    after = files()
    pictures = [name for name in before if name.endswith(".png")]
    assert len(pictures) == 8
    assert all(after[name] == before[name] for name in pictures)
    assert "judge.red" not in next(
        iter(json.loads(v)["scores"] for k, v in after.items() if k.endswith(".json"))
    )


def test_a_wider_sweep_in_the_same_folder_makes_only_what_is_new():
    run()
    Path("sweep.toml").write_text(SWEEP.replace("[3, 7]", "[3, 7, 8]"))
    progress, pool = run()
    assert (progress.planned, progress.kept, sum(map(len, pool.tasks))) == (6, 4, 2)


def test_what_is_equally_long_and_not_the_same_is_found_by_a_thorough_run():
    run()
    before = files()
    picture = next(Path("folder").glob("cells/*/*.png"))
    content = bytearray(picture.read_bytes())
    content[-20] ^= 1
    picture.write_bytes(content)
    assert run()[0].kept == 4
    assert run(thorough=True)[0].kept == 3
    assert files() == before


def test_what_fails_is_kept_from_the_others_and_tried_again_when_asked_for():
    Path("sweep.toml").write_text(SWEEP.replace("Cheap", "Torn", 1))
    progress, _ = run()
    (name,) = progress.failed  # at scale 0 nothing is asked
    failure = Folder("folder").failure(name)
    assert failure["kind"] == "PluginError"
    assert "torn" in failure["message"]
    assert Folder("folder").trace(name) is None
    assert run()[1].tasks == []
    Folder("folder").forget(name)
    assert run()[1].tasks == [[name]]


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("my_judge.py:wrong", "wrong must answer with a value for each picture, shape (2,)"),
        ("my_judge.py:none", "judge must be a function as MODULE:NAME or FILE.py:NAME"),
        ("no_such_module:judge", "judge must be a function as MODULE:NAME or FILE.py:NAME"),
        ("math:pi", "judge must be a function; 'math:pi' is 3.14"),
    ],
)
def test_a_judge_that_is_none_fails_the_cell_and_says_why(judge, words):
    Path("sweep.toml").write_text(
        SWEEP.replace("my_judge.py:judge", judge).replace("[3, 7]", "[3]").replace("[0, 1]", "[0]")
    )
    (name,) = run()[0].failed
    assert words in Folder("folder").failure(name)["message"]


@pytest.mark.slow
def test_one_process_and_two_make_the_same_files_with_a_model_of_their_own():
    random_pipeline().save_pretrained("tiny")
    Path("sweep.toml").write_text(f'model = "tiny"\n{SWEEP}')
    for workers in ("1", "2"):
        words = ("sweep", "run", "sweep.toml", "--out", workers, "--workers", workers)
        done = subprocess.run(
            [sys.executable, "-m", "pilotfish", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{workers}  4 of 4 cells, 0 kept\n"
    assert files("1") == files("2")
    assert len(files("1")) == 1 + 4 * 4
    assert len({entry["pid"] for entry in Folder("2").logged()}) == 2


# ---- claims ----


def test_one_of_many_claims_a_cell_and_an_abandoned_one_is_taken_over(tmp_path):
    cell, held, go = tmp_path / "ab" / "abc", [], threading.Barrier(8)

    def claim():
        go.wait()
        with claims.claimed(cell) as lock:
            held.append(lock)
            go.wait()

    def all_claim():
        held.clear()
        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [lock.name for lock in held if lock]

    assert all_claim() == ["abc.lock.0"]
    assert not claims.locks_of(cell)
    (cell.with_name("abc.lock.0")).mkdir()
    os.utime(cell.with_name("abc.lock.0"), (0, 0))
    assert all_claim() == ["abc.lock.1"]
    assert not claims.locks_of(cell)


def test_a_claim_of_another_machine_lives_by_its_heartbeat(tmp_path):
    cell = tmp_path / "abc"
    with claims.claimed(cell, beat=0.05) as lock:
        (lock / "owner").write_text('{"where": "elsewhere", "pid": 1}')
        os.utime(lock, (0, 0))
        for _ in range(200):
            if claims.is_held(lock, abandoned=5):
                break
            threading.Event().wait(0.05)
        else:
            raise AssertionError("no sign of life in ten seconds")
    (tmp_path / "abc.lock.0").mkdir()
    os.utime(tmp_path / "abc.lock.0", (0, 0))
    assert not claims.is_held(tmp_path / "abc.lock.0", abandoned=5)


def first_cell():
    """What makes the first cell of the sweep, and with what."""
    sweep, folder = Sweep.read("sweep.toml"), Folder("folder")
    folder.begin(sweep)
    cell = sweep.cells()[0]
    job = Job("folder", sweep.scores, sweep.scored)
    return job, (cell.name, sweep.content(cell.values), Models("cpu"))


def test_who_lost_a_claim_while_it_worked_leaves_the_cell_to_the_other_one():
    class Robbed(Job):
        def _made(self, content, models):
            made = super()._made(content, models)
            (lock,) = Path("folder").glob("cells/*/*.lock.0")
            shutil.rmtree(lock)
            return made

    job, cell = first_cell()
    assert Robbed(**vars(job)).make(*cell) == "busy"
    assert {*files()} == {"sweep.toml"}
    assert job.make(*cell) == "done"


def test_a_picture_that_cannot_be_written_ends_the_sweep_and_is_no_failure(monkeypatch):
    job, cell = first_cell()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left.*the same command goes on"):
        job.make(*cell)
    assert {*files()} == {"sweep.toml"}


def test_a_folder_that_cannot_be_made_is_refused_before_a_model_is_loaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(work, "load", load)
    Path("file").write_text("")
    done = call("run", "sweep.toml", "--out", "file/folder")
    assert done.exit_code == 1
    assert "cannot write the sweep's folder file/folder" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- commands, results and report ----


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr("pilotfish_sweep.pools.Processes", Here)


def call(*arguments):
    return CliRunner().invoke(main, ["sweep", *arguments])


def test_the_commands_run_tell_and_try_again(processes):
    Path("sweep.toml").write_text(SWEEP.replace("Cheap", "Torn", 1))
    assert call("run", "sweep.toml", "--out", "f", "--dry-run").stdout == (
        "4 cells over seed, plugins.cheap.scale\n"
    )
    assert not Path("f").exists()
    done = call("run", "sweep.toml", "--out", "f", "--workers", "2")
    assert done.exit_code == 1
    assert done.stdout == "f  3 of 4 cells, 0 kept\n"
    assert "error: 1 of 4 cells failed" in done.stderr
    told = call("status", "f").stdout
    assert told.startswith("3 of 4 cells done, 1 failed, 0 under way, 0 left\n")
    assert "torn" in told
    state = json.loads(call("status", "f", "--json").stdout)
    assert (state["planned"], state["done"], state["failed"], state["running"]) == (4, 3, 1, [])
    (failed,) = state["failures"]
    assert call("rerun", failed[:8], "f").exit_code == 1  # it has failed again
    assert call("rerun", "0" * 32, "f").exit_code == 1
    assert call("rerun", "failed", "f").exit_code == 1
    assert len([*Folder("f").logged()]) == 4 + 1 + 1


def test_status_tells_who_works(processes):
    run("f")
    trace = next(Path("f").glob("cells/*/*.json"))
    trace.unlink()
    with claims.claimed(trace.with_suffix("")):
        told = call("status", "f").stdout
        assert told.startswith("3 of 4 cells done, 0 failed, 1 under way, 1 left\n")
        assert f"{trace.stem}  on " in told
        assert f"process {os.getpid()}" in told


@pytest.mark.parametrize("name", ["status", "report", "rerun"])
def test_a_folder_without_a_sweep_is_told_so(name, processes):
    more = ("failed",) if name == "rerun" else ()
    done = call(name, *more, "nothing")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: nothing holds no sweep: there is no sweep.toml in it.")


def test_results_hold_each_picture_in_a_row_in_every_form():
    run("f")
    table = results.table(Folder("f"))
    assert len(table.pictures) == 8
    for form in ("csv", "sqlite", "parquet"):
        if form == "parquet":
            pytest.importorskip("pyarrow", reason="Parquet takes pyarrow")
        done = call("results", "f", "--out", f"new/r.{form}")
        assert done.exit_code == 0, done.output
    with open("new/r.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    for row in rows:
        run_file = (Path("f") / row["picture"]).with_name(f"{row['cell']}.toml").read_text()
        assert f"seed = {int(row['seed']) - int(row['image'])}\n" in run_file
        assert f"scale = {row['plugins.cheap.scale']} " in run_file
        red = pixels(Path("f") / row["picture"])[..., 0].mean() / 255
        assert float(row["score.judge.red"]) == pytest.approx(red, abs=1e-6)
        assert float(row["seconds"]) > 0
        assert (row["loss.cheap"] != "") == (row["plugins.cheap.scale"] == "1")
    with contextlib.closing(sqlite3.connect("new/r.sqlite")) as base:
        count, least = base.execute(
            'select count(*), min("score.judge.red") from pictures'
        ).fetchone()
        assert (count, least) == (8, min(float(row["score.judge.red"]) for row in rows))
        steps = base.execute("select step, count(*) from losses group by step").fetchall()
        assert steps == [(0, 4), (1, 4)]  # two seeds at scale 1, two pictures each
    from pyarrow import parquet

    columns = parquet.read_table("new/r.parquet").to_pydict()
    assert columns["score.judge.red"] == [float(row["score.judge.red"]) for row in rows]
    assert columns["seed"] == [int(row["seed"]) for row in rows]


def test_results_of_an_unfinished_sweep_tell_what_is_open_and_what_failed(processes):
    Path("sweep.toml").write_text(SWEEP.replace("Cheap", "Torn", 1))
    run("f")
    next(Path("f").glob("cells/*/*.json")).unlink()
    states = [row["state"] for row in results.table(Folder("f")).pictures]
    assert sorted(states) == ["done"] * 4 + ["failed", "open"]
    assert call("results", "f", "--out", "r.txt").exit_code == 1
    assert call("results", "f", "--out", "r.csv").exit_code == 0


class Page(html.parser.HTMLParser):
    """The data of a report, and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.data, self.loads, self._tag, self.tags = "", [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self._tag = attributes.get("id") if tag == "script" else None
        self.loads += [attributes[key] for key in ("src", "href") if key in attributes]

    def handle_data(self, text):
        if self._tag == "data":
            self.data += text


def test_the_report_is_one_file_with_all_of_the_sweep_in_it(processes):
    run("f")
    done = call("report", "f")
    assert done.stdout == "f/report.html  4 cells\n"
    page = Page(Path("f/report.html").read_text())
    assert page.loads == []
    assert page.tags.count("b") == 0  # no prompt's markup becomes the page's
    data = json.loads(page.data)
    assert [axis["name"] for axis in data["axes"]] == ["seed", "plugins.cheap.scale"]
    assert data["axes"][1]["values"] == ["cheap.scale = 0", "cheap.scale = 1"]
    assert sorted(cell["at"] for cell in data["cells"]) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for cell in data["cells"]:
        assert cell["settings"]["prompt"] == "a red cat </script><b>"
        assert cell["settings"]["seed"] == ["3", "7"][cell["at"][0]]
        assert len(cell["pictures"]) == 2
        assert all(picture.startswith("data:image/webp;base64,") for picture in cell["pictures"])
        assert all((Path("f") / link).is_file() for link in cell["links"])
        trace = Folder("f").trace(cell["name"])
        assert cell["numbers"]["judge.red"] == trace["scores"]["judge.red"]
        if cell["at"][1]:
            first = trace["records"][0]["loss"]
            assert cell["losses"]["cheap"][0] == [0, pytest.approx(sum(first) / 2)]


def test_a_report_elsewhere_leads_to_the_pictures_and_a_large_one_shows_the_folders(
    processes, monkeypatch
):
    monkeypatch.setattr("pilotfish_sweep.report.EMBEDDED", 3)
    run("f")
    assert call("report", "f", "--out", "new/deep/report.html").exit_code == 0
    page = Page(Path("new/deep/report.html").read_text())
    for cell in json.loads(page.data)["cells"]:
        assert cell["pictures"] == cell["links"]
        assert all((Path("new/deep") / link).is_file() for link in cell["links"])


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom pilotfish_sweep.command import sweep\n"
        "sweep(['run', '--help'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'diffusers', 'distributed'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resources", "GPU=1"), "it goes with --scheduler"),
        (("--scheduler", "local", "--device", "cpu,cpu"), "--device names one device"),
        (("--scheduler", "local", "--resources", "GPU"), "--resources must be NAME=NUMBER"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, words):
    done = call("run", "sweep.toml", "--out", "f", *arguments)
    assert done.exit_code == 1
    assert words in done.stderr


def test_amounts_are_read_as_dask_takes_them():
    assert command.amounts("GPU=1, MEMORY=2e9") == {"GPU": 1, "MEMORY": 2e9}
    assert command.amounts(None) == {}
