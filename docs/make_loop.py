"""Draws docs/loop.svg, the sampling loop with every hook in it: `python docs/make_loop.py`."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("loop.svg")
LETTER = 7.3  # the width of a letter of a hook's name, in pixels

HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 716"
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
.stage { fill: #fff; stroke: #d5dce2 }
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
<rect width="980" height="716" fill="#fff"/>"""


def page() -> str:
    """The whole picture."""
    stages = [*begin(), *predict(), *guide(), *advance()]
    parts = [HEAD, *bands(), *before(), *stages, *after(), "</svg>"]
    return "\n".join(parts) + "\n"


def bands() -> list[str]:
    """The parts of the run and of a step, behind everything else."""
    return [
        band(8, 150, "Once, before the first step"),
        band(166, 442, "At each step", left=150),
        band(616, 92, "Once, after the last step"),
        stage(18, 200, 262, 146, "begin", left=78),
        stage(288, 200, 674, 146, "predict", left=296),
        stage(288, 354, 674, 144, "guide", left=296),
        stage(18, 506, 944, 94, "advance", left=78),
    ]


def before() -> list[str]:
    """What happens once: words become conditioning, and the run gets a start."""
    return [
        hook(262, 27, "setup"),
        flow("M110 70H252"),
        flow("M338 70H510"),
        flow("M610 70H782"),
        flow("M295 118V89"),
        flow("M835 88V191H254V225"),
        flow("M66 136V261"),
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
        box(66, 120, "noise", 70),
        hook(72, 176, "start_latents"),
    ]


def begin() -> list[str]:
    """The step as the network will find it."""
    return [
        flow("M262 240H300V270H341"),
        flow("M104 290H129"),
        flow("M225 290H341"),
        hook(185, 240, "embedding_transform"),
        box(66, 280, "latents", 76),
        hook(178, 290, "before_step"),
        note(185, 330, "conditioning may change"),
    ]


def predict() -> list[str]:
    """The network's calls, and x0."""
    return [
        flow("M410 241V257"),
        flow("M467 280H481"),
        flow("M637 280H652"),
        flow("M778 280H789"),
        back("M800 297V338H404V328"),
        hook(410, 228, "network_inputs"),
        flow("M500 228 457 257"),
        hook(566, 228, "further_prediction"),
        around(404, 257, 326, "around_network"),
        box(404, 280, "UNet", 76),
        hook(560, 280, "combine_predictions"),
        note(560, 258, "cond, uncond"),
        note(560, 312, "step.predict: another call"),
        hook(716, 280, "on_predicted_x0"),
        box(815, 280, "x0", 48),
    ]


def guide() -> list[str]:
    """The leaf split: each guide reads copies of its own, and one gradient goes back."""
    return [
        flow("M806 297 588 369"),
        flow("M812 297 664 369"),
        flow("M818 297 754 369"),
        flow("M839 280H905V369"),
        flow("M288 440H90V299"),
        note(185, 460, "with recurrence:"),
        note(185, 476, "noise is put back"),
        red(440, 378, 'where gradient = "latents":'),
        red(440, 394, "on through the UNet"),
        box(570, 388, "step.x0", 72),
        box(655, 388, "step.rgb", 76),
        box(750, 388, "step.image", 92),
        note(815, 352, "decoder"),
        flow("M570 406 620 441"),
        flow("M655 406V441"),
        flow("M750 406 692 441"),
        hook(655, 456, "loss_guidance"),
        note(655, 487, "each guide on leaves of its own"),
        back("M711 456H802"),
        red(757, 474, "one gradient"),
        box(842, 456, "one move", 76),
        back("M882 456H900V407"),
        box(905, 388, "moved x0", 90),
    ]


def advance() -> list[str]:
    """What is left of the noise, and what plugins make of the result."""
    return [
        flow("M930 406V556"),
        flow("M825 575H66V299"),
        hook(915, 528, "advance"),
        box(890, 575, "scheduler.step", 130),
        note(740, 566, "latents at the next level"),
        hook(570, 575, "after_step"),
        hook(350, 575, "resample"),
    ]


def after() -> list[str]:
    """What happens once, at the end."""
    return [
        hook(262, 635, "teardown"),
        flow("M190 680H250"),
        flow("M328 680H388"),
        box(112, 680, "latents, no noise left", 156),
        box(290, 680, "VAE", 76),
        box(435, 680, "picture", 90),
    ]


def band(top: int, height: int, title: str, left: int = 22) -> str:
    """A part of the run."""
    return (
        f'<rect class="band" x="8" y="{top}" width="964" height="{height}" rx="8"/>\n'
        f'<text class="when" x="{left}" y="{top + 23}">{title}</text>'
    )


def stage(x: int, y: int, width: int, height: int, name: str, left: int) -> str:
    """A stage of a step, as the loop calls it."""
    return (
        f'<rect class="stage" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>\n'
        f'<text class="when" x="{left}" y="{y + 18}">{name}</text>'
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


def around(x: int, top: int, bottom: int, name: str) -> str:
    """Where a plugin puts something around what the core does."""
    width = LETTER * len(name) + 22
    return (
        f'<rect class="hook" x="{x - width / 2:g}" y="{top}" width="{width:g}" '
        f'height="{bottom - top}" rx="13"/>\n'
        f'<text class="name" x="{x}" y="{bottom - 9}">{name}</text>'
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
