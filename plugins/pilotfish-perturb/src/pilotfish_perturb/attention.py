"""Attention that is worse: the plugins `pag` and `seg`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pilotfish import ModelError, Setting

from .blur import blurred, grid
from .layers import Layer, Weakened, shadowed

if TYPE_CHECKING:
    from pilotfish import Step


class Pag(Weakened):
    """Lead away from a network whose image tokens see only themselves: perturbed attention.

    Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv
    2403.17377: the self-attention map is the identity. Where image and text tokens see each other,
    every image token sees itself and the text, and the text sees all, as in diffusers'
    `StableDiffusion3PAGPipeline`; we differ in that queries and keys are normalised there too.
    """

    def _patch(
        self, step: Step, state: tuple[Layer, ...], images: slice
    ) -> AbstractContextManager[Any]:
        return attending(state, own_token, images)


class Seg(Weakened):
    """Lead away from a network that looks around without aim: smoothed energy guidance.

    Hong 2024, "Smoothed Energy Guidance", arXiv 2408.00760: queries are blurred, which is to blur
    the attention map's logits. The image tokens' queries alone, as attention gets them: after norms
    and positions. diffusers' guider blurs text tokens along, takes the mean of all where a blur is
    asked for, and the other way round.
    """

    class Settings(Weakened.Settings):
        blur: float | None = Setting(
            None,
            gt=0,
            description="standard deviation of the blur, in tokens; where not given without end: "
            "all queries are their mean",
        )

    def _patch(
        self, step: Step, state: tuple[Layer, ...], images: slice
    ) -> AbstractContextManager[Any]:
        height, width = step.latents.shape[2:]
        return attending(state, partial(smoothed, self.settings.blur, (height, width)), images)


@dataclass(frozen=True)
class Attention:
    """One call of torch's attention, by the names of its arguments.

    Attributes:
        query, key, value: (B, heads, tokens, D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def output(self) -> Tensor:
        """What torch makes of it, (B, heads, tokens, D)."""
        return scaled_dot_product_attention(**vars(self))

    def of(self, images: slice) -> Attention:
        """That of some images alone."""
        mask, count = self.attn_mask, len(self.query)
        if mask is not None and mask.dim() == 4 and len(mask) == count:
            mask = mask[images]
        query, key, value = (t[images] for t in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, attn_mask=mask)


# What stands in for `Attention.output`; it is told which of the tokens are the image's.
Attend = Callable[[Attention, slice], Tensor]


def own_token(attention: Attention, image: slice) -> Tensor:
    """Image tokens see themselves and the text, text tokens see all."""
    tokens = attention.query.shape[2]
    if image == slice(0, tokens):
        return attention.value
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=attention.query.device)
    seen[image, image] = torch.eye(image.stop - image.start, dtype=torch.bool, device=seen.device)
    mask = attention.attn_mask
    if mask is not None:
        seen = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
    return replace(attention, attn_mask=seen).output()


def smoothed(
    blur: float | None, size: tuple[int, int], attention: Attention, image: slice
) -> Tensor:
    """Attention whose image tokens' queries are blurred.

    Args:
        blur: standard deviation in tokens; None is their mean.
        size: (H, W) of the latents.
    """
    query = attention.query[:, :, image]  # (B, heads, N, D)
    if blur is None:
        query = query.mean(dim=2, keepdim=True).expand_as(query)
    else:
        maps = query.mT.reshape(*query.mT.shape[:3], *grid(query.shape[2], size))
        # The paper's kernel has the whole number of tokens next to six deviations that is odd.
        query = blurred(maps, blur, math.ceil(6 * blur) // 2).flatten(-2).mT
    before, after = attention.query[:, :, : image.start], attention.query[:, :, image.stop :]
    return replace(attention, query=torch.cat([before, query, after], dim=2)).output()


def attending(
    layers: Iterable[Layer], attend: Attend, images: slice = slice(None)
) -> AbstractContextManager[None]:
    """Another attention in these layers' own place, for some images of a call, for a while."""
    some = partial(for_images, images, attend)
    sites = [site for layer in layers for site in layer.sites]
    return shadowed({site.module: Processor(site, some) for site in sites}, "processor")


def for_images(images: slice, attend: Attend, attention: Attention, tokens: slice) -> Tensor:
    """What `attend` makes of these images, and of the others what torch does."""
    start, stop, _ = images.indices(len(attention.query))
    some = attend(attention.of(slice(start, stop)), tokens)
    if stop - start == len(attention.query):
        return some
    others = [attention.of(i).output() for i in (slice(0, start), slice(stop, None))]
    return torch.cat([others[0], some, others[1]])


class Processor:
    """An attention processor that is the module's own, but for torch's attention in it.

    Norms, positions and the order of tokens stay the family's own business.
    """

    def __init__(self, site: Any, attend: Attend) -> None:
        self._site, self._attend, self._own = site, attend, site.module.processor
        vars(self)["__call__"] = self._own.__call__  # diffusers reads its parameters there

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with Interception(self._site, self._attend, hidden_states.shape[1]) as interception:
            output = self._own(attn, hidden_states, *args, **kwargs)
        if not interception.met:
            raise ModelError(
                f"{self._site.name} attends by {type(self._own).__name__}; expected a processor "
                "that calls torch's scaled_dot_product_attention with all tokens. Set diffusers' "
                "AttnProcessor2_0, or the attention backend 'native'"
            )
        return output


class Interception(TorchFunctionMode):
    """Torch's attention is another, among the tokens of a module and the text that comes apart.

    Args:
        count: of the module's `hidden_states`.

    Attributes:
        met: whether it was called.
    """

    def __init__(self, site: Any, attend: Attend, count: int) -> None:
        super().__init__()
        self._site, self._attend, self._count, self.met = site, attend, count, False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        attention = Attention(*args, **(kwargs or {}))
        tokens, keys = attention.query.shape[2], attention.key.shape[2]
        apart = tokens > self._count and self._site.kind == "joint"
        if tokens != keys or not (apart or tokens == self._count):  # of an adapter's tokens
            return attention.output()
        self.met = True
        first = tokens - self._count if apart and self._site.text_first else 0
        image = range(first, first + self._count)[self._site.image]
        return self._attend(attention, slice(image.start, image.stop))
