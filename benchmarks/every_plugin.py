"""What does each plugin do on both models that ship? 64 pictures a row, the same rows on both.

    python benchmarks/every_plugin.py                       # both models; run it again to go on
    python benchmarks/every_plugin.py --models emoji-flow   # one of them
    python benchmarks/every_plugin.py --rows blue palette   # some rows

Eight scenes, an object on a background, with eight seeds each; steps, scheduler and guidance are
the model's own, and every guide is at scale 1 unless the row says otherwise. A row has the
plugin's own measure, and how often the judge that ships with the model sees the wanted object and
background. Finished pictures are kept in `benchmarks/.work` under a fingerprint of weights and
settings, so a run can be killed at any time, and only what has changed is made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from random import Random
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pilotfish_emoji
import pilotfish_emoji_flow
import torch
from curves.drawings import fill
from emoji_training.world import render
from PIL import Image, ImageDraw, ImageFont
from pilotfish_emoji import judge as judges
from pilotfish_emoji.names import COLORS, GLYPHS
from pilotfish_textual_inversion import Plan, train
from torch import Tensor

import pilotfish
from pilotfish.guidance import moves
from pilotfish.hooks.stack import Stack

HERE = Path(__file__).parent
RESULT, KEPT, DOCS = (
    HERE / "results/every_plugin.json",
    HERE / ".work/plugins",
    HERE.parent / "docs",
)
MODELS = {"emoji": pilotfish_emoji, "emoji-flow": pilotfish_emoji_flow}
SEEDS = 8  # pictures of a scene
SIDE, LEFT = 64, 118  # pixels: a picture's side, and the sheet's margin for names

# Object, background, and another object, which swaps, mixtures and pictures take.
SCENES = (
    ("fox", "teal", "cat"),
    ("cat", "red", "fox"),
    ("frog", "pink", "owl"),
    ("owl", "purple", "frog"),
    ("campfire", "black", "tree"),
    ("tree", "white", "campfire"),
    ("car", "yellow", "crown"),
    ("crown", "green", "car"),
)
BOX = (0.125, 0.125, 0.875, 0.875)  # what `inpaint` draws anew: whole cells of the latents
STYLE = "blueprint"  # in a few pictures of each model's training, and in no caption
LESSON = ("panda", "lion", "boat", "castle", "fish", "guitar", "clock", "mushroom")
PLAN = Plan(
    token="<ink>", init="blue pencil sketch", vectors=6, steps=800, batch=8, learning_rate=0.15
)

PROMPT = {"prompt": "a {object} on a {background} background"}
NO_PROMPT = {"prompt": "", "guidance_scale": 1.0}
SHOWN = ("own", "object", "background")  # of a row's numbers


@dataclass(frozen=True)
class Row:
    """What is run on each scene, and what is looked at; texts are filled with a scene's words.

    Attributes:
        use: the plugin with its settings; None is none.
        measure: of the plugin's own, one of `MEASURES`.
        run: the run's options.
        beside: the row without the plugin, which measures compare with.
        objects: one of these the judge should see.
        background: likewise; None: not asked for.
    """

    use: Mapping[str, Any] | None = None
    measure: str = ""
    run: Mapping[str, Any] = field(default_factory=PROMPT.copy)
    beside: str = "no plugin"
    objects: tuple[str, ...] = ("{object}",)
    background: str | None = "{background}"


def guide(use: str, scale: float = 1.0, **settings: Any) -> Row:
    """A guide beside a prompt."""
    return Row({"use": use, "scale": scale, **settings}, "loss left")


def label(scale: float, **settings: Any) -> Row:
    """A classifier's label, and no prompt."""
    use = {"use": "classifier", "model": "{classifier}", "label": "{object}", "scale": scale}
    return Row({**use, **settings}, "loss left", NO_PROMPT, "no prompt", background=None)


def words(use: str, objects: tuple[str, ...] = ("{object}", "{other}"), **settings: Any) -> Row:
    """Another object in the prompt."""
    return Row({"use": use, **settings}, "other seen", objects=objects)


