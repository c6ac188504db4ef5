"""Draws docs/loop.svg, the sampling loop with every hook in it: `python docs/make_loop.py`."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("loop.svg")
LETTER = 7.3  # the width of a letter of a hook's name, in pixels

HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 640"
 font-family="sans-serif" font-size="13" text-anchor="middle">
<title>The sampling loop, and where each hook comes in</title>
<defs>
<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
 orient="auto"><path d="M0 0 8 4 0 8z" fill="#45525e"/></marker>
<marker id="back" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
 orient="auto"><path d="M0 0 8 4 0 8z" fill="#c22f45"/></marker>
</defs>
<style>
.band { fill: #f6f8fa; stroke: #d5dce2 }
.box { fill: #fff; stroke: #45525e; stroke-width: 1.2 }
.hook { fill: #ffe9b8; stroke: #c98a10 }
.name { font-family: monospace; font-size: 12px; fill: #5e4000 }
.flow { fill: none; stroke: #45525e; stroke-width: 1.4; marker-end: url(#end) }
.back { fill: none; stroke: #c22f45; stroke-width: 1.4; stroke-dasharray: 5 3;
 marker-end: url(#back) }
.note { font-size: 12px; fill: #45525e }
.red { font-size: 12px; fill: #c22f45 }
.when { text-anchor: start; font-weight: bold; fill: #45525e }
</style>
<rect width="980" height="640" fill="#fff"/>"""


def page() -> str:
    """The whole picture."""
    parts = [HEAD, *bands(), *before(), *step(), *guides(), *after(), "</svg>"]
    return "\n".join(parts) + "\n"


def bands() -> list[str]:
    """The parts of the run, behind everything else."""
    return [
        band(8, 150, "Once, before the first step"),
        band(166, 366, "At each step", left=150),
        band(540, 92, "Once, after the last step"),
    ]


def before() -> list[str]:
    """What happens once: words become conditioning, and the run gets a start."""
    return [
        hook(262, 27, "setup"),
        flow("M110 70H252"),
        flow("M338 70H510"),
        flow("M610 70H782"),
        flow("M295 118V89"),
        flow("M835 88V182H290V237"),
        flow("M75 136V237"),
        box(70, 70, "prompt", 80),
        hook(181, 70, "prompt_transform"),
        box(295, 70, "tokens", 86),
        hook(295, 124, "vocabulary"),
        hook(424, 70, "embedding_transform"),
        note(424, 99, 'stage "token"'),
        box(560, 70, "text encoder", 100),
        hook(696, 70, "embedding_transform"),
        note(696, 99, 'stage "prompt"'),
        box(835, 70, "conditioning", 106),
        box(75, 120, "noise", 70),
        hook(75, 190, "start_latents"),
    ]


def step() -> list[str]:
    """What happens at each step, as a ring."""
    return [
        flow("M120 255H250"),
        flow("M328 255H658"),
        flow("M720 255H803"),
        flow("M900 273V462"),
        flow("M820 480H75V275"),
        box(75, 255, "latents", 90),
        hook(184, 255, "before_step"),
        box(290, 255, "UNet", 76),
        hook(422, 255, "combine_predictions"),
        note(422, 232, "cond, uncond"),
        hook(580, 255, "on_predicted_x0"),
        box(690, 255, "x0", 60),
        box(860, 255, "moved x0", 110),
        hook(900, 410, "advance"),
        box(890, 480, "scheduler.step", 140),
        hook(250, 480, "after_step"),
        note(540, 500, "latents at the next noise level"),
    ]


def guides() -> list[str]:
    """The leaf split: each guide reads copies of its own, and one gradient goes back."""
    return [
        flow("M680 273 578 322"),
        flow("M687 273 652 322"),
        flow("M698 273 738 322"),
        box(560, 340, "step.x0", 72),
        box(645, 340, "step.rgb", 76),
        box(740, 340, "step.image", 92),
        note(752, 302, "decoder"),
        flow("M560 358 610 399"),
        flow("M645 358V399"),
        flow("M740 358 682 399"),
        hook(645, 414, "loss_guidance"),
        note(615, 445, "each guide on leaves of its own"),
        back("M701 414H838V359"),
        box(838, 340, "one move", 80),
        back("M838 322V275"),
        back("M668 273V298H290V275"),
        red(430, 316, 'where gradient = "latents":'),
        red(430, 332, "on through the UNet"),
        red(778, 434, "one gradient, at x0"),
    ]


def after() -> list[str]:
    """What happens once, at the end."""
    return [
        hook(262, 559, "teardown"),
        flow("M190 604H250"),
        flow("M328 604H388"),
        box(112, 604, "latents, no noise left", 156),
        box(290, 604, "VAE", 76),
        box(435, 604, "picture", 90),
    ]


def band(top: int, height: int, title: str, left: int = 22) -> str:
    """A part of the run."""
    return (
        f'<rect class="band" x="8" y="{top}" width="964" height="{height}" rx="8"/>\n'
        f'<text class="when" x="{left}" y="{top + 23}">{title}</text>'
    )


def box(x: int, y: int, text: str, width: int) -> str:
    """What the core does, or holds."""
    return (
        f'<rect class="box" x="{x - width / 2:g}" y="{y - 17}" width="{width}" height="34" '
        f'rx="4"/>\n<text x="{x}" y="{y + 5}">{text}</text>'
    )


def hook(x: int, y: int, name: str) -> str:
    """Where a plugin comes in."""
    width = LETTER * len(name) + 14
    return (
        f'<rect class="hook" x="{x - width / 2:g}" y="{y - 13}" width="{width:g}" height="26" '
        f'rx="13"/>\n<text class="name" x="{x}" y="{y + 4}">{name}</text>'
    )


def flow(path: str) -> str:
    """Values, forwards."""
    return f'<path class="flow" d="{path}"/>'


def back(path: str) -> str:
    """Gradients, backwards."""
    return f'<path class="back" d="{path}"/>'


def note(x: int, y: int, text: str) -> str:
    """A few words."""
    return f'<text class="note" x="{x}" y="{y}">{text}</text>'


def red(x: int, y: int, text: str) -> str:
    """A few words on a gradient."""
    return f'<text class="red" x="{x}" y="{y}">{text}</text>'


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
