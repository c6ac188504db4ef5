"""What stands in for the prompt's pull where there is no prompt? `UNPROMPTED_PULL`, measured.

    python benchmarks/pull.py --models emoji         # about two minutes; without, both that ship

`rms` measures a guide's move in the prompt's own pull, `guidance_scale * RMS(cond - uncond)`.
Printed: that pull as a fraction of the predicted noise over unguided runs, and the constant with
which `blue` at scale 1 goes as far without classifier-free guidance as it does with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from curves.pictures import Prompts
from curves.points import BATCH, Series, texts
from torch import Tensor

import pilotfish
from pilotfish.guidance import moves as rules
from pilotfish.guidance.moves import rms

USUAL, STRONG = 4.0, 7.5  # guidance_scale: the emoji model's, and Stable Diffusion's
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of `blue` without guidance: multiples of the constant
MODELS = ("emoji", "emoji-flow")
RUN = {"num_images": BATCH, "seed": 0}  # steps and scheduler are the model's own
RESULT = Path(__file__).parent / "results" / "pull.json"


class Watch(pilotfish.Plugin):
    """Notes RMS(cond - uncond) / RMS(cond) of the noise that is predicted; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ratios: list[Tensor] = []

    def setup(self, run: pilotfish.Run) -> bool:
        """Whether it is a flow: then predictions are velocities, noise - x0."""
        return "prediction_type" not in run.model.new_scheduler(None).config

    def combine_predictions(
        self, cond: Tensor, uncond: Tensor | None, step: pilotfish.Step, state: bool
    ) -> None:
        """Unchanged."""
        if uncond is not None:
            noise = step.latents + step.alpha * cond if state else cond
            difference = (cond - uncond) * (step.alpha if state else 1)
            self.ratios.append((rms(difference) / rms(noise)).flatten())  # (B,)


def pulls(sampler: pilotfish.Sampler, guidance_scale: float) -> Tensor:
    """The prompt's pull at each step of unguided runs, as a fraction of the predicted noise."""
    watch = Watch()
    sampler(plugins=[prompts(), watch], guidance_scale=guidance_scale, **RUN)
    return guidance_scale * torch.stack(watch.ratios)  # (steps, B)


def blue_loss(sampler: pilotfish.Sampler, guidance_scale: float, scale: float) -> float:
    """The blue loss of pictures that are guided at a scale."""
    plugins = [prompts(), {"use": "blue", "scale": scale}]
    latents = sampler(plugins=plugins, guidance_scale=guidance_scale, **RUN).latents
    with torch.no_grad():
        blue = sampler.model.decode(latents).clamp(0, 1)[:, 2]
    return float((blue - 0.9).abs().mean())


def blue_left(
    sampler: pilotfish.Sampler, guidance_scale: float, scales: Sequence[float]
) -> list[float]:
    """The blue loss at each scale, as a fraction of the unguided pictures'."""
    unguided = blue_loss(sampler, guidance_scale, 0.0)
    return [blue_loss(sampler, guidance_scale, scale) / unguided for scale in scales]


def prompts() -> pilotfish.Plugin:
    """A quarter of all objects, each on a background."""
    return Prompts(texts(Series("blue", "balanced"), 0))


def matching(left: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The scale at which so much is left, between the measured ones; None where none is near."""
    for (low, more), (high, less) in pairwise(left):
        if less <= wanted <= more:
            return low + (high - low) * (more - wanted) / (more - less)
    return None


def measure(sampler: pilotfish.Sampler) -> dict[str, Any]:
    """All numbers."""
    result: dict[str, Any] = {"constant": rules.UNPROMPTED_PULL}
    for guidance_scale in (USUAL, STRONG):
        pull = pulls(sampler, guidance_scale)
        result[f"guidance {guidance_scale:g}"] = {
            "mean": round(float(pull.mean()), 3),
            "by step": [round(p, 3) for p in pull.mean(dim=1).tolist()],
            "below the constant": round(float((pull < rules.UNPROMPTED_PULL).float().mean()), 3),
        }
    (wanted,) = blue_left(sampler, USUAL, [1.0])
    left = list(zip(SCALES, blue_left(sampler, 1.0, SCALES), strict=True))
    scale = matching(left, wanted)
    result["blue left with guidance"] = round(wanted, 3)
    result["blue left without"] = {f"{scale:g}": round(part, 3) for scale, part in left}
    result["matching constant"] = scale and round(scale * rules.UNPROMPTED_PULL, 3)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names, folders or hub ids")
    parser.add_argument("--out", type=Path, default=RESULT, help="other models' results stay there")
    args = parser.parse_args(arguments)
    result = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for name in args.models:
        result[name] = measure(pilotfish.load(name))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
