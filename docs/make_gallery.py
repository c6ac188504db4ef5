"""Writes docs/gallery.md, and its pictures by running the examples: `python docs/make_gallery.py`.

With names, only these examples are run: `python docs/make_gallery.py blue palette`.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageSequence

FILE = Path(__file__).with_name("gallery.md")
PICTURES = FILE.with_suffix("")
EXAMPLES = FILE.parents[1] / "examples"
WIDTH, COLORS, FILM_COLORS = 960, 192, 24  # at most; pixels, and colours of a picture and a film

ORDER = {
    "From noise to picture": ("vae", "noise", "loop", "image_to_image"),
    "From words to embeddings": (
        *("embeddings", "token_swap", "token_blend", "textual_inversion", "prompt_blend"),
    ),
    "Sampling": ("film", "guidance_scale", "schedulers", "optimize"),
    "Guidance": ("campfire", "blue", "palette", "models", "clip_guidance", "stack", "ten_plugins"),
}

HEAD = """\
# Gallery

<!-- Written by docs/make_gallery.py from the examples; change it there. -->

How a latent diffusion model works, and where plugins take hold of it: one idea, one picture, one
short program each. All run on the emoji model that ships, or on one that is named behind them:
`python examples/blue.py FOLDER_OR_HUB_ID`. In a checkout `make gallery` makes them all again."""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in ORDER.items():
        parts += [f"## {title}", *map(section, names)]
    return "\n\n".join(parts) + "\n"


def section(name: str) -> str:
    """One example: what it shows, as its docstring says, its picture, and how to run it."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))) or ""
    first, *paragraphs = (" ".join(p.split()) for p in text.split("\n\n"))
    title, _, about = first.partition(": ")
    picture = next(PICTURES.glob(f"{name}.*"))
    return "\n\n".join(
        [
            f"### {title}",
            about[:1].upper() + about[1:],
            f"![{title}]({PICTURES.name}/{picture.name})",
            *paragraphs,
            f"[examples/{name}.py](../examples/{name}.py): `python examples/{name}.py`",
        ]
    )


def run(name: str, folder: str) -> Path:
    """The picture that an example makes in a process of its own; tells what that took."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone, as nothing else tells
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed")
    seconds = usage.ru_utime + usage.ru_stime
    print(f"{name}: {seconds:.0f} s of a core, {usage.ru_maxrss / 1e6:.1f} GB", flush=True)
    return Path(folder, lines[-1])


def keep(picture: Path, name: str) -> None:
    """Write a picture among the page's, small."""
    with Image.open(picture) as image:
        frames = [small(frame) for frame in ImageSequence.Iterator(image)]
        times = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(image)]
    path, (first, *others) = PICTURES / f"{name}{picture.suffix}", frames
    if others:
        first.save(path, save_all=True, append_images=others, duration=times, loop=0)
    else:
        first.save(path, optimize=True)


def small(image: Image.Image) -> Image.Image:
    """A picture of few colours, and no wider than the page."""
    size = fitted(image.size)
    colors = FILM_COLORS if getattr(image, "is_animated", False) else COLORS
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return resized.quantize(colors, dither=Image.Dither.NONE)


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    """The size that a picture has on the page."""
    width = min(size[0], WIDTH)
    return width, round(size[1] * width / size[0])


def main(*names: str) -> None:
    """Run the examples, all or those named, and write the page."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names or [name for names in ORDER.values() for name in names]:
            keep(run(name, folder), name)
    FILE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
