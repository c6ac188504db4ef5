"""Learned embeddings from files, whatever tool wrote them, and back into files.

What is read: `{token: tensor}` in .safetensors or .bin (diffusers, the concepts library), .pt of
AUTOMATIC1111 (`string_to_param`), of the original textual_inversion repository and of InvokeAI's
trainer (the same as a `torch.nn.ParameterDict`), a bare tensor, a tensor without a name
(`emb_params`), and vectors for several text encoders (`clip_l`, `clip_g`, `t5`). Numbers and text
beside them are passed over. Pickles are read with `weights_only=True`, and only after a look at
their operations: they can hold tensors, and run nothing.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import ParameterDict
from torch.serialization import safe_globals

from pilotfish import InputError

Words = dict[str, dict[str, Tensor]]  # {word: {text encoder: (n, D)}}, float32

ENCODER, T5 = "text_encoder", "t5"
# What trainers call the text encoders; a T5 is the second of one family, and the third of another.
ENCODERS = {"clip_l": ENCODER, "clip_g": "text_encoder_2", "t5": T5, "t5xxl": T5}
UNNAMED = ("*", "emb_params")  # keys that say what is there, not how it is called
PICKLED = (".bin", ".pt")
ZIPPED = b"PK\x03\x04"  # how torch tells its formats apart
LARGEST = 16 * 2**20  # bytes; 75 vectors of both of XL's widths are 0.6 MB
MOST_WORDS = 64  # in a file; trainers write one, or a handful
MOST_VECTORS = 512  # of a word; the longest prompt of a text encoder in use (T5) has as many tokens
MOST_OPERATIONS = 6_000  # of a pickle; a word takes 30 to 70, and time can grow by the square
LONGEST = 200  # characters of a word
LAYOUTS = (
    "{token: tensor} (diffusers), string_to_param (AUTOMATIC1111, textual_inversion, InvokeAI), "
    "one tensor, or clip_l, clip_g and t5 (Stable Diffusion XL and others of several text encoders)"
)
# What torch.save names for dense tensors, parameters and dictionaries of them. It is much less than
# weights_only allows, which can be made to allocate or to compute without end.
HARMLESS = re.compile(
    r"torch\.(_utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|[A-Za-z]+\d*Storage"
    r"|nn\.parameter\.Parameter|nn\.modules\.container\.ParameterDict)"
    r"|collections\.OrderedDict|(__builtin__|builtins)\.set"
)
# Before torch 1.6 a module's class was a reference to (word, class, file, source code).
WITH_SOURCE = re.compile(
    rb"\(X\x06\x00{3}module(?:q.|r.{4})(c[\w.]+\nParameterDict\n(?:q.|r.{4}))", re.DOTALL
)
_SAFE_GLOBALS = threading.Lock()  # torch has one list of them for all threads


def read(path: str | Path, token: str | None = None) -> Words:
    """The words of a file with their vectors (n, D), by text encoder: `{word: {encoder: vectors}}`.

    Encoders are "text_encoder" and "text_encoder_2", the model's CLIPs, and "t5".
    A file that names no word gives its own name, without the ending.

    Args:
        token: another name for the word.

    Raises:
        InputError: the file cannot be read, is no learned embedding, holds values that are not
            finite, names a word with spaces, or holds more than `MOST_WORDS` words or
            `MOST_VECTORS` vectors of one; names the file and the fact.
    """
    path = Path(path)
    found = _words(_load(path), path)
    if token is not None:
        if len(found) > 1:
            raise InputError(
                f"{path} holds {len(found)} words ({_listed(found)}); "
                "token renames the word of a file that holds one"
            )
        found = {token: next(iter(found.values()))}
    for word in found:
        _check_word(word, path)
    return {
        word: {name: _vectors(value, f"{path}: {word!r}") for name, value in parts.items()}
        for word, parts in found.items()
    }


def write(path: str | Path, word: str, vectors: Tensor | Mapping[str, Tensor]) -> Path:
    """Write a word's vectors (n, D) as diffusers does, so that a reader never sees half a file.

    Args:
        vectors: one encoder's, or by text encoder as `read` gives them. Then the file has `clip_l`,
            `clip_g` and `t5`, and the word stands in its metadata.

    Raises:
        InputError: the name does not end in .safetensors, or the place cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"cannot write {path}: end its name in .safetensors")
    about: dict[str, Any] = {}
    if not isinstance(vectors, Tensor):
        keys = {encoder: key for key, encoder in reversed(ENCODERS.items())}
        vectors, about = {keys[n]: v for n, v in vectors.items()}, {"metadata": {"name": word}}
    named = {word: vectors} if isinstance(vectors, Tensor) else vectors
    content = {key: value.detach().float().cpu().contiguous() for key, value in named.items()}
    return replace(path, lambda part: save_file(content, part, **about))


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
    if not os.path.isfile(path):  # unlike Path's own also False where a name is too long
        named = f"{str(path)[:200]}{'...' * (len(str(path)) > 200)}"
        raise InputError(f"no embedding file {named}; expected .safetensors, .bin or .pt")
    kind = path.suffix.lower()
    if kind not in (".safetensors", *PICKLED):
        raise InputError(f"{path} ends in {path.suffix!r}; expected .safetensors, .bin or .pt")
    try:
        _check_size(path.stat().st_size)
        return _tensors(path) if kind == ".safetensors" else _unpickled(path.read_bytes())
    except _Refused as error:
        reason = str(error)
    except Exception as error:  # a damaged file makes the loaders raise anything
        # What torch says of a pickle is not passed on: it ends in advice to switch safety off.
        says = str(error) if kind == ".safetensors" else "damaged, or not written by torch.save"
        reason = f"{says} ({type(error).__name__})"
    raise InputError(f"{path} is no learned embedding: {reason}")


