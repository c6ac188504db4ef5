"""What tells networks of other weights apart, without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

SAMPLES = 16  # of a tensor
UNUSED = ("safety_checker", "image_encoder")  # parts that draw nothing
# What peft's layers keep of how strongly, and whether, an adapter counts.
ADAPTER = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")


class Fingerprint:
    """A hash of the weights of a pipeline's networks, as they are when it is called.

    Of each tensor: name, shape, number format and 16 values. It is the same on every device and in
    every memory layout; weights that are cast are others. Of tensors of a class of their own, as
    some quantised ones are, no values count. Adapters that are not fused count with their scales.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        # Where tensors lie, what is hashed of them beside values, and views of those, which see
        # what is changed in place. No other tensor can lie there while a view holds the memory.
        self._last: tuple[list[int], bytes, list[list[Tensor]]] = [], b"", []

    def __call__(self) -> str | None:
        """32 hexadecimal digits; None where weights are on no device, as offloading has it."""
        parts = self._pipeline.components.items()
        networks = {n: p for n, p in parts if isinstance(p, nn.Module) and n not in UNUSED}
        last, places = self._last, [*_places(networks.values())]
        if last[0] != places:
            tensors = dict(_tensors(networks))
            if any(tensor.is_meta for tensor in tensors.values()):
                return None
            last = self._last = places, _head(tensors), _views(tensors)
        told = hashlib.sha256(last[1])
        for views in last[2]:
            told.update(_bytes(views))
        for network in networks.values():
            told.update(_adapters(network))
        return told.hexdigest()[:32]


def _places(networks: Iterable[nn.Module]) -> Iterator[int]:
    for network in networks:
        for module in network.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                # Those of a class of their own may have no place.
                plain = type(tensor) in (Tensor, nn.Parameter)
                yield cast("Tensor", tensor).data_ptr() if plain else id(tensor)


def _tensors(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for part, network in networks.items():
        for name, tensor in network.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.numel():
                yield f"{part}.{name.replace('_orig_mod.', '')}", tensor  # of a compiled one


def _head(tensors: Mapping[str, Tensor]) -> bytes:
    return "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items()).encode()


def _views(tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Some values of each tensor, by network and number format."""
    groups: dict[Any, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if type(tensor) is Tensor:
            groups.setdefault((name.split(".")[0], tensor.dtype), []).append(_diagonal(tensor))
    return [*groups.values()]


def _diagonal(tensor: Tensor) -> Tensor:
    """Values at even distances, along all axes at once: of the longest at most `SAMPLES`."""
    count = min(SAMPLES, max(tensor.shape, default=1))
    step = sum(size // count * s for size, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((count,), (step,))


def _bytes(views: list[Tensor]) -> bytes:
    if len({view.device for view in views}) > 1:
        views = [view.cpu() for view in views]
    return torch.cat(views).view(torch.uint8).cpu().numpy().tobytes()


def _adapters(network: nn.Module) -> bytes:
    """How a network's LoRAs count, layer by layer."""
    layers = network.modules() if "peft_config" in vars(network) else ()
    kept = [[vars(m).get(name) for name in ADAPTER] for m in layers if ADAPTER[0] in vars(m)]
    return repr(kept).encode()
