"""A prompt for each region of the picture: the plugin `regions`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from pilotfish import Area, Conditioning, InputError, ModelError, Plugin, Setting, area_weights

if TYPE_CHECKING:
    from pilotfish import Embedding, Run, Step


class Regions(Plugin):
    """Give each region of the picture a prompt of its own; the run's prompt says the rest.

    The network's answers, those for the negative prompt too, are put together by the regions'
    masks, as in MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113, equation 5), from what it
    says to the box around each region, or to the whole picture. Or each place of the picture
    attends to its own region's prompt alone.
    """

    heading = "prompts"

    class Settings(Plugin.Settings):
        prompts: list[str] = Setting(
            min_length=1, description="a prompt for each region", examples=[["a cat", "a fox"]]
        )
        areas: list[Area] = Setting(
            title="a list of paths to pictures, or boxes [left, top, right, bottom]",
            description="where each is: a picture file, white there, or a box [left, top, right, "
            "bottom] in fractions of the picture; where some overlap, they share",
            examples=[[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]],
        )
        by: Literal["crop", "whole", "attention"] = Setting(
            "crop",
            description="crop: the network sees the box around a region, and draws what is asked "
            "for in it; whole: it sees the picture; attention: one call for all, for Stable "
            "Diffusion 1.x, 2.x and XL",
        )
        stop: float = Setting(
            1.0, ge=0, le=1, description="last moment; after it the run's prompt goes on alone"
        )

        @field_validator("areas")
        @classmethod
        def _one_for_each(cls, areas: list[Any], info: ValidationInfo) -> list[Any]:
            prompts = info.data.get("prompts", areas)
            if len(areas) != len(prompts):
                raise ValueError(f"as many areas as there are prompts, {len(prompts)}")
            return areas

    def setup(self, run: Run) -> Parts:
        uses = [table["use"].rpartition(":")[2].lower() for table in run.plugins]
        if uses.count("regions") > 1:
            raise InputError("regions is in this run twice; give one all prompts and areas")
        cells = run.model.latent_shape(run.height, run.width)[1:]
        areas = [
            area_weights(area, cells, what=f"Regions: areas[{index}]")
            for index, area in enumerate(self.settings.areas)
        ]
        sites = [site for site in run.model.sites if site.kind == "cross"]
        if self.settings.by == "attention" and not sites:
            raise ModelError(
                "regions: by='attention' needs attention from the picture to the text alone, which "
                "Stable Diffusion 1.x, 2.x and XL have, and this model has not; take by='crop'"
            )
        return Parts(run, shares(torch.cat(areas)[:, 0]).to(run.model.device), sites)

    def embedding_transform(
        self, embedding: Embedding, encode: Callable[[str], Embedding], state: Parts
    ) -> None:
        if embedding.stage == "prompt" and embedding.role == "positive":
            prompts = self.settings.prompts
            state.embeddings[embedding.encoder] = [encode(prompt) for prompt in prompts]

    def around_network(self, step: Step, state: Parts) -> AbstractContextManager[None] | None:
        if step.progress > self.settings.stop:
            return None
        told, own = step.conditioning["values"], step.embeddings
        # Of two halves the second is the prompt's; of one, it may be a call for another text.
        halves = len(told) == 2 * len(own)
        ours = len(own) if halves or torch.equal(told, own) else 0
        if self.settings.by == "attention":
            return state.attending(ours)
        return state.composed(ours, whole=self.settings.by == "whole")


def shares(areas: Tensor) -> Tensor:
    """What part of each cell is the rest's, and each area's: (1 + n, H, W), summing to 1.

    Args:
        areas: what part of each cell lies in each area, (n, H, W); they may overlap.
    """
    areas = areas / areas.sum(0).clamp(min=1)
    return torch.cat([(1 - areas.sum(0, keepdim=True)).clamp(min=0), areas])


def around(area: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is not 0 in (H, W).

    Even, since in some families two by two cells are one token.
    """
    edges = []
    for axis in (1, 0):
        there = area.any(axis).nonzero().flatten()
        first, last = int(there[0]) // 2 * 2, int(there[-1]) // 2 * 2 + 2
        edges += [first, min(last, area.shape[1 - axis])]
    top, bottom, left, right = edges
    return top, bottom, left, right


