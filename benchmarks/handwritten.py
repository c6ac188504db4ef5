"""Guidance as a careful user would write it by hand: torch, diffusers and open_clip, nothing else.

What `speed.py` compares with. A test asserts the imports.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import open_clip
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import interpolate, normalize

Loss = Callable[[Tensor], Tensor]  # picture (B, 3, 8H, 8W) in [0, 1] -> (B,)
Network = Callable[[Tensor], Tensor]  # latents -> eps


@dataclass(frozen=True)
class Work:
    """What every loop does.

    Attributes:
        batch: images, with seeds `seed`, `seed + 1`, ...
        scale: strength of the guidance: the latents move by `-scale * sigma^2 * gradient`.
    """

    prompt: str
    steps: int
    batch: int = 1
    seed: int = 32
    guidance_scale: float = 8.0
    scale: float = 50.0


# ---- loops; for schedulers whose latents are x0 + sigma * eps: Euler, LMS, Heun ----


def unguided(pipeline: StableDiffusionPipeline, work: Work) -> tuple[Tensor, list]:
    """Latents and pictures: UNet, classifier-free guidance, `scheduler.step`."""
    with torch.no_grad():
        scheduler, embeddings, latents = start(pipeline, work)
        for timestep in scheduler.timesteps:
            network = at(pipeline, scheduler, timestep, embeddings, work.guidance_scale)
            latents = scheduler.step(network(latents), timestep, latents, return_dict=False)[0]
        return latents, pictures(pipeline, latents)


def outside(pipeline: StableDiffusionPipeline, work: Work) -> tuple[Tensor, list]:
    """What every run has once: prompts encoded and noise drawn, pictures decoded; no step."""
    with torch.no_grad():
        latents = start(pipeline, work)[2]
        return latents, pictures(pipeline, latents)


def guided(
    pipeline: StableDiffusionPipeline,
    work: Work,
    losses: Sequence[Loss],
    gradient: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, list]:
    """Latents and pictures under several losses on the predicted picture, at every step.

    The prediction made before the move is kept for the scheduler, as in the Deep Dive talk.

    Args:
        gradient: `summed`, `summed_at_x0`, `retained` or `textbook`.
    """
    scheduler, embeddings, latents = start(pipeline, work)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        network = at(pipeline, scheduler, timestep, embeddings, work.guidance_scale)
        eps, slope = gradient(pipeline, network, losses, latents, sigma)
        latents = latents - (work.scale * sigma**2 * slope.float()).to(latents.dtype)
        latents = scheduler.step(eps, timestep, latents, return_dict=False)[0]
    with torch.no_grad():
        return latents, pictures(pipeline, latents)


def fitting_scale(pipeline: StableDiffusionPipeline, work: Work, loss: Loss) -> float:
    """The strength at which a loss's first move is a third of the latents' standard deviation."""
    scheduler, embeddings, latents = start(pipeline, work)
    sigma, timestep = scheduler.sigmas[0], scheduler.timesteps[0]
    network = at(pipeline, scheduler, timestep, embeddings, work.guidance_scale)
    large = 2.0**16  # pixel gradients of a CLIP vanish in float16

    def enlarged(image: Tensor) -> Tensor:
        return large * loss(image)

    slope = summed(pipeline, network, [enlarged], latents, sigma)[1].float() / large
    return float(latents.float().std() / (3 * sigma**2 * slope).std())


# ---- eps, and the gradient of the losses: four ways ----


def summed(
    pipeline: StableDiffusionPipeline,
    network: Network,
    losses: Sequence[Loss],
    latents: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Tensor]:
    """One graph for all losses, and one backward from their sum: the best that a loop can do."""
    latents = latents.detach().requires_grad_()
    eps = network(latents)
    image = decode(pipeline, clean(latents, eps, sigma))
    total = torch.stack([loss(image).sum() for loss in losses]).sum()
    return eps.detach(), torch.autograd.grad(total, latents)[0]


def summed_at_x0(
    pipeline: StableDiffusionPipeline,
    network: Network,
    losses: Sequence[Loss],
    latents: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same, with the gradient taken at the predicted x0 instead of through the UNet."""
    with torch.no_grad():
        eps = network(latents)
    x0 = clean(latents, eps, sigma).requires_grad_()
    image = decode(pipeline, x0)
    total = torch.stack([loss(image).sum() for loss in losses]).sum()
    return eps, torch.autograd.grad(total, x0)[0]


