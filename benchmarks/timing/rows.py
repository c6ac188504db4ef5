"""The rows: the same pictures made in different ways, by diffusers, by hand and by pilotfish."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import handwritten
import torch
from handwritten import Loss, Work
from torch import Tensor

import pilotfish

Answer = tuple[Tensor | None, list[Any]]  # latents, if they are known, and pictures

PLUGINS = 8
SELDOM = 5  # a ratio of eight needs fewer rounds than one of 1.01
EXACT, CLOSE = 0.0, 1e-5  # of the largest latent; gradients are added up in another order
KERNELS = 1e-3  # the same where other kernels compute it
HALF = 0.05  # the same in half precision, where each sum is rounded to three digits or fewer

WARM = ((1.0, 0.8, 0.5), (0.8, 0.3, 0.1), (0.2, 0.1, 0.1), (0.9, 0.6, 0.2))
COLD = ((0.9, 1.0, 1.0), (0.2, 0.5, 0.8), (0.0, 0.1, 0.3), (0.5, 0.8, 0.9))


@dataclass(frozen=True)
class Row:
    """One way of making the pictures.

    Attributes:
        same_as: the row whose latents it must give.
        tolerance: how far they may lie apart, as a part of the largest latent.
        every: timed in every n-th round only, because it takes long.
        steady: whether each of its steps costs the same.
        timed: False for a row that is only compared with.
        counted: whether operations and calls can be counted; not in compiled networks.
    """

    what: str
    run: Callable[[Work], Answer]
    same_as: str | None = None
    tolerance: float = EXACT
    every: int = 1
    steady: bool = True
    timed: bool = True
    counted: bool = True


class Idle(pilotfish.Plugin):
    """Implements every hook of a step and does nothing."""

    def before_step(self, step: pilotfish.Step) -> None:
        """Unchanged."""

    def network_inputs(self, inputs: Mapping[str, Any], step: pilotfish.Step) -> None:
        """Unchanged."""

    def around_network(self, step: pilotfish.Step) -> None:
        """Nothing."""

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: pilotfish.Step
    ) -> None:
        """Unchanged."""

    def on_predicted_x0(self, x0: Tensor, step: pilotfish.Step) -> None:
        """Unchanged."""

    def advance(self, step: pilotfish.Step) -> None:
        """The core's answer."""

    def after_step(self, step: pilotfish.Step) -> None:
        """Nothing."""

    def resample(self, step: pilotfish.Step) -> None:
        """Every image goes on in its own place."""


@dataclass
class Bench:
    """A pipeline, and what it is guided by.

    Attributes:
        losses: eight of one CLIP, with targets of their own.
        tiny: folder of a tiny decoder, for the rows that use one.
        large: one of a larger CLIP, if there is any.
    """

    pipeline: Any
    losses: Sequence[Loss]
    tiny: str = ""
    large: Loss | None = None

    @cached_property
    def sampler(self) -> pilotfish.Sampler:
        return pilotfish.Sampler.from_pipeline(self.pipeline)

    @property
    def network(self) -> Any:
        """The UNet or transformer."""
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer

    @property
    def tolerance(self) -> float:
        return CLOSE if self.network.dtype == torch.float32 else HALF

    def latents(self, work: Work) -> Tensor:
        """Its own pipeline's, (B, C, H, W)."""
        return handwritten.of(self.pipeline, work).cells(self.diffusers(work, "latent"))

    def diffusers(self, work: Work, output_type: str = "pil") -> Any:
        """Its own pipeline's answer: pictures, or latents as it has them."""
        seeds = range(work.seed, work.seed + work.batch)
        return self.pipeline(
            work.prompt,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance_scale,
            num_images_per_prompt=work.batch,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type=output_type,
        ).images

    def ours(self, work: Work, *plugins: Any, **options: Any) -> Answer:
        """Our loop."""
        result = self.sampler(
            work.prompt,
            plugins=plugins,
            steps=work.steps,
            guidance_scale=work.guidance_scale,
            num_images=work.batch,
            seed=work.seed,
            **{"preset": "deep-dive", "checkpointing": "off", **options},
        )
        return result.latents, result.images

    def guided(
        self,
        work: Work,
        losses: Sequence[Loss],
        end: str = "latents",
        every: int = 1,
        **options: Any,
    ) -> Answer:
        """Our loop with a guide for each loss."""
        settings = {"scale": work.scale, "gradient": end, "every": every}
        guides = [guide_of(loss, **settings) for loss in losses]
        return self.ours(work, *guides, **options)

    def by_hand(self, work: Work, losses: Sequence[Loss], gradient: Any) -> Answer:
        """The hand-written loop."""
        return handwritten.guided(self.pipeline, work, losses, gradient)


