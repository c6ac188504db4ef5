"""Image classifiers of transformers and timm: loaded once, frozen; and how to find a class."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pilotfish import ModelError, SettingsError

TIMM = "timm:"
SHOWN = 8  # names in an error
HALF_SCALE = 2.0**10  # on gradients inside a float16 classifier: a pixel's is small, and vanishes


@dataclass(frozen=True)
class Source:
    """A classifier as its library gives it.

    Attributes:
        logits: normalised pictures (B, 3, *size) -> (B, classes).
        size: (height, width).
        labels: the classes' names, in order; empty if they have none.
    """

    module: torch.nn.Module
    logits: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    labels: list[str]


class Network:
    """A classifier on a device, frozen; guides that use the same one share it.

    Args:
        name: a folder or hub id for transformers, or `timm:NAME`.
        dtype: of its layers; what comes out is float32.

    Raises:
        ModelError: it cannot be loaded, or is no classifier.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        library, read = ("timm", _timm) if name.startswith(TIMM) else ("transformers", _hugging)
        try:
            with torch.random.fork_rng(devices=[]):  # a library may draw weights before it reads
                source = read(name.removeprefix(TIMM), dtype)
        except Exception as error:  # whatever a loader of foreign files raises
            raise ModelError(f"{library} cannot load the classifier {name}: {error}") from error
        source.module.to(device, dtype).eval().requires_grad_(False)
        self._logits, self._dtype = source.logits, dtype
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (source.mean, source.std)
        )
        self.size, self.labels = source.size, source.labels

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, *size) in about [0, 1] -> logits (B, classes), float32; differentiable."""
        pixels = (images - self._mean) / self._std
        logits = self._logits(pixels.to(self._dtype)).float()
        if self._dtype == torch.float16 and logits.requires_grad:
            # A power of two: what comes out is the same gradient, unless it had vanished.
            logits.register_hook(lambda g: g * HALF_SCALE)  # type: ignore[no-untyped-call]
            pixels.register_hook(lambda g: g / HALF_SCALE)  # type: ignore[no-untyped-call]
        return logits


def _hugging(name: str, dtype: torch.dtype) -> Source:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    looks = AutoImageProcessor.from_pretrained(name)
    model, report = AutoModelForImageClassification.from_pretrained(
        name, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers.
        raise ValueError(f"it holds no weights for {', '.join(missing[:SHOWN])}")
    names = model.config.id2label
    return Source(
        module=model,
        logits=lambda pixels: model(pixel_values=pixels).logits,
        size=_side(looks),
        mean=looks.image_mean,
        std=looks.image_std,
        labels=[str(names[index]) for index in range(len(names))],
    )


def _side(looks: Any) -> tuple[int, int]:
    """The size of the pictures that a processor of transformers gives out."""
    crop = getattr(looks, "crop_size", None) if getattr(looks, "do_center_crop", None) else None
    size = crop or looks.size
    if size.height and size.width:
        return int(size.height), int(size.width)
    return int(size.shortest_edge), int(size.shortest_edge)


def _timm(name: str, dtype: torch.dtype) -> Source:
    try:
        import timm.data
    except ImportError as error:
        raise ModelError("timm is not installed: pip install 'pilotfish-likeness[timm]'") from error
    model = timm.create_model(name, pretrained=True).to(dtype)
    looks = timm.data.resolve_model_data_config(model)
    subset = timm.data.infer_imagenet_subset(model)
    labels = model.pretrained_cfg.get("label_names") or (
        timm.data.ImageNetInfo(subset).label_descriptions() if subset else []
    )
    _, height, width = looks["input_size"]
    return Source(model, model, (height, width), looks["mean"], looks["std"], list(labels))


# Networks live as long as a run that uses them.
_loaded: WeakValueDictionary[tuple[Any, ...], Network] = WeakValueDictionary()
_loading = threading.Lock()


def load(name: str, device: torch.device, dtype: torch.dtype) -> Network:
    """The classifier of that name, loaded once however many guides use it at the same time.

    Raises:
        ModelError: see `Network`.
    """
    key = (name, str(device), dtype)
    with _loading:
        network = _loaded.get(key)
        if network is None:
            network = _loaded[key] = Network(name, device, dtype)
    return network


def class_of(label: int | str, labels: Sequence[str]) -> int:
    """The index of a class, by index or name; one of a name's synonyms ("tench, Tinca") is enough.

    Raises:
        SettingsError: there is no such class, or several; names the nearest and some choices.
    """
    wanted = str(label).strip().casefold()
    names = [[name.casefold(), *name.casefold().split(", ")] for name in labels]
    found = [i for i, all_names in enumerate(names) if wanted in all_names[:1]]
    found = found or [i for i, all_names in enumerate(names) if wanted in all_names]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise SettingsError(
            f"Classifier: label {label!r} is the name of {len(found)} classes; give an index: "
            + ", ".join(f"{i} ({labels[i]})" for i in found)
        )
    if wanted.isdigit() and (not labels or int(wanted) < len(labels)):
        return int(wanted)
    raise SettingsError(f"Classifier: {_unknown(label, labels)}")


def _unknown(label: int | str, labels: Sequence[str]) -> str:
    if not labels:
        return f"label must be an index, since this classifier's classes have no names; got {label}"
    spelled = {name.casefold(): name for full in labels for name in (full, *full.split(", "))}
    near = difflib.get_close_matches(str(label).casefold(), spelled, n=1, cutoff=0.5)
    hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
    some = ", ".join(labels[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")
    return (
        f"label must be one of the classifier's {len(labels)} classes, by name or index; "
        f"got {label!r}.{hint} Available: {some}"
    )
