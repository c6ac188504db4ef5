"""Configurations of diffusers from a folder or the hub."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from ..errors import ModelError


def load_config(kind: Any, target: str, **place: Any) -> Any:
    """As `kind.load_config`, which without a network would try again for most of a minute.

    Args:
        kind: a class of diffusers that has a configuration.
        target: a folder or a hub id.
        place: options of diffusers that say where to find it.

    Raises:
        ModelError: it is a hub id, its configuration is in no cache, and the hub does not answer.
        OSError, ValueError: as `kind.load_config`.
    """
    if not os.path.isdir(target) and not place.get("local_files_only"):
        _check_reachable(target, kind.config_name, place)
    return kind.load_config(target, **place)


def _check_reachable(target: str, file: str, place: dict[str, Any]) -> None:
    """Ask for a file once; what the hub answers is for diffusers to tell."""
    revision = place.get("revision")
    if try_to_load_from_cache(target, file, cache_dir=place.get("cache_dir"), revision=revision):
        return
    try:
        get_hf_file_metadata(hf_hub_url(target, file, revision=revision), token=place.get("token"))
    except HfHubHTTPError:
        return
    except Exception as error:  # of the HTTP library that this version of the client is built on
        raise ModelError(
            f"{target} is no folder here, nor in the hub's cache, and the hub does not answer: "
            f"{error}"
        ) from error
