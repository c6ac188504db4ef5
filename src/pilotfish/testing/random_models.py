"""Small models of random weights, and a step of random numbers: no downloads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import unknown
from ..guidance.graph import Leaves, SharedGraph
from ..guidance.noise import NoiseLevel
from ..models.protocol import Conditioning
from ..models.torchvision import mend_torchvision
from ..runs.run import Run
from ..sampling.generators import seeded
from ..sampling.sampler import Sampler
from ..sampling.step import Step, StepState

WORDS = (
    *("a", "an", "the", "of", "on", "in", "and", "to", "with", "some", "style", "background"),
    *("red", "green", "blue", "black", "white", "picture", "photo", "drawing", "watercolor"),
    *("campfire", "puppy", "cat", "otter", "parrot", "skunk"),
)


def random_sampler(
    *,
    family: str = "stable-diffusion",
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Sampler:
    """A model of random weights: 32 x 32 pixels, milliseconds a step, no downloads.

    Its pictures show nothing, but every number reacts to every input.

    Args:
        family: "stable-diffusion", or one of `random_families.FAMILIES`: "sdxl", "sd3" ...
        prediction_type: "epsilon" or "v_prediction", of Stable Diffusion alone.

    Raises:
        InputError: there is no such family.
    """
    return Sampler.from_pipeline(random_pipeline(prediction_type, dtype, seed, family))


def random_pipeline(
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    family: str = "stable-diffusion",
) -> Any:
    """The pipeline of `random_sampler`."""
    builders = families(prediction_type)
    if family not in builders:
        raise unknown("model family", family, builders)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = builders[family](tokenizer())
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            # The pipeline's own `to` warns of layers to keep in float32, where there are none.
            nn.Module.to(part.eval(), dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def families(prediction_type: str = "epsilon") -> dict[str, Callable[[Any], Any]]:
    """What builds each family's random pipeline, from a CLIP tokenizer."""
    mend_torchvision()
    from .random_families import FAMILIES, stable_diffusion

    return {"stable-diffusion": partial(stable_diffusion, prediction_type), **FAMILIES}


def tokenizer() -> Any:
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


def random_step(
    *,
    image: Tensor | None = None,
    rgb: Tensor | None = None,
    x0: Tensor | None = None,
    num_images: int = 2,
    index: int = 0,
    num_steps: int = 10,
    seed: int = 0,
) -> Step:
    """A step of random numbers as a guide sees it, to call its loss without a run.

    `step.image`, `step.rgb` and `step.x0` take gradients: `torch.autograd.grad(loss.sum(),
    step.image)`. `step.run.model` is None.

    Args:
        image: what the step shows (B, 3, 8H, 8W) instead of random numbers (B, 3, 128, 128).
        rgb: the same at latent size (B, 3, H, W).
        x0: the same in latents (B, 4, H, W).
        num_images: B, where none of the three is given.
    """
    given = [len(tensor) for tensor in (image, rgb, x0) if tensor is not None]
    batch, generator = (given or [num_images])[0], torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator)

    pictures = {"image": random(3, 128, 128), "rgb": random(3, 16, 16)}
    pictures |= {n: t for n, t in (("image", image), ("rgb", rgb)) if t is not None}
    run = Run(seed=seed, num_images=batch, steps=num_steps)
    state = StepState(
        run=run,
        index=index,
        num_steps=num_steps,
        timestep=torch.tensor(500),
        level=NoiseLevel.of(alpha=0.6, sigma=0.8, prediction_type="epsilon"),
        latents=random(4, 16, 16),
        conditioning=Conditioning({"values": random(77, 16)}),
        generators=lambda plugin: seeded(run, plugin),
        output=random(4, 16, 16),
        _x0=x0,
    )
    graph = SharedGraph(state.x0, lambda _: pictures["image"], lambda _: pictures["rgb"])
    return Step(state, "plugin", Leaves(graph))
