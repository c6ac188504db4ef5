"""What all guides of a step share, `latents -> x0 -> rgb and image`, and the leaves they see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class SharedGraph:
    """What all guides of one step share: latents -> x0 -> rgb and image, each built at most once.

    Attributes:
        predicted: clean latents (B, C, H, W), with a graph to `latents` where that is given.
        decode: x0 -> image (B, 3, 8H, 8W).
        to_rgb: x0 -> rgb (B, 3, H, W).
        latents: the leaf that the graph of x0 starts from, if any guide's gradient goes there.
        x0: where guides see it; None is what was predicted.
        spans: of building.
    """

    predicted: Tensor
    decode: Callable[[Tensor], Tensor]
    to_rgb: Callable[[Tensor], Tensor]
    latents: Any = None
    x0: Tensor | None = None

    def __post_init__(self) -> None:
        x0 = self.predicted if self.x0 is None else self.x0
        self._nodes = {"x0": x0.detach().requires_grad_()}
        self.spans: list[Span] = []

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.predicted.device

    def shifted(self, offset: Tensor) -> SharedGraph:
        """The graph of this x0 plus a constant, over the same network."""
        return replace(self, x0=self._nodes["x0"].detach() + offset)

    def node(self, name: str) -> Tensor:
        """The graph's own value of that name, built on first use."""
        if name not in self._nodes:
            build = self.decode if name == "image" else self.to_rgb
            start = mark(self.device)
            with torch.enable_grad():
                self._nodes[name] = build(self._nodes["x0"])
            self.spans.append((start, mark(self.device)))
        return self._nodes[name]

    def to_x0(self, name: str, cotangent: Tensor, retain_graph: bool) -> Tensor:
        """Pull a gradient at one leaf back to x0: one vector-Jacobian product."""
        if name == "x0":
            return cotangent
        return _pull_back(self.node(name), self._nodes["x0"], cotangent, retain_graph)

    def to_latents(self, cotangent: Tensor, retain_graph: bool = False) -> Tensor:
        """Pull a gradient at x0 back to the latents, through the network."""
        return _pull_back(self.predicted, self.latents, cotangent, retain_graph)


def _pull_back(output: Tensor, source: Tensor, cotangent: Tensor, retain_graph: bool) -> Tensor:
    """A vector-Jacobian product, scaled per image to magnitude one on the way.

    It is linear in the cotangent, and powers of two are exact, so this changes nothing but saves a
    half-precision network from underflow: pixel gradients of a CLIP loss at 512 pixels lie below
    the smallest normal float16.
    """
    scale = power_of_two(cotangent.abs().amax(dim=(1, 2, 3), keepdim=True))
    (pulled,) = torch.autograd.grad(
        output, source, (cotangent * scale).to(output.dtype), retain_graph
    )
    return pulled.to(cotangent.dtype) / scale


def power_of_two(size: Tensor) -> Tensor:
    """What brings sizes >= 0 to about 1, exactly; 1 for 0."""
    mantissa, _ = size.frexp()
    power = torch.where(size > 0, mantissa / size, 1)  # exact: the quotient is a power of two
    return power.clamp(2.0**-120, 2.0**120)  # normal in float32


class Leaves:
    """The leaves that one guide has read: copies, so that what it changes nobody else sees."""

    def __init__(self, graph: SharedGraph) -> None:
        self._graph = graph
        self.read: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self.read:
            self.read[name] = self._graph.node(name).detach().clone().requires_grad_()
        return self.read[name]


# ---- how long a device takes for a part of its work, without waiting for it in between ----

Span = tuple[Any, Any]  # two marks


def mark(device: torch.device) -> Any:
    """This moment in what a device does: on CUDA, which works behind Python, not Python's own."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds(spans: Iterable[Span]) -> float:
    """The sum of spans that the device has done."""
    times = [
        end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        for start, end in spans
    ]
    return float(sum(times))
