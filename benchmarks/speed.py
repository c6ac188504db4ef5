"""How fast pilotfish is beside diffusers and beside hand-written loops: only ratios.

    python benchmarks/speed.py --profile smoke    # the emoji model, about a minute
    python benchmarks/speed.py --profile cpu      # random weights, three families' shapes
    python benchmarks/speed.py --profile gpu      # Stable Diffusion 1.5's and SDXL's size
    python benchmarks/speed.py --memory           # a guided run of SD 1.5's size on the CPU
    python benchmarks/speed.py --tables           # write README.md's tables from results/

Machines differ and are noisy, so rows run in rounds, in a shuffled order, and are compared with
another row *of the same round*; a table shows the median of these ratios. Before anything is timed,
the rows must give the same latents.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import host, memory, models, report
from timing.profiles import PROFILES
from timing.scenes import Scene, play

from pilotfish import GuideWarning

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse(arguments)
    warnings.simplefilter("ignore", GuideWarning)  # what few steps do to a loss, no row is about
    if args.tables:
        report.write_tables(README, RESULTS)
        return
    name = "memory" if args.memory else args.profile
    out = args.out or RESULTS / f"speed-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device or ("cuda" if args.profile == "gpu" else "cpu"))
    for result in memory.run(args.model) if args.memory else profile(args, device, out):
        whole = {"machine": report.machine(device), "goals": report.reached(result), **result}
        out.write_text(json.dumps(whole, indent=1) + "\n")  # after each scene: nothing is lost
    print(report.page(whole))


def profile(args: argparse.Namespace, device: torch.device, out: Path) -> Iterator[dict[str, Any]]:
    """A profile's result, more of it after each scene; what `--scene` leaves out is kept."""
    scenes = [changed(scene, args) for scene in PROFILES[args.profile]]
    chosen = [scene for scene in scenes if args.scene in scene.name]
    found = json.loads(out.read_text()) if args.scene and out.exists() else {"scenes": []}
    results = {result["scene"]["name"]: result for result in found["scenes"]}
    costs = found.get("host_microseconds_per_step") or host.costs(args.rounds or host.ROUNDS)
    for scene in chosen:
        results[scene.name] = play(scene, device, args.scheduler)
        print(f"{scene.name}: {results[scene.name]['minutes']} minutes", file=sys.stderr)
        yield {
            "profile": args.profile,
            "host_microseconds_per_step": costs,
            "scenes": [results[scene.name] for scene in scenes if scene.name in results],
        }


def changed(scene: Scene, args: argparse.Namespace) -> Scene:
    """The scene as the command line has it."""
    own = {name: getattr(args, name) for name in ("steps", "rounds", "minutes", "dtype")}
    if args.model and not scene.model.startswith(args.model):  # "random sd3" is random
        scene = replace(scene, name=f"{scene.name}: {args.model}", model=args.model, large=None)
    return replace(scene, **{name: value for name, value in own.items() if value is not None})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="smoke")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of seconds")
    parser.add_argument("--tables", action="store_true", help="only write the README's tables")
    parser.add_argument("--device", help="cpu or cuda; the profile's own if not given")
    parser.add_argument("--scheduler", choices=models.SCHEDULERS, default="euler")
    parser.add_argument("--model", help="emoji, random, random flux, small, sd15, a folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="in every scene"
    )
    parser.add_argument("--scene", default="", help="only those with this in their name")
    parser.add_argument("--steps", type=int, help="in every scene")
    parser.add_argument("--rounds", type=int, help="in every scene")
    parser.add_argument("--minutes", type=float, help="for every scene")
    parser.add_argument("--out", type=Path, help="results/speed-PROFILE.json if not given")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
