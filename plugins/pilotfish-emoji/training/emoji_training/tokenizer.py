"""A `CLIPTokenizer` in whose vocabulary each word of the world is one token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from pilotfish_emoji.names import BACKGROUNDS, OBJECTS, STYLES
from tokenizers import pre_tokenizers

from emoji_training.networks import CLIPTokenizer

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"

# Words of other prompts; those that no caption has keep their random embeddings.
COMMON_WORDS: Final = """
a an the of on in and with without at by from to for is like as
background style some thing picture photo photograph image drawing painting art artwork
rendering print render portrait view closeup small large big little cute happy sad old new
beautiful colorful bright dark light soft sharp simple detailed brown gold golden silver
beige cyan magenta violet color colour oil ink sketchy cartoon toy animal bird dog kitten
fire dance dancing running sitting flying sky sea water forest night day sun sunset
"""


def world_words() -> list[str]:
    """Every word that a caption can hold, and the common ones."""
    named = " ".join((*OBJECTS, *BACKGROUNDS, *STYLES)).split()
    return sorted({*named, *COMMON_WORDS.split()})


def build_tokenizer(
    words: Sequence[str] | None = None, max_length: int = MAX_LENGTH
) -> CLIPTokenizer:
    """The tokenizer: 256 bytes, the same as word ends, the merges, and CLIP's special tokens.

    Args:
        words: those that are to be one token each; the emoji model's if left out.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + SUFFIX for letter in alphabet)]
    merges = learn_merges(world_words() if words is None else words)
    tokens = [*symbols, *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pair encoding's merges, continued until each of the words is a single token.

    Of equally frequent pairs the alphabetically first is merged, so that the ids, which the weights
    rely on, are the same every time; tokenizers' own trainer leaves the order of equals to chance.
    """
    spelt = [[*word[:-1], word[-1] + SUFFIX] for word in words]
    merges = []
    while counts := Counter(pair for symbols in spelt for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelt = [_merged(symbols, best) for symbols in spelt]
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> list[list[int]]:
    """The captions as rows of as many ids as the tokenizer takes, padded with the end token."""
    rows: list[list[int]] = tokenizer(captions, padding="max_length", truncation=True)["input_ids"]
    return rows


def write_clip_files(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json, for readers of CLIP's original files."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "vocab.json").write_text(vocabulary, "utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
