"""What plugins add to the network's calls, put around them, and ask it beside them."""

import contextlib

import diffusers
import pytest
import torch
from torch import nn

from pilotfish import Guide, PilotfishError, Plugin, PluginError, Sampler, Setting
from pilotfish.testing import random_pipeline


@contextlib.contextmanager
def identity_attention(unet, images=slice(None)):
    """Self-attention that looks at nothing but each token itself: perturbed attention."""
    modules = [m for name, m in unet.named_modules() if name.endswith("attn1")]
    before = [module.processor for module in modules]
    for module in modules:
        module.processor = Identity(module.processor, images)
    yield
    for module, processor in zip(modules, before, strict=True):
        module.processor = processor


class Identity:
    def __init__(self, own, images):
        self.own, self.images = own, images

    def __call__(self, attn, hidden_states, *args, **kwargs):
        answer = self.own(attn, hidden_states, *args, **kwargs).clone()
        answer[self.images] = attn.to_out[0](attn.to_v(hidden_states[self.images]))
        return answer


class Pag(Plugin):
    """Perturbed attention guidance (Ahn et al. 2024, arXiv 2403.17377) in ten lines."""

    class Settings(Plugin.Settings):
        scale: float = Setting(2.0, description="strength; 0 is off")

    def combine_predictions(self, prediction, cond, step):
        perturbed = step.predict(patch=identity_attention(step.run.model.denoiser))
        return prediction + self.settings.scale * (cond - perturbed)


class Perturbed(Plugin):
    """The same attention at every call of a run."""

    def around_network(self, step):
        return identity_attention(step.run.model.denoiser)


class Red(Guide):
    def loss_guidance(self, step):
        return step.image[:, 0].mean(dim=(1, 2))


def test_perturbed_attention_equals_the_pipeline_of_diffusers():
    """StableDiffusionPAGPipeline, whose batch is uncond, cond, perturbed."""
    pipeline = random_pipeline()
    theirs = diffusers.StableDiffusionPAGPipeline(
        **pipeline.components,
        requires_safety_checker=False,
        pag_applied_layers=["down", "mid", "up"],
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red cat", num_inference_steps=3, pag_scale=2.0, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1), output_type="latent",
    ).images  # fmt: skip
    run = {"steps": 3, "seed": 1, "guidance_scale": 5.0}
    ours = Sampler.from_pipeline(random_pipeline())("a red cat", plugins=[Pag()], **run).latents
    # Another size of batch, in which convolutions sum in another order.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    off = Sampler.from_pipeline(random_pipeline())("a red cat", plugins=[Pag(scale=0)], **run)
    assert torch.equal(
        off.latents, Sampler.from_pipeline(random_pipeline())("a red cat", **run).latents
    )


class Further(Pag):
    """The same, in one batch with the other predictions."""

    def further_prediction(self, step):
        return lambda images: identity_attention(step.run.model.denoiser, images)

    def combine_predictions(self, prediction, cond, step):
        return prediction + self.settings.scale * (cond - step.further_prediction)


def test_a_further_prediction_is_what_a_call_of_its_own_gives():
    sampler = Sampler.from_pipeline(random_pipeline().to(torch.float64))
    run = {"steps": 2, "seed": 1, "num_images": 2}
    for others in ([], [Red(gradient="latents", scale=3)]):
        apart, joined = (
            sampler("a red cat", plugins=[plugin, *others], **run).latents
            for plugin in (Pag(), Further())
        )
        torch.testing.assert_close(joined, apart, rtol=1e-6, atol=1e-6)


def test_each_plugin_finds_its_own_further_prediction():
    sampler = Sampler.from_pipeline(random_pipeline())
    run = {"steps": 2, "seed": 1}
    once = sampler("a red cat", plugins=[Further(scale=2)], **run).latents
    twice = sampler("a red cat", plugins=[Further(), Further(scale=0), Quiet()], **run).latents
    # Another size of batch, in which convolutions sum in another order.
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)


class Quiet(Further):
    """Asks for one, without a change, and adds what it should not differ by."""

    def further_prediction(self, step):
        return lambda images: contextlib.nullcontext()


def test_a_further_prediction_that_was_not_asked_for_is_refused_by_name(sampler):
    class Greedy(Further):
        def further_prediction(self, step):
            return None

    class Wrong(Further):
        def further_prediction(self, step):
            return torch.zeros(1)

    with pytest.raises(PilotfishError, match="'Greedy'.*further_prediction is known after"):
        sampler("a", plugins=[Further(), Greedy()], steps=1)
    with pytest.raises(PluginError, match="'Wrong': further_prediction.* function of a slice"):
        sampler("a", plugins=[Wrong()], steps=1)


