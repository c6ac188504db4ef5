"""What the cheaper decoders cost and what their gradients are worth, on the emoji model.

    python benchmarks/decoders.py            # two minutes: results/decoders.json, docs/decoders.png
    python benchmarks/decoders.py --quick    # seconds: fewer pictures and rounds

**Worth**: the cosine between a loss's gradient at x0 through the cheap decoder and through the VAE,
over the noise levels of unguided runs. **Cost**: one decode and its gradient, in processor time of
one thread, each decoder once in every round; ratios are of the same round.

The tiny decoder has random weights: they change no cost, and their gradient is worth nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pilotfish_emoji import BACKGROUNDS, OBJECTS
from timing.measure import count_flops, spread, stopwatch
from timing.report import machine
from torch import Tensor
from torch.nn.functional import cosine_similarity

import pilotfish
from pilotfish.hooks import registry
from pilotfish.models.schedulers import diffusers

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = Path(__file__).parent / "results"
GUIDES: dict[str, dict[str, Any]] = {
    "blue": {"use": "blue"},
    "palette": {"use": "palette", "colors": ["#14213d", "#fca311", "#e5e5e5"]},
    "clip": {"use": "clip", "text": "a watercolor"},
    "classifier": {"use": "classifier", "label": "cat"},
}
STEPS, EVERY, GUIDANCE_SCALE = 25, 4, 4.0
PROMPTS, EACH = 8, 2  # and pictures of each
BATCH = 4  # of the timed decodes
TINY = {  # of the emoji model's latents; 0.12 million parameters, 0.10 of them in the decoder
    "decoder_block_out_channels": (32, 32, 32),
    "num_decoder_blocks": (1, 1, 1),
    "encoder_block_out_channels": (16, 16, 16),
    "num_encoder_blocks": (0, 1, 1),
}

Decode = Callable[[Tensor], Tensor]


def tiny_decoder(model: Any, folder: Path) -> Decode:
    """An AutoencoderTiny of random weights, through its files, as a user's own."""
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(**TINY).save_pretrained(folder)
    decode: Decode = model.decoder(f"tiny:{folder}")
    return decode


def in_squares(model: Any) -> Decode:
    """The linear decoder without interpolation: what it was chosen against."""

    def decode(x0: Tensor) -> Tensor:
        rgb = model.rgb(x0)
        return rgb.repeat_interleave(model.factor, 2).repeat_interleave(model.factor, 3)

    return decode


# ---- worth ----


def moments(
    sampler: pilotfish.Sampler, guides: Sequence[Any], prompts: int
) -> Iterator[pilotfish.Step]:
    """Steps of unguided runs, in which the guides are set up."""
    for i in range(prompts):
        prompt = f"a {OBJECTS[7 * i]} on a {BACKGROUNDS[i]} background"
        run = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "scheduler": "ddim"}
        stream = sampler.stream(prompt, plugins=guides, seed=i * EACH, num_images=EACH, **run)
        with contextlib.closing(stream):
            yield from (step for step in stream if step.index % EVERY == 0)


def gradients(guides: dict[str, Any], step: pilotfish.Step, decode: Decode) -> dict[str, Tensor]:
    """Each guide's gradient at x0 (B, N); those that draw draw the same for every decoder."""
    x0 = step.x0.clone().requires_grad_()
    image, found = decode(x0), {}
    for name, guide in guides.items():
        generator = [torch.Generator().manual_seed(i) for i in range(len(x0))]
        seen = SimpleNamespace(image=image, run=step.run, generator=generator)
        # As the host asks: a guide that keeps a state of the run takes it.
        state = (guide.setup(step.run),) if hasattr(guide, "setup") else ()
        loss = guide.loss_guidance(seen, *state)
        found[name] = torch.autograd.grad(loss.sum(), x0, retain_graph=True)[0].flatten(1)
    return found


def worth(sampler: pilotfish.Sampler, prompts: int) -> dict[str, Any]:
    """Cosines to the VAE's gradient: mean over the pictures and its standard error."""
    model = sampler.model
    guides = {n: registry.resolve({**use, "scale": 0}).plugin for n, use in GUIDES.items()}
    cheap = {"linear": model.decoder("linear"), "squares": in_squares(model)}
    cosines: dict[tuple[str, str, float], list[float]] = {}
    for step in moments(sampler, list(guides.values()), prompts):
        with torch.enable_grad():
            exact = gradients(guides, step, model.decoder("vae"))
            for decoder, decode in cheap.items():
                for name, gradient in gradients(guides, step, decode).items():
                    values = cosine_similarity(gradient, exact[name], dim=1).tolist()
                    cosines.setdefault((name, decoder, round(step.sigma, 3)), []).extend(values)
    result: dict[str, Any] = {name: {decoder: [] for decoder in cheap} for name in guides}
    for (name, decoder, sigma), values in cosines.items():
        error = statistics.stdev(values) / len(values) ** 0.5
        point = {"sigma": sigma, "mean": round(statistics.fmean(values), 3)}
        result[name][decoder].append({**point, "error": round(error, 3)})
    return result


# ---- cost ----


