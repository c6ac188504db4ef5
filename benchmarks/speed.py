"""How fast pilotfish is beside diffusers and beside hand-written loops: one table, only ratios.

    python benchmarks/speed.py                  # the emoji model, about five minutes
    python benchmarks/speed.py --model random   # random weights, seconds

Machines differ and are noisy, so every row runs once in every round, in a shuffled order, and is
compared with another row *of the same round*; the table shows the median of these ratios. Before
anything is timed, the rows must give the same latents.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pilotfish
from pilotfish import Guide, Setting
from pilotfish.model import diffusers  # with torchvision mended first
from pilotfish.testing import random_pipeline

import handwritten  # isort: skip  # imports diffusers

PLUGINS = 8
RESULTS = Path(__file__).parent / "results"
WARM_UPS = 2
HOST_ROUNDS = 9
HOST_STEPS = (20, 120)  # of two runs whose network costs nothing: their difference is the loop's
TOLERANCE = 1e-4  # of the largest latent; the guided rows add up their gradients in another order

# Euler costs least beside the network. LMS, the talk's, integrates its coefficients numerically,
# milliseconds a step in every row, which hides what the loops themselves cost.
SCHEDULERS = {"euler": diffusers.EulerDiscreteScheduler, "lms": diffusers.LMSDiscreteScheduler}

Row = Callable[[], tuple[Tensor, list[Any]]]


@dataclass(frozen=True)
class Work:
    """What every row does."""

    prompt: str = "a campfire on a black background"
    seed: int = 32
    steps: int = 6
    guidance_scale: float = 8.0
    scale: float = 50.0
    target: float = 0.9


class Blue(Guide):
    """The blue loss of the talk: mean distance of the blue channel to a target."""

    class Settings(Guide.Settings):
        """Adds the target."""

        target: float = Setting(0.9, description="the blue that every pixel should have")

    def loss_guidance(self, step: pilotfish.Step) -> Tensor:
        """One value per image."""
        return (step.image[:, 2] - self.settings.target).abs().mean(dim=(1, 2))  # (B,)


class Idle(pilotfish.Plugin):
    """Implements every hook of a step and does nothing."""

    def before_step(self, step: pilotfish.Step) -> None:
        """Unchanged."""

    def combine_predictions(self, cond: Tensor, uncond: Tensor | None, step: Any) -> None:
        """The core's answer."""

    def on_predicted_x0(self, x0: Tensor, step: pilotfish.Step) -> None:
        """Unchanged."""

    def advance(self, step: pilotfish.Step) -> None:
        """The core's answer."""

    def after_step(self, step: pilotfish.Step) -> None:
        """Nothing."""


ROWS = {
    "U0": "diffusers' StableDiffusionPipeline, unguided",
    "U1": "pilotfish, no plugins",
    "U2": "hand-written loop, unguided",
    "O0": f"pilotfish, {PLUGINS} plugins that do nothing",
    "H1": "hand-written loop, blue loss, gradient at x0",
    "O1": "pilotfish, the same guidance",
    "H1L": "hand-written loop, gradient through the UNet",
    "O1L": "pilotfish, the same guidance",
}
HOST_ROWS = {"hooks": f"{PLUGINS} plugins that do nothing", "guiding": "O1 beyond H1"}
PAIRS = (("U1", "U0"), ("U1", "U2"), ("O0", "U1"), ("O1", "H1"), ("O1L", "H1L"))
GOALS = {"U1/U0": 1.02, "O1/H1": 1.05, "hooks": 100.0}


