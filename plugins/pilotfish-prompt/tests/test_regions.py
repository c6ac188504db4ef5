"""`regions`: a prompt for each part of the picture, by the network's answers or attention."""

import functools

import pytest
import torch
from PIL import Image
from pilotfish_kit import parametrize_with_checks
from pilotfish_prompt import LongPrompt, Regions, Weights
from pilotfish_prompt.regions import shares

from pilotfish import InputError, ModelError, Plugin, Run, SettingsError
from pilotfish.testing import random_sampler

HALVES = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
LEFT = [[0, 0, 0.5, 1]]
FAMILIES = ["stable-diffusion", "sdxl", "sd3", "flux", "qwen-image", "z-image", "flux2-klein"]
SMALL = {"steps": 2, "seed": 3, "height": 32, "width": 32}
sampler_of = functools.cache(lambda family: random_sampler(family=family))


class Watch(Plugin):
    """Keeps both predictions of the first step, and what they were made from."""

    def setup(self):
        return {}

    def combine_predictions(self, cond, uncond, step, state):
        self.seen = cond, uncond, step.latents, step.timestep


def predictions(sampler, *plugins, **options):
    watch = Watch()
    next(sampler.stream("a cat", plugins=[*plugins, watch], steps=4, seed=3, **options))
    return watch.seen


def of_prompt(sampler, text, latents, timestep, box=(slice(None), slice(None))):
    """The network's answer for a prompt, to some of the latents (B, C, H, W)."""
    model = sampler.model
    (encoder,) = model.text_encoders
    with torch.no_grad():
        ids = encoder.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        told = encoder.network(ids).last_hidden_state.expand(len(latents), -1, -1)
        return model.unet(latents[:, :, box[0], box[1]], timestep, told).sample


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["crop", "whole"])
def test_both_predictions_are_put_together_from_those_for_each_region(random_sampler, by):
    plugin = Regions(prompts=["a puppy"], areas=[[0, 0, 0.5, 0.75]], by=by)
    cond, uncond, latents, timestep = predictions(random_sampler, plugin, negative_prompt="red")
    box = (slice(0, 12), slice(0, 8)) if by == "crop" else (slice(None), slice(None))
    for ours, own, inside in ((cond, "a cat", "a puppy"), (uncond, "red", "red")):
        expected = of_prompt(random_sampler, own, latents, timestep)
        there = of_prompt(random_sampler, inside, latents, timestep, box)
        expected[:, :, :12, :8] = there[:, :, :12, :8]
        close(ours, expected)