def guide_of(loss: Loss, **settings: Any) -> pilotfish.Guide:
    """A guide with that loss on the picture."""
    return pilotfish.guide(lambda step: loss(step.image), **settings)


def unguided(bench: Bench) -> dict[str, Row]:
    """Without a guide, all of them the same pictures to the bit."""
    idle = [Idle() for _ in range(PLUGINS)]
    none = pilotfish.guide(lambda step: None, gradient="x0")
    return {
        "U0": Row(
            f"diffusers' {type(bench.pipeline).__name__}",
            lambda work: (None, bench.diffusers(work)),
        ),
        "U0 latents": Row("its latents", lambda work: (bench.latents(work), []), timed=False),
        "U1": Row("pilotfish, no plugins", bench.ours, "U0 latents"),
        "U2": Row(
            "hand-written, network and scheduler.step",
            lambda work: handwritten.unguided(bench.pipeline, work),
            "U0 latents",
        ),
        "S": Row(
            "no step: prompts encoded, pictures decoded",
            lambda work: handwritten.outside(bench.pipeline, work),
        ),
        "O0": Row(
            f"{PLUGINS} plugins that do nothing",
            lambda work: bench.ours(work, *idle),
            "U0 latents",
        ),
        "None": Row("a guide that answers None", lambda work: bench.ours(work, none), "U0 latents"),
    }


def guided(bench: Bench, counts: Sequence[int]) -> dict[str, Row]:
    """So many CLIP guides, the gradient taken exactly, through decoder and UNet."""
    rows = {}
    for count in counts:
        losses = bench.losses[:count]
        rows[f"H{count}"] = Row(
            f"hand-written, {_guides(count)}, losses summed",
            lambda work, losses=losses: bench.by_hand(work, losses, handwritten.summed),
        )
        rows[f"O{count}"] = Row(
            f"pilotfish, {_guides(count)}",
            lambda work, losses=losses: bench.guided(work, losses),
            f"H{count}",
            bench.tolerance,
        )
    return rows


def stacked(bench: Bench, counts: Sequence[int]) -> dict[str, Row]:
    """What several guides cost where they do not share."""
    rows = {}
    for count in counts:
        losses = bench.losses[:count]
        for letter, gradient, what in (
            ("R", handwritten.retained, "one graph, a backward each"),
            ("N", handwritten.textbook, "a graph each"),
        ):
            rows[f"{letter}{count}"] = Row(
                f"hand-written, {_guides(count)}, {what}",
                lambda work, g=gradient, losses=losses: bench.by_hand(work, losses, g),
                f"H{count}",
                bench.tolerance,
                every=SELDOM if count > 3 else 1,
            )
    return rows


