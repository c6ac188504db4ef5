"""For plugin authors' tests: a small random model, and a check of a plugin's contract."""

from __future__ import annotations

from typing import Any

import torch

from .errors import PilotfishError
from .plugin import Guide
from .sampler import Sampler
from .torchvision_fakes import mend_torchvision

WORDS = (
    *("a", "an", "the", "of", "on", "in", "and", "to", "with", "some", "style", "background"),
    *("red", "green", "blue", "black", "white", "picture", "photo", "drawing", "watercolor"),
    *("campfire", "puppy", "cat", "otter", "parrot", "skunk"),
)


def random_sampler(
    *, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Sampler:
    """A Stable Diffusion of random weights: 32 x 32 pixels, milliseconds a step, no downloads.

    Its pictures show nothing, but every number reacts to every input.

    Args:
        prediction_type: "epsilon" or "v_prediction".
    """
    return Sampler.from_pipeline(random_pipeline(prediction_type, dtype, seed))


def random_pipeline(
    prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """The `StableDiffusionPipeline` of `random_sampler`."""
    mend_torchvision()
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _random_networks()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        **parts,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if dtype == torch.float32 else pipeline.to(dtype=dtype)


def _random_networks() -> dict[str, Any]:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    )
    networks = {"text_encoder": CLIPTextModel(text), "unet": unet, "vae": vae}
    return {"tokenizer": tokenizer, **{name: n.eval() for name, n in networks.items()}}


def _tokenizer() -> Any:
    """A real `CLIPTokenizer`: one token for each of `WORDS`, pieces of letters for the rest."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {t: i for i, t in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            if merge not in merges:
                merges.append(merge)
            pieces[:2] = ["".join(merge)]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def check_plugin(plugin: Any, sampler: Sampler | None = None) -> None:
    """Run a plugin and check what every plugin must keep.

    It runs with one and with two images, also beside a second instance; two runs give the same
    picture; torch's global random state is left alone; a guide at scale 0 changes nothing.

    Args:
        plugin: an instance.
        sampler: the model to try it on; None is `random_sampler()`.

    Raises:
        PilotfishError: what the plugin broke.
    """
    sampler = sampler or random_sampler()

    def latents(*plugins: Any, num_images: int = 1) -> torch.Tensor:
        return sampler("a red cat", plugins=plugins, steps=3, seed=7, num_images=num_images).latents

    before = torch.random.get_rng_state()
    with_plugin = latents(plugin)
    if not torch.equal(before, torch.random.get_rng_state()):
        raise PilotfishError(f"{plugin!r} uses torch's global random state; use step.generator")
    if not torch.equal(with_plugin, latents(plugin)):
        raise PilotfishError(f"{plugin!r} gives another picture when it runs again")
    pair = latents(plugin, num_images=2)[:1]
    if not torch.allclose(pair, with_plugin, atol=1e-3):
        raise PilotfishError(f"{plugin!r} gives an image another picture beside a neighbour")
    if isinstance(plugin, Guide):
        off = type(plugin)(**{**plugin.settings.model_dump(), "scale": 0})
        if not torch.equal(latents(off), latents()):
            raise PilotfishError(f"{plugin!r} changes the picture at scale 0")
