"""Networks that judge pictures: frozen, shared, and shown what they were trained on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pilotfish import at_least_float32, cutouts

# Of the pictures that OpenAI's CLIP was trained on (Radford et al. 2021); LAION's and BLIP's
# descendants kept the numbers.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF_SCALE = 2.0**10  # on gradients inside a float16 network: a pixel's is small, and vanishes

N = TypeVar("N")


@dataclass(frozen=True)
class Looks:
    """How a network wants its pictures.

    Attributes:
        size: (height, width).
        fit: of pictures of another shape: the middle is cut out ("crop"), black is put beside them
            ("pad"), or they are squeezed ("squash").
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    fit: Literal["crop", "pad", "squash"] = "crop"
    kernel: Literal["bilinear", "bicubic"] = "bicubic"

    def shown(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [0, 1] -> (B, 3, *size), normalised; differentiable."""
        height, width = images.shape[2:]
        if self.fit == "crop":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            images = images[:, :, top : top + side, left : left + side]
        if self.fit == "pad":
            images = letterboxed(images, self.size[0], self.kernel)
        else:
            images = resized(images, self.size, self.kernel)
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def resized(
    images: Tensor, size: tuple[int, int], kernel: Literal["bilinear", "bicubic"]
) -> Tensor:
    """Images (B, C, *size), antialiased, with a gradient that is deterministic on every device."""
    return cutouts(images, size, 0, [], smallest=1.0, kernel=kernel)[:, 0]


def letterboxed(images: Tensor, side: int, kernel: Literal["bilinear", "bicubic"]) -> Tensor:
    """Images as large as they fit into a square, in the middle of black: (B, C, side, side)."""
    scale = side / max(images.shape[2:])
    height, width = (round(length * scale) for length in images.shape[2:])
    top, left = (side - height) // 2, (side - width) // 2
    inner = resized(images, (height, width), kernel)
    return pad(inner, (left, side - width - left, top, side - height - top))


class Network:
    """A network on a device, frozen; guides that use the same one share it.

    Args:
        dtype: of its layers; what comes out is at least float32.
    """

    def __init__(
        self, module: nn.Module, looks: Looks, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module: Any = module.to(device, dtype).eval().requires_grad_(False)
        self.looks, self.device, self.dtype = looks, device, dtype

    def see(self, images: Tensor, judge: Callable[[Tensor], Tensor]) -> Tensor:
        """What `judge` makes of images (B, 3, H, W), in about [0, 1]; differentiable.

        Args:
            judge: gets the images as the network wants them, in its dtype.
        """
        pixels = self.looks.shown(images)
        answer = at_least_float32(judge(pixels.to(self.dtype)))
        if self.dtype == torch.float16 and answer.requires_grad:
            # A power of two: what comes out is the same gradient, unless it had vanished.
            answer.register_hook(lambda g: g * HALF_SCALE)  # type: ignore[no-untyped-call]
            pixels.register_hook(lambda g: g / HALF_SCALE)  # type: ignore[no-untyped-call]
        return answer


def wide(dtype: torch.dtype) -> torch.dtype:
    """That of small layers behind a network: at least float32."""
    return torch.promote_types(dtype, torch.float32)


# Networks live as long as a run that uses them.
_loaded: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_loading = threading.Lock()


def shared(key: tuple[Any, ...], make: Callable[[], N]) -> N:
    """The network of that name, made once however many guides use it at the same time.

    A library may draw weights before it reads them: torch's own generator stays as it was.
    """
    with _loading:
        network = _loaded.get(key)
        if network is None:
            with torch.random.fork_rng(devices=[]):
                network = _loaded[key] = make()
    return cast("N", network)