def variants(bench: Bench) -> dict[str, Row]:
    """Cheaper and dearer ways to guide."""
    one, three = bench.losses[:1], bench.losses[:3]
    mixed = [handwritten.color(), handwritten.palette(WARM), bench.losses[0]]
    rgb = [
        pilotfish.guide(lambda step: (step.rgb[:, 2] - 0.9).abs().mean(dim=(1, 2)), gradient="x0")
    ]

    def ours(losses: Sequence[Loss], **options: Any) -> Callable[[Work], Answer]:
        return lambda work: bench.guided(work, losses, **options)

    def by_hand(losses: Sequence[Loss], gradient: Any) -> Callable[[Work], Answer]:
        return lambda work: bench.by_hand(work, losses, gradient)

    close = bench.tolerance
    rows = {
        "H1 x0": Row("hand-written, gradient at x0", by_hand(one, handwritten.summed_at_x0)),
        "O1 x0": Row("gradient at x0", ours(one, end="x0"), "H1 x0", close),
        "O3 x0": Row("3 guides, gradient at x0", ours(three, end="x0")),
        "O1 every 2": Row("on every 2nd step", ours(one, every=2), steady=False),
        "O1 every 5": Row("on every 5th step", ours(one, every=5), steady=False),
        "O1 tiny": Row("tiny decoder", ours(one, decoder=f"tiny:{bench.tiny}")),
        "O1 x0 tiny": Row(
            "tiny decoder, gradient at x0", ours(one, end="x0", decoder=f"tiny:{bench.tiny}")
        ),
        "O1 linear": Row("linear decoder", ours(one, decoder="linear")),
        "O1 x0 linear": Row(
            "linear decoder, gradient at x0", ours(one, end="x0", decoder="linear")
        ),
        "O1 checkpointed": Row("checkpointing", ours(one, checkpointing="on"), "O1", close),
        "O3 balanced": Row("3 guides, the default preset", ours(three, preset="balanced")),
        "H3 mixed": Row(
            "hand-written, colour, palette and CLIP", by_hand(mixed, handwritten.summed)
        ),
        "O3 mixed": Row("colour, palette and CLIP", ours(mixed), "H3 mixed", close),
        "O1 rgb": Row("a colour guide on step.rgb", lambda work: bench.ours(work, *rgb)),
    }
    if bench.large is not None:
        rows["O1 large"] = Row("ViT-L-14 as guide", ours([bench.large]))
    return rows


def compiled(bench: Bench) -> dict[str, Row]:
    """The UNet through torch.compile, for everybody; two graphs, one of them with gradients."""
    unet = copy.copy(bench.pipeline.unet)  # compiled apart, with the same weights
    unet.compile()
    return _again(bench, "compiled", unet=unet)


def channels_last(bench: Bench) -> dict[str, Row]:
    """UNet and VAE with their channels last in memory."""
    networks = {name: getattr(bench.pipeline, name) for name in ("unet", "vae")}
    format = torch.channels_last
    changed = {name: copy.deepcopy(n).to(memory_format=format) for name, n in networks.items()}
    return _again(bench, "channels last", **changed)


def _again(bench: Bench, how: str, **networks: Any) -> dict[str, Row]:
    """The main rows with other networks, under names of their own.

    Without a guide they are the same among themselves to the bit. With one, those by hand and
    checkpointed are the same as with the networks as they were, to the rounding of other kernels.
    """
    parts = {**bench.pipeline.components, **networks}
    pipeline = type(bench.pipeline)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    other = Bench(pipeline, bench.losses)
    rows = {**unguided(other), **guided(other, [1]), **variants(other)}
    again = {}
    for name in ("U0", "U0 latents", "U1", "H1", "O1", "O1 checkpointed"):
        row = rows[name]
        twin = {"H1": "H1", "O1 checkpointed": "O1"}.get(name) or f"{row.same_as} {how}"
        again[f"{name} {how}"] = replace(
            row,
            what=f"{row.what}, {how}",
            same_as=twin if row.same_as or name == "H1" else None,
            tolerance=max(bench.tolerance, KERNELS) if row.tolerance or name == "H1" else EXACT,
            counted=False,
        )
    return again


def _guides(count: int) -> str:
    return "1 guide" if count == 1 else f"{count} guides"


def rows_of(bench: Bench, names: Sequence[str]) -> dict[str, Row]:
    """The rows of those names, and those that they must be the same as.

    Raises:
        ValueError: there is no such row.
    """
    counts = sorted({int(name[1:]) for name in names if name[1:].isdigit()} - {0} | {1})
    rows = {**unguided(bench), **guided(bench, counts), **stacked(bench, counts), **variants(bench)}
    for how, again in (("compiled", compiled), ("channels last", channels_last)):
        if any(name.endswith(how) for name in names):
            rows |= again(bench)
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"no rows {missing}; there are: {', '.join(rows)}")
    if bench.network.dtype == torch.float16:  # by hand, pixel gradients of a CLIP vanish
        by_hand = {n: r for n, r in rows.items() if r.same_as and r.same_as.startswith("H")}
        rows |= {name: replace(row, same_as=None) for name, row in by_hand.items()}
    twins = {rows[name].same_as for name in names} | {"U0 latents"}
    return {
        name: row if name in names else replace(row, timed=False, same_as=None)
        for name, row in rows.items()
        if name in names or name in twins
    }