@dataclass
class Parts:
    """The regions of one run.

    Attributes:
        shares: the rest's and the regions' parts of each cell, (1 + n, H, W).
        sites: the network's attention to the text.
        embeddings: the regions' prompts, by text encoder.
    """

    run: Run
    shares: Tensor
    sites: Sequence[Any]
    embeddings: dict[str, list[Embedding]] = field(default_factory=dict)

    @cached_property
    def told(self) -> list[Conditioning]:
        """What the network is told in each region, for one image."""
        each = zip(*self.embeddings.values(), strict=True)
        return [self.run.model.condition(e, "positive", self.run) for e in each]

    @cached_property
    def views(self) -> tuple[bool, list[tuple[int, int, int, int]]]:
        """Whether the regions cover the whole picture, and the box around each."""
        rest, *parts = self.shares.cpu()  # once a run, not a wait for the device at each call
        return not rest.any(), [around(part) for part in parts]

    @contextmanager
    def composed(self, ours: int, *, whole: bool) -> Iterator[None]:
        """Within, the network's answer is put together from those for each region's prompt.

        Args:
            ours: how many images of the call, the last ones, are told the run's own prompt.
            whole: whether the network sees the whole picture for each region.
        """
        model, predict = self.run.model, self.run.model.predict
        (rest, *parts), (covered, boxes) = self.shares, self.views

        def composed(latents: Tensor, timestep: Any, told: Conditioning, **inputs: Any) -> Tensor:
            if inputs and not whole:
                raise InputError(
                    f"regions: by='crop' shows the network parts of the picture, and {[*inputs]} "
                    "of another plugin are for the whole; take by='whole' or by='attention'"
                )
            answer = torch.zeros_like(latents)
            if not covered:
                answer = rest.to(latents) * predict(latents, timestep, told, **inputs)
            for part, own, box in zip(parts, self.told, boxes, strict=True):
                height, width = part.shape
                top, bottom, left, right = (0, height, 0, width) if whole else box
                view = latents[:, :, top:bottom, left:right]
                said = predict(view, timestep, replaced(told, own, ours), **inputs)
                edges = (left, width - right, top, height - bottom)
                answer = answer + part.to(said) * pad(said, edges)
            return answer

        model.predict = composed  # of this run's own copy of the model
        try:
            yield
        finally:
            del model.predict

    @contextmanager
    def attending(self, ours: int) -> Iterator[None]:
        """Within, each place attends to its region's prompt.

        Args:
            ours: see `composed`.
        """
        before = [site.module.processor for site in self.sites]
        for site, processor in zip(self.sites, before, strict=True):
            site.module.processor = Masked(processor, self, ours)
        try:
            yield
        finally:
            for site, processor in zip(self.sites, before, strict=True):
                site.module.processor = processor

    def bias(self, ours: int, images: int, places: int, length: int) -> Tensor:
        """What is added to the attention's logits: (images, places, tokens of all prompts).

        Args:
            ours: see `composed`.
            places: of the picture, in this layer.
            length: T, of the run's own prompt.
        """
        height, width = self.shares.shape[1:]
        while height * width > places:  # a layer further down has half of both, rounded up
            height, width = -(-height // 2), -(-width // 2)
        there = adaptive_avg_pool2d(self.shares, (height, width)).flatten(1)  # (1 + n, places)
        plain = torch.eye(len(there), 1).to(there).expand_as(there)  # the run's own prompt alone
        lengths = [length, *(told["values"].shape[1] for told in self.told)]
        tokens = torch.arange(len(there)).repeat_interleave(torch.tensor(lengths))
        return torch.stack([plain] * (images - ours) + [there] * ours)[:, tokens].mT.log()


def replaced(told: Conditioning, own: Conditioning, ours: int) -> Conditioning:
    """What a call is told, with a region's prompt in the last images' place."""
    others = len(told["values"]) - ours
    if not ours:
        return told
    if not others:
        return own.expand(ours)
    rows = {name: tensor[:others] for name, tensor in told.tensors.items()}
    return Conditioning(rows).cat(own.expand(ours))


@dataclass
class Masked:
    """An attention processor of diffusers, which also sees the regions' prompts."""

    processor: Any
    parts: Parts
    ours: int

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        images, places, _ = hidden_states.shape
        told = [told["values"].expand(images, -1, -1) for told in self.parts.told]
        bias = self.parts.bias(self.ours, images, places, encoder_hidden_states.shape[1])
        values = torch.cat([encoder_hidden_states, *told], dim=1)
        answer: Tensor = self.processor(
            attn, hidden_states, values, bias.to(hidden_states), *args, **kwargs
        )
        return answer