def cost(sampler: pilotfish.Sampler, rounds: int) -> dict[str, Any]:
    """Of one picture's decode with its gradient, and of the UNet's part in an unguided step."""
    model = sampler.model
    shape = model.latent_shape(model.defaults.height, model.defaults.width)
    x0 = torch.randn(BATCH, *shape, generator=torch.Generator())
    with tempfile.TemporaryDirectory() as folder:
        decoders = {
            "vae": model.decoder("vae"),
            "tiny": tiny_decoder(model, Path(folder)),
            "linear": model.decoder("linear"),
        }
    rows: dict[str, Callable[[], object]] = {
        name: partial(decode_and_back, decode, x0) for name, decode in decoders.items()
    }
    rows["unet"] = partial(unguided_step, model, x0)
    seconds = interleaved(rows, rounds)
    result = {}
    for name, row in rows.items():
        both = {"step": [a + b for a, b in zip(seconds[name], seconds["unet"], strict=True)]}
        result[name] = {
            "milliseconds_per_image": round(1e3 * statistics.median(seconds[name]) / BATCH, 3),
            "ratio_to_vae": rounded(ratios(seconds, name, "vae")),
            "guided_step_to_unguided": rounded(ratios({**seconds, **both}, "step", "unet")),
            "flops_per_image": count_flops(row) // BATCH,
        }
    del result["unet"]["guided_step_to_unguided"]
    return result


def stable_diffusion_flops() -> dict[str, int]:
    """Of one decode with its gradient at 512 pixels, Stable Diffusion 1.5's VAE and a TAESD."""
    with torch.device("meta"):  # no weights
        networks = {
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "tiny": diffusers.AutoencoderTiny(),
        }
        x0 = torch.randn(1, 4, 64, 64)

    def flops(network: Any) -> int:
        network.requires_grad_(False)
        return count_flops(lambda: decode_and_back(lambda x: network.decode(x * 1).sample, x0))

    return {name: flops(network) for name, network in networks.items()}


def interleaved(rows: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every row in every round, in a shuffled order, after two warm-ups."""
    threads, order, shuffle = torch.get_num_threads(), list(rows), random.Random(0)
    torch.set_num_threads(1)
    for row in [*rows.values()] * 2:
        row()
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(stopwatch(rows[name], time.process_time))
    torch.set_num_threads(threads)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    """Of two rows of the same round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])


def decode_and_back(decode: Decode, x0: Tensor) -> Tensor:
    """What a guided step does beside the network and the guides' own heads."""
    leaf = x0.clone().requires_grad_()
    image = decode(leaf)
    return torch.autograd.grad(image, leaf, torch.ones_like(image))[0]


@torch.no_grad()
def unguided_step(model: Any, latents: Tensor) -> Tensor:
    """The UNet for both prompts of classifier-free guidance."""
    encoder = model.text_encoder.config
    words = torch.zeros(2 * len(latents), encoder.max_position_embeddings, encoder.hidden_size)
    output: Tensor = model.unet(torch.cat([latents] * 2), 500, words).sample
    return output


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Three significant places."""
    return {key: float(f"{value:.3g}") for key, value in values.items()}


# ---- tables ----


def worth_table(result: dict[str, Any]) -> str:
    """The linear decoder's cosines as Markdown."""
    sigmas = [point["sigma"] for point in result["worth"]["blue"]["linear"]]
    lines = [
        f"| gradient of | {' | '.join(f'sigma {s:.2f}' for s in sigmas)} |",
        "|---|" + "---:|" * len(sigmas),
    ]
    for name, decoders in result["worth"].items():
        cells = [f"{point['mean']:.2f}" for point in decoders["linear"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(result: dict[str, Any]) -> str:
    """The decoders' costs as Markdown."""
    lines = [
        "| decoder | decode and gradient | of the VAE's (min to max) | by FLOPs | guided step |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ("vae", "tiny", "linear"):
        row = result["cost"][name]
        ratio, step = row["ratio_to_vae"], row["guided_step_to_unguided"]["median"]
        flops = row["flops_per_image"] / result["cost"]["vae"]["flops_per_image"]
        lines.append(
            f"| `{name}` | {row['milliseconds_per_image']:.1f} ms | {ratio['median']:.3f} "
            f"({ratio['min']:.3f} to {ratio['max']:.3f}) | {flops:.3f} | {step:.2f} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], target: Path) -> None:
    """Cosine over noise level, a line for each guide; dotted without interpolation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for color, (name, decoders) in enumerate(result["worth"].items()):
        for decoder, style in (("linear", "-"), ("squares", ":")):
            sigmas, means, errors = (
                [point[key] for point in decoders[decoder]] for key in ("sigma", "mean", "error")
            )
            label = name if decoder == "linear" else None
            look = {"color": f"C{color}", "linestyle": style, "marker": ".", "label": label}
            axis.errorbar(sigmas, means, errors, **look)
    axis.set(xlabel="sigma", ylabel="cosine to the VAE's gradient", ylim=(0, 1))
    axis.invert_xaxis()  # a run goes from noise to picture
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(target, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures and rounds")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "decoders.json"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="of the plot")
    args = parser.parse_args(arguments)
    sampler = pilotfish.load()
    prompts, rounds = (1, 3) if args.quick else (PROMPTS, 25)
    result = {
        "machine": machine(torch.device("cpu")),
        "pictures": prompts * EACH,
        "rounds": rounds,
        "cost": cost(sampler, rounds),
        "stable_diffusion_flops": stable_diffusion_flops(),
        "worth": worth(sampler, prompts),
    }
    print(f"{cost_table(result)}\n\n{worth_table(result)}")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.docs / "decoders.png")


if __name__ == "__main__":
    main()
