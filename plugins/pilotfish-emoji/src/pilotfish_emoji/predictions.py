"""Pictures as the model predicts them out of noise: what a guide sees on the way to a picture.

A network that knows finished pictures only pulls early predictions towards what looks like nothing.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pilotfish_emoji.names import FOLDER
from pilotfish_emoji.networks import DDIMScheduler, StableDiffusionPipeline
from pilotfish_emoji.world import Dataset

EVERY: Final = 4  # one picture in so many is also predicted
REPEATS: Final = 3  # so that three sevenths of the draws are predictions


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