def build(pipeline: Any, work: Work) -> dict[str, Row]:
    """Every row as a function that gives latents and pictures."""
    sampler = pilotfish.Sampler.from_pipeline(pipeline)
    prompt, common = (
        work.prompt,
        {
            "seed": work.seed,
            "steps": work.steps,
            "guidance_scale": work.guidance_scale,
        },
    )

    def diffusers_row(output_type: str = "pil") -> tuple[Tensor, list[Any]]:
        answer = pipeline(
            prompt,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance_scale,
            generator=torch.Generator().manual_seed(work.seed),
            output_type=output_type,
        ).images
        return (torch.empty(0), answer) if output_type == "pil" else (answer, [])

    def ours(*plugins: Any) -> tuple[Tensor, list[Any]]:
        result = sampler(prompt, plugins=plugins, preset="deep-dive", **common)
        return result.latents, result.images

    def by_hand(through_unet: bool) -> tuple[Tensor, list[Any]]:
        guide = {"scale": work.scale, "target": work.target}
        return handwritten.guided(pipeline, prompt, **common, **guide, through_unet=through_unet)

    blue, idle = {"scale": work.scale, "target": work.target}, [Idle() for _ in range(PLUGINS)]
    return {
        "U0": diffusers_row,
        "U1": ours,
        "U2": lambda: handwritten.unguided(pipeline, prompt, **common),
        "H1": lambda: by_hand(False),
        "O0": lambda: ours(*idle),
        "O1": lambda: ours(Blue(**blue)),
        "H1L": lambda: by_hand(True),
        "O1L": lambda: ours(Blue(**blue, gradient="latents")),
        "U0 latents": lambda: diffusers_row("latent"),
    }


def check(rows: dict[str, Row]) -> dict[str, float]:
    """The largest difference between rows that must be the same, in units of the largest latent.

    Raises:
        RuntimeError: two rows do not compute the same thing.
    """
    latents = {name: row()[0] for name, row in rows.items() if name != "U0"}
    latents["U0"] = latents.pop("U0 latents")
    pictures = {name: rows[name]()[1][0].tobytes() for name in ("U0", "U1", "U2", "O0")}
    apart = {}
    for name, other in PAIRS:
        difference = (latents[name] - latents[other]).abs().max() / latents[other].abs().max()
        apart[f"{name}/{other}"] = float(difference)
        exact = other.startswith("U")
        same = torch.equal(latents[name], latents[other]) if exact else difference < TOLERANCE
        if not same or (exact and pictures[name] != pictures[other]):
            raise RuntimeError(f"{name} and {other} differ: {difference:.2g} of the largest latent")
    if torch.equal(latents["H1"], latents["U2"]) or torch.equal(latents["H1L"], latents["U2"]):
        raise RuntimeError("the guide changes nothing: nothing would be compared")
    return apart