def test_overlapping_areas_share_and_the_rest_is_the_runs_own():
    areas = torch.tensor([[[1.0, 1.0, 0.5, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    expected = torch.tensor([[[0, 0, 0.5, 1.0]], [[1, 0.5, 0.5, 0]], [[0, 0.5, 0, 0]]])
    assert torch.equal(shares(areas), expected)


@pytest.mark.parametrize("by", ["crop", "whole", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_region_over_the_whole_picture_is_as_the_prompt_itself(family, by):
    sampler = sampler_of(family)
    run = {**SMALL, "negative_prompt": "red"}
    if family in ("flux", "qwen-image"):
        run["true_cfg_scale"] = 3
    plugin = Regions(prompts=["a puppy"], areas=[[0, 0, 1, 1]], by=by)
    if by == "attention" and family not in ("stable-diffusion", "sdxl"):
        with pytest.raises(ModelError, match="by='attention' needs attention from the picture"):
            sampler("a cat", plugins=[plugin], **run)
        return
    ours = sampler("a cat", plugins=[plugin], **run).latents
    plain = sampler("a puppy", **run).latents
    if by == "attention" and family == "sdxl":  # what it pools is still the run's prompt's
        assert not torch.allclose(ours, plain, atol=1e-5)
    else:
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_have_their_own_prompts_in_every_family(family):
    run = functools.partial(sampler_of(family), "a cat", num_images=2, **SMALL)
    first, other, mirrored = (
        run(plugins=[Regions(prompts=prompts, areas=HALVES)]).latents
        for prompts in (["a puppy", "a cat"], ["a puppy", "red"], ["red", "a cat"])
    )
    half = first.shape[3] // 2
    assert torch.equal(first[..., :half], other[..., :half])
    assert not torch.allclose(first[..., half:], other[..., half:], atol=1e-6)
    assert torch.equal(first[..., half:], mirrored[..., half:])


def test_attention_of_each_place_sees_its_own_prompt_alone(random_sampler):
    class Look(Plugin):
        """Calls one attention inside the run, with all prompts and with one."""

        def around_network(self, step):
            if not seen:
                seen.append(None)
                site = next(s for s in step.run.model.sites if s.kind == "cross")
                told = step.conditioning["values"]
                hidden = torch.randn(len(told), 256, site.module.to_q.in_features)
                seen[0] = site.module.processor(site.module, hidden, told), hidden, told, site

    seen = []
    regions = Regions(prompts=["a puppy", "red on white"], areas=HALVES, by="attention")
    next(random_sampler.stream("a cat", plugins=[regions, Look()], steps=1, seed=0))
    answer, hidden, told, site = seen[0]
    plain = site.module.processor  # the model's own again
    (encoder,) = random_sampler.model.text_encoders

    def alone(text):
        ids = encoder.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            values = encoder.network(ids).last_hidden_state
            return plain(site.module, hidden[1:], values).view(16, 16, -1)

    ours = answer[1].view(16, 16, -1)
    close(ours[:, :8], alone("a puppy")[:, :8])
    close(ours[:, 8:], alone("red on white")[:, 8:])
    with torch.no_grad():
        close(answer[:1], plain(site.module, hidden[:1], told[:1]))  # the negative prompt's


def test_attention_at_sizes_that_halve_unevenly(random_sampler):
    plugin = Regions(prompts=["a puppy", "red"], areas=HALVES, by="attention")
    run = random_sampler("a cat", plugins=[plugin], steps=2, seed=0, height=40, width=44)
    assert run.latents.isfinite().all()


def test_a_mask_file_keeps_its_shape(random_sampler, tmp_path):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "left.png")
    run = functools.partial(random_sampler, "a cat", steps=2, seed=3)
    by_file, by_box = (
        run(plugins=[Regions(prompts=["a puppy"], areas=[area])]).latents
        for area in (tmp_path / "left.png", LEFT[0])
    )
    assert torch.equal(by_file, by_box)


def test_after_stop_the_network_is_called_once_a_step(random_sampler):
    class Count(Plugin):
        def around_network(self, step):
            handle = step.run.model.denoiser.register_forward_hook(lambda *_: calls.append(0))

            class Hooked:
                def __enter__(self):
                    return None

                def __exit__(self, *_):
                    handle.remove()

            return Hooked()

    counts = {}
    for name, areas, stop in (("rest", LEFT, 1), ("all", HALVES, 1), ("stop", HALVES, 0.4)):
        calls = []
        prompts = ["a puppy", "red"][: len(areas)]
        plugin = Regions(prompts=prompts, areas=areas, stop=stop)
        random_sampler("a cat", plugins=[plugin, Count()], steps=4, seed=3)
        counts[name] = len(calls)
    # The whole picture and one half; two halves; two halves in the first two of four steps.
    assert counts == {"rest": 8, "all": 8, "stop": 6}


def test_weights_and_long_prompts_are_read_in_the_regions_prompts(random_sampler):
    long = "(red:1.4) cat " * 40
    plugins = [Weights(dialect="automatic1111"), LongPrompt(chunks=2)]
    run = {"steps": 2, "seed": 3}
    plain = random_sampler(long, plugins=plugins, **run).latents
    for by in ("crop", "attention"):
        regions = Regions(prompts=[long], areas=[[0, 0, 1, 1]], by=by)
        ours = random_sampler("a cat", plugins=[*plugins, regions], **run).latents
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_guide_and_a_travelling_prompt_beside_it_and_the_run_file_repeats_it(random_sampler):
    regions = Regions(prompts=["a puppy"], areas=LEFT, stop=0.7)
    travel = {"use": "blend", "prompts": {"a cat": 1, "red": 1}, "schedule": "travel"}
    plugins = ["blue:scale=2,gradient=latents", regions, travel]
    first = random_sampler("a cat", plugins=plugins, steps=3, seed=4)
    again = Run.parse(first.run.to_toml())
    again = {k: v for k, v in again.items() if k not in ("model", "dtype")}
    assert torch.equal(random_sampler(**again).latents, first.latents)
    alone = random_sampler("a cat", plugins=[plugins[0], travel], steps=3, seed=4)
    assert not torch.allclose(alone.latents, first.latents, atol=1e-5)


def test_a_further_prediction_for_another_text_is_that_texts_own(random_sampler):
    class Other(Plugin):
        def combine_predictions(self, step):
            return step.predict("a parrot")

    def latents(**options):
        plugins = [Regions(prompts=["a puppy"], areas=LEFT, **options), Other()]
        return random_sampler("a cat", plugins=plugins, steps=2, seed=3).latents

    plain = random_sampler("a parrot", plugins=[Other()], steps=2, seed=3).latents
    torch.testing.assert_close(latents(by="whole"), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents(by="attention"), plain, rtol=1e-4, atol=1e-4)


def test_what_another_plugin_adds_to_the_call_is_refused_with_crops(random_sampler):
    class Scaled(Plugin):
        def network_inputs(self, inputs):
            return {**inputs, "cross_attention_kwargs": {"scale": 1.0}}

    with pytest.raises(InputError, match=r"\['cross_attention_kwargs'\] of another plugin"):
        random_sampler("a", plugins=[Regions(prompts=["b"], areas=LEFT), Scaled()], steps=1)


def test_two_of_them_in_one_run_are_refused(random_sampler):
    plugins = [Regions(prompts=["a"], areas=LEFT), Regions(prompts=["b"], areas=LEFT, by="whole")]
    with pytest.raises(InputError, match="give one all prompts and areas"):
        random_sampler("a", plugins=plugins, steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompts": ["a"], "areas": HALVES},
            "as many areas as there are prompts, 1",
        ),
        ({"prompts": [], "areas": []}, "prompts must be"),
        ({"prompts": ["a"], "areas": [[0, 0, 2, 1]]}, "a picture file, or"),
        ({"prompts": ["a"], "areas": LEFT, "by": "mask"}, "by must be 'crop', 'whole'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        Regions(**settings)


@pytest.mark.slow
def test_the_emoji_model_draws_an_object_in_each_half(emoji_sampler):
    from pilotfish_emoji.judge import load

    places = "a {} on a teal background"
    regions = Regions(prompts=[places.format(name) for name in ("cat", "owl")], areas=HALVES)
    run = {"height": 64, "width": 128, "steps": 20, "seed": 5}
    (image,) = emoji_sampler("on a teal background", plugins=[regions], **run).images
    pixels = torch.tensor(list(image.tobytes())).view(1, 64, 128, 3).permute(0, 3, 1, 2) / 255
    names = [load().judge(part).names[0][0] for part in pixels.chunk(2, dim=3)]
    assert names == ["cat", "owl"]


@parametrize_with_checks(
    [Regions(prompts=["a puppy", "red"], areas=HALVES, by=by) for by in ("crop", "attention")]
)
def test_it_keeps_the_contract_of_plugins(plugin, check, random_sampler):
    check(plugin, random_sampler)
