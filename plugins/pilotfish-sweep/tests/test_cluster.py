"""Workers of dask; their cells need no model."""

import importlib.util
import sys
from pathlib import Path

import pytest

distributed = pytest.importorskip(
    "distributed", reason="needs dask: pip install 'pilotfish-sweep[cluster]'"
)

from pilotfish_sweep import Folder, Sweep, drive  # noqa: E402
from pilotfish_sweep.cluster import Cluster  # noqa: E402

# What distributed itself leaves open when it ends.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
SWEEP = 'prompt = "a red cat"\n[axes]\nguidance_scale = [1, 2.5]\nseed = {from = 1, to = 6}\n'


@pytest.fixture
def quick(monkeypatch):
    """The module of the double, also for workers."""
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    spec = importlib.util.spec_from_file_location("quick", Path(folder) / "quick.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quick", module)
    spec.loader.exec_module(module)
    return module


def test_a_cluster_makes_the_files_that_processes_make(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(SWEEP + 'prompt = ["a cat", "wrong"]\n')

    class QuickCluster(Cluster):
        def run(self, job, tasks):
            return super().run(quick.Quick(**vars(job)), tasks)

    with QuickCluster("local", workers=2, device="cpu", resources={"GPU": 1}) as pool:
        assert pool.workers == 2
        progress = drive.run(Sweep.read("sweep.toml"), Folder("cluster"), pool, pause=0.2)
    assert (progress.planned, len(progress.failed)) == (24, 12)
    assert len({(e["pid"]) for e in Folder("cluster").logged()}) == 2
    quick.main("sweep.toml", "processes")
    made = {
        name: {
            str(path.relative_to(name)): path.read_bytes()
            for path in Path(name).rglob("*")
            if path.is_file() and "log" not in path.parts
        }
        for name in ("cluster", "processes")
    }
    assert made["cluster"] == made["processes"]
    assert len(made["cluster"]) == 1 + 12 * 3 + 12 * 2
