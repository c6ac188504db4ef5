"""A folder's networks, each held to its file: no tensor keeps the random numbers it began with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelError
from .schedulers import diffusers

SHOWN = 3  # names in a message
# A tokenizer without any of them is made empty by transformers, without a word.
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def check_index(folder: Path, index: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a folder in which a part is no part, or a tokenizer has no words.

    Args:
        given: parts that are not read from the folder.

    Raises:
        ModelError: names the part.
    """
    kind = getattr(diffusers, str(index["_class_name"]), None)
    takes = (
        signature(kind).parameters if kind else {}
    )  # a package's own pipeline is not looked into
    for name, value in index.items():
        is_part = name in takes and not isinstance(takes[name].default, bool | int | float)
        if not is_part or name in given:
            continue
        if not isinstance(value, list) or len(value) != 2:
            raise ModelError(
                f"the {name} in model_index.json must be a library and a class, or null twice; "
                f"got {value!r}"
            )
        place = folder / name
        if "tokenizer" in name and value[0] and not any((place / n).is_file() for n in WORDS):
            raise ModelError(
                f"the {name} is missing: {place} has none of {', '.join(WORDS)}; get it again"
            )


def broken_file(folder: Path) -> Path | None:
    """The first file of a part that ends in .json and is none."""
    for file in sorted(folder.glob("*/*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return file
    return None


def load_networks(
    folder: Path, index: Mapping[str, Any], dtype: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The networks that a pipeline's index lists, by name; none where it shall quantise them.

    Args:
        options: of the pipeline's `from_pretrained`: `variant`, `use_safetensors`, and parts that
            there are already.

    Raises:
        ModelError: see `load_network`.
    """
    if "quantization_config" in options:  # which speaks of parts by name
        return {}
    kinds = {n: _kind(*value) for n, value in index.items() if isinstance(value, list)}
    plain = {k: options[k] for k in ("use_safetensors",) if k in options}
    networks = {}
    for name, kind in kinds.items():
        if kind is not None and name not in options:
            place = folder / name
            # A part may do without the variant: the pipeline refuses one that no part has.
            more = {"variant": v} if (v := options.get("variant")) and _has(place, v) else {}
            networks[name] = load_network(kind, place, name, dtype, **plain, **more)
    return networks


def _kind(library: str | None, name: str | None) -> Any:
    """The network's class, where the part is one of diffusers or transformers; or None."""
    if library not in ("diffusers", "transformers"):
        return None
    kind = getattr(import_module(library), str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def _has(folder: Path, variant: str) -> bool:
    return any(f".{variant}{end}" in file.name for file in folder.glob("*") for end in ".-")


def load_network(kind: Any, place: Any, name: str, dtype: Any, **options: Any) -> Any:
    """One network of diffusers or transformers.

    Args:
        kind: its class.
        place: folder or hub id.
        name: what a message calls it.
        options: further ones of its `from_pretrained`.

    Raises:
        ModelError: its files cannot be read, or are not those of the network that its `config.json`
            tells of: tensors are missing, of another shape, or of layers that it does not have.
    """
    key = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    with told_of(name):
        network, found = kind.from_pretrained(
            place,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, with what is missing
            **{key: dtype},
            **options,
        )
    # What the index of several files lists counts as found, also where its file lacks it.
    missing = {*found["missing_keys"], *without_value(network)}
    had = {n: tuple(t.shape) for n, t in network.state_dict().items() if n not in missing}
    had |= {n: tuple(shape) for n, shape, _ in found["mismatched_keys"]}
    check_shapes(name, network, {**dict.fromkeys(found["unexpected_keys"], ()), **had})
    return network


def check_shapes(name: str, network: nn.Module, found: Mapping[str, tuple[int, ...]]) -> None:
    """Hold a network to what a file has.

    Args:
        found: shapes by name.

    Raises:
        ModelError: tensors are missing, of another shape, or of layers that it does not have.
    """
    expected = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    shapes = {n: f"{n} {found[n]} for {s}" for n, s in expected.items() if found.get(n, s) != s}
    # Of which training alone makes use.
    missing = {n for n in expected.keys() - found if not n.endswith("num_batches_tracked")}
    # Any other tensor that the network has no place for (`position_ids`) is harmless.
    further = [n for n in found.keys() - expected if _of_further_layer(n, network)]
    check_whole(
        name,
        {
            f"{{}} of its {len(expected)} tensors are missing": missing,
            "{} tensors are of another shape": shapes.values(),
            "{} tensors are of layers that its config.json leaves out": further,
        },
    )


def check_whole(name: str, faults: Mapping[str, Iterable[str]]) -> None:
    """Refuse a network with faults.

    Args:
        faults: names of tensors by what is wrong with them, with `{}` for how many there are.

    Raises:
        ModelError: there are some; names the first.
    """
    told = []
    for fault, names in faults.items():
        if tensors := sorted(names):
            more = ", ..." if len(tensors) > SHOWN else ""
            told.append(f"{fault.format(len(tensors))}: {', '.join(tensors[:SHOWN])}{more}")
    if told:
        raise ModelError(
            f"the {name} is not whole: {'; '.join(told)}. Its file was cut off, or belongs to "
            "another model; get it again"
        )


def without_value(network: nn.Module) -> list[str]:
    """The tensors that no file gave a value."""
    return [name for name, tensor in network.state_dict().items() if tensor.is_meta]


@contextlib.contextmanager
def told_of(name: str) -> Iterator[None]:
    """Turn whatever reading a network's files raises into an error that names it.

    Raises:
        ModelError: the libraries raise their own kinds for each way in which a file can be broken.
    """
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"the {name} cannot be read: {cause}") from error


def _of_further_layer(tensor: str, network: nn.Module) -> bool:
    """Whether a tensor is of a layer beyond the last one of its list."""
    module = network
    for name in tensor.split("."):
        children = dict(module.named_children())
        if name not in children:
            return isinstance(module, nn.ModuleList | nn.Sequential)
        module = children[name]
    return False