class Control(Plugin):
    """A ControlNet: residuals for the network, from a picture."""

    def __init__(self, controlnet, picture):
        super().__init__()
        self.controlnet, self.picture = controlnet, picture

    def network_inputs(self, inputs, step):
        count = len(step.network_latents)
        down, mid = self.controlnet(
            step.network_latents,
            step.timestep,
            encoder_hidden_states=step.conditioning["values"],
            controlnet_cond=self.picture.expand(count, -1, -1, -1),
            return_dict=False,
        )
        return {
            **inputs,
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_controlnets_residuals_equal_its_pipeline_to_the_bit(num_images, guidance_scale):
    pipeline = random_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        controlnet = diffusers.ControlNetModel.from_unet(
            pipeline.unet, conditioning_embedding_out_channels=(4,)
        ).eval()
        for parameter in controlnet.parameters():  # its convolutions begin at zero
            nn.init.normal_(parameter, std=0.1)
        controlnet.controlnet_cond_embedding.conv_in.stride = (2, 2)  # the random VAE's factor
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    components = {**pipeline.components, "controlnet": controlnet}
    theirs = diffusers.StableDiffusionControlNetPipeline(
        **components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red cat", image=picture, num_inference_steps=3, guidance_scale=guidance_scale,
        num_images_per_prompt=num_images, output_type="latent",
        generator=[torch.Generator().manual_seed(1 + i) for i in range(num_images)],
    ).images  # fmt: skip
    run = {"steps": 3, "seed": 1, "guidance_scale": guidance_scale, "num_images": num_images}
    with torch.no_grad():
        sampler = Sampler.from_pipeline(pipeline)
        ours = sampler("a red cat", plugins=[Control(controlnet, picture)], **run).latents
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, sampler("a red cat", **run).latents)


