"""How long until `pilotfish generate` has taken its first step? The emoji model, guided by `blue`.

    python benchmarks/startup.py             # about two minutes on one core
    python benchmarks/startup.py --rounds 1

Each row is a process of its own, and what is told is processor time, user and system, from its
start on, beside that of `import torch` in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from curves.drawings import fill
from timing import measure, report

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results/startup.json", HERE / "README.md"
BOUND = 3.5
TORCH, FIRST, DIFFUSERS = "`import torch`", "`pilotfish generate`", "diffusers by hand"
LOOK = ("`pilotfish generate --dry-run`", "`pilotfish plugins show blue`")

TELL = "import time; print('seconds', time.process_time(), flush=True)"
COMMAND = "from pilotfish.cli import main; main({arguments}, standalone_mode=False)"
WITH_CLOCK = ["generate", "a campfire", "--use", "blue", "--use", "clock.py", "--steps", "25"]
CLOCK = f"""
import pilotfish

class Clock(pilotfish.Plugin):
    def after_step(self, step):
        {TELL}
        step.stop()
"""
BY_HAND = f"""
import pilotfish; pilotfish.mend_torchvision()
from diffusers import StableDiffusionPipeline
from pilotfish_emoji import FOLDER

def told(*_):
    {TELL}
    raise SystemExit

pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
pipeline.set_progress_bar_config(disable=True)
pipeline("a campfire", num_inference_steps=25, callback_on_step_end=told)
"""
ROWS = {
    TORCH: f"import torch\n{TELL}",
    DIFFUSERS: BY_HAND,
    FIRST: COMMAND.format(arguments=WITH_CLOCK),
    LOOK[0]: f"{COMMAND.format(arguments=[*WITH_CLOCK[:4], '--dry-run'])}\n{TELL}",
    LOOK[1]: f"{COMMAND.format(arguments=['plugins', 'show', 'blue'])}\n{TELL}",
}


def seconds(code: str) -> float:
    """Processor time of a new process, when it tells it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "clock.py").write_text(CLOCK, encoding="utf-8")
        one = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            **{"cwd": folder, "env": {**os.environ, **one}, "check": True},
            **{"capture_output": True, "text": True},
        )
    told = next(line for line in f"{done.stdout}{done.stderr}".splitlines() if "seconds " in line)
    return float(told.split("seconds ")[1])


def measured(rounds: int) -> dict[str, Any]:
    """Every row in every round, after one that warms the disk's cache."""
    found: dict[str, dict[int, float]] = {name: {} for name in ROWS}
    for index in range(-1, rounds):
        for name, code in ROWS.items():
            found[name][index] = seconds(code)
    for each in found.values():
        del each[-1]
    return {
        "machine": report.machine(torch.device("cpu")),
        "bound": BOUND,
        "seconds": {name: measure.spread([*each.values()]) for name, each in found.items()},
        "ratio": {name: measure.ratio(found, name, TORCH) for name in ROWS},
    }


def table(result: Mapping[str, Any]) -> str:
    """In Markdown."""
    lines = [("", "processor seconds", "beside `import torch`", "to reach")]
    lines.append(("---", "---:", "---:", "---:"))
    for name, ratio in result["ratio"].items():
        met = "met" if ratio["median"] <= result["bound"] else "**missed**"
        goal = f"<= {result['bound']}, {met}" if name == FIRST else ""
        lines.append((name, report.shown(result["seconds"][name], 2), report.shown(ratio, 2), goal))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    result = measured(parser.parse_args().rounds)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    fill(PAGE, {"first": table(result)}, kind="startup")
    print(table(result))


if __name__ == "__main__":
    main()
