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
# # The first hour
#
# Make a picture, look at how it comes about, pull it towards blue, see what that did, and write a
# loss of your own. The small model that ships draws emoji, offline, in seconds on a CPU.

# %%
import pilotfish

STEPS = 25
PROMPT = "a campfire on a black background"
sampler = pilotfish.load()
sampler

# %% [markdown]
# ## A picture
#
# With `show=True` a small picture changes with every step: what the model expects to see at the
# end, `x0`, by a linear estimate of its colours that costs next to nothing.

# %%
plain = sampler(PROMPT, steps=STEPS, seed=32, show=True)
plain

# %% [markdown]
# ## A guide
#
# A guide is a plugin with a loss. `blue` measures how far the picture is from blue, and pulls every
# step towards less. `scale` is its strength: 1 pulls as hard as the prompt does, 0 is off.

# %%
blue = sampler(PROMPT, plugins=["blue:scale=0.5"], steps=STEPS, seed=32)
blue

# %% [markdown]
# The trace holds every number behind that table: of each guide at each step.

# %%
print("\n".join(blue.trace.told()))
blue.trace.to_dicts()[0]

# %% [markdown]
# ## Step by step
#
# A stream gives the steps one by one: look, keep what you like, or stop when it is good enough.

# %%
previews = []
with_steps = sampler.stream(PROMPT, plugins=["blue:scale=0.5"], steps=STEPS, seed=32)
for step in with_steps:
    previews += step.preview()
    if step.progress >= 0.5:
        break
with_steps.close()
print(f"stopped at {step}")
previews[-1]


# %% [markdown]
# ## A loss of your own
#
# Ten lines. `step.image` is the decoded picture, (B, 3, height, width) in [0, 1]; the loss is one
# number per picture, and whatever torch can differentiate will do.


# %%
class Warmth(pilotfish.Guide):
    """More red than blue."""

    class Settings(pilotfish.Guide.Settings):
        amount: float = pilotfish.Setting(0.5, ge=-1, le=1, description="red minus blue")

    def loss_guidance(self, step):
        red, _, blue = step.image.unbind(dim=1)
        return ((red - blue) - self.settings.amount).abs().mean(dim=(1, 2))  # (B,)


warm = sampler(PROMPT, plugins=[Warmth(scale=0.5)], steps=STEPS, seed=32)
warm

# %% [markdown]
# ## Two that disagree
#
# Guides stack. These two want opposite things, and the trace says so.

# %%
both = sampler(PROMPT, plugins=["blue:scale=0.5", Warmth(scale=0.5)], steps=STEPS, seed=32)
both

# %% [markdown]
# ## Keep it
#
# A picture that is saved holds its whole run, your class's settings among it; `pilotfish replay`
# makes it again. What a notebook defines has no address for that, so put the class into a file, and
# give it as `warmth.py:Warmth`.

# %%
print(blue.run.to_toml())
