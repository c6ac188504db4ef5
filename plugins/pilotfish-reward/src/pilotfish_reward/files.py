"""Where published checkpoints lie, and networks filled from them, tensor by tensor."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pilotfish import ModelError, SettingsError

SHOWN = 3  # names in a message
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")  # and a file in it, for checkpoints of one file


@dataclass(frozen=True)
class Published:
    """A checkpoint as its authors publish it.

    Attributes:
        repo: hub id.
        size: of the download, in words.
        file: the one file that it is; "" for a folder in the layout of transformers.
        what: whose it is, and the name of the setting that names it: "Hps: model".
    """

    what: str
    repo: str
    size: str
    file: str = ""

    def place(self, given: str | None) -> tuple[str, bool]:
        """Folder, file or hub id, and whether it may be downloaded: only what a user names may.

        Raises:
            SettingsError: what is given is neither.
        """
        if given is None:
            return self.repo, False
        if Path(given).exists():
            return given, False
        if HUB_ID.fullmatch(given):
            return given, True
        raise SettingsError(
            f"{self.what} must be a file or folder that exists, or a hub id such as {self.repo!r}; "
            f"got {given!r}"
        )

    def path(self, given: str | None) -> Path:
        """The file of a checkpoint that is one file.

        Raises:
            SettingsError: see `place`.
            ModelError: it is not there, or cannot be downloaded.
        """
        place, ask = self.place(given)
        path = Path(place)
        if path.exists():
            path = path / self.file if path.is_dir() else path
            if not path.is_file():
                raise ModelError(f"{self.what}: the folder {place} has no {self.file}")
            return path
        from huggingface_hub import hf_hub_download

        owner, name, *inside = place.split("/")
        with self.told(given):
            file = "/".join(inside) or self.file
            return Path(hf_hub_download(f"{owner}/{name}", file, local_files_only=not ask))

    @contextlib.contextmanager
    def told(self, given: str | None) -> Iterator[None]:
        """Turn what loading raises into an error that says whose it is, and how to get it.

        Raises:
            ModelError: the libraries raise their own kinds for each fault of a file.
        """
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            setting = self.what.split(": ")[-1]
            hint = f"; {setting}={self.repo!r} downloads it ({self.size})" if given is None else ""
            raise ModelError(
                f"{self.what}: {given or self.repo} cannot be read{hint}. {cause}"
            ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle that holds nothing else of any danger.

    Those of a training's checkpoint, under "state_dict", and of one that ran on several devices,
    whose names begin with "module.", come under their own names.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by their names")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def fill(network: nn.Module, tensors: Mapping[str, Tensor], part: str) -> None:
    """Give each tensor of a network the one of that name; others are left out.

    Raises:
        ModelError: one is missing, or of another shape; names the part and the first of them.
    """
    own = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensors[name].shape) for name in own.keys() & tensors.keys()}
    check_whole(
        part,
        [name for name in shapes if name not in found],
        [
            f"{name} {found[name]} in place of {shape}"
            for name, shape in shapes.items()
            if found.get(name, shape) != shape
        ],
    )
    network.load_state_dict({name: tensors[name] for name in own})


def check_whole(part: str, missing: list[str], misshapen: list[str]) -> None:
    """Refuse a network that would keep random numbers.

    Raises:
        ModelError: a tensor is missing or of another shape.
    """
    faults = {"tensors are missing": missing, "tensors are of another shape": misshapen}
    told = [
        f"{len(names)} {fault}: {', '.join(sorted(names)[:SHOWN])}"
        + (", ..." if len(names) > SHOWN else "")
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise ModelError(
            f"the {part} is not whole: {'; '.join(told)}. Its file was cut off, or is another "
            "model's; get it again"
        )


def from_pretrained(kind: Any, place: str, part: str, *, ask: bool, **options: Any) -> Any:
    """A network of transformers, held to its files.

    Raises:
        ModelError: a tensor is missing or of another shape.
    """
    network, report = kind.from_pretrained(
        place,
        local_files_only=not ask,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, with what is missing
        **options,
    )
    # Counted in the network's own buffers, which no file needs.
    missing = [name for name in report["missing_keys"] if not name.endswith("position_ids")]
    shapes = [f"{n} {tuple(got)} in place of {tuple(own)}" for n, got, own in mismatched(report)]
    check_whole(part, missing, shapes)
    return network


def mismatched(report: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, shape in the file, and shape in the network, of what does not fit."""
    return sorted(report["mismatched_keys"])