class _Refused(Exception):
    """A file that the loaders would take; the text says why it is refused."""


class _State:
    """What a file holds of a ParameterDict, which itself would be slow to fill, time and again."""


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise _Refused(f"it is {size / 1e6:.0f} MB large; they are below 1 MB")
    if size == 0:
        raise _Refused("it is empty")


def _tensors(path: Path) -> dict[str, Any]:
    """What a .safetensors file holds, and the name in its metadata."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        _check_count(len(names))
        own = {"name": (file.metadata() or {}).get("name")}
        return {**own, **{name: file.get_tensor(name) for name in names}}


def _check_count(words: int) -> None:
    if words > MOST_WORDS:
        raise _Refused(f"it holds {words} tensors; {MOST_WORDS} words at most are read")


def _unpickled(content: bytes) -> Any:
    """What a file of torch.save holds, as a ZIP archive or in the format before torch 1.6."""
    content = _without_source(content)
    asked: set[str] = set()
    for pickle in _pickles(content):
        asked |= _check_operations(pickle)
    if not any(name.endswith("ParameterDict") for name in asked):
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    stand_in = (_State, f"{ParameterDict.__module__}.{ParameterDict.__qualname__}")
    with _SAFE_GLOBALS, safe_globals([stand_in]):
        return torch.load(BytesIO(content), map_location="cpu", weights_only=True)


def _without_source(content: bytes) -> bytes:
    """A file of before torch 1.6 with a ParameterDict's class alone, as weights_only takes it."""
    if content.startswith(ZIPPED) or not (found := WITH_SOURCE.search(content)):
        return content
    rest = BytesIO(content[found.end() :])
    for operation, _, _ in islice(pickletools.genops(rest), 10):
        if operation.name == "BINPERSID":
            return content[: found.start()] + found[1] + rest.read()
    return content


def _pickles(content: bytes) -> Iterator[IO[bytes]]:
    """The pickles of a file of torch.save, each as a stream that begins with it."""
    stream = BytesIO(content)
    if not content.startswith(ZIPPED):
        yield from [stream] * 5  # number, version, system, content, names; then the values
        return
    with zipfile.ZipFile(stream) as archive:
        _check_size(sum(entry.file_size for entry in archive.infolist()))  # unpacked
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise _Refused("it holds two files of one name")
        yield from (archive.open(name) for name in names if name.endswith(".pkl"))


def _check_operations(pickle: IO[bytes]) -> set[str]:
    """What a pickle asks for by name; refuse it, unread, where it could run something or grow.

    A tuple that is used twice is refused: forty that hold the last one twice are 200 bytes, and
    take a day to hash. torch.save makes each tuple anew.
    """
    asked: set[str] = set()
    tuples: set[Any] = set()  # where the pickle remembers them
    tuple_on_top = False
    operations = pickletools.genops(pickle)
    for operation, argument, _ in islice(operations, MOST_OPERATIONS):
        name = operation.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            (tuples.add if tuple_on_top else tuples.discard)(argument)
            continue
        if name in ("GET", "BINGET", "LONG_BINGET") and argument in tuples:
            raise _Refused("it repeats a tuple, as no file of torch.save does")
        if name == "GLOBAL":
            asked.add(wanted := str(argument).replace(" ", "."))
            if not HARMLESS.fullmatch(wanted):
                raise _Refused(f"it asks for {wanted[:LONGEST]}; a file of tensors may run nothing")
        tuple_on_top = name.startswith("TUPLE") or (tuple_on_top and name == "PROTO")
    if next(operations, None) is not None:
        raise _Refused(f"it takes more than {MOST_OPERATIONS} operations; a word takes some 50")
    return asked


