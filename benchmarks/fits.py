"""What guiding a model of each family takes in memory, computed from its configuration.

    python benchmarks/fits.py    # results/memory.json, docs/models.md, and doctor's numbers

Networks of the published sizes are built on the `meta` device, where tensors have shapes and no
values, and run forwards; what autograd keeps for the gradient is counted, each storage once.
Attention counts as kernels that keep no matrix of it (flash, memory-efficient). Computed, not
measured: passing tensors, gradients, the allocator's gaps and the CUDA context are not in it.

Sizes: the classes' own defaults in diffusers (FLUX.1, Z-Image, Qwen-Image and its VAE, the VAE of
FLUX.2) and in what differs from them, the configurations published with the models on the hub, from
memory: no network was at hand to look them up, so each is checked by its number of parameters.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from pilotfish import Sampler
from pilotfish.models.checkpointing import parts
from pilotfish.models.protocol import Conditioning
from pilotfish.testing import random_pipeline

HERE = Path(__file__).parent
ROOT = HERE.parent
CARDS = (12, 24, 80)  # GiB
FREE = 0.9  # of a card, for what is not counted
GIB = 2**30

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN_VL_7B = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        family: of `random_pipeline`, whose pipeline gets these networks.
        configs: by the part's name.
        told: shapes of the conditioning, batch first.
        pixels: the usual side.
        predictions: of the network in a step, by the family's usual guidance.
        tiny: channels of the latents of its tiny decoder; 0 where there is none.
    """

    family: str
    configs: Mapping[str, Any]
    told: Mapping[str, tuple[int, ...]]
    pixels: int = 1024
    predictions: int = 2
    tiny: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "Stable Diffusion 1.5": Model(
        "stable-diffusion",
        {
            "unet": {"sample_size": 64, "cross_attention_dim": 768},
            "vae": VAE,
            "text_encoder": CLIP_L,
        },
        {"values": (1, 77, 768)},
        pixels=512,
        tiny=4,
    ),
    "Stable Diffusion XL": Model(
        "sdxl",
        {"unet": SDXL, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
        {"values": (1, 77, 2048), "pooled": (1, 1280), "ids": (1, 6)},
        tiny=4,
    ),
    "Stable Diffusion 3.5 medium": Model(
        "sd3",
        {
            "transformer": SD35_MEDIUM,
            "vae": VAE_16,
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5_XXL,
        },
        {"values": (1, 77 + 256, 4096), "pooled": (1, 2048)},
    ),
    "FLUX.1 dev": Model(
        "flux",
        {
            "transformer": {"guidance_embeds": True},
            "vae": VAE_16,
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
        },
        {"values": (1, 512, 4096), "pooled": (1, 768), "guidance": (1,)},
        predictions=1,
    ),
    "Z-Image": Model(
        "z-image",
        {"transformer": {}, "vae": VAE_16, "text_encoder": QWEN3_4B},
        {"values": (1, 128, 2560)},
    ),
    "Qwen-Image": Model(
        "qwen-image",
        {"transformer": {}, "vae": {}, "text_encoder": QWEN_VL_7B},
        {"values": (1, 128, 3584)},
        tiny=0,
    ),
    "FLUX.2 Klein 4B": Model(
        "flux2-klein",
        {"transformer": KLEIN_4B, "vae": {}, "text_encoder": QWEN3_4B},
        {"values": (1, 512, 7680)},
        predictions=1,
        tiny=0,
    ),
}


class Attention(TorchFunctionMode):
    """Attention by the memory-efficient kernel, as on a GPU: it keeps no matrix of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        q, k, v, mask = (named.get(n) for n in ("query", "key", "value", "attn_mask"))
        if mask is not None:
            mask = q.new_empty(()).expand(*q.shape[:-1], k.shape[-2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, mask, q.requires_grad or k.requires_grad)[0]


class Kept:
    """What autograd keeps, while it counts: bytes by storage, beside those of weights.

    Attributes:
        bytes: so far.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self.bytes, self._seen = 0, set()
        for network in networks:
            self._seen |= {storage(t) for t in (*network.parameters(), *network.buffers())}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        if storage(tensor) not in self._seen:
            self._seen.add(storage(tensor))
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is kept within."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        # Masks without values hold nothing back: here no prompt is padded.
        with Attention(), hooks, _config.patch(meta_nonzero_assume_all_nonzero=True):
            yield