def measure(
    rows: dict[str, Row], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every row in every round, in a shuffled order."""
    for row in [*rows.values()] * WARM_UPS:
        row()
    gc.collect()
    gc.freeze()  # the imported modules, or each collection takes longer than a fast row
    order, shuffle = list(rows), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(stopwatch(rows[name], clock))
    return seconds


def stopwatch(row: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call, without the garbage of the calls before."""
    gc.collect()
    start = clock()
    row()  # ends with pictures in main memory, so a GPU has nothing left to do
    return clock() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """Of two rows of the same round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])


def count_flops(row: Row) -> int:
    """Floating-point operations of all products and convolutions, attention written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        row()
    return int(counter.get_total_flops())


def peak_bytes(row: Row, device: torch.device) -> int:
    """The most memory that tensors held at a time, beyond what they held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        row()
        return int(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        row()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def host_costs(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a step of everything but the network, whose stand-in answers at once.

    The processor time of one thread: what else runs on the machine does not count.
    """
    pipeline = prepare(random_pipeline(), "euler")
    pipeline.unet.forward = lambda sample, *_, **__: (sample * 0.1,)
    rows: dict[str, Row] = {}
    for steps in HOST_STEPS:
        work = Work(prompt="a campfire", steps=steps)
        rows |= {f"{name} {steps}": row for name, row in build(pipeline, work).items()}
    names = ("U0", "U1", "U2", "O0", "H1", "O1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = {name: row for name, row in rows.items() if name.split()[0] in names}
    seconds = measure(rows, rounds, time.process_time)
    torch.set_num_threads(threads)
    few, many = HOST_STEPS
    costs = {
        name: [
            1e6 * (long - short) / (many - few)
            for short, long in zip(seconds[f"{name} {few}"], seconds[f"{name} {many}"], strict=True)
        ]
        for name in names
    }
    costs["hooks"] = [a - b for a, b in zip(costs.pop("O0"), costs["U1"], strict=True)]
    costs["guiding"] = [a - b for a, b in zip(costs["O1"], costs["H1"], strict=True)]
    return {name: spread(values) for name, values in costs.items()}


def load(model: str, device: str | None, dtype: str | None) -> Any:
    """The pipeline of random weights, of a folder, or of the model that ships."""
    if model == "random":
        return random_pipeline()
    networks = pilotfish.load(None if model == "emoji" else model, device=device, dtype=dtype).model
    return diffusers.StableDiffusionPipeline(
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        scheduler=networks.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def prepare(pipeline: Any, scheduler: str) -> Any:
    """Scheduler set, weights frozen, no progress bar: for every row alike."""
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "pilotfish": pilotfish_version(),
    }


def pilotfish_version() -> str:
    """The installed version."""
    from importlib.metadata import version

    return version("pilotfish")


def cpu_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain data."""
    work = Work(steps=args.steps)
    pipeline = prepare(load(args.model, args.device, args.dtype), args.scheduler)
    rows = build(pipeline, work)
    apart = check(rows)
    del rows["U0 latents"]
    seconds = measure(rows, args.rounds)
    flops = {name: count_flops(row) for name, row in rows.items()}
    peaks = {name: peak_bytes(row, pipeline.unet.device) for name, row in rows.items()}
    return {
        "machine": machine(),
        "work": {
            **asdict(work),
            "model": "folder" if Path(args.model).is_dir() else args.model,
            "scheduler": args.scheduler,
            "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
            "device": pipeline.unet.device.type,
        },
        "rounds": args.rounds,
        "rows": {
            name: {
                "what": ROWS[name],
                "seconds": [round(s, 4) for s in seconds[name]],
                "ratio_to_U0": ratios(seconds, name, "U0"),
                "flops": flops[name],
                "flops_ratio_to_U0": flops[name] / flops["U0"],
                "peak_bytes": peaks[name],
            }
            for name in rows
        },
        "ratios": {f"{name}/{other}": ratios(seconds, name, other) for name, other in PAIRS},
        "largest_difference": apart,
        "host_microseconds_per_step": host_costs(min(args.rounds, HOST_ROUNDS)),
        "goals": GOALS,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| row | what | seconds | ratio to U0 (min to max) | by FLOPs | peak MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['what']} | {statistics.median(row['seconds']):.3f} "
            f"| {shown(row['ratio_to_U0'])} | {row['flops_ratio_to_U0']:.2f} "
            f"| {row['peak_bytes'] / 1e6:.1f} |"
        )
    lines += ["", "| ratio | median (min to max) | goal |", "|---|---:|---:|"]
    for name, ratio in result["ratios"].items():
        goal = result["goals"].get(name)
        lines.append(f"| {name} | {shown(ratio)} | {f'<= {goal:.2f}' if goal else ''} |")
    lines += ["", "| microseconds a step | median (min to max) | goal |", "|---|---:|---:|"]
    for name, cost in result["host_microseconds_per_step"].items():
        what = HOST_ROWS.get(name, f"{name}, no network")
        goal = f"<= {result['goals']['hooks']:.0f}" if name == "hooks" else ""
        lines.append(f"| {what} | {shown(cost, 0)} | {goal} |")
    return "\n".join(lines)


def shown(value: dict[str, float], digits: int = 3) -> str:
    """`1.004 (0.991 to 1.020)`."""
    median, low, high = (f"{value[k]:.{digits}f}" for k in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji", help="emoji, random, or a diffusers folder")
    parser.add_argument("--device", help="cpu, cuda, ...; as pilotfish.load")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; as pilotfish.load")
    parser.add_argument("--steps", type=int, default=Work.steps)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="euler")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    args = parser.parse_args(arguments)
    result = benchmark(args)
    print(table(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