def _words(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Which value belongs to which word and text encoder; the values are not yet checked."""
    if isinstance(content, Tensor):
        return {path.stem: {ENCODER: content}}
    entries = _entries(content) or {}
    own = entries.get("name")
    name = own if isinstance(own, str) and own else path.stem
    params = _entries(entries.get("string_to_param"))
    if params is None:
        params = {key: value for key, value in entries.items() if not _is_aside(value)}
        if not _hold_vectors(params):
            found = _listed(entries) if entries else type(content).__name__
            raise InputError(f"{path} has an unknown layout ({found}); known: {LAYOUTS}")
    if params.keys() <= ENCODERS.keys():
        return {name: {ENCODERS[key]: params[key] for key in ENCODERS if key in params}}
    words = {name if k in UNNAMED else k: {ENCODER: v} for k, v in params.items()}
    if not 0 < len(words) == len(params) <= MOST_WORDS:
        raise InputError(
            f"{path} holds {len(params)} tensors ({_listed(params)}) for {len(words)} words; "
            f"expected one for each, and {MOST_WORDS} at most"
        )
    return words


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """A dictionary's entries, also of a ParameterDict, whose own methods fail on old ones."""
    if isinstance(value, ParameterDict | _State):
        value = vars(value).get("_parameters")
    return value if isinstance(value, Mapping) else None


def _is_aside(value: Any) -> bool:
    """Whether a value only tells about the embedding: a number of steps, a model's name."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point()
    return value is None or isinstance(value, str | int | float)


def _hold_vectors(values: Mapping[Any, Any]) -> bool:
    """Whether the values can be embeddings of one encoder, or of several that have names.

    A LoRA's have many widths.

    What else is wrong with them is told later, with the word.
    """
    if not values or not all(isinstance(v, Tensor) for v in values.values()):
        return False
    widths = {tuple(v.shape[-1:]) for v in values.values()}
    return len(widths) == 1 or values.keys() <= ENCODERS.keys()


def _check_word(word: Any, path: Path) -> None:
    """Refuse what cannot stand in a prompt.

    A lone surrogate, half a character, comes from a pickle, or from a file's name that is no UTF-8.
    """
    if not isinstance(word, str) or not word or any(c.isspace() for c in word):
        fault = "one without spaces"
    elif len(word) > LONGEST:
        fault = f"one of {LONGEST} characters at most"
    elif any("\ud800" <= c <= "\udfff" for c in word):
        fault = "one of whole characters, which UTF-8 can write,"
    else:
        return
    raise InputError(f"{path} names its word {_short(word)}; give {fault} as token")


def _vectors(value: Any, where: str) -> Tensor:
    """A value as (n, D), float32 and finite."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        what = f"a {value.layout} tensor" if isinstance(value, Tensor) else _short(value)
        raise InputError(f"{where} is {what}; expected a dense tensor")
    if not value.is_floating_point():
        raise InputError(f"{where} holds {value.dtype}; expected floating-point numbers")
    if value.ndim not in (1, 2) or 0 in value.shape:
        raise InputError(f"{where} has shape {tuple(value.shape)}; expected (D,) or (n, D)")
    if math.prod(value.shape) * value.element_size() > LARGEST:  # strides can claim more than is
        raise InputError(f"{where} claims shape {tuple(value.shape)}; that is no learned embedding")
    vectors = value.detach().float().reshape(-1, value.shape[-1]).clone()  # (n, D)
    if len(vectors) > MOST_VECTORS:
        raise InputError(f"{where} holds {len(vectors)} vectors; expected {MOST_VECTORS} at most")
    if not vectors.isfinite().all():
        raise InputError(
            f"{where} holds {int((~vectors.isfinite()).sum())} values that are not finite; "
            "its training went wrong, take an earlier checkpoint"
        )
    return vectors


def _listed(keys: Mapping[Any, Any]) -> str:
    """The first few keys."""
    return ", ".join(map(_short, islice(keys, 6))) + (", ..." if len(keys) > 6 else "")


def _short(value: Any) -> str:
    """At most a line; a list or a tuple, which may hold itself many times over, by its type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:77]!r}..."
    return repr(value) if isinstance(value, int | float) else type(value).__name__
