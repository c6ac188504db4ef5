# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From the talk's loop to a plugin
#
# Jonathan Whitaker's *Stable Diffusion Deep Dive* (2022) ends with guidance by hand: decode what
# the model expects, measure a loss on it, and move the latents by its gradient times sigma squared.
# Here is that loop with nothing but the networks and a scheduler, then the same in three lines of
# pilotfish, equal to the bit; and then what it would have been work to add by hand.

# %%
import torch

import pilotfish

STEPS, EVERY, SCALE = 25, 5, 200
PROMPT, SEED = "a campfire on a black background", 32
sampler = pilotfish.load()
model = sampler.model
guidance = model.defaults.guidance_scale

# %% [markdown]
# ## By hand: text, noise, schedule


# %%
def embed(text):
    tokens = model.tokenizer([text], padding="max_length", return_tensors="pt")
    return model.text_encoder(tokens.input_ids)[0]  # (1, T, D)


with torch.no_grad():
    embeddings = torch.cat([embed(""), embed(PROMPT)])
scheduler = model.new_scheduler("lms")
scheduler.set_timesteps(STEPS)
shape = (1, *model.latent_shape(model.defaults.height, model.defaults.width))
noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
latents = noise * scheduler.init_noise_sigma
print(f"{len(scheduler.timesteps)} steps from sigma {scheduler.sigmas[0]:.1f} to 0")

# %% [markdown]
# ## By hand: the loop
#
# `x0 = latents - sigma * eps` is the clean picture that the prediction means. The loss is measured
# on its decode, and the gradient goes back to the latents.


# %%
def blueness(image):
    return (image[:, 2] - 0.9).abs().mean()


losses = []
for index, timestep in enumerate(scheduler.timesteps):
    sigma = scheduler.sigmas[index]
    with torch.no_grad():
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        predicted = model.unet(scaled, timestep, encoder_hidden_states=embeddings).sample
        uncond, cond = predicted.chunk(2)
        eps = uncond + guidance * (cond - uncond)
    if index % EVERY == 0:
        latents = latents.detach().requires_grad_()
        x0 = latents - sigma * eps
        image = model.vae.decode(x0 / model.vae.config.scaling_factor).sample / 2 + 0.5
        loss = blueness(image) * SCALE
        gradient = torch.autograd.grad(loss, latents)[0]
        latents = latents.detach() - gradient * sigma**2
        losses.append(loss.item() / SCALE)
    latents = scheduler.step(eps, timestep, latents).prev_sample
by_hand = latents.detach()
print("loss", " ".join(f"{loss:.3f}" for loss in losses))
with torch.no_grad():
    picture = pilotfish.to_pil(model.decode(by_hand))[0]
picture

# %% [markdown]
# ## In pilotfish's terms
#
# The loss is a guide, `every` is its setting, and the move (gradient at x0, times sigma squared, on
# the latents) is the preset `deep-dive`.

# %%
run = {"steps": STEPS, "seed": SEED, "scheduler": "lms", "guidance_scale": guidance}
ours = sampler(PROMPT, plugins=[f"blue:scale={SCALE},every={EVERY}"], preset="deep-dive", **run)
print("equal to the bit:", torch.equal(ours.latents, by_hand))
ours

# %% [markdown]
# The same losses, of every step at which it acted:

# %%
print("by hand  ", " ".join(f"{loss:.4f}" for loss in losses))
print("pilotfish", " ".join(f"{loss:.4f}" for loss in ours.trace.losses("blue")))

# %% [markdown]
# ## What it was for
#
# A scale of 200 is found by trying, and fits one loss, one scheduler and one number of steps. With
# the usual preset, `balanced`, a scale of 1 pulls as hard as the prompt, at every step, whatever
# the loss; and a second guide is one more item in the list.

# %%
usual = sampler(PROMPT, plugins=["blue:scale=0.5", "palette:colors='#035,#fa0',scale=0.5"], **run)
print("\n".join(usual.trace.told()))
usual
