"""The two text encoders: those of the emoji model and of its CLIP, with words for more objects."""

from __future__ import annotations

from typing import Any, Final

import torch
from emoji_training.tokenizer import build_tokenizer as build
from emoji_training.tokenizer import world_words
from emoji_training.unet import text_config
from pilotfish_emoji.names import FOLDER as EMOJI
from pilotfish_emoji.names import OBJECTS as KNOWN
from pilotfish_emoji_flow.names import MORE
from safetensors.torch import load_file
from torch import Tensor

from flow_training.networks import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

MAX_LENGTH: Final = 16  # the longest caption has 12 tokens; each one costs every step
WIDTH: Final = 128
SEED: Final = 110_002
Encoders = tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]


def build_tokenizer() -> CLIPTokenizer:
    """The emoji model's tokenizer with the new objects' words, and few positions."""
    return build(sorted({*world_words(), *MORE}), MAX_LENGTH)


def build_encoders() -> Encoders:
    """Both encoders with their trained weights; pooled outputs of the first are not projected."""
    emoji = CLIPTextModel.from_pretrained(EMOJI / "text_encoder", dtype=torch.float32)
    first = {f"text_model.{name}": value for name, value in emoji.state_dict().items()}
    first["text_projection.weight"] = torch.eye(WIDTH)
    second = from_open_clip(load_file(EMOJI / "clip" / "open_clip_model.safetensors"))
    return _encoder(first, "quick_gelu", SEED), _encoder(second, "gelu", SEED + 1)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text transformer under transformers' names."""
    renamed = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, value in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        _, _, layer, part = name.split(".", 3)
        target, (part, kind) = f"text_model.encoder.layers.{layer}", part.rsplit(".", 1)
        if kind.startswith("in_proj_"):
            for letter, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{target}.self_attn.{letter}_proj.{kind[8:]}"] = piece
        else:
            renamed[f"{target}.{names[part]}.{kind}"] = value
    return {name: value.float() for name, value in renamed.items()}


def _encoder(state: dict[str, Tensor], activation: str, seed: int) -> CLIPTextModelWithProjection:
    """An encoder with these weights, its vocabulary extended and its positions cut."""
    tokenizer = build_tokenizer()
    config = text_config(tokenizer, hidden_act=activation)
    prefix = "text_model.embeddings."
    words, places = f"{prefix}token_embedding.weight", f"{prefix}position_embedding.weight"
    rows = extend(state[words], build(), tokenizer, seed)
    state = {**state, words: rows, places: state[places][:MAX_LENGTH]}
    encoder: Any = CLIPTextModelWithProjection(config)
    encoder.load_state_dict(state)
    return encoder


def extend(rows: Tensor, known: CLIPTokenizer, wanted: CLIPTokenizer, seed: int) -> Tensor:
    """Embeddings (V, D) for a larger vocabulary: what is known stays, what is new is drawn.

    New rows have the mean and the covariance of the trained objects' rows, so that they look like
    words of that kind to the layers that follow.
    """
    before = known.get_vocab()
    objects = rows[known.convert_tokens_to_ids([f"{name}</w>" for name in KNOWN])]
    mean, around = objects.mean(0), objects - objects.mean(0)
    generator = torch.Generator().manual_seed(seed)
    extended = []
    for token, _ in sorted(wanted.get_vocab().items(), key=lambda pair: pair[1]):
        mix = torch.randn(len(objects), generator=generator) / len(objects) ** 0.5
        extended.append(rows[before[token]] if token in before else mean + mix @ around)
    return torch.stack(extended)
