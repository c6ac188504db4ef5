"""Writes docs/shipped.md from the plugins' metadata and classes: `python docs/make_shipped.py`.

With names, the pictures of these plugins are made first: `python docs/make_shipped.py pag seg`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import pilotfish
from pilotfish import Guide
from pilotfish.cli.listing import docstring_summary, setting_rows
from pilotfish.hooks.plugin import implemented
from pilotfish.hooks.registry import COMMAND_GROUP, MODEL_GROUP, PLUGIN_GROUP, load_class

FILE = Path(__file__).with_name("shipped.md")
ROOT = FILE.parents[1]
PICTURES = FILE.with_suffix("")
PROJECTS = sorted(ROOT.glob("plugins/*/pyproject.toml"))
ROUTINE = ("setup", "teardown")  # they say nothing of what a plugin is for

SIDE, GAP, COLORS = 128, 8, 64  # pixels of a picture and between two; colours of both

# Pictures that other pages have, and the plugins in them.
SHEETS = {
    "docs/guiders-emoji.png": (
        *("apg", "cfg-interval", "cfg-norm", "cfg-plus-plus", "cfg-rescale", "cfg-zero-star"),
        *("fdg", "mambo", "tcfg", "threshold"),
    ),
    "plugins/pilotfish-cfg/docs/nag.png": ("nag",),
    "docs/gallery/blue.png": ("blue",),
    "docs/gallery/palette.png": ("palette",),
    "docs/guiders-emoji-flow.png": ("slg",),
    "plugins/pilotfish-blend/docs/blends.png": ("blend", "token-blend"),
    "docs/gallery/token_swap.png": ("token-swap",),
    "plugins/pilotfish-textual-inversion/docs/blueprint.png": ("concept",),
    "plugins/pilotfish-prompt/docs/regions.png": ("regions",),
    "plugins/pilotfish-image/docs/image.png": ("img2img", "inpaint"),
    "plugins/pilotfish-image/docs/optimize.png": ("optimize",),
    "plugins/pilotfish-likeness/docs/classifier.png": ("classifier",),
    "plugins/pilotfish-clip/docs/clip.png": ("clip",),
    **{
        f"plugins/pilotfish-reward/docs/{name}.png": (name,)
        for name in ("edges", "sharpness", "symmetry", "clip-style", "gate")
    },
}
NO_PICTURE = (  # they need networks that do not ship
    *("aesthetic", "controlnet", "hps", "image-reward", "ip-adapter", "lora", "perceptual"),
    "pickscore",
)


class Pair(NamedTuple):
    """A run of the emoji model without a plugin and with it, all else the same.

    Attributes:
        use: the plugin with its settings.
        beside: plugins of both runs.
    """

    prompt: str
    use: str
    seed: int
    beside: tuple[str, ...] = ()
    run: Mapping[str, Any] = {}


FOX, UNGUIDED = "a fox on a teal background", {"guidance_scale": 1.0}
BLUER = ("blue:name=bluer,gradient=none",)  # measured, for searches to choose by
DRAWING = "plugins/pilotfish-image/docs/drawing.png"
PAIRS = {
    "autoguidance": Pair(FOX, "autoguidance:layers=[down_blocks.1],scale=2", 4, run=UNGUIDED),
    "pag": Pair(FOX, "pag:layers=[down_blocks.0],scale=1", 4, run=UNGUIDED),
    "sag": Pair(FOX, "sag:scale=3", 4, run=UNGUIDED),
    "seg": Pair(FOX, "seg:layers=[down_blocks.0],scale=1", 7, run=UNGUIDED),
    "reference": Pair("a house on a gray background", f"reference:image={DRAWING}", 2),
    "long-prompt": Pair("a fox, " * 25 + "on a teal background", "long-prompt", 4),
    "weights": Pair(
        "a fox and a (cat:1.6) on a teal background", "weights:dialect=automatic1111", 2
    ),
    "best-of": Pair("a fox", "best-of:particles=8", 24, BLUER, {"scheduler": "ddpm"} | UNGUIDED),
    "das": Pair("a fox", "das:particles=4", 24, ("blue:scale=0.3",), {"scheduler": "ddpm"}),
    "feynman-kac": Pair(
        *("a fox", "feynman-kac:particles=8,strength=40", 24),
        *(BLUER, {"scheduler": "ddpm"} | UNGUIDED),
    ),
    "svdd": Pair("a fox", "svdd:particles=8", 3, BLUER, {"scheduler": "ddpm"}),
}

HEAD = """\
# The plugins that ship

<!-- Written by docs/make_shipped.py from the plugins; change it there. -->

Each package is installed by itself, and its page says what its plugins take and what was measured
with them. `pilotfish plugins list` tells what is installed, `pilotfish plugins show NAME` what a
plugin takes. Plugins stand here under the headings that `plugins list` has, with what each does to
a picture.
"""

GUIDES = """\
## What every guide takes