OTHER = PROMPT["prompt"].replace("object", "other")
ROWS = {
    "no plugin": Row(),
    "blue, scale 0.5": guide("blue", 0.5),
    "blue": guide("blue"),
    "blue, scale 2": guide("blue", 2.0),
    "palette": guide("palette", colors=["#14213d", "#fca311", "#e5e5e5"]),
    "clip": guide("clip", model="local-dir:{clip}", text="a watercolor of a {object}"),
    "reference": guide("reference", image="{elsewhere}"),
    "no prompt": Row(run=NO_PROMPT, background=None),
    "classifier": label(1.0),
    "classifier, scale 4": label(4.0, cutouts=4, stop=0.8),
    "concept": Row(
        {"use": "concept", "file": "{word}"},
        "style seen",
        {"prompt": f"a {PLAN.token} of a {{object}}"},
        background=None,
    ),
    "blend": words("blend", prompts={OTHER: 0.5}),
    "token-blend": words("token-blend", word="{object}", mix={"{other}": 0.5}),
    "token-swap": words("token-swap", ("{other}",), word="{object}", by="{other}"),
    "img2img": Row({"use": "img2img", "image": "{picture}", "strength": 0.6}, "distance left"),
    "inpaint": Row({"use": "inpaint", "image": "{picture}", "mask": BOX}, "error outside"),
    "optimize": Row({"use": "optimize"}, "steps taken"),
}


# ---- pictures ----


@dataclass(frozen=True)
class Drawn:
    """A row's pictures of a scene: images (B, 3, 64, 64), latents (B, 4, 16, 16), and for each the
    share of the run's steps that was taken (B,).
    """

    images: Tensor
    latents: Tensor
    steps: Tensor


class Lab:
    """Makes a model's pictures, and keeps them.

    Args:
        name: of an installed model.
        seeds: pictures of each scene.
        run: options of every run.
    """

    def __init__(self, name: str, seeds: int = SEEDS, kept: Path = KEPT, **run: Any) -> None:
        self.name, self.seeds, self.kept, self.run = name, seeds, kept, run
        self.folder: Path = MODELS[name].FOLDER
        self.judge = judges.load(self.folder, objects=MODELS[name].OBJECTS)
        self.weights = weights(name)
        self.word = kept / f"{name}-{digest([self.weights, PLAN])}.safetensors"
        self.drawn = cache(self._drawn)
        kept.mkdir(parents=True, exist_ok=True)

    @cached_property
    def sampler(self) -> pilotfish.Sampler:
        """Loaded when it is needed."""
        sampler = pilotfish.load(self.name)
        for network in (sampler.model.denoiser, sampler.model.vae):
            network.to(memory_format=torch.channels_last)  # three quarters of the time on a CPU
        return sampler

    def file(self, row: str, scene: int) -> Path:
        """Where a row's pictures of a scene are kept."""
        told = [self.weights, ROWS[row].use, ROWS[row].run, self.run, SCENES[scene]]
        told += [moves.UNPROMPTED_PULL, PLAN if row == "concept" else None]
        return self.kept / f"{self.name}-{row}-{scene}-{digest(told)}.pt".replace(" ", "-")

    def _drawn(self, row: str, scene: int) -> Drawn:
        """What is not there yet is made."""
        file = self.file(row, scene)
        parts = [torch.load(file, weights_only=True)] if file.exists() else []
        if (done := len(parts[0][0]) if parts else 0) < self.seeds:
            parts.append(self._made(row, scene, done))
            part = file.with_suffix(".part")
            torch.save(tuple(torch.cat(values) for values in zip(*parts, strict=True)), part)
            part.replace(file)
        latents, steps = (values[: self.seeds] for values in torch.load(file, weights_only=True))
        with torch.no_grad():
            return Drawn(self.sampler.model.decode(latents).clamp(0, 1), latents, steps)

    def _made(self, row: str, scene: int, first: int) -> tuple[Tensor, Tensor]:
        """Latents and steps, see `Drawn`, of the seeds from `first` on."""
        if row == "concept":
            self.learn()
        plugins = [self.filled(ROWS[row].use, scene)] if ROWS[row].use else []
        run = {"num_images": self.seeds - first, "seed": scene * SEEDS + first, **self.run}
        stream = self.sampler.stream(plugins=plugins, **self.filled(ROWS[row].run, scene), **run)
        steps = sum(1 for _ in stream) / len(stream)
        return (latents := stream.result().latents), torch.full((len(latents),), steps)

    def filled(self, template: Any, scene: int) -> Any:
        """A template with a scene's words and files in it."""
        if isinstance(template, Mapping):
            return {self.filled(k, scene): self.filled(v, scene) for k, v in template.items()}
        if not isinstance(template, str):
            return template
        name, background, other = SCENES[scene]
        return template.format(
            object=name,
            background=background,
            other=other,
            picture=self.picture(other, background),
            elsewhere=self.picture(other, next(b for o, b, _ in SCENES if o == other)),
            clip=pilotfish_emoji.FOLDER / "clip",
            classifier=pilotfish_emoji.FOLDER / "classifier",
            word=self.word,
        )

    def picture(self, name: str, background: str, style: str = "plain") -> Path:
        """A picture file of the world."""
        file = self.kept / f"{name}-{background}-{style}.png"
        if not file.exists():
            render(GLYPHS[name], COLORS[background], style, Random(file.name)).save(file)
        return file

    def learn(self) -> None:
        """Train the word for `STYLE`, if that is not done."""
        if self.word.exists() and not self.word.with_suffix(".training").exists():
            return
        pictures = [self.picture(o, b, STYLE) for o, b in zip(LESSON, COLORS, strict=False)]
        for name, file in zip(LESSON, pictures, strict=True):
            file.with_suffix(".txt").write_text(f"a {{token}} of a {name}", "utf-8")
        train(self.sampler, pictures, self.word, PLAN)


