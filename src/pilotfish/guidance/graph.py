"""What all guides of a step share, `latents -> x0 -> rgb and image`, and the leaves they see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SharedGraph:
    """What all guides of one step share: latents -> x0 -> rgb and image, each built at most once.

    Args:
        x0: predicted clean latents (B, C, H, W), with a graph to `latents` where that is given.
        decode: x0 -> image (B, 3, 8H, 8W).
        to_rgb: x0 -> rgb (B, 3, H, W).
        latents: the leaf that the graph of x0 starts from, if any guide's gradient goes there.
    """

    def __init__(
        self,
        x0: Tensor,
        decode: Callable[[Tensor], Tensor],
        to_rgb: Callable[[Tensor], Tensor],
        latents: Tensor | None = None,
    ) -> None:
        self._predicted, self._latents = x0, latents
        self._x0 = x0.detach().requires_grad_()
        self._build = {"x0": lambda x0: x0, "rgb": to_rgb, "image": decode}
        self._nodes: dict[str, Tensor] = {}
        self.spans: list[Span] = []  # of building

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._x0.device

    def shifted(self, offset: Tensor) -> SharedGraph:
        """The graph of this x0 plus a constant, over the same network."""
        other = SharedGraph(self._x0.detach() + offset, self._build["image"], self._build["rgb"])
        other._predicted, other._latents = self._predicted, self._latents
        return other

    def node(self, name: str) -> Tensor:
        """The graph's own value of that name, built on first use."""
        if name not in self._nodes:
            start = mark(self.device)
            with torch.enable_grad():
                self._nodes[name] = self._build[name](self._x0)
            self.spans.append((start, mark(self.device)))
        return self._nodes[name]

    def to_x0(self, name: str, cotangent: Tensor, retain_graph: bool) -> Tensor:
        """Pull a gradient at one leaf back to x0: one vector-Jacobian product."""
        if name == "x0":
            return cotangent
        return _pull_back(self.node(name), self._x0, cotangent, retain_graph)

    def to_latents(self, cotangent: Tensor) -> Tensor:
        """Pull a gradient at x0 back to the latents, through the network."""
        if self._latents is None:
            raise ValueError("this graph's x0 has no graph to the latents")
        return _pull_back(self._predicted, self._latents, cotangent, retain_graph=False)


def _pull_back(output: Tensor, source: Tensor, cotangent: Tensor, retain_graph: bool) -> Tensor:
    """A vector-Jacobian product, scaled per image to magnitude one on the way.

    It is linear in the cotangent, and powers of two are exact, so this changes nothing but saves a
    half-precision network from underflow: pixel gradients of a CLIP loss at 512 pixels lie below
    the smallest normal float16.
    """
    largest = cotangent.abs().amax(dim=(1, 2, 3), keepdim=True)
    mantissa, _ = largest.frexp()
    power = torch.where(largest > 0, mantissa / largest, 1)  # exact: the quotient is a power of two
    scale = power.clamp(2.0**-120, 2.0**120)  # normal in float32
    (pulled,) = torch.autograd.grad(
        output, source, (cotangent * scale).to(output.dtype), retain_graph
    )
    return pulled.to(cotangent.dtype) / scale


class Leaves:
    """The leaves that one guide has read: fresh, detached, and its own."""

    def __init__(self, graph: SharedGraph) -> None:
        self._graph = graph
        self.read: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self.read:
            self.read[name] = self._graph.node(name).detach().requires_grad_()
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
    return sum(_between(start, end) for start, end in spans)


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000  # CUDA's milliseconds
