"""Where a model lies and what it is called, for which nothing of torch is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InputError, ModelError, unknown
from ..hooks import registry

DTYPES = ("float32", "float16", "bfloat16")
PICKLES = (".ckpt", ".bin", ".pt", ".pth")


def locate(model: str | Path | None) -> str:
    """A folder, file or hub id: the one given, or an installed model's folder (default: "emoji").

    Raises:
        InputError: there is no such folder, file or installed model, it is no .safetensors file, or
            no model was named and the one that ships is not installed.
    """
    name = "emoji" if model is None else str(model)
    known = registry.installed(registry.MODEL_GROUP)
    if name in known:
        entry = registry.find(name, registry.MODEL_GROUP)
        return str(registry.load_object(entry.target, f"model {name!r}"))
    if model is None:
        raise InputError(
            "the model that ships is not installed: pip install pilotfish-emoji "
            "(or name another one: a diffusers folder or a hub id)"
        )
    place = Path(os.path.expanduser(name))
    if os.path.isfile(place) or place.suffix in (".safetensors", *PICKLES):
        return locate_file(name)
    if name.startswith((".", "/", "~")) and not os.path.isdir(place):
        raise InputError(f"no model folder {name}; expected a folder in the diffusers layout")
    if not os.path.isdir(place) and "/" not in name:
        raise InputError(
            f"{unknown('model', name, known)}. A folder in the diffusers layout, one .safetensors "
            "file, or a hub id, OWNER/NAME, does as well"
        )
    return str(place) if os.path.isdir(place) else name


def locate_file(name: str) -> str:
    """The file's path.

    Raises:
        InputError: it is not there, or of a kind that is not read.
    """
    place = Path(os.path.expanduser(name))
    takes = "expected a folder in the diffusers layout, a hub id or one .safetensors file"
    if place.suffix in PICKLES:
        raise InputError(
            f"{name} is a pickle, which can run any code when it is read; {takes}. Its tensors can "
            "be written as one: safetensors.torch.save_file(torch.load(FILE, weights_only=True))"
        )
    if place.suffix != ".safetensors" or not os.path.isfile(place):
        what = "is a file of another kind" if os.path.isfile(place) else "is not there"
        raise InputError(f"{name} {what}; {takes}")
    return str(place)


def locate_tiny(place: str, folder: Path | None) -> str:
    """Folder or hub id of a tiny decoder; for no place, `tiny_vae/` of the model's folder.

    Raises:
        InputError: there is none.
    """
    target = os.path.expanduser(place or f"{folder or 'FOLDER'}/tiny_vae")
    if not place and not os.path.isdir(target):
        raise InputError(
            f"decoder 'tiny' takes the model's own, {target}, which does not exist. Name an "
            "AutoencoderTiny made for this model's latents, decoder='tiny:FOLDER_OR_HUB_ID' "
            "(tiny:madebyollin/taesd for Stable Diffusion 1.x and 2.x), or use 'linear'"
        )
    if place.startswith((".", "/", "~")) and not os.path.isdir(target):
        raise InputError(f"decoder 'tiny:{place}': no such folder")
    return target


def find_family(name: str, owner: str) -> registry.Installed:
    """The adapter for pipelines of that class name, not imported yet.

    Raises:
        ModelError: there is none; names those that there are.
    """
    known = registry.installed(registry.FAMILY_GROUP)
    if name not in known:
        raise ModelError(
            f"{owner} is a {name or 'pipeline without a name'}, and no model family here takes "
            f"that. Families: {', '.join(known)}"
        )
    return registry.find(name, registry.FAMILY_GROUP)


def check_offload(offload: str | None) -> None:
    """Refuse what is not offloaded here.

    Raises:
        InputError: see there.
    """
    if offload not in (None, "text"):
        raise InputError(f"offload must be 'text', or None for nothing; got {offload!r}")


def dtype_name(dtype: object) -> str:
    """A number format's name, of `torch.bfloat16` or "bfloat16"; None is float32.

    Raises:
        InputError: there is none of that name, or no model runs in it; names those that there are.
    """
    name = str(dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return name


def scheduler_name(kind: str) -> str:
    """A scheduler of diffusers as it is called here, by the name of its class.

    `EulerAncestralDiscreteScheduler` is `euler-ancestral`.
    """
    name = re.sub("Scheduler|Discrete", "", kind)
    return re.sub("(?<=.)(?=Multistep|Singlestep|Ancestral|SDE|Euler)", "-", name).lower()