A plugin whose hooks name `loss_guidance` is a guide. Beside its own settings it has these, which
pilotfish applies, not the plugin:
"""

ELSE = """\
## Models and commands

Packages may also bring models, for `--model` and `pilotfish.load`, and commands of their own:
"""


def page() -> str:
    """The whole page."""
    projects = [tomllib.loads(f.read_text(encoding="utf-8"))["project"] for f in PROJECTS]
    others = [row for project in projects for row in offers(project)]
    parts = [
        HEAD,
        *sections(projects),
        GUIDES,
        table(*guide_settings()),
        ELSE,
        table(("name", "what", "package"), others),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sections(projects: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The plugins of each heading: what they do, and what that looks like."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for project in projects:
        for name in entry_points(project, PLUGIN_GROUP):
            found.setdefault(load_class(name).heading, {})[name] = project
    for heading, plugins in sorted(found.items()):
        names = sorted(plugins)
        yield f"## {heading[0].upper()}{heading[1:]}"
        rows = (row(name, plugins[name]) for name in names)
        yield table(("plugin", "what it does", "hooks", "package"), rows)
        if pairs := [name for name in names if name in PAIRS]:
            yield table(("plugin", "without, and with it", "run"), map(pair, pairs))
        yield from sheets(names)
        if dark := [f"`{name}`" for name in names if name in NO_PICTURE]:
            yield f"No picture of {', '.join(dark)}: they need networks that do not ship."


def row(name: str, project: dict[str, Any]) -> tuple[str, ...]:
    """What a plugin does, where it takes hold, and where it comes from."""
    plugin = load_class(name)
    hooks = [hook for hook in implemented(plugin) if hook not in ROUTINE]
    links = ", ".join(f"[`{hook}`](hooks.md#{hook})" for hook in hooks)
    return f"`{name}`", docstring_summary(plugin), links, link(project)


def pair(name: str) -> tuple[str, ...]:
    """A plugin's two pictures, and how they were made."""
    about = PAIRS[name]
    prompt = re.sub(r"(\S.*?, )\1{2,}", r"\1\1... ", about.prompt)
    options = {**about.run, "seed": about.seed}
    parts = [f'"{prompt}"', *(f"`{use}`" for use in (*about.beside, about.use))]
    parts += [f"{key.replace('_', ' ')} {value}" for key, value in options.items()]
    return f"`{name}`", f"![Without and with {name}]({PICTURES.name}/{name}.png)", ", ".join(parts)


def sheets(names: Sequence[str]) -> Iterator[str]:
    """The pictures of other pages in which some of these plugins are, with those pages' words."""
    for path, shown in SHEETS.items():
        if set(shown) <= set(names):
            page = FILE.with_name("gallery.md" if "gallery" in path else "guidance.md")
            if path.startswith("plugins"):
                page = (ROOT / path).parents[1] / "README.md"
            text = page.read_text(encoding="utf-8")
            target = (ROOT / path).relative_to(page.parent)
            said = re.search(rf"!\[([^]]+)\]\({re.escape(str(target))}\)", text)
            if said is None:
                raise SystemExit(f"{page} no longer shows {target}")
            file = f"../{path}" if path.startswith("plugins") else path.removeprefix("docs/")
            yield f"{', '.join(f'`{name}`' for name in shown)}: {said[1]}."
            yield f"![{said[1]}]({file})"


def offers(project: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each model and each command of a package."""
    for group, what in ((MODEL_GROUP, "model"), (COMMAND_GROUP, "command")):
        for name in entry_points(project, group):
            yield f"`{name.replace('.', ' ')}`", what, link(project)


def entry_points(project: dict[str, Any], group: str) -> Iterable[str]:
    """The names that a package gives in a group."""
    names: dict[str, str] = project.get("entry-points", {}).get(group, {})
    return names


def link(project: dict[str, Any]) -> str:
    """A package's name, leading to its page."""
    return f"[{project['name']}](../plugins/{project['name']}/README.md)"


def guide_settings() -> tuple[Sequence[str], Iterator[tuple[str, ...]]]:
    """The head, and a row for each setting of every guide."""
    head, *rows = setting_rows(Guide)
    return head, ((f"`{name}`", *rest) for name, *rest in rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell is no border."""
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(name: str) -> None:
    """Write a plugin's two pictures beside each other, small."""
    about, sampler = PAIRS[name], pilotfish.load("emoji")
    use = about.use.replace(DRAWING, str(ROOT / DRAWING))
    both = Image.new("RGB", (2 * SIDE + GAP, SIDE), "white")
    for i, plugins in enumerate((about.beside, (*about.beside, use))):
        (image,) = sampler(about.prompt, plugins=plugins, seed=about.seed, **about.run).images
        both.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (i * (SIDE + GAP), 0))
    PICTURES.mkdir(exist_ok=True)
    both.quantize(COLORS, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    for plugin in sys.argv[1:]:
        draw(plugin)
    FILE.write_text(page(), encoding="utf-8")
