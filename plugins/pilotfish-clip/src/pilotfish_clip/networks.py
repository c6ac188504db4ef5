"""open_clip's models: found by name, loaded once, frozen."""

from __future__ import annotations

import difflib
import logging
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pilotfish import ModelError, SettingsError, cutouts

if TYPE_CHECKING:
    from pilotfish import Run

MODEL, CHECKPOINT = "ViT-B-32", "laion2b_s34b_b79k"  # where a model brings no CLIP of its own
OWN = "clip"  # in a diffusion model's folder, the folder of its own CLIP
SMALLEST = 0.5  # side of a cutout, as a fraction of the picture's shorter side
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALF_SCALE = 2.0**10  # on gradients inside a float16 CLIP: a pixel's is about 1e-6, and vanishes


class Networks:
    """An open_clip model on a device, frozen; guides that use the same one share it.

    Args:
        dtype: of its layers, where open_clip has that format; what comes out is float32.

    Attributes:
        size: (height, width) of the pictures that it takes.

    Raises:
        ModelError: open_clip cannot load it.
    """

    def __init__(
        self, name: str, checkpoint: str | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name = name
        self.dtype = dtype if dtype in PRECISIONS else torch.float32
        try:
            self._model, self._tokenizer, config = _read(name, checkpoint, device, self.dtype)
        except Exception as error:  # whatever a loader of foreign files raises
            what = name if checkpoint is None else f"{name} ({checkpoint})"
            raise ModelError(f"open_clip cannot load {what}: {error}") from error
        size = config["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        linear = config.get("interpolation") == "bilinear"
        self._kernel: Literal["bilinear", "bicubic"] = "bilinear" if linear else "bicubic"
        self._mean = torch.tensor(config["mean"], device=device).view(-1, 1, 1)
        self._std = torch.tensor(config["std"], device=device).view(-1, 1, 1)

    def views(self, images: Tensor, count: int, generators: list[torch.Generator]) -> Tensor:
        """Each image (B, 3, H, W) whole, and random squares of it: (B, 1 + count, 3, *size)."""
        return cutouts(images, self.size, count, generators, smallest=SMALLEST, kernel=self._kernel)

    def see(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, height, width) in about [0, 1] -> features (N, D); differentiable."""
        pixels = (pictures - self._mean) / self._std
        features: Tensor = self._model.encode_image(pixels.to(self.dtype)).float()
        if self.dtype == torch.float16 and features.requires_grad:
            # A power of two: what comes out is the same gradient, unless it had vanished.
            features.register_hook(lambda g: g * HALF_SCALE)  # type: ignore[no-untyped-call]
            pixels.register_hook(lambda g: g / HALF_SCALE)  # type: ignore[no-untyped-call]
        return features

    @torch.no_grad()
    def read(self, texts: list[str]) -> Tensor:
        """Texts -> features (T, D).

        Warns:
            UserWarning: a text is longer than the model reads.
        """
        tokens = self._tokenizer(texts)  # (T, length)
        length = tokens.shape[1]
        wholes = self._tokenizer(texts, context_length=4 * length)
        for text, row, whole in zip(texts, tokens, wholes, strict=True):
            # Padding stands at the right or, with some tokenizers, at the left.
            if not any(torch.equal(row, part) for part in (whole[:length], whole[-length:])):
                warnings.warn(
                    f"the CLIP model {self.name} reads {length} tokens: the end of {text!r} is "
                    "left out",
                    UserWarning,
                    stacklevel=2,
                )
        features: Tensor = self._model.encode_text(tokens.to(self._mean.device))
        return features.float()


def _read(
    name: str, checkpoint: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and how it wants its pictures."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(name, checkpoint) if checkpoint else {}
    # open_clip logs to the root logger, which would configure itself for the whole program.
    silent = logging.NullHandler()
    logging.root.addHandler(silent)
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights before it reads them
            model = open_clip.create_model(
                name,
                checkpoint,
                precision=PRECISIONS[dtype],
                device=device,
                force_quick_gelu=bool(tag.get("quick_gelu")),  # else as the model's name says
                require_pretrained=True,
            )
        tokenizer = open_clip.get_tokenizer(name)
    finally:
        logging.root.removeHandler(silent)
    model.eval().requires_grad_(False)
    return model, tokenizer, open_clip.get_model_preprocess_cfg(model)


# Networks live as long as a run that uses them.
_loaded: WeakValueDictionary[tuple[Any, ...], Networks] = WeakValueDictionary()
_loading = threading.Lock()


def load(name: str, checkpoint: str | None, device: torch.device, dtype: torch.dtype) -> Networks:
    """The networks of that name, loaded once however many guides use them at the same time.

    Raises:
        ModelError: see `Networks`.
    """
    key = (name, checkpoint, str(device), dtype)
    with _loading:
        networks = _loaded.get(key)
        if networks is None:
            networks = _loaded[key] = Networks(name, checkpoint, device, dtype)
    return networks


def choose(name: str | None, checkpoint: str | None, run: Run) -> tuple[str, str | None]:
    """open_clip's names of the model and its checkpoint.

    Raises:
        SettingsError: open_clip knows no such model or checkpoint; names the nearest.
    """
    folder = getattr(run.model, "folder", None)
    own = None if folder is None else Path(folder) / OWN
    if name is None and checkpoint is None and own and (own / "open_clip_config.json").is_file():
        return f"local-dir:{own}", None
    name = name or MODEL
    if not name.startswith(("local-dir:", "hf-hub:")):
        known = _known_model(name)
        return known, _known_checkpoint(known, checkpoint or CHECKPOINT)
    if checkpoint is not None:
        raise SettingsError(
            f"Clip: pretrained must be left out where the model brings its weights, as {name!r} "
            f"does; got {checkpoint!r}"
        )
    return name, None


def _known_model(name: str) -> str:
    import open_clip

    clean, names = name.replace("/", "-"), open_clip.list_models()
    if clean in names:
        return clean
    hint = _nearest(clean, names)
    if Path(name).is_dir():
        hint = f" For the folder write 'local-dir:{name}'."
    raise SettingsError(
        f"Clip: model must be one of open_clip's, 'local-dir:FOLDER' or 'hf-hub:ID'; got {name!r}."
        f"{hint} open_clip.list_models() lists all {len(names)}."
    )


def _known_checkpoint(name: str, checkpoint: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if open_clip.is_pretrained_cfg(name, checkpoint) or Path(checkpoint).is_file():
        return checkpoint
    raise SettingsError(
        f"Clip: pretrained must be a checkpoint of {name}, or a file; got {checkpoint!r}."
        f"{_nearest(checkpoint, tags)} Available: {', '.join(tags) or 'none'}"
    )


def _nearest(name: str, choices: list[str]) -> str:
    spelled = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""
