"""Two guides that pull against each other: how much of what each reaches alone is left to it?

    python benchmarks/conflict.py           # the emoji model: some four minutes on one core
    python benchmarks/conflict.py --quick   # one prompt, fewer steps

`blue` wants blue in every pixel and `dim` a darker picture, which takes the blue away; a dark blue
picture has both. `blue` and a palette with an orange are opposed less. Each guide alone, then both
together under each setting, on the same prompts and seeds. A guide's gain is how far its loss falls
below that of the unguided pictures. Prints the table of `docs/guidance.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pilotfish_color import Blue, Palette
from pilotfish_emoji import judge as judges
from torch import Tensor

import pilotfish
from pilotfish import Guide, Setting

HERE = Path(__file__).parent
PROMPTS = {
    "campfire": "a campfire on a black background",
    "penguin": "a penguin on a red background",
    "rocket": "a rocket on a gray background",
    "panda": "a panda on a white background",
}
SCALE, STEPS, IMAGES = 0.5, 25, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "sum": {},
    "project": {"combine": "project"},
    "project, trust 1": {"combine": "project", "trust": 1.0},
}


class Dim(Guide):
    """Squared distance of the picture's mean brightness to a target."""

    class Settings(Guide.Settings):
        target: float = Setting(0.35, ge=0, le=1, description="mean brightness")

    def loss_guidance(self, step: Any) -> Tensor:
        """(B,)."""
        return (step.image.mean(dim=(1, 2, 3)) - self.settings.target).square()


GUIDES: dict[str, Any] = {
    "blue": Blue,
    "dim": Dim,
    "palette": partial(Palette, colors=["#14213d", "#fca311", "#e5e5e5"]),
}
PAIRS = (("blue", "dim"), ("blue", "palette"))


class Lab:
    """Makes pictures with one model, and measures them.

    Args:
        prompts: by the object that the judge should see.
    """

    def __init__(self, prompts: Mapping[str, str], steps: int = STEPS) -> None:
        self.sampler, self.judge = pilotfish.load(), judges.load()
        self.prompts, self.steps = prompts, steps

    def measure(self, guides: Sequence[str], setting: Mapping[str, Any]) -> dict[str, Any]:
        """Each guide's mean loss for each prompt, also of those that did not act; objects seen."""
        losses: dict[str, list[float]] = {name: [] for name in GUIDES}
        right = 0
        for seen, prompt in self.prompts.items():
            result = self.sampler(
                prompt,
                plugins=[GUIDES[name](scale=SCALE) for name in guides],
                preset={"base": "balanced", **setting},
                scheduler="ddim",
                steps=self.steps,
                guidance_scale=4,
                seed=100,
                num_images=IMAGES,
            )
            with torch.no_grad():
                image = self.sampler.model.decode(result.latents).clamp(0, 1)
                step = SimpleNamespace(image=image)
                for name, guide in GUIDES.items():
                    losses[name].append(round(float(guide().loss_guidance(step).mean()), 5))
                right += sum(name == seen for name, *_ in self.judge.judge(image).names)
        return {"loss": losses, "object_right": right}


def compare(lab: Lab, pair: Sequence[str], plain: dict[str, Any], settings: Any) -> dict[str, Any]:
    """Both guides of a pair alone and together, with what is left of each one's gain."""
    alone = {name: lab.measure([name], {}) for name in pair}
    together = {label: lab.measure(pair, settings[label]) for label in settings}
    for measured in together.values():
        measured["left"] = {name: left(name, plain, alone[name], measured) for name in pair}
    return {"pair": list(pair), "unguided": plain, "alone": alone, "together": together}


def left(name: str, plain: Any, alone: Any, together: Any) -> dict[str, float]:
    """A guide's gain beside another as part of its gain alone: in all, and of the worst prompt."""
    before, by_itself, beside = (measured["loss"][name] for measured in (plain, alone, together))
    in_all = (sum(before) - sum(beside)) / (sum(before) - sum(by_itself))
    prompts = zip(before, by_itself, beside, strict=True)
    worst = min((start - two) / (start - one) for start, one, two in prompts)
    return {"mean": round(in_all, 3), "worst": round(worst, 3)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """All pairs as Markdown."""
    lines = [
        "| guides | together | of the first's gain | of the second's | object right |",
        "|---|---|---:|---:|---:|",
    ]
    for result in results:
        pair, alone = result["pair"], result["alone"]
        kept = " and ".join(str(alone[name]["object_right"]) for name in pair)
        start = f"| {', '.join(pair)} |"
        lines.append(f"{start} each alone | 100 % | 100 % | {kept} |")
        for label, measured in result["together"].items():
            cells = [f"{x['mean']:.0%} ({x['worst']:.0%})" for x in measured["left"].values()]
            cells = [cell.replace("%", " %") for cell in cells]
            lines.append(f"{start} {label} | {' | '.join(cells)} | {measured['object_right']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one prompt, fewer steps")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "conflict.json")
    args = parser.parse_args(arguments)
    prompts = dict(list(PROMPTS.items())[:1]) if args.quick else PROMPTS
    lab = Lab(prompts, 5 if args.quick else STEPS)
    plain = lab.measure([], {})
    results = [compare(lab, pair, plain, SETTINGS) for pair in PAIRS]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
