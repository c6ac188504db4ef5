"""A sweep whose cells need no model, in a process of its own: `python quick.py SWEEP FOLDER`.

Only the network is a double, which reacts to everything in a run; planning, claims, processes and
files are the real ones.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from pilotfish_sweep import drive, pools
from pilotfish_sweep.folder import Folder
from pilotfish_sweep.plan import Sweep
from pilotfish_sweep.work import Job

SECONDS = 0.05


class Trace(list):
    remarks = ()

    def to_dicts(self):
        return [{"index": 0, "plugin": "blue", "loss": [0.5], "seconds": time.perf_counter()}]


class Result:
    def __init__(self, content):
        self.content, self.trace = content, Trace()
        self.run = SimpleNamespace(seed=content["seed"])

    def save(self, path):
        time.sleep(SECONDS / 4)
        text = json.dumps(self.content, sort_keys=True)
        with open(path, "wb") as file:
            for part in range(50):
                file.write(hashlib.sha256(f"{text} {part}".encode()).digest())
                file.flush()
        return [Path(path)]


class Quick(Job):
    def _made(self, content, models):
        time.sleep(SECONDS)
        if content["prompt"] == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if content["prompt"] == "wrong":
            return ValueError("a wrong prompt")
        return Result(content), {"length": [len(content["prompt"])]}


class QuickProcesses(pools.Processes):
    def run(self, job, tasks):
        return super().run(Quick(**vars(job)), tasks)


def main(sweep, folder, workers=2):
    with QuickProcesses(workers) as pool:
        drive.run(Sweep.read(sweep), Folder(folder), pool, pause=0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
