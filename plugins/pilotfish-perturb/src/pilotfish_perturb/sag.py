"""A picture that is blurred where attention is: the plugin `sag`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pilotfish import Conditioning, Setting, at_least_float32

from .attention import Attention, attending
from .blur import blurred, grid
from .layers import Layer, Perturbed

if TYPE_CHECKING:
    from pilotfish import Run, Step


@dataclass
class Looks:
    """What the network looked at in a step.

    Attributes:
        calls: of its calls, in order, what it was told, and how much attention each image token got
            in each layer: (N, tokens), 1 on average.
    """

    layers: tuple[Layer, ...]
    calls: list[tuple[Conditioning, list[Tensor]]] = field(default_factory=list)


class Sag(Perturbed):
    """Lead away from what is predicted where the picture is blurred at its salient parts.

    Hong et al. 2023, "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance",
    arXiv 2210.00939: x0 is blurred where the tokens get more attention than on average, noised with
    its own noise, and predicted from again; `StableDiffusionSAGPipeline` of diffusers. Under
    classifier-free guidance both predictions are those for the negative prompt (equation 25).
    We differ: attention may be that of several layers, averaged, and is counted among image tokens
    where those see the text too.
    """

    class Settings(Perturbed.Settings):
        scale: float = Setting(0.75, description="strength; 0 is off, below 0 leads to the blurred")
        blur: float = Setting(
            1.0, gt=0, description="standard deviation of the blur, in cells of the latents"
        )
        threshold: float = Setting(
            1.0, ge=0, description="the attention above which a token is blurred; 1 is the average"
        )

    def setup(self, run: Run) -> Looks:
        return Looks(super().setup(run))

    def before_step(self, state: Looks) -> None:
        state.calls.clear()

    def around_network(self, step: Step, state: Looks) -> AbstractContextManager[Any] | None:
        # The step's own calls come first, before those that plugins ask for.
        if not self._acts(step) or len(state.calls) == own_calls(step.run):
            return None
        received: list[Tensor] = []
        state.calls.append((step.conditioning, received))
        return attending(state.layers, partial(watched, received.append))

    def combine_predictions(
        self, prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: Step, state: Looks
    ) -> Tensor | None:
        if not self._acts(step):
            return None
        count, own = len(cond), cond if uncond is None else uncond
        told, received = state.calls[-1]  # the negative prompt's half is first, or its call last
        looks = [look[:count] for look in received]
        x0 = step.to_x0(own)
        salient = mean_look(looks, (x0.shape[2], x0.shape[3])) > self.settings.threshold
        blur: float = self.settings.blur
        offset = step.alpha * salient * (blurred(x0, blur, round(4 * blur)) - x0)
        told = Conditioning({name: tensor[:count] for name, tensor in told.tensors.items()})
        scale: float = self.settings.scale
        return prediction + scale * (own - step.predict(told, offset=offset))


def own_calls(run: Any) -> int:
    """How often a step asks the network by itself."""
    return 1 if run.cfg_scale is None or run.model.together else 2


def watched(keep: Callable[[Tensor], None], attention: Attention, image: slice) -> Tensor:
    """Attention as it is, with how much of it each image token got from all, 1 on average."""
    with torch.no_grad():
        query, key = (at_least_float32(t[:, :, image]) for t in (attention.query, attention.key))
        scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        heads = zip(query.unbind(1), key.unbind(1), strict=True)  # (B, N, D) each, to save memory
        got = [(q @ k.mT * scale).softmax(dim=-1).sum(dim=1) for q, k in heads]
        keep(torch.stack(got).mean(dim=0))  # (B, N)
    return attention.output()


def mean_look(looks: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Attention that tokens got, (B, tokens) a layer, over latents (H, W): (B, 1, H, W)."""
    maps = [look.reshape(-1, 1, *grid(look.shape[1], size)) for look in looks]
    return torch.stack([interpolate(m, size) for m in maps]).mean(dim=0)