def storage(tensor: Tensor) -> int:
    """What tells a tensor's storage from others, while the graph holds it."""
    return int(tensor.untyped_storage()._cdata)


def build(model: Model, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Its networks on `meta`, as the engine has them."""
    tiny = random_pipeline(family=model.family)
    networks = {}
    for name, config in model.configs.items():
        kind = type(getattr(tiny, name))
        with torch.device("meta"):
            ours = issubclass(kind, diffusers.ModelMixin)
            network = kind(**config) if ours else kind(kind.config_class(**config))
        networks[name] = nn.Module.to(network, dtype).eval().requires_grad_(False)
    own = {n: p for n, p in tiny.components.items() if n not in networks}
    told = {n: getattr(tiny.config, n) for n in ("is_distilled",) if hasattr(tiny.config, n)}
    if model.family == "stable-diffusion":
        told = {"requires_safety_checker": False}
    return Sampler.from_pipeline(type(tiny)(**own, **networks, **told)).model


def network_bytes(model: Model, built: Any, checkpointing: str) -> tuple[int, int]:
    """What one prediction keeps, and the most that a layer of it does."""
    ready = built.differentiable(checkpointing)
    told = {n: torch.empty(s, dtype=ready.dtype, device="meta") for n, s in model.told.items()}

    def predicted(latents: Tensor) -> Tensor:
        return ready.predict(latents, torch.empty((), device="meta"), Conditioning(told))

    latents = empty_latents(model, ready, ready.latents_dtype)
    return counted(ready.denoiser, checkpointing, predicted, latents)


def decoder_bytes(model: Model, built: Any, checkpointing: str) -> tuple[int, int]:
    """The same of the VAE's decoder."""
    ready = built.differentiable(checkpointing)
    latents = empty_latents(model, ready, ready.dtype)
    return counted(ready.vae, checkpointing, ready.decode, latents)


def empty_latents(model: Model, ready: Any, dtype: torch.dtype) -> Tensor:
    """Of its usual size, without values, a gradient's leaf."""
    shape = ready.latent_shape(model.pixels, model.pixels)
    return torch.empty(1, *shape, dtype=dtype, device="meta").requires_grad_()


def counted(
    network: nn.Module, checkpointing: str, run: Callable[[Tensor], Tensor], latents: Tensor
) -> tuple[int, int]:
    """What autograd keeps of a run through the network, and the most that a layer of it does."""
    kept, largest = Kept(network), [0]
    for part in parts(network) if checkpointing == "off" else ():
        watch(part, kept, largest)
    with kept.counting():
        output = run(latents)
    assert output.requires_grad
    return kept.bytes, largest[0]


def watch(part: nn.Module, kept: Kept, largest: list[int]) -> None:
    """Note what a layer keeps, where it is the most so far."""
    before: list[int] = []
    part.register_forward_pre_hook(lambda *_: before.append(kept.bytes))
    part.register_forward_hook(
        lambda *_: largest.__setitem__(0, max(largest[0], kept.bytes - before.pop()))
    )


def tiny_bytes(model: Model) -> int:
    """What a tiny decoder of TAESD's size keeps."""
    with torch.device("meta"):
        tiny = diffusers.AutoencoderTiny(latent_channels=model.tiny)
    tiny = nn.Module.to(tiny, torch.bfloat16).eval().requires_grad_(False)
    side = model.pixels // 8
    latents = torch.empty(1, model.tiny, side, side, dtype=torch.bfloat16, device="meta")
    kept = Kept(tiny)
    with kept.counting():
        tiny.decode(latents.requires_grad_())
    return kept.bytes


def computed(model: Model) -> dict[str, Any]:
    """A model's numbers, in bytes."""
    built = build(model)
    weights = {n: sum(p.nbytes for p in getattr(built, n).parameters()) for n in model.configs}
    (off, layer), (on, _) = (network_bytes(model, built, how) for how in ("off", "on"))
    (vae_off, block), (vae_on, _) = (decoder_bytes(model, built, how) for how in ("off", "on"))
    at_once = model.predictions if built.together else 1  # in one call of the network
    return {
        "pixels": model.pixels,
        "predictions": model.predictions,
        "weights": weights,
        "kept": {"off": off * model.predictions, "on": on * model.predictions + layer * at_once},
        "decoder": {
            "vae": vae_off,
            "vae, checkpointed": min(vae_off, vae_on + block),
            **({"tiny": tiny_bytes(model)} if model.tiny else {}),
            "linear": 0,
        },
    }


def ways(numbers: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """How it can be guided through the network, what changes least first, and the peak of each."""
    weights = numbers["weights"]
    text = sum(size for name, size in weights.items() if name.startswith("text"))
    others = sum(weights.values()) - text
    decoders = {n: size for n, size in numbers["decoder"].items() if n != "vae, checkpointed"}
    for decoder, on, away in itertools.product(decoders, (False, True), (False, True)):
        seen = "vae, checkpointed" if on and decoder == "vae" else decoder
        step = others + numbers["kept"]["on" if on else "off"] + numbers["decoder"][seen]
        # With the text encoders away, all weights are there while the prompts are encoded.
        peak = max(others + text, step) if away else text + step
        how = (["text off"] if away else []) + (["checkpointing"] if on else [])
        yield ", ".join([*how, *([decoder] if decoder != "vae" else [])]) or "as it is", peak


def fitting(numbers: Mapping[str, Any], card: float) -> str:
    """The first way that fits a card of so many GiB."""
    found = (how for how, peak in ways(numbers) if peak <= FREE * card * GIB)
    return next(found, "-")


def tables(results: Mapping[str, Any]) -> str:
    """Both tables, in Markdown."""

    def gib(size: float) -> str:
        return f"{size / GIB:.1f}"

    rows = [
        [
            "GiB",
            "pixels",
            "network",
            "VAE",
            "text",
            "step",
            "checkpointing",
            "and text off",
            "linear",
        ],
        ["---"] * 9,
    ]
    fits = [["card", *(f"{card} GiB" for card in CARDS)], ["---"] * (len(CARDS) + 1)]
    for name, numbers in results.items():
        weights, peaks = numbers["weights"], dict(ways(numbers))
        text = sum(size for part, size in weights.items() if part.startswith("text"))
        network = next(iter(weights.values()))
        shown = ("as it is", "checkpointing", "text off, checkpointing")
        linear = "text off, checkpointing, linear"
        sizes = (network, weights["vae"], text, *(peaks[how] for how in (*shown, linear)))
        rows.append([name, str(numbers["pixels"]), *map(gib, sizes)])
        fits.append([name, *(fitting(numbers, card) for card in CARDS)])
    return "\n\n".join(
        "\n".join(f"| {' | '.join(row)} |" for row in table) for table in (rows, fits)
    )


def write(results: Mapping[str, Any], page: Path, shipped: Path) -> None:
    """The tables into a page, and what `pilotfish doctor` tells beside it."""
    begin, end = "<!-- memory -->", "<!-- /memory -->"
    text = page.read_text(encoding="utf-8")
    inside = f"{begin}\n\n{tables(results)}\n\n{end}"
    text = re.sub(f"{begin}.*?{end}", lambda _: inside, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
    peaks = {
        name: {how: round(peak / GIB, 1) for how, peak in ways(numbers)}
        for name, numbers in results.items()
    }
    shipped.write_text(json.dumps(peaks, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Compute all, and write."""
    results = {}
    for name, model in MODELS.items():
        results[name] = computed(model)
        print(name, json.dumps(results[name]), flush=True)
    (HERE / "results" / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    write(results, ROOT / "docs" / "models.md", ROOT / "src/pilotfish/cli/memory.json")


if __name__ == "__main__":
    main()