def retained(
    pipeline: StableDiffusionPipeline,
    network: Network,
    losses: Sequence[Loss],
    latents: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Tensor]:
    """One graph for all losses, and a backward through all of it for each of them."""
    latents = latents.detach().requires_grad_()
    eps = network(latents)
    image = decode(pipeline, clean(latents, eps, sigma))
    gradients = [
        torch.autograd.grad(loss(image).sum(), latents, retain_graph=loss is not losses[-1])[0]
        for loss in losses
    ]
    return eps.detach(), torch.stack(gradients).sum(dim=0)


def textbook(
    pipeline: StableDiffusionPipeline,
    network: Network,
    losses: Sequence[Loss],
    latents: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Tensor]:
    """The prediction without a graph, then for each loss a function that builds one of its own.

    What stacking the guidance of several scripts comes to: each brings a `cond_fn(latents)`.
    """
    with torch.no_grad():
        eps = network(latents)
    slope = torch.zeros_like(latents)
    for loss in losses:
        leaf = latents.detach().requires_grad_()
        image = decode(pipeline, clean(leaf, network(leaf), sigma))
        slope = slope + torch.autograd.grad(loss(image).sum(), leaf)[0]
    return eps, slope


# ---- losses ----


def color(channel: int = 2, target: float = 0.9) -> Loss:
    """Mean distance of a colour channel to a target: the talk's blue loss."""
    return lambda image: (image[:, channel] - target).abs().mean(dim=(1, 2))


def palette(colors: Sequence[Sequence[float]]) -> Loss:
    """Mean squared distance of each pixel to the nearest of some colours."""

    def loss(image: Tensor) -> Tensor:
        distances = [
            (image - image.new_tensor(color).view(3, 1, 1)).square().sum(dim=1) for color in colors
        ]
        return torch.stack(distances).amin(dim=0).mean(dim=(1, 2))

    return loss


def similarity(see: Callable[[Tensor], Tensor], size: int, target: Tensor) -> Loss:
    """Half the squared angle between what CLIP sees and a target (D,): Crowson 2021.

    Args:
        see: CLIP's image encoder.
        size: of the pictures that it takes.
    """

    def loss(image: Tensor) -> Tensor:
        shown = interpolate(image, (size, size), mode="bilinear", antialias=True)
        features = see((shown - 0.45) / 0.27)  # about CLIP's own mean and deviation
        chord = (normalize(features.float(), dim=-1) - normalize(target, dim=-1)).norm(dim=-1)
        return 2 * (chord / 2).asin().square()

    return loss


def clips(model: open_clip.CLIP, count: int, dtype: torch.dtype) -> list[Loss]:
    """So many losses with a CLIP, each with a random target of its own.

    Args:
        dtype: of the pictures that the model takes.
    """
    model.eval().requires_grad_(False)
    device = next(model.visual.parameters()).device
    generator = torch.Generator().manual_seed(0)
    width = model.visual.output_dim
    targets = torch.randn(count, width, generator=generator).to(device)
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]

    def see(pixels: Tensor) -> Tensor:
        return model.encode_image(pixels.to(dtype))

    return [similarity(see, side, target) for target in targets]


# ---- what all of them share ----


def start(pipeline: StableDiffusionPipeline, work: Work) -> tuple[SchedulerMixin, Tensor, Tensor]:
    """A fresh scheduler, the embeddings (2B, T, D) with the empty prompts first, and the noise."""
    unet, device = pipeline.unet, pipeline.unet.device
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(work.steps, device=device)
    with torch.no_grad():
        pair = torch.cat([embed(pipeline, ""), embed(pipeline, work.prompt)]).to(unet.dtype)
    side = unet.config.sample_size
    shape = (1, unet.config.in_channels, side, side)
    noise = torch.cat(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=unet.dtype)
            for seed in range(work.seed, work.seed + work.batch)
        ]
    )
    embeddings = pair.repeat_interleave(work.batch, dim=0)
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


def at(
    pipeline: StableDiffusionPipeline,
    scheduler: SchedulerMixin,
    timestep: Tensor,
    embeddings: Tensor,
    guidance_scale: float,
) -> Network:
    """The noise that the UNet predicts at a timestep, under classifier-free guidance."""

    def network(latents: Tensor) -> Tensor:
        doubled = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        output = pipeline.unet(
            doubled, timestep, encoder_hidden_states=embeddings, return_dict=False
        )
        uncond, cond = output[0].chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return network


def clean(latents: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Predicted clean latents, float32."""
    return latents.float() - sigma * eps.float()


def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """The picture (B, 3, 8H, 8W) in [0, 1], not clamped."""
    vae = pipeline.vae
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    return vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5


def pictures(pipeline: StableDiffusionPipeline, latents: Tensor) -> list:
    """PIL pictures."""
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(image)
