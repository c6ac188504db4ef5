"""Learned embeddings from files, whatever tool wrote them, and back into files.

What is read: `{token: tensor}` in .safetensors or .bin (diffusers, the concepts library), .pt of
AUTOMATIC1111 (`string_to_param`), a bare tensor, a tensor without a name (`emb_params`), and pairs
for Stable Diffusion XL (`clip_l`, `clip_g`). Pickles are read with `weights_only=True`: they can
hold tensors, and run nothing.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilotfish import InputError

Words = dict[str, dict[str, Tensor]]  # {word: {text encoder: (n, D)}}, float32

ENCODER = "text_encoder"
PAIR = {"clip_l": ENCODER, "clip_g": "text_encoder_2"}  # of Stable Diffusion XL
UNNAMED = ("*", "emb_params", *PAIR)  # keys that say what is there, not how it is called
PICKLED = (".bin", ".pt")
LARGEST = 16 * 2**20  # bytes; 75 vectors of both of XL's widths are 0.6 MB
LAYOUTS = (
    "{token: tensor} (diffusers), string_to_param (AUTOMATIC1111), one tensor, "
    "or clip_l and clip_g (Stable Diffusion XL)"
)


def read(path: str | Path, token: str | None = None) -> Words:
    """The words of a file with their vectors (n, D), by text encoder: `{word: {encoder: vectors}}`.

    A file that names no word gives its own name, without the ending.

    Args:
        token: another name for the word.

    Raises:
        InputError: the file cannot be read, is no learned embedding, holds values that are not
            finite, or names a word with spaces; names the file and the fact.
    """
    path = Path(path)
    found = _words(_load(path), path)
    if token is not None:
        if len(found) > 1:
            raise InputError(
                f"{path} holds {len(found)} words ({', '.join(found)}); "
                "token renames the word of a file that holds one"
            )
        found = {token: next(iter(found.values()))}
    for word in found:
        if not word or any(c.isspace() for c in word):
            raise InputError(f"{path} names its word {word!r}; give one without spaces as token")
    return {
        word: {name: _vectors(value, f"{path}: {word!r}") for name, value in parts.items()}
        for word, parts in found.items()
    }


def write(path: str | Path, word: str, vectors: Tensor) -> Path:
    """Write a word's vectors (n, D) as diffusers does, so that a reader never sees half a file.

    Raises:
        InputError: the name does not end in .safetensors, or the place cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"cannot write {path}: end its name in .safetensors")
    content = {word: vectors.detach().float().cpu().contiguous()}
    return replace(path, lambda part: save_file(content, part))


def replace(path: Path, save: Callable[[Path], object]) -> Path:
    """Let `save` write beside the place, then move the whole file there.

    Raises:
        InputError: the place cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch gives a RuntimeError where a disk is full
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error
    return path


def _load(path: Path) -> Any:
    """What the file holds, not yet understood."""
    if not path.is_file():
        raise InputError(f"no embedding file {path}; expected .safetensors, .bin or .pt")
    if path.suffix not in (".safetensors", *PICKLED):
        raise InputError(f"{path} ends in {path.suffix!r}; expected .safetensors, .bin or .pt")
    try:
        if (size := _unpacked_size(path)) > LARGEST:
            raise ValueError(f"it is {size / 1e6:.0f} MB large; they are below 1 MB")
        if path.suffix in PICKLED:
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:  # a damaged file makes the loaders raise anything
        raise InputError(f"{path} is no learned embedding: {_reason(error)}") from error


def _unpacked_size(path: Path) -> int:
    """Bytes; torch's files are ZIP archives, which may unpack to much more than they are."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _reason(error: Exception) -> str:
    """The one line that matters of what a loader says."""
    if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {forbidden[1]}; a file of tensors may run nothing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _words(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Which value belongs to which word and text encoder; the values are not yet checked."""
    if isinstance(content, Tensor):
        return {path.stem: {ENCODER: content}}
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        own = content.get("name")
        name = own if isinstance(own, str) else path.stem
        return _named(content["string_to_param"], name)
    if not isinstance(content, Mapping) or not _holds_tensors(content):
        keys = list(content) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{path} has an unknown layout ({_short(keys)}); known: {LAYOUTS}")
    if content.keys() == PAIR.keys():
        return {path.stem: {PAIR[key]: content[key] for key in PAIR}}
    return _named(content, path.stem)


def _named(values: Mapping[Any, Any], name: str) -> dict[str, dict[str, Any]]:
    return {name if k in UNNAMED else str(k): {ENCODER: v} for k, v in values.items()}


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether the values can be embeddings of one encoder, or of a pair: a LoRA's have many widths.

    What else is wrong with them is told later, with the word.
    """
    values = list(content.values())
    if not values or not all(isinstance(v, Tensor) for v in values):
        return False
    widths = {tuple(v.shape[-1:]) for v in values}
    return len(widths) == 1 or content.keys() == PAIR.keys()


def _vectors(value: Any, where: str) -> Tensor:
    """A value as (n, D), float32 and finite."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        what = f"a {value.layout} tensor" if isinstance(value, Tensor) else _short(value)
        raise InputError(f"{where} is {what}; expected a dense tensor")
    if not value.is_floating_point():
        raise InputError(f"{where} holds {value.dtype}; expected floating-point numbers")
    if value.ndim not in (1, 2) or 0 in value.shape:
        raise InputError(f"{where} has shape {tuple(value.shape)}; expected (D,) or (n, D)")
    if value.numel() * value.element_size() > LARGEST:  # strides can claim more than there is
        raise InputError(f"{where} claims shape {tuple(value.shape)}; that is no learned embedding")
    vectors = value.detach().float().reshape(-1, value.shape[-1]).clone()  # (n, D)
    if not vectors.isfinite().all():
        raise InputError(
            f"{where} holds {int((~vectors.isfinite()).sum())} values that are not finite; "
            "its training went wrong, take an earlier checkpoint"
        )
    return vectors


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
