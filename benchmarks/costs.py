"""What does a step cost with each plugin? The emoji model, one picture, guidance 4.

    python benchmarks/costs.py            # about two minutes on one core
    python benchmarks/costs.py --rounds 1

Predictions are the images that the network is shown in a step, calls how often it is called for
them. Milliseconds are processor time of one thread: of a run of ten steps beyond one of two, over
eight; rows are run in rounds, in a shuffled order, and compared with no plugin of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from curves.drawings import fill
from handwritten import Work
from PIL import Image
from timing import measure, models
from timing.rows import Answer, Row

import pilotfish

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results/costs.json", HERE.parent / "docs/guidance.md"
CPU = torch.device("cpu")
WORK = Work("a fox on a teal background", 2, guidance_scale=4.0)
STEPS = (2, 10)  # of two runs; their difference is what is told
PLAIN, MEASURED = "no plugin", "blue:gradient=none"
HALVES = {"prompts": ["a fox", "a cat"], "areas": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]}

# What runs, by the name in the table; `{folder}` holds networks and a picture, see `prepared`.
ROWS: dict[str, tuple[Any, ...]] = {
    PLAIN: (),
    "`blue`": ("blue",),
    '`blue`, `gradient = "latents"`': ("blue:gradient=latents",),
    '`blue`, `gradient = "none"`': (MEASURED,),
    **{
        f"`{name}`": (name,)
        for name in (
            *("cfg-zero-star", "apg", "mambo", "tcfg", "fdg", "cfg-norm", "cfg-plus-plus"),
            *("cfg-rescale", "cfg-interval", "threshold", "nag", "pag", "seg"),
        )
    },
    "`slg`": ("slg:stop=1",),
    "`sag`": ("sag",),
    "`autoguidance`": ("autoguidance",),
    "`pag`, `slg`": ("pag", "slg:stop=1"),
    **{
        f"`{name}`, {count} particles": (MEASURED, f"{name}:particles={count}")
        for name, counts in (("best-of", (2, 4, 8)), ("svdd", (4,)), ("feynman-kac", (4,)))
        for count in counts
    },
    "`controlnet`": ({"use": "controlnet", "image": "{folder}/edges.png"},),
    "`lora`": ("lora:file={folder}/pytorch_lora_weights.safetensors",),
    "`weights`": ("weights:dialect=automatic1111",),
    "`long-prompt`, 2 chunks": ("long-prompt",),
    **{
        f'`regions`, `by = "{by}"`': ({"use": "regions", "by": by, **HALVES},)
        for by in ("crop", "whole", "attention")
    },
}

PROMPTS = {
    "`weights`": "a (fox:1.3) on a teal background",
    "`long-prompt`, 2 chunks": f"{WORK.prompt}, {'and a very small fox ' * 18}",
}


def prepared(pipeline: Any, folder: Path) -> Any:
    """A random ControlNet of the pipeline; into the folder its picture, and a random LoRA."""
    import peft  # which finds torchvision as pilotfish mends it

    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    Image.new("RGB", (side, side), "white").save(folder / "edges.png")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    other = models.load("emoji", CPU, torch.float32)  # an adapter stays where it is put
    peft.inject_adapter_in_model(config, other.unet)
    layers = peft.get_peft_model_state_dict(other.unet)
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers)
    stages = pipeline.vae_scale_factor.bit_length()
    options = {"conditioning_embedding_out_channels": (16, 32, 64, 128)[:stages]}
    return diffusers.ControlNetModel.from_unet(pipeline.unet, **options).eval()


def rows_of(pipeline: Any, folder: Path) -> dict[str, Row]:
    """What is timed."""
    network, sampler = prepared(pipeline, folder), pilotfish.Sampler.from_pipeline(pipeline)

    def filled(value: Any) -> Any:
        if isinstance(value, Mapping):
            more = {"model": network} if value["use"] == "controlnet" else {}
            return {name: filled(part) for name, part in value.items()} | more
        return value.format(folder=folder) if isinstance(value, str) else value

    def run(name: str, plugins: Sequence[Any], work: Work) -> Answer:
        result = sampler(
            PROMPTS.get(name, work.prompt),
            plugins=plugins,
            steps=work.steps,
            guidance_scale=work.guidance_scale,
            seed=work.seed,
            scheduler="euler-ancestral",  # it draws noise, which searches need
        )
        return result.latents, result.images

    return {n: Row(n, partial(run, n, [filled(p) for p in plugins])) for n, plugins in ROWS.items()}


@contextlib.contextmanager
def shown(network: torch.nn.Module) -> Iterator[list[int]]:
    """How many images the network was shown in each of its calls."""
    calls: list[int] = []
    hook = network.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    try:
        yield calls
    finally:
        hook.remove()


def counted(pipeline: Any, row: Row) -> dict[str, float]:
    """Predictions, calls and decodes of a step."""
    found = []
    for steps in STEPS:
        with shown(pipeline.unet) as calls, measure.counted(pipeline.vae.decoder) as decodes:
            row.run(replace(WORK, steps=steps))
        found.append((sum(calls), len(calls), len(decodes)))
    each = [(many - few) / (STEPS[1] - STEPS[0]) for few, many in zip(*found, strict=True)]
    return dict(zip(("predictions", "calls", "decodes"), each, strict=True))


def costs(rounds: int) -> dict[str, dict[str, Any]]:
    """What each row costs."""
    pipeline = models.load("emoji", CPU, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(pipeline, Path(folder))
        with measure.clock_on(CPU) as clock:
            runs = [
                measure.measure(rows, replace(WORK, steps=n), rounds, clock=clock) for n in STEPS
            ]
            each = {name: spent(name, *runs) for name in rows}
            return {
                name: {
                    **counted(pipeline, row),
                    "milliseconds": round(statistics.median(each[name]), 2),
                    "ratio": measure.spread(
                        [own / plain for own, plain in zip(each[name], each[PLAIN], strict=True)]
                    ),
                    "peak_bytes": measure.peak_bytes(partial(row.run, WORK), CPU),
                }
                for name, row in rows.items()
            }


def spent(name: str, few: measure.Seconds, many: measure.Seconds) -> list[float]:
    """Milliseconds of one step in every round."""
    return [1e3 * (many[name][r] - few[name][r]) / (STEPS[1] - STEPS[0]) for r in few[name]]


def table(result: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown."""
    heads = ("plugin", "predictions", "calls", "decodes", "ms", "beside none", "peak MB")
    lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for name, cost in result.items():
        counts = (f"{cost[key]:g}" for key in ("predictions", "calls", "decodes"))
        ratio, peak = f"{cost['ratio']['median']:.2f}", f"{cost['peak_bytes'] / 1e6:.0f}"
        lines.append((name, *counts, f"{cost['milliseconds']:.1f}", ratio, peak))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    result = costs(parser.parse_args().rounds)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    fill(PAGE, {"plugins": table(result)}, kind="costs")
    print(table(result))


if __name__ == "__main__":
    main()
