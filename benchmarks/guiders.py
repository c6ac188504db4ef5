"""Do the plugins of pilotfish-cfg and pilotfish-perturb help on the models that ship?

    python benchmarks/guiders.py                       # both models; run it again to go on
    python benchmarks/guiders.py --models emoji-flow   # one of them

64 prompts, an object each, a picture each, with the model's own steps and scheduler, in bfloat16.
Plain guidance over scales, and each plugin over scales of guidance or of its own. The judge that
ships with the model, a network apart, says whether object and background are as the prompt says;
the Frechet distance, in its features, is to 512 fresh pictures of the same prompts. A method's best
is its lowest distance among the points at which both are right in at least `RIGHT` of the pictures.

Finished pictures are kept in `benchmarks/.work` under a fingerprint of weights and settings, so a
run can be killed at any time. Result: `results/guiders.json`, and in `docs/` the tables of
`guidance.md` and a sheet for each model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import pilotfish_emoji as emoji
import pilotfish_emoji_flow as flow
import torch
from curves.drawings import fill
from curves.pictures import Prompts, digest
from emoji_training.score import Wish, frechet_distance, plain_wishes, rates
from emoji_training.world import EMOJI, World, pixels, render
from flow_training.pictures import WORLD
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import COLORS
from torch import Tensor

import pilotfish

HERE = Path(__file__).parent
RESULT, KEPT, DOCS = HERE / "results/guiders.json", HERE / ".work/guiders", HERE.parent / "docs"
COUNT, BATCH, REPEATS = 64, 16, 8  # pictures of a point, at a time, and fresh ones for each prompt
RIGHT = 0.95
SHOWN, SIDE, LEFT = 12, 64, 150  # of a sheet's row: pictures, their side, the margin for names
PLAIN, FRESH = "plain guidance", "fresh pictures"
OWN = 4.0  # the guidance scale of both models

# Of `pilotfish-cfg`, which change how the two predictions are combined: each at three scales.
COMBINED: dict[str, Mapping[str, Any]] = {
    "threshold": {},
    "cfg-interval": {},
    "cfg-rescale": {},
    "cfg-zero-star": {},
    "apg": {"threshold": 2.5},  # 15 is for 16 times as many latents
    "mambo": {},
    "tcfg": {},
    "cfg-norm": {},
}
BANDS = ([2, 4], [4, 2], [4, 8])  # of `fdg`, low frequencies first
# Of `pilotfish-perturb`, scales of their own beside the model's guidance, the usual one last.
WEAKENED = {
    "pag": (0.3, 1, 3),
    "seg": (0.3, 1, 3),
    "slg": (1, 2.8),
    "sag": (0.25, 0.75),
    "autoguidance": (0.1, 0.3, 1),
}


@dataclass(frozen=True)
class Model:
    """One that ships.

    Attributes:
        objects: that its judge knows.
        world: whose pictures it draws.
        longer: steps with as many calls as three a step make.
        layers: what is weakened, where the plugins' usual layer does not count.
    """

    folder: Path
    objects: Sequence[str]
    world: World
    longer: int
    layers: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One method at one setting.

    Attributes:
        setting: as the tables tell it.
        run: options of the run.
    """

    method: str
    setting: str
    run: Mapping[str, Any]
    plugin: Mapping[str, Any] | None = None


MODELS = {
    "emoji": Model(emoji.FOLDER, emoji.OBJECTS, EMOJI, 38, {"layers": ["down_blocks.1"]}),
    "emoji-flow": Model(flow.FOLDER, flow.OBJECTS, WORLD, 42, {}),
}


def points(model: Model) -> Iterator[Point]:
    """All methods, what is asked first of all of them first."""
    for scale in (OWN, 2.0, 1.5, 3.0, 8.0):
        yield Point(PLAIN, f"guidance {scale:g}", {"guidance_scale": scale})
    for scale in (OWN, 2.0, 8.0):
        for use, settings in COMBINED.items():
            plugin = {"use": use, **settings}
            yield Point(use, f"guidance {scale:g}", {"guidance_scale": scale}, plugin)
    for bands in BANDS:
        yield Point("fdg", f"scales {bands}", {}, {"use": "fdg", "scales": bands})
    for scale in (0.2, 0.4, 0.6):
        plugin = {"use": "cfg-plus-plus", "scale": scale}
        yield Point("cfg-plus-plus", f"scale {scale:g}", {}, plugin)
    for place in range(3):
        for use, scales in WEAKENED.items():
            for scale in scales[place : place + 1]:
                plugin = {"use": use, "scale": scale, **model.layers}
                yield Point(use, f"scale {scale:g}", {}, plugin)
    # A third call a step makes as many as half as many steps more.
    longer = f"{PLAIN}, {model.longer} steps"
    yield Point(longer, f"guidance {OWN:g}", {"steps": model.longer})


