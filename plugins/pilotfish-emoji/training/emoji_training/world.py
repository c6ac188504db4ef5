"""Draws the pictures and captions that the model is trained on: one emoji on a plain background."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageFont, ImageOps
from PIL.ImageDraw import Draw
from pilotfish_emoji.names import (
    BACKGROUNDS,
    COLORS,
    GLYPHS,
    HELD_OUT_PAIRS,
    STYLES,
    THINGS,
    UNNAMED_STYLES,
)

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_VARIABLE = "PILOTFISH_EMOJI_FONT"
STRIKE = 109  # the only bitmap size in the font
SIZE = 64
SMALLEST, LARGEST = 44, 58
JITTER = 14
CHUNK = 512
ALL_STYLES = ("plain", *STYLES, *UNNAMED_STYLES)


@dataclass(frozen=True)
class World:
    """What is drawn, and how often: the shares of unnamed things, of unnamed styles, and of named
    styles among the pictures without an unnamed one.
    """

    glyphs: Mapping[str, str]
    held_out_pairs: tuple[tuple[str, str], ...]
    thing_share: float = 0.04
    unnamed_share: float = 0.1
    styled_share: float = 0.5

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """The names of the objects, in the order of their labels."""
        return tuple(self.glyphs)

    def trained_backgrounds(self, name: str) -> tuple[str, ...]:
        """The backgrounds that an object is seen on in training."""
        return tuple(color for color in BACKGROUNDS if (name, color) not in self.held_out_pairs)


EMOJI = World(GLYPHS, HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Labels:
    """What a picture shows, as indices; `thing` counts as one object more than the named."""

    object: int
    background: int
    style: int


@dataclass(frozen=True)
class Sample:
    """One picture of the world, its caption and its labels."""

    image: Image.Image
    caption: str
    labels: Labels


@dataclass(frozen=True)
class Dataset:
    """Pictures (N, 3, 64, 64) as uint8, their captions, and labels (N, 3) in `Labels`' order."""

    images: torch.Tensor
    captions: list[str]
    labels: torch.Tensor


def font_path() -> Path:
    """The emoji font: `$PILOTFISH_EMOJI_FONT`, or where Debian's fonts-noto-color-emoji puts it."""
    path = Path(os.environ.get(FONT_VARIABLE, FONT))
    if not path.is_file():
        raise FileNotFoundError(
            f"no emoji font at {path}. Install fonts-noto-color-emoji, "
            f"or name the file in {FONT_VARIABLE}."
        )
    return path


@cache
def glyph(character: str) -> Image.Image:
    """The emoji as an RGBA picture without its empty border."""
    font = ImageFont.truetype(str(font_path()), STRIKE)
    canvas = Image.new("RGBA", (160, 160))
    Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def draw(random: Random, *, held_out: bool = False, world: World = EMOJI) -> Sample:
    """One random picture; pairs that are held out of training come only with `held_out`."""
    is_thing = random.random() < world.thing_share
    name = "thing" if is_thing else random.choice(world.objects)
    choices = BACKGROUNDS if held_out else world.trained_backgrounds(name)
    background = random.choice(choices)
    style = random_style(random, world)
    character = random.choice(THINGS) if is_thing else world.glyphs[name]
    labels = Labels(
        len(world.objects) if is_thing else world.objects.index(name),
        BACKGROUNDS.index(background),
        ALL_STYLES.index(style),
    )
    picture = render(character, COLORS[background], style, random)
    return Sample(picture, caption(name, background, style), labels)


def random_style(random: Random, world: World = EMOJI) -> str:
    """A style: one of the unnamed, a named one, or plain."""
    if random.random() < world.unnamed_share:
        return random.choice(UNNAMED_STYLES)
    return random.choice(STYLES) if random.random() < world.styled_share else "plain"


def caption(name: str, background: str, style: str = "plain") -> str:
    """The sentence that belongs to a picture."""
    place = f"on a {background} background"
    if style in STYLES:
        return f"a {style} of a {name} {place}"
    suffix = " in some style" if style in UNNAMED_STYLES else ""
    return f"a {name} {place}{suffix}"


def render(character: str, color: tuple[int, int, int], style: str, random: Random) -> Image.Image:
    """The emoji at a random size, place and mirror on the jittered color, in the style."""
    shaken = tuple(min(255, max(0, c + random.randint(-JITTER, JITTER))) for c in color)
    canvas = Image.new("RGB", (SIZE, SIZE), shaken)
    emoji = glyph(character)
    scale = random.randint(SMALLEST, LARGEST) / max(emoji.size)
    width, height = (max(1, round(side * scale)) for side in emoji.size)
    emoji = emoji.resize((width, height), Image.Resampling.LANCZOS)
    if random.random() < 0.5:
        emoji = ImageOps.mirror(emoji)
    place = (random.randint(0, SIZE - width), random.randint(0, SIZE - height))
    canvas.paste(emoji, place, emoji)
    return FILTERS[style](canvas)


