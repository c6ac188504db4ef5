"""Sweeps that are killed, started twice or damaged end with the files of an undisturbed one."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pilotfish_sweep.folder import Folder
from pilotfish_sweep.plan import Sweep

QUICK = Path(__file__).with_name("quick.py")
CELLS = 60
SWEEP = """
prompt = "a red cat"
[axes]
guidance_scale = [1, 2.5]
seed = {from = 1, to = 30}
"""


def start(folder, sweep="sweep.toml", **options):
    command = [sys.executable, str(QUICK), sweep, str(folder)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def finish(process):
    _, told = process.communicate(timeout=300)
    return process.returncode, told


def files(folder):
    """Everything in a sweep's folder but its log: a killed process may not have written there.

    Nor claims: one that a worker looks into a cell with as the sweep ends goes with the next one.
    """
    folder = Path(folder)
    there = (path for path in folder.rglob("*") if path.is_file())
    found = (path for path in there if ".lock." not in path.parent.name)
    kept = (path for path in found if path.relative_to(folder).parts[0] != "log")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def made(folder):
    """How often each cell was made, by the log."""
    names = [entry["cell"] for entry in Folder(folder).logged()]
    return {name: names.count(name) for name in names}


def workers_of(process):
    """The processes that a driver has started, but not Python's own helper."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, line in lines.items() if "spawn_main" in line]


def both_workers(process):
    """Its two workers, once both have started."""
    deadline = time.monotonic() + 120
    while len(found := workers_of(process)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def kill(*pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(SWEEP)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "sweep.toml").write_text(SWEEP)
    code, told = finish(start(folder / "folder", str(folder / "sweep.toml")))
    assert code == 0, told
    found = files(folder / "folder")
    assert len(found) == 3 * CELLS + 1  # run, picture and trace of each, and the sweep
    assert made(folder / "folder") == dict.fromkeys(
        (cell.name for cell in Sweep.read(folder / "sweep.toml").cells()), 1
    )
    return found


def wait_for(folder, count):
    deadline = time.monotonic() + 120
    while len([*Path(folder).glob("cells/*/*.json")]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_ten_points_it_ends_with_the_same_files(undisturbed):
    own = random.Random(7)
    for round_ in range(10):
        process = start("folder")
        wait_for("folder", 3 * (round_ + 1))
        workers = both_workers(process)  # cells of the round before may be enough to wait for
        time.sleep(own.random() * 0.1)
        chosen = {0: [process.pid], 1: workers[:1], 2: [process.pid, *workers]}[round_ % 3]
        kill(*chosen)
        if round_ % 3 == 1:  # the driver starts another worker, and is killed in its turn
            time.sleep(0.3)
            kill(process.pid, *workers)
        process.communicate(timeout=60)
    code, told = finish(start("folder"))
    assert code == 0, told
    assert files("folder") == undisturbed
    counts = made("folder")
    assert len(counts) == CELLS
    assert max(counts.values()) == 1  # what was done once is not made again


def test_killed_once_it_ends_with_the_same_files(undisturbed):
    process = start("folder")
    wait_for("folder", 5)
    kill(process.pid, *both_workers(process)[:1])
    process.communicate(timeout=60)
    code, told = finish(start("folder"))
    assert code == 0, told
    assert files("folder") == undisturbed
    assert {*made("folder").values()} == {1}


def test_workers_end_with_a_driver_that_was_killed():
    process = start("folder")
    wait_for("folder", 1)
    both_workers(process)
    kill(process.pid)
    process.communicate(timeout=60)  # ends when the last that holds stderr has ended


def test_started_twice_each_cell_is_made_once_and_both_end_well(undisturbed):
    both = [start("folder"), start("folder")]
    for process in both:
        code, told = finish(process)
        assert code == 0, told
    assert files("folder") == undisturbed
    assert {*made("folder").values()} == {1}


def test_a_worker_that_dies_of_a_cell_costs_that_cell_alone():
    Path("sweep.toml").write_text(
        'prompt = ""\n[axes]\nprompt = ["a cat", "deadly", "wrong", "a dog"]'
    )
    code, told = finish(start("folder"))
    assert code == 0, told
    folder = Folder("folder")
    names = {cell.values[0]: cell.name for cell in folder.sweep().cells()}
    failures = {prompt: folder.failure(name) for prompt, name in names.items()}
    assert failures["a cat"] is None
    assert failures["a dog"] is None
    assert failures["wrong"] == {"kind": "ValueError", "message": "a wrong prompt"}
    assert "3 workers died with it alone" in failures["deadly"]["message"]
    assert folder.trace(names["a cat"])
    assert folder.trace(names["a dog"])


def limit_files():
    """A disk without room for the pictures: writing beyond fails, as on a full one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a picture has 1600 bytes


def test_a_full_disk_ends_the_sweep_and_says_so_and_it_goes_on_later(undisturbed):
    code, told = finish(start("folder", preexec_fn=limit_files))
    assert code != 0
    assert "cannot write the sweep's folder folder: " in told
    assert "What is finished in it stays" in told
    # A worker that is ended while it cleans up leaves its half in its claim, which goes next time.
    assert all(".lock." in png.parent.name for png in Path("folder").rglob("*.png"))
    assert not [*Path("folder").rglob("*.failed")]
    code, told = finish(start("folder"))
    assert code == 0, told
    assert files("folder") == undisturbed


def damage(folder):
    """Cut a picture, a trace and a run file, lose others, and spoil the log."""
    traces = sorted(Path(folder).glob("cells/*/*.json"))
    for at, ending in enumerate((".png", ".json", ".toml")):
        file = traces[at].with_suffix(ending)
        file.write_bytes(file.read_bytes()[:-20])
        traces[at + 3].with_suffix(ending).unlink()
    traces[6].write_bytes(b"")
    abandoned = traces[7].with_name(f"{traces[7].stem}.lock.0")
    abandoned.mkdir()
    (abandoned / "owner").write_text("{")
    (abandoned / f"{traces[7].stem}.png").write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    traces[6].with_suffix(".failed").write_text("{")
    log = next(Path(folder).glob("log/*.jsonl"))
    log.write_text(f'{{"cell": \n\0\n[]\n{log.read_text()}{{"cell": "a"')
    return [trace.stem for trace in traces[:7]]


def test_what_was_cut_or_lost_is_made_again_and_nothing_else(undisturbed):
    assert finish(start("folder"))[0] == 0
    before = made("folder")
    damaged = damage("folder")
    code, told = finish(start("folder"))
    assert code == 0, told
    assert files("folder") == undisturbed
    assert made("folder") == {name: n + (name in damaged) for name, n in before.items()}


def test_what_a_cell_is_called_is_the_hash_of_its_run_file(undisturbed, tmp_path):
    import hashlib
    import tomllib

    for name, content in undisturbed.items():
        if name.endswith(".toml") and name != "sweep.toml":
            run = {"plugins": [], **tomllib.loads(content.decode())}
            digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
            assert Path(name).stem == digest[:32]
            assert Path(name).parts[1] == digest[:2]