def weights(name: str) -> str:
    """A fingerprint of all that ships with a model, the judge too."""
    files = sorted(MODELS[name].FOLDER.rglob("*.safetensors"))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def digest(what: Sequence[Any]) -> str:
    """A fingerprint."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


# ---- measures, each a fraction ----


def loss_left(lab: Lab, row: str) -> float:
    """The guide's own loss on the finished pictures, as a fraction of that without it."""
    guided, plain = (
        fmean(float(loss(lab, row, shown, scene).mean()) for scene in range(len(SCENES)))
        for shown in (row, ROWS[row].beside)
    )
    return guided / plain


def loss(lab: Lab, row: str, shown: str, scene: int) -> Tensor:
    """What a row's guide says of another row's pictures (B,)."""
    stack, drawn = Stack([lab.filled(ROWS[row].use, scene)]), lab.drawn(shown, scene)
    run = SimpleNamespace(model=lab.sampler.model, height=SIDE, width=SIDE)
    stack.setup(lambda *_: {"run": run})
    generators = [torch.Generator().manual_seed(seed) for seed in range(lab.seeds)]
    values = {"run": run, "image": drawn.images, "x0": drawn.latents, "generator": generators}
    step = SimpleNamespace(**values, changed=lambda: None)
    with torch.no_grad():
        ((_, losses),) = stack.collect("loss_guidance", lambda *_: {"step": step})
    return losses


def other_seen(lab: Lab, row: str) -> float:
    """How often the judge sees the other object."""
    return seen(lab, row, 0, ["{other}"])


def style_seen(lab: Lab, row: str) -> float:
    """How often the judge sees the style that was learned."""
    return seen(lab, row, 2, [STYLE])


def distance_left(lab: Lab, row: str) -> float:
    """To the picture, root mean square, as a fraction of that without the plugin."""
    everywhere = torch.ones(SIDE, SIDE, dtype=torch.bool)
    return distance(lab, row, everywhere) / distance(lab, ROWS[row].beside, everywhere)


def error_outside(lab: Lab, row: str) -> float:
    """To the picture outside of the box, as a multiple of what its VAE alone makes there."""
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    left, top, right, bottom = (int(edge * SIDE) for edge in BOX)
    outside[top:bottom, left:right] = False
    return distance(lab, row, outside) / distance(lab, None, outside)


def steps_taken(lab: Lab, row: str) -> float:
    """Of the run's steps, until all pictures of a scene are done."""
    return fmean(float(lab.drawn(row, scene).steps.mean()) for scene in range(len(SCENES)))


