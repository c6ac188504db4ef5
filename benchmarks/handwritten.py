"""Guidance as a careful user would write it by hand: torch, diffusers and open_clip, nothing else.

What `speed.py` compares with. A test asserts the imports.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import open_clip
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn.functional import interpolate, normalize

Loss = Callable[[Tensor], Tensor]  # picture (B, 3, 8H, 8W) in [0, 1] -> (B,)


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


# ---- loops; for flows, and schedulers whose latents are x0 + sigma * eps: Euler, LMS, Heun ----


def unguided(pipeline: DiffusionPipeline, work: Work) -> tuple[Tensor, list]:
    """Latents and pictures: the network, classifier-free guidance, `scheduler.step`."""
    with torch.no_grad():
        model = of(pipeline, work)
        latents = model.noise
        for timestep in model.scheduler.timesteps:
            output = model.output(latents, timestep)
            latents = model.scheduler.step(output, timestep, latents, return_dict=False)[0]
        return model.cells(latents), model.pictures(latents)


def outside(pipeline: DiffusionPipeline, work: Work) -> tuple[Tensor, list]:
    """What every run has once: prompts encoded and noise drawn, pictures decoded; no step."""
    with torch.no_grad():
        model = of(pipeline, work)
        return model.cells(model.noise), model.pictures(model.noise)


def guided(
    pipeline: DiffusionPipeline, work: Work, losses: Sequence[Loss], gradient: "Gradient"
) -> tuple[Tensor, list]:
    """Latents and pictures under several losses on the predicted picture, at every step.

    The prediction made before the move is kept for the scheduler, as in the Deep Dive talk.

    Args:
        gradient: `summed`, `summed_at_x0`, `retained` or `textbook`.
    """
    model = of(pipeline, work)
    latents = model.noise
    for index, timestep in enumerate(model.scheduler.timesteps):
        sigma = model.scheduler.sigmas[index]
        output, slope = gradient(model, losses, latents, timestep, sigma)
        latents = latents - (work.scale * sigma**2 * slope.float()).to(latents.dtype)
        latents = model.scheduler.step(output, timestep, latents, return_dict=False)[0]
    with torch.no_grad():
        return model.cells(latents), model.pictures(latents)


def fitting_scale(pipeline: DiffusionPipeline, work: Work, loss: Loss) -> float:
    """The strength at which a loss's first move is a third of the latents' standard deviation."""
    model = of(pipeline, work)
    sigma, timestep = model.scheduler.sigmas[0], model.scheduler.timesteps[0]
    large = 2.0**16  # pixel gradients of a CLIP vanish in float16

    def enlarged(image: Tensor) -> Tensor:
        return large * loss(image)

    slope = summed(model, [enlarged], model.noise, timestep, sigma)[1].float() / large
    return float(model.noise.float().std() / (3 * sigma**2 * slope).std())


# ---- the network's output, and the gradient of the losses: four ways ----


def summed(
    model: "Model", losses: Sequence[Loss], latents: Tensor, timestep: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """One graph for all losses, and one backward from their sum: the best that a loop can do."""
    latents = latents.detach().requires_grad_()
    output = model.output(latents, timestep)
    image = model.decode(clean(latents, output, sigma))
    total = torch.stack([loss(image).sum() for loss in losses]).sum()
    return output.detach(), torch.autograd.grad(total, latents)[0]


def summed_at_x0(
    model: "Model", losses: Sequence[Loss], latents: Tensor, timestep: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, with the gradient taken at the predicted x0 instead of through the network."""
    with torch.no_grad():
        output = model.output(latents, timestep)
    x0 = clean(latents, output, sigma).requires_grad_()
    image = model.decode(x0)
    total = torch.stack([loss(image).sum() for loss in losses]).sum()
    return output, torch.autograd.grad(total, x0)[0]


