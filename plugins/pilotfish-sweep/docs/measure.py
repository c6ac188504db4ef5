"""What a sweep costs beside a plain loop over the same runs: `python measure.py`.

Wall time tells the efficiency of two workers on two idle cores, processor time also that on a busy
machine. Both are counted from when each worker has its model.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as each worker has

from pilotfish_sweep import Folder, Processes, Sweep, run

import pilotfish
from pilotfish.testing import random_pipeline

STEPS, CELLS, WARM = 40, 32, 4


def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as name:
        random_pipeline().save_pretrained(Path(name) / "model")
        base = {"model": str(Path(name) / "model"), "prompt": "a red cat", "steps": STEPS}
        seeds = {"from": 1, "to": CELLS}
        sweep = Sweep.of({**base, "axes": {"seed": seeds}}, Path())
        loop = looped(sweep, Path(name) / "loop.png")
        warm = Sweep.of({**base, "steps": 1, "axes": {"seed": {"from": 1, "to": WARM}}}, Path())
        print(f"plain loop   {loop[0]:6.2f} s wall  {loop[1]:6.2f} s processor")
        for workers in (1, 2):
            with Processes(workers) as pool:
                run(warm, Folder(Path(name) / f"warm{workers}"), pool)
                before, begin = processor(), time.perf_counter()
                run(sweep, Folder(Path(name) / f"cells{workers}"), pool)
                wall, own = time.perf_counter() - begin, processor() - before
            efficiency = loop[0] / (workers * wall)
            print(
                f"{workers} workers    {wall:6.2f} s wall  {own:6.2f} s processor; efficiency "
                f"{efficiency:.0%} by wall time, {loop[1] / own:.0%} by processor time; overhead "
                f"{1000 * (own - loop[1]) / CELLS:.1f} ms of processor time a cell"
            )


def looped(sweep: Sweep, file: Path) -> tuple[float, float]:
    """Seconds of a plain loop that makes and saves the same pictures: wall and processor."""
    model = sweep.base["model"]
    sampler = pilotfish.load(model, device="cpu")

    def make(content: Mapping[str, Any]) -> None:
        sampler(**{k: v for k, v in content.items() if k != "model"}).save(file)

    contents = [sweep.content(cell.values) for cell in sweep.cells()]
    for content in contents[:WARM]:
        make({**content, "steps": 1})
    before, begin = processor(), time.perf_counter()
    for content in contents:
        make(content)
    return time.perf_counter() - begin, processor() - before


def processor() -> float:
    """Seconds of processor time of this process and of those that it has started; Linux."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    ticks = 0
    for pid in (str(os.getpid()), *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