MEASURES: dict[str, Callable[[Lab, str], float]] = {
    "loss left": loss_left,
    "other seen": other_seen,
    "style seen": style_seen,
    "distance left": distance_left,
    "error outside": error_outside,
    "steps taken": steps_taken,
}


def distance(lab: Lab, row: str | None, where: Tensor) -> float:
    """Root mean square, over some pixels, from a row's pictures to those that it was given.

    Args:
        row: None is the pictures themselves, through the VAE.
        where: (64, 64), the pixels.
    """
    squares, model = [], lab.sampler.model
    for scene, (_, background, other) in enumerate(SCENES):
        with Image.open(lab.picture(other, background)) as opened:
            picture = pilotfish.pixels(opened)  # (1, 3, 64, 64)
        with torch.no_grad():
            images = lab.drawn(row, scene).images if row else model.decode(model.encode(picture))
        squares.append(float((images.clamp(0, 1) - picture).square()[..., where].mean()))
    return float(fmean(squares) ** 0.5)


def seen(lab: Lab, row: str, kind: int, wanted: Sequence[str]) -> float:
    """How often the judge sees one of what is wanted.

    Args:
        kind: 0 object, 1 background, 2 style.
    """
    found = []
    for scene in range(len(SCENES)):
        names = lab.judge.judge(lab.drawn(row, scene).images).names
        found += [name[kind] in [lab.filled(w, scene) for w in wanted] for name in names]
    return fmean(found)


def measured(lab: Lab, name: str) -> dict[str, float | int | str]:
    """A row's numbers."""
    row = ROWS[name]
    numbers: dict[str, float | int | str] = {"pictures": lab.seeds * len(SCENES)}
    if row.measure:
        numbers |= {"measure": row.measure, "own": round(MEASURES[row.measure](lab, name), 4)}
    numbers["object"] = round(seen(lab, name, 0, row.objects), 4)
    if row.background:
        numbers["background"] = round(seen(lab, name, 1, [row.background]), 4)
    return numbers


# ---- what is shown ----


def table(result: Mapping[str, Any]) -> str:
    """Both models side by side as Markdown."""
    columns = " | ".join(f"{model}: pictures | its own | object | background" for model in result)
    lines = [f"| plugin | its own measure | {columns} |"]
    lines += ["|---|---|" + "---:|---:|---:|---:|" * len(result)]
    for name, row in ROWS.items():
        found = [model["rows"].get(name, {}) for model in result.values()]
        cells = [
            cell
            for f in found
            for cell in (str(f.get("pictures", "")), *map(percent, (f.get(k) for k in SHOWN)))
        ]
        lines.append(f"| {name} | {row.measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A cell; empty where nothing is asked for."""
    return "" if value is None else f"{100 * value:.0f} %"


def sheet(lab: Lab, names: Sequence[str], target: Path) -> None:
    """The first picture of each scene: a line for each row."""
    canvas = Image.new("RGB", (LEFT + len(SCENES) * SIDE, len(names) * SIDE), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for line, name in enumerate(names):
        pen.text((4, (line + 0.5) * SIDE), name, "black", font, anchor="lm")
        for scene in range(len(SCENES)):
            pixels = lab.drawn(name, scene).images[0].mul(255).round().byte()
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            canvas.paste(tile, (LEFT + scene * SIDE, line * SIDE))
    canvas.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


def write(result: Mapping[str, Any], out: Path) -> None:
    """The numbers so far; never half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    part.replace(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pictures of each of 8 scenes")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--docs", type=Path, default=DOCS, help="page and sheets")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {name: {"rows": {}} for name in MODELS}
    if args.out.exists():
        result |= json.loads(args.out.read_text("utf-8"))
    for model in args.models:
        lab = Lab(model, args.seeds)
        if result[model].get("weights") != lab.weights:
            result[model] = {"weights": lab.weights, "rows": {}}
        for row in args.rows:
            result[model]["rows"][row] = measured(lab, row)
            print(model, row, result[model]["rows"][row], flush=True)
            write(result, args.out)
        done = [row for row in ROWS if row in result[model]["rows"]]
        sheet(Lab(model, 1), done, args.docs / f"every-plugin-{model}.png")
    fill(args.docs / "guidance.md", {"both": table(result)}, "plugins")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
