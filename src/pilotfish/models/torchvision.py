"""Let torchvision import next to a CPU-only torch.

torchvision has no CPU build on some package indexes. Its compiled operators then do not load, and
`import torchvision` raises `operator torchvision::nms does not exist`, because it registers a fake
for an operator that nobody declared; transformers and diffusers, which import it where it is
installed, fail after it. Declaring the two schemas is enough: its transforms, which are all that
open_clip needs, are plain Python.

To be removed when torchvision imports without its compiled operators:
https://github.com/pytorch/vision registers those fakes in `torchvision/_meta_registrations.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import Literal

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# The library object must live as long as the declarations are to last.
_declared: list[torch.library.Library] = []


def state() -> Literal["absent", "whole", "without compiled operators"]:
    """What is installed; imports nothing of torchvision but its compiled part."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return "absent"
    folders = spec.submodule_search_locations or []
    return "whole" if not _declared and _operators_load(folders) else "without compiled operators"


def mend_torchvision() -> None:
    """Let torchvision import, where it is installed and its compiled operators cannot load.

    pilotfish does it before it imports diffusers. Who imports diffusers, transformers or open_clip
    before pilotfish's networks calls it first.
    """
    if "torchvision" not in sys.modules and not _declared and state().startswith("without"):
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)


def _operators_load(folders: Iterable[str]) -> bool:
    try:
        extension = importlib.machinery.PathFinder.find_spec("_C", [*folders])
        if extension is not None and extension.origin is not None:
            torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")
