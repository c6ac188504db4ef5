"""Pictures as a guide sees them on the way to a finished one: predicted out of noise, cut, blurred.

A network that knows finished pictures only pulls early predictions towards what looks like nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from pilotfish_emoji.names import FOLDER
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from tqdm.auto import tqdm

from emoji_training.judge import augment
from emoji_training.networks import DDIMScheduler, StableDiffusionPipeline
from emoji_training.world import Dataset

EVERY: Final = 2  # one picture in so many is also predicted
REPEATS: Final = 2  # so that half of the draws are predictions
SIDE: Final = 64
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NOISE: Final = 0.4  # standard deviation of the strongest, where pictures span 1
AGAINST: Final = 2.0  # norm of the strongest change against a network, where pixels span 2


def with_predictions(data: Dataset, seed: int) -> Dataset:
    """The pictures, and some of them as the model predicts them, at every level of noise alike."""
    some = torch.arange(0, len(data.labels), EVERY).tolist()
    images = predict(data.images[some], seed)
    return Dataset(
        images=torch.cat([data.images, *[images] * REPEATS]),
        captions=data.captions + [data.captions[i] for i in some] * REPEATS,
        labels=torch.cat([data.labels, *[data.labels[some]] * REPEATS]),
    )


@torch.no_grad()
def predict(images: Tensor, seed: int) -> Tensor:
    """Pictures (N, 3, 64, 64), uint8, noised and predicted in one step, told no prompt."""
    generator = torch.Generator().manual_seed(seed)
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    nothing = pipe.encode_prompt("", "cpu", 1, do_classifier_free_guidance=False)[0]
    factor = pipe.vae.config.scaling_factor
    parts = []
    for part in tqdm(images.split(64), "predict", unit="batch"):
        x0 = pipe.vae.encode(part.float() / 127.5 - 1).latent_dist.mean * factor
        timesteps = torch.randint(1000, (len(part),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        latents = scheduler.add_noise(x0, noise, timesteps)
        eps = pipe.unet(latents, timesteps, nothing.expand(len(part), -1, -1)).sample
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        x0 = (latents - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        image = pipe.vae.decode(x0 / factor).sample / 2 + 0.5
        parts.append((image.clamp(0, 1) * 255).round().byte())
    return torch.cat(parts)


def show(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] cut, blurred as early predictions are, noisy; normalised.

    Noise, from none to strong, turns a classifier's gradient into something that can be seen
    (Kaur et al. 2019, "Are Perceptually-Aligned Gradients a General Property of Robust
    Classifiers?", arXiv 1910.08640).

    Args:
        smallest: the part of a picture's side that is shown at least.
    """
    side = int(torch.randint(round(smallest * SIDE), SIDE + 1, (), generator=generator))
    top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
    pieces = images[..., top : top + side, left : left + side]
    images = interpolate(pieces, (SIDE, SIDE), mode="bilinear", align_corners=False)
    blurred = interpolate(avg_pool2d(images, 4), (SIDE, SIDE), mode="bilinear", align_corners=False)
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator).square()
    shown = augment(torch.lerp(images, blurred, blur), generator)
    shown = shown + NOISE * noise * torch.randn(shown.shape, generator=generator)
    pixels: Tensor = (shown - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return pixels.contiguous(memory_format=torch.channels_last)


def against(pixels: Tensor, loss: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Normalised pictures (B, 3, 64, 64), each a step up the gradient of a network's loss.

    A network that is trained on these has gradients that draw what it names (Santurkar et al. 2019,
    "Image Synthesis with a Single (Robust) Classifier", arXiv 1906.09453). We differ: one step from
    the picture, of a random length up to `AGAINST`, in place of seven.
    """
    start = pixels.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(start), start)
    length = AGAINST * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    norm = slope.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    return pixels + length * slope / norm
