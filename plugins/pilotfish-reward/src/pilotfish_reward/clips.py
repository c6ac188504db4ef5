"""CLIP models that embed pictures and texts, in the layouts of transformers and of open_clip."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pilotfish import at_least_float32, mend_torchvision

from .files import Published, fill, from_pretrained, read_tensors
from .networks import Looks, Network, shared

if TYPE_CHECKING:
    from pilotfish import Run

CONFIG = "open_clip_config.json"  # beside a checkpoint: open_clip's own name for it
TOKENIZER = "tokenizer_config.json"  # where transformers keeps a tokenizer


class HuggingClip(Network):
    """A `CLIPModel` of transformers."""

    @classmethod
    def of(cls, published: Published, given: str | None, run: Run) -> HuggingClip:
        """The one that is given, or published: loaded once for all guides of the same.

        Raises:
            ModelError: it cannot be read, or is not whole.
        """
        place, ask = published.place(given)
        device, dtype = run.model.device, run.model.dtype

        def make() -> HuggingClip:
            mend_torchvision()
            from transformers import CLIPModel

            with published.told(given):
                clip = from_pretrained(CLIPModel, place, f"CLIP {place}", ask=ask, dtype=dtype)
            side = clip.config.vision_config.image_size
            return cls(clip, Looks((side, side)), device, dtype)

        return shared((cls, place, str(device), dtype), make)

    def pictures(self, images: Tensor) -> Tensor:
        """Embeddings (B, D), of length one, of images (B, 3, H, W) in about [0, 1]."""
        clip = self.module
        see = self.see(images, lambda p: clip.visual_projection(clip.vision_model(p).pooler_output))
        return normalize(see, dim=-1)

    @torch.no_grad()
    def text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """The embedding (1, D), of length one, of a text in the tokenizer's ids and mask."""
        own = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        pooled = self.module.text_model(**own).pooler_output
        return normalize(at_least_float32(self.module.text_projection(pooled)), dim=-1)

    @property
    def temperature(self) -> float:
        """What it scales cosines by."""
        return float(self.module.logit_scale.detach().float().exp())


class OpenClip(Network):
    """A CLIP of open_clip, filled from a checkpoint file.

    Attributes:
        length: tokens that it reads, with those of begin and end.
    """

    length: int

    @classmethod
    def of(cls, published: Published, given: str | None, name: str, run: Run) -> OpenClip:
        """The one that is given, or published: loaded once for all guides of the same.

        Args:
            name: open_clip's name of the architecture, where no configuration lies beside the file.

        Raises:
            ModelError: it cannot be read, or is not whole.
        """
        path = published.path(given)
        device, dtype = run.model.device, run.model.dtype

        def make() -> OpenClip:
            mend_torchvision()
            import open_clip

            beside = path.with_name(CONFIG)
            with published.told(given):
                tensors = read_tensors(path)
                config = open_clip.get_model_config(name)
                if beside.is_file():
                    config = json.loads(beside.read_text(encoding="utf-8"))["model_cfg"]
                clip = open_clip.CLIP(**config)
                fill(clip, tensors, f"CLIP {path.name}")
            side = config["vision_cfg"]["image_size"]
            network = cls(clip, Looks((side, side), fit="pad"), device, dtype)
            network.length = config["text_cfg"]["context_length"]
            return network

        return shared((cls, str(path), str(device), dtype), make)

    def pictures(self, images: Tensor) -> Tensor:
        """Embeddings (B, D), of length one, of images (B, 3, H, W) in about [0, 1]."""
        return normalize(self.see(images, self.module.encode_image), dim=-1)

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """The embedding (1, D), of length one.

        Warns:
            UserWarning: the text is longer than the model reads.
        """
        import open_clip

        tokenizer = open_clip.SimpleTokenizer(context_length=self.length)
        warn_if_cut(text, len(tokenizer.encode(text)) + 2, self.length)
        features = self.module.encode_text(tokenizer([text]).to(self.device))
        return normalize(at_least_float32(features), dim=-1)


def tokenizer_of(published: Published, given: str | None, model: str | None) -> Any:
    """The tokenizer that is given; or else the one in the model's folder, or the published one.

    Args:
        model: what the setting `model` says; a hub id allows the tokenizer's download too.

    Raises:
        ModelError: it cannot be read.
    """
    mend_torchvision()
    from transformers import AutoTokenizer

    path = Path(model) if model else None
    folder = path.parent if path and path.is_file() else path
    if given is None and folder is not None and (folder / TOKENIZER).is_file():
        given = str(folder)
    place, ask = published.place(given)
    asked = ask or (given is None and folder is not None and not folder.exists())
    with published.told(given):
        return AutoTokenizer.from_pretrained(place, local_files_only=not asked)


def tokenized(tokenizer: Any, text: str, length: int, padding: str | bool) -> Mapping[str, Tensor]:
    """Ids and mask (1, T) of a text, of at most `length` tokens.

    Warns:
        UserWarning: the text is longer.
    """
    warn_if_cut(text, len(tokenizer(text, verbose=False)["input_ids"]), length)
    tokens: Mapping[str, Tensor] = tokenizer(
        text, padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    return tokens


def warn_if_cut(text: str, count: int, length: int) -> None:
    """Say that a text has more tokens than a model reads."""
    if count > length:
        warnings.warn(
            f"the model reads {length} tokens: the end of {text!r} ({count}) is left out",
            UserWarning,
            stacklevel=2,
        )


class Head(nn.Module):
    """The linear layers of the aesthetic predictor, and of ImageReward: 5, with nothing between.

    Schuhmann 2022, "improved-aesthetic-predictor". They are layers 0, 2, 4, 6 and 7 of a list in
    which the others are dropout.
    """

    WIDTHS = (1024, 128, 64, 16, 1)
    PLACES = (0, 2, 4, 6, 7)

    def __init__(self, width: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for place, published in zip(self.PLACES, self.WIDTHS, strict=True):
            weight = tensors.get(f"layers.{place}.weight")
            out = 1 if place == self.PLACES[-1] else published if weight is None else len(weight)
            self.layers.add_module(str(place), nn.Linear(width, out))
            width = out

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) -> scores (B,)."""
        scores: Tensor = self.layers(features)[:, 0]
        return scores


def read_head(path: Path, width: int, part: str) -> Head:
    """The head of a file, for features of that width.

    Raises:
        ModelError: a tensor is missing or of another shape.
    """
    tensors = read_tensors(path)
    with torch.random.fork_rng(devices=[]):
        head = Head(width, tensors)
    fill(head, tensors, part)
    return head.requires_grad_(False)