def retained(
    model: "Model", losses: Sequence[Loss], latents: Tensor, timestep: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """One graph for all losses, and a backward through all of it for each of them."""
    latents = latents.detach().requires_grad_()
    output = model.output(latents, timestep)
    image = model.decode(clean(latents, output, sigma))
    gradients = [
        torch.autograd.grad(loss(image).sum(), latents, retain_graph=loss is not losses[-1])[0]
        for loss in losses
    ]
    return output.detach(), torch.stack(gradients).sum(dim=0)


def textbook(
    model: "Model", losses: Sequence[Loss], latents: Tensor, timestep: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The prediction without a graph, then for each loss a function that builds one of its own.

    What stacking the guidance of several scripts comes to: each brings a `cond_fn(latents)`.
    """
    with torch.no_grad():
        output = model.output(latents, timestep)
    slope = torch.zeros_like(latents)
    for loss in losses:
        leaf = latents.detach().requires_grad_()
        image = model.decode(clean(leaf, model.output(leaf, timestep), sigma))
        slope = slope + torch.autograd.grad(loss(image).sum(), leaf)[0]
    return output, slope


def clean(latents: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
    """Predicted clean latents, float32: of the noise, and of a flow's velocity `noise - x0`."""
    return latents.float() - sigma * output.float()


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


# ---- what loops call: a pipeline's networks, told what the work says ----


class Model:
    """`StableDiffusionPipeline`'s, whose network predicts the noise.

    Attributes:
        scheduler: a fresh one.
        noise: the first latents.
    """

    def __init__(self, pipeline: DiffusionPipeline, work: Work) -> None:
        self.pipeline, self.work, self.vae = pipeline, work, pipeline.vae
        self.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        self._begin()
        with torch.no_grad():
            self.told = self._told()

    def _begin(self) -> None:
        """The scheduler's timesteps, and the noise."""
        unet = self.pipeline.unet
        self.scheduler.set_timesteps(self.work.steps, device=unet.device)
        noise = self._drawn(unet, unet.config.in_channels, unet.config.sample_size)
        self.noise = noise * self.scheduler.init_noise_sigma

    def _drawn(self, network: torch.nn.Module, channels: int, side: int) -> Tensor:
        """Each image's from a generator of its own, (B, C, side, side)."""
        shape, first = (1, channels, side, side), self.work.seed
        generators = [
            torch.Generator().manual_seed(first + number) for number in range(self.work.batch)
        ]
        noise = [torch.randn(shape, generator=g, dtype=network.dtype) for g in generators]
        return torch.cat(noise).to(network.device)

    def _told(self) -> Tensor:
        """The embeddings (2B, T, D), with those of the empty prompt first."""
        pair = torch.cat([self._embedded(""), self._embedded(self.work.prompt)])
        return pair.to(self.pipeline.unet.dtype).repeat_interleave(self.work.batch, dim=0)

    def _embedded(self, prompt: str) -> Tensor:
        """The text encoder's output (1, T, D)."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        ids = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return encoder(ids.to(encoder.device))[0]

    def output(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What the network predicts, under classifier-free guidance."""
        doubled = self.scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        both = self.pipeline.unet(
            doubled, timestep, encoder_hidden_states=self.told, return_dict=False
        )[0]
        return self._led(both)

    def _led(self, both: Tensor) -> Tensor:
        uncond, cond = both.chunk(2)
        return uncond + self.work.guidance_scale * (cond - uncond)

    def cells(self, latents: Tensor) -> Tensor:
        """Latents as the VAE has them, (B, C, H, W)."""
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """The picture (B, 3, 8H, 8W) in [0, 1], not clamped."""
        return self._decoded(latents.to(self.vae.dtype)).float() / 2 + 0.5

    def pictures(self, latents: Tensor) -> list:
        """PIL pictures."""
        return self.pipeline.image_processor.postprocess(self._decoded(latents))

    def _decoded(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled = self.cells(latents) / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(scaled, return_dict=False)[0]


class StableDiffusion3(Model):
    """`StableDiffusion3Pipeline`'s: a flow, and a transformer told what its encoders pool too."""

    def _begin(self) -> None:
        transformer = self.pipeline.transformer
        self.scheduler.set_timesteps(self.work.steps, device=transformer.device)
        side = self.pipeline.default_sample_size
        self.noise = self._drawn(transformer, transformer.config.in_channels, side)

    def _told(self) -> dict[str, Tensor]:
        cond, uncond, pooled, unpooled = self.pipeline.encode_prompt(
            self.work.prompt, None, None, num_images_per_prompt=self.work.batch
        )
        return {
            "encoder_hidden_states": torch.cat([uncond, cond]),
            "pooled_projections": torch.cat([unpooled, pooled]),
        }

    def output(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What the network predicts, under classifier-free guidance."""
        doubled = torch.cat([latents] * 2)
        times = timestep.expand(len(doubled))
        both = self.pipeline.transformer(doubled, timestep=times, **self.told, return_dict=False)
        return self._led(both[0])


class Flux(Model):
    """`FluxPipeline`'s: a flow on packed latents, and a network that is told the guidance scale."""

    def _begin(self) -> None:
        transformer, config = self.pipeline.transformer, self.scheduler.config
        self.side = self.pipeline.default_sample_size
        noise = self._drawn(transformer, transformer.config.in_channels // 4, self.side)
        self.noise = self.pipeline._pack_latents(noise, *noise.shape)
        shift = calculate_shift(
            self.noise.shape[1],
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        sigmas = torch.linspace(1, 1 / self.work.steps, self.work.steps, dtype=torch.double)
        self.scheduler.set_timesteps(sigmas=sigmas.numpy(), mu=shift, device=transformer.device)

    def _told(self) -> dict[str, Tensor]:
        text, pooled, places = self.pipeline.encode_prompt(
            self.work.prompt, None, num_images_per_prompt=self.work.batch
        )
        half = self.side // 2
        grid = torch.cartesian_prod(*map(torch.arange, (1, half, half))).to(text)
        guidance = text.new_full([self.work.batch], self.work.guidance_scale, dtype=torch.float)
        return {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "txt_ids": places,
            "img_ids": grid,
            "guidance": guidance,
        }

    def output(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What the network predicts, in tokens."""
        times = timestep.expand(len(latents)).to(latents.dtype) / 1000
        tokens = latents.view_as(latents)  # torch's counter of operations hooks no leaf
        return self.pipeline.transformer(tokens, timestep=times, **self.told, return_dict=False)[0]

    def cells(self, latents: Tensor) -> Tensor:
        """Latents as the VAE has them, (B, C, H, W), from tokens."""
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(latents, *(2 * [self.side * factor]), factor)


Gradient = Callable[[Model, Sequence[Loss], Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
MODELS = {"StableDiffusion3Pipeline": StableDiffusion3, "FluxPipeline": Flux}


def of(pipeline: DiffusionPipeline, work: Work) -> Model:
    """A pipeline's networks as its loop calls them."""
    return MODELS.get(type(pipeline).__name__, Model)(pipeline, work)