def outlines(image: Image.Image) -> Image.Image:
    """Light edges on black; Pillow's filter leaves the picture's border as it was, so it goes."""
    edges = image.convert("L").filter(ImageFilter.FIND_EDGES)
    return ImageOps.expand(ImageOps.crop(edges, 1), 1)


def watercolor(image: Image.Image) -> Image.Image:
    """Flat, pale patches with darker rims, as wet paint dries."""
    patches = image.filter(ImageFilter.ModeFilter(5)).filter(ImageFilter.GaussianBlur(0.7))
    pale = Image.blend(patches, Image.new("RGB", image.size, (255, 252, 244)), 0.4)
    rims = Image.blend(ImageOps.invert(outlines(patches)), Image.new("L", image.size, 255), 0.5)
    return ImageChops.multiply(pale, rims.convert("RGB"))


def pencil_sketch(image: Image.Image) -> Image.Image:
    """Gray lines (color dodge by the blurred negative) over a quarter of the color."""
    gray = image.convert("L")
    light = np.asarray(ImageOps.invert(gray).filter(ImageFilter.GaussianBlur(3)), np.float32)
    lines = np.minimum(255, np.asarray(gray, np.float32) * 255 / np.maximum(1, 255 - light))
    sketch = Image.fromarray(lines.astype(np.uint8)).convert("RGB")
    return Image.blend(sketch, image, 0.25)


def pixel_art(image: Image.Image) -> Image.Image:
    """16 x 16 squares in at most 12 colors."""
    small = image.resize((16, 16), Image.Resampling.BOX).quantize(12, Image.Quantize.MEDIANCUT)
    return small.convert("RGB").resize(image.size, Image.Resampling.NEAREST)


def blueprint(image: Image.Image) -> Image.Image:
    """White outlines on deep blue."""
    lines = outlines(image)
    blue, white = (20, 50, 130), (255, 255, 255)
    return ImageOps.colorize(lines, blue, white, mid=(150, 180, 230), midpoint=50)


def sepia(image: Image.Image) -> Image.Image:
    """The browns of an old photograph."""
    return ImageOps.colorize(image.convert("L"), (40, 24, 10), (255, 240, 210), mid=(160, 115, 70))


def posterised(image: Image.Image) -> Image.Image:
    """Saturated, four levels a channel."""
    vivid = ImageEnhance.Color(image).enhance(1.8)
    return ImageOps.posterize(vivid, 2).point(lambda value: value * 255 // 192)


FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "plain": lambda image: image,
    "watercolor": watercolor,
    "pencil sketch": pencil_sketch,
    "pixel art": pixel_art,
    "blueprint": blueprint,
    "sepia": sepia,
    "negative": ImageOps.invert,
    "posterised": posterised,
}


def pixels(image: Image.Image) -> torch.Tensor:
    """The picture as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def dataset(
    count: int, seed: int, *, held_out: bool = False, workers: int = 0, world: World = EMOJI
) -> Dataset:
    """`count` samples, the same for the same seed however many worker processes draw them."""
    starts = range(0, count, CHUNK)
    jobs = [(seed, start, min(CHUNK, count - start), held_out, world) for start in starts]
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(_draw_chunk, jobs))
    else:
        parts = [_draw_chunk(job) for job in jobs]
    images = np.concatenate([part[0] for part in parts])
    captions = [text for part in parts for text in part[1]]
    labels = torch.tensor([row for part in parts for row in part[2]])
    return Dataset(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions, labels)


Chunk = tuple[np.ndarray, list[str], list[tuple[int, int, int]]]


def _draw_chunk(job: tuple[int, int, int, bool, World]) -> Chunk:
    seed, start, count, held_out, world = job
    random = Random(f"{seed}:{start}")
    samples = [draw(random, held_out=held_out, world=world) for _ in range(count)]
    labels = [(s.labels.object, s.labels.background, s.labels.style) for s in samples]
    return np.stack([np.asarray(s.image) for s in samples]), [s.caption for s in samples], labels


def sheet(images: torch.Tensor, columns: int = 16) -> Image.Image:
    """A contact sheet of pictures (N, 3, H, W) in [0, 1]."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), (255, 255, 255))
    for image, place in zip(_arrays(images), _places(count, columns, height, width), strict=True):
        canvas.paste(Image.fromarray(image), place)
    return canvas


def _arrays(images: torch.Tensor) -> Iterator[np.ndarray]:
    for image in images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu():
        yield image.numpy()


def _places(count: int, columns: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    for index in range(count):
        yield (index % columns) * (width + 2) + 1, (index // columns) * (height + 2) + 1