class Calls(pilotfish.Plugin):
    """Counts how often the network is asked for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def around_network(self, step: pilotfish.Step) -> None:
        """Rows of the batch, whoever asks."""
        self.count += len(step.network_latents) // step.run.num_images


class Lab:
    """A model's pictures, made once and kept, and their scores."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, (model := MODELS[name])
        self.judge = judges.load(model.folder, objects=model.objects)
        self.weights = digest(model.folder, "unet", "transformer", "vae", "text_encoder*")
        self.wishes = plain_wishes(COUNT, 1, model.world)
        self.known = self.features(self.renders(self.wishes * REPEATS, 4))
        KEPT.mkdir(parents=True, exist_ok=True)

    @cached_property
    def sampler(self) -> pilotfish.Sampler:
        """Loaded when the first picture is made."""
        return pilotfish.load(self.name, dtype="bfloat16")

    def renders(self, wishes: Sequence[Wish], seed: int) -> Tensor:
        """Fresh pictures (N, 3, 64, 64) in [0, 1] of what is wished."""
        random, glyphs = Random(seed), self.model.world.glyphs
        drawn = [render(glyphs[w.object], COLORS[w.background], w.style, random) for w in wishes]
        return torch.stack([pixels(image) for image in drawn]).float() / 255

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The judge's, (N, 384)."""
        return torch.cat([self.judge.features(part) for part in images.split(64)])

    def pictures(self, point: Point) -> tuple[Tensor, int]:
        """(64, 3, 64, 64) in [0, 1], and the network's calls for each."""
        told = json.dumps([asdict(point), self.weights, COUNT, BATCH])
        name = f"{self.name}-{point.method}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.pt"
        file = KEPT / name.replace(" ", "-")
        if not file.exists():
            part = file.with_suffix(".part")
            torch.save(self._made(point), part)
            part.replace(file)
        images, calls = torch.load(file, weights_only=True)
        return images.float() / 255, calls

    def _made(self, point: Point) -> tuple[Tensor, int]:
        parts, calls = [], Calls()
        for first in range(0, COUNT, BATCH):
            prompts = [wish.prompt for wish in self.wishes[first : first + BATCH]]
            run = {"guidance_scale": OWN, **point.run, "num_images": BATCH, "seed": 1000 + first}
            use = [dict(point.plugin)] if point.plugin else []
            result = self.sampler(prompts[0], plugins=[Prompts(prompts), *use, calls], **run)
            parts += [pixels(image) for image in result.images]
        return torch.stack(parts), calls.count * BATCH // COUNT

    def scored(self, images: Tensor) -> dict[str, float]:
        """The share of pictures with the right object and background, and the distance."""
        with torch.no_grad():
            right = rates(self.judge, images, self.wishes)["both"]
        distance = frechet_distance(self.features(images), self.known)
        return {"right": round(right, 4), "distance": round(distance, 1)}

    def row(self, point: Point) -> dict[str, Any]:
        """A point's numbers."""
        images, calls = self.pictures(point)
        told = {"method": point.method, "setting": point.setting, "calls": calls}
        return told | self.scored(images)


# ---- what is shown ----


def best(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each method at its best: the least distance first, fresh pictures above all."""
    tops: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=_merit):
        tops.setdefault(row["method"], row)
    return sorted(tops.values(), key=lambda row: (row["method"] != FRESH, _merit(row)))


def _merit(row: Mapping[str, Any]) -> tuple[float, float]:
    return max(0.0, RIGHT - row["right"]), row["distance"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each method at its best, as Markdown."""
    lines = [
        "| plugin | at its best | both right | Fréchet distance | calls |",
        "|---|---|---:|---:|---:|",
    ]
    for row in best(rows):
        name = f"`{row['method']}`" if row["method"][:5] not in (PLAIN[:5], FRESH[:5]) else None
        cells = [name or row["method"], row.get("setting", ""), f"{row['right']:.0%}"]
        lines.append(f"| {' | '.join(cells)} | {row['distance']:.0f} | {row.get('calls', '')} |")
    return "\n".join(lines)


def sheet(lab: Lab, rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """The first pictures of each method at its best."""
    tops = best(rows)
    canvas = Image.new("RGB", (LEFT + SHOWN * SIDE, len(tops) * SIDE), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    known = {(p.method, p.setting): p for p in points(lab.model)}
    for line, row in enumerate(tops):
        name = f"{row['method']}\n{row.get('setting', '')}"
        pen.text((4, (line + 0.5) * SIDE), name, "black", font, anchor="lm")
        point = known.get((row["method"], row.get("setting", "")))
        images = lab.pictures(point)[0] if point else lab.renders(lab.wishes, 5)
        for column, image in enumerate(images[:SHOWN]):
            tile = Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
            canvas.paste(tile, (LEFT + column * SIDE, line * SIDE))
    canvas.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--docs", type=Path, default=DOCS, help="page and sheets")
    args = parser.parse_args(arguments)
    result = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for name in args.models:
        lab = Lab(name)
        rows = [{"method": FRESH, **lab.scored(lab.renders(lab.wishes, 5))}]
        for point in points(lab.model):
            rows.append(lab.row(point))
            print(name, rows[-1], flush=True)
        result[name] = {"weights": lab.weights, "points": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        part.replace(args.out)
        sheet(lab, rows, args.docs / f"guiders-{name}.png")
    tables = {name: table(found["points"]) for name, found in result.items()}
    fill(args.docs / "guidance.md", tables, "guiders")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
