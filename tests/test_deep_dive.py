"""The preset "deep-dive" against the plain loop of the talk, transcribed here."""

import diffusers
import pytest
import torch

from pilotfish import Guide, Setting


class Blue(Guide):
    class Settings(Guide.Settings):
        target: float = Setting(0.9, ge=0, le=1)

    def loss_guidance(self, step):
        return (step.image[:, 2] - self.settings.target).abs().mean(dim=(1, 2))


def talk_loop(pipe, prompt, seed, steps, guidance_scale, blue_scale, every):
    """Stable Diffusion Deep Dive, last section: guidance by a loss on the decoded x0.

    The networks must be frozen, as pilotfish freezes them: torch's backward passes round
    differently (2e-8 here) where a weight asks for its own gradient.
    """
    scheduler = diffusers.LMSDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)

    def embed(text):
        tokens = pipe.tokenizer(
            [text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            return pipe.text_encoder(tokens.input_ids)[0]

    text_embeddings = torch.cat([embed(""), embed(prompt)])
    latents = torch.randn((1, 4, 16, 16), generator=torch.manual_seed(seed))
    latents = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        with torch.no_grad():
            noise = pipe.unet(model_input, t, encoder_hidden_states=text_embeddings).sample
        uncond, text = noise.chunk(2)
        noise = uncond + guidance_scale * (text - uncond)
        if i % every == 0:
            latents = latents.detach().requires_grad_()
            x0 = latents - sigma * noise
            image = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
            loss = torch.abs(image[:, 2] - 0.9).mean() * blue_scale
            gradient = torch.autograd.grad(loss, latents)[0]
            latents = latents.detach() - gradient * sigma**2
        latents = scheduler.step(noise, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("blue_scale", [0, 200])
def test_the_deep_dive_preset_is_the_talks_loop_to_the_bit(pipeline, sampler, blue_scale):
    pipeline.vae.requires_grad_(False)
    with torch.random.fork_rng():
        expected = talk_loop(pipeline, "a campfire", 32, 50, 8, blue_scale, 5)
    ours = sampler(
        "a campfire",
        plugins=[Blue(scale=blue_scale, every=5)],
        preset="deep-dive",
        scheduler="lms",
        steps=50,
        guidance_scale=8,
        seed=32,
    )
    assert torch.equal(ours.latents, expected)
    assert [r.index for r in ours.trace] == ([0, *range(5, 50, 5)] if blue_scale else [])
