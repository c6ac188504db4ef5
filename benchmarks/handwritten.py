"""Sampling loops as a careful user would write them by hand: torch and diffusers, nothing else.

What `speed.py` compares with. A test asserts the imports.
"""

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from torch import Tensor


def unguided(
    pipeline: StableDiffusionPipeline, prompt: str, *, seed: int, steps: int, guidance_scale: float
) -> tuple[Tensor, list]:
    """Latents and pictures: UNet, classifier-free guidance, `scheduler.step`."""
    with torch.no_grad():
        scheduler, embeddings, latents = start(pipeline, prompt, seed, steps)
        for timestep in scheduler.timesteps:
            eps = predict(pipeline, scheduler, latents, timestep, embeddings, guidance_scale)
            latents = scheduler.step(eps, timestep, latents, return_dict=False)[0]
        return latents, pictures(pipeline, latents)


def guided(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    scale: float,
    target: float,
    through_unet: bool = False,
) -> tuple[Tensor, list]:
    """Latents and pictures under the blue loss of the Deep Dive talk, at every step.

    The latents move by `-scale * sigma^2 * gradient`; the prediction made before the move is kept.
    For schedulers whose latents are `x0 + sigma * eps`: LMS, Euler, Heun.

    Args:
        through_unet: go back through the UNet too, instead of stopping at the predicted x0.
    """
    scheduler, embeddings, latents = start(pipeline, prompt, seed, steps)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        latents = latents.detach().requires_grad_(through_unet)
        with torch.set_grad_enabled(through_unet):
            eps = predict(pipeline, scheduler, latents, timestep, embeddings, guidance_scale)
            x0 = latents - sigma * eps
        source = latents if through_unet else x0.requires_grad_()
        loss = (decode(pipeline, x0)[:, 2] - target).abs().mean(dim=(1, 2)).sum()
        (gradient,) = torch.autograd.grad(loss, source)
        latents = latents.detach() - scale * sigma**2 * gradient
        latents = scheduler.step(eps.detach(), timestep, latents, return_dict=False)[0]
    with torch.no_grad():
        return latents, pictures(pipeline, latents)


def start(
    pipeline: StableDiffusionPipeline, prompt: str, seed: int, steps: int
) -> tuple[SchedulerMixin, Tensor, Tensor]:
    """A fresh scheduler, the embeddings (2, T, D) with the empty prompt first, and the noise."""
    unet, device = pipeline.unet, pipeline.unet.device
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    with torch.no_grad():
        embeddings = torch.cat([embed(pipeline, ""), embed(pipeline, prompt)]).to(unet.dtype)
    side = unet.config.sample_size
    shape = (1, unet.config.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=unet.dtype)
    return scheduler, embeddings, noise.to(device) * scheduler.init_noise_sigma


def embed(pipeline: StableDiffusionPipeline, prompt: str) -> Tensor:
    """The text encoder's output (1, T, D)."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        prompt,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0]


def predict(
    pipeline: StableDiffusionPipeline,
    scheduler: SchedulerMixin,
    latents: Tensor,
    timestep: Tensor,
    embeddings: Tensor,
    guidance_scale: float,
) -> Tensor:
    """The noise that the UNet predicts, under classifier-free guidance."""
    doubled = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
    output = pipeline.unet(doubled, timestep, encoder_hidden_states=embeddings, return_dict=False)
    uncond, cond = output[0].chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """The picture (1, 3, 8H, 8W) in [0, 1], not clamped."""
    vae = pipeline.vae
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    return vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5


def pictures(pipeline: StableDiffusionPipeline, latents: Tensor) -> list:
    """PIL pictures."""
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(image)