def test_two_runs_interleaved_one_with_attention_replaced_equal_those_alone(sampler):
    options = [{"plugins": [Perturbed()], "seed": 1}, {"seed": 1}, {"plugins": [Red()], "seed": 2}]
    alone = [sampler("a red cat", steps=4, **o).latents for o in options]
    streams = [sampler.stream("a red cat", steps=4, **o) for o in options]
    for _ in zip(*streams, strict=True):
        pass
    assert all(torch.equal(s.result().latents, a) for s, a in zip(streams, alone, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_what_is_put_around_the_network_is_there_during_its_calls_alone(sampler):
    seen = []

    class Watch(Plugin):
        def around_network(self, step):
            @contextlib.contextmanager
            def manager():
                seen.append(("in", step.index, tuple(step.network_latents.shape)))
                yield
                seen.append("out")

            return manager()

        def combine_predictions(self, step):
            seen.append("combine")
            step.predict("a blue puppy")

    sampler("a red cat", plugins=[Watch()], steps=1, seed=0)
    assert seen == [
        *(("in", 0, (2, 4, 16, 16)), "out", "combine"),
        *(("in", 0, (1, 4, 16, 16)), "out"),
    ]


@pytest.mark.parametrize("plugin", [Pag, Perturbed])
def test_a_gradient_through_patched_calls_is_the_same_checkpointed(sampler, plugin):
    """Layers that are computed again must find what was around them the first time."""
    run = {"steps": 2, "seed": 1, "plugins": [plugin(), Red(gradient="latents")]}
    plain = sampler("a red cat", checkpointing="off", **run).latents
    checkpointed = sampler("a red cat", checkpointing="on", **run).latents
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain, sampler("a red cat", steps=2, seed=1, plugins=[Red()]).latents)


def test_a_patch_that_can_be_made_again_is_checkpointed_too(sampler):
    class Factory(Plugin):
        def combine_predictions(self, prediction, cond, step):
            made = []

            def patch():
                made.append(True)
                return identity_attention(step.run.model.denoiser)

            perturbed = step.predict(patch=patch)
            counts.append(made)
            return prediction + 2 * (cond - perturbed)

    counts = []
    run = {"steps": 2, "seed": 1, "checkpointing": "on"}
    guide = Red(gradient="latents")
    ours = sampler("a red cat", plugins=[Factory(), guide], **run).latents
    expected = sampler("a red cat", plugins=[Pag(), guide], **run).latents
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert all(len(made) > 1 for made in counts)


def test_a_further_prediction_is_what_a_run_of_that_prompt_would_get(sampler):
    class Puppy(Plugin):
        def combine_predictions(self, step):
            return step.predict("a blue puppy")

    run = {"steps": 2, "seed": 1, "guidance_scale": 1}
    ours = sampler("a red cat", plugins=[Puppy()], **run).latents
    assert torch.equal(ours, sampler("a blue puppy", **run).latents)


def test_a_further_prediction_of_the_runs_own_prompt_is_its_own(sampler):
    class Again(Plugin):
        def combine_predictions(self, cond, step):
            assert torch.equal(step.predict(), cond)
            with contextlib.suppress(PluginError):
                step.predict(3)
                raise AssertionError("not refused")

    sampler("a red cat", plugins=[Again()], steps=2, seed=1, guidance_scale=1)


def test_an_offset_moves_the_latents_of_that_call_alone(sampler):
    """Before they are scaled: by 1 / sqrt(sigma^2 + 1) in Euler's coordinates (EDM, c_in)."""
    seen = []

    class Moved(Plugin):
        def around_network(self, step):
            seen.append(step.network_latents)

        def combine_predictions(self, step):
            before = step.latents.clone()
            step.predict(offset=torch.ones_like(step.latents))
            step.predict()
            assert torch.equal(step.latents, before)
            own, moved, again = seen
            expected = own + 1 / (step.sigma**2 + 1) ** 0.5
            torch.testing.assert_close(moved, expected)
            assert torch.equal(again, own)

    run = {"scheduler": "euler", "guidance_scale": 1, "seed": 1}
    sampler("a red cat", plugins=[Moved()], steps=1, **run)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_what_a_prediction_means_is_the_x0_that_it_leads_to(sampler, scheduler):
    class Means(Plugin):
        def setup(self, run):
            return []

        def combine_predictions(self, prediction, step, state):
            state[:] = [step.to_x0(prediction)]

        def after_step(self, step, state):
            assert torch.equal(step.x0, state[0])
            counts.append(True)

    counts = []
    sampler("a red cat", plugins=[Means()], steps=2, scheduler=scheduler)
    assert len(counts) == 2


def test_a_wrong_answer_is_blamed_on_its_plugin(sampler):
    class Wrong(Plugin):
        def around_network(self):
            return 3

    class Wronger(Plugin):
        def network_inputs(self, inputs):
            return [1]

    with pytest.raises(PluginError, match="'Wrong': around_network.* expected a context manager"):
        sampler("a", plugins=[Wrong()], steps=1)
    with pytest.raises(PluginError, match="'Wronger': network_inputs.* expected a mapping"):
        sampler("a", plugins=[Wronger()], steps=1)


class Particles(Plugin):
    """Takes the images [2, 2, 0, 1] after step 2, and draws noise of its own."""

    def before_step(self, step):
        noise = [torch.randn(1, 4, 16, 16, generator=g) for g in step.generator]
        return step.latents + 0.01 * torch.cat(noise)

    def resample(self, step):
        if step.index == 2 and step.run.num_images == 4:
            return [2, 2, 0, 1]


@pytest.mark.parametrize(
    "scheduler",
    ["dpmsolver-multistep", "lms", "pndm", "unipc-multistep", "heun", "euler-ancestral"],
)
def test_resampled_images_go_on_as_they_would_have(sampler, scheduler):
    run = {"scheduler": scheduler, "steps": 6, "plugins": [Particles(), Red()]}
    moved = sampler("a red cat", num_images=4, seed=3, **run).latents
    for place, image in enumerate([2, 2, 0, 1]):
        alone = sampler("a red cat", seed=3 + image, **run).latents
        size = float(alone.abs().max())
        # Convolutions sum in another order for another batch size.
        torch.testing.assert_close(moved[place : place + 1] / size, alone / size, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "indices", [[0], [0, 4, 1, 2], [0.0, 1.0, 2.0, 3.0], "abcd", [0, 1, 2, -1]]
)
def test_wrong_indices_are_refused(sampler, indices):
    class Wrong(Plugin):
        def resample(self, step):
            return indices

    with pytest.raises(PluginError, match="'Wrong': resample.* expected"):
        sampler("a", plugins=[Wrong()], steps=2, num_images=4)
