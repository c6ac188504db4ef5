"""A broken plugin is named, and hurts nobody else."""

import numpy as np
import pytest
import torch

import pilotfish
from pilotfish import (
    Guide,
    InputError,
    NonFiniteError,
    Plugin,
    PluginError,
    Sampler,
    SettingsError,
    guide,
)
from pilotfish.testing import random_pipeline, random_sampler


class Red(Guide):
    def loss_guidance(self, step):
        return step.image[:, 0].mean(dim=(1, 2))


class Broken(Guide):
    """Does one thing wrong, from step 1 on."""

    class Settings(Guide.Settings):
        how: str

    def loss_guidance(self, step):
        good = step.image.mean(dim=(1, 2, 3))
        if step.index < 1:
            return good
        return FAULTS[self.settings.how][0](step, good)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[0, 0, 0, 0] = float("nan")
        return gradient


FAULTS = {
    "nan": (lambda step, good: good * float("nan"), r"not finite: \[nan"),
    "inf": (lambda step, good: good + float("inf"), r"not finite: \[inf"),
    "nan-gradient": (
        lambda step, good: NanGradient.apply(step.image).mean(dim=(1, 2, 3)),
        "a gradient that is not finite in 1 of 6144 values of step.image",
    ),
    "raises": (lambda step, good: [][1], "raised IndexError: list index out of range"),
    "no-graph": (lambda step, good: good.detach(), "a loss without a graph"),
    "scalar": (
        lambda step, good: good.mean(),
        r"returned shape \(\); expected one value per image",
    ),
    "map": (lambda step, good: step.image.mean(1), r"shape \(2, 32, 32\).*all axes but the first"),
    "latents-only": (lambda step, good: step.latents.mean(dim=(1, 2, 3)), "without a graph"),
    "number": (lambda step, good: 0.5, "returned float; expected a tensor"),
    "unpicklable-backward": (
        lambda step, good: good.sqrt() * 0 + (good * 0).sqrt(),
        "a gradient that is not finite",
    ),
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_broken_guide_is_named_with_hook_and_step(sampler, how):
    with pytest.raises(PluginError, match=FAULTS[how][1]) as caught:
        sampler("a cat", plugins=[Red(), Broken(how=how)], steps=4, seed=0, num_images=2)
    assert "plugin 'Broken'" in str(caught.value)
    assert "loss_guidance()" in str(caught.value)
    assert "at step 1 of 4" in str(caught.value)
    assert (caught.value.plugin, caught.value.hook) == ("Broken", "loss_guidance")


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("preset", ["balanced", "deep-dive"])
def test_skipping_leaves_the_others_picture_bit_identical(sampler, how, preset):
    run = {"steps": 4, "seed": 0, "num_images": 2, "preset": preset, "on_error": "skip"}
    red = Red(scale=20 if preset == "deep-dive" else 1)
    alone = sampler("a cat", plugins=[red], **run)
    both = sampler("a cat", plugins=[Broken(how=how, start=0.25), red], **run)
    assert torch.equal(alone.latents, both.latents)
    errors = [r for r in both.trace if r.error]
    assert [r.index for r in errors] == [1, 2, 3]
    assert all("Broken" in r.error for r in errors)


def test_disabling_asks_a_broken_guide_only_once(sampler):
    plugins = [Broken(how="nan", start=0.25)]
    result = sampler("a cat", plugins=plugins, steps=4, seed=0, on_error="disable")
    assert [r.index for r in result.trace if r.error] == [1]
    assert torch.equal(result.latents, sampler("a cat", steps=4, seed=0).latents)


def test_a_float16_loss_is_taken_in_float32(latents_of):
    class Half(Guide):
        def loss_guidance(self, step):
            return step.image[:, 0].mean(dim=(1, 2)).half()

    torch.testing.assert_close(latents_of(Half()), latents_of(Red()), rtol=1e-3, atol=1e-3)


def test_a_huge_gradient_is_harmless_under_rms_and_named_under_sigma2(sampler):
    class Huge(Guide):
        def loss_guidance(self, step):
            return 1e34 * step.image.mean(dim=(1, 2, 3))

    assert sampler("a cat", plugins=[Huge()], steps=3, seed=0).latents.isfinite().all()
    with pytest.raises(
        NonFiniteError, match=r"after step \d of 10 .*'Huge', norm .*lower its scale"
    ):
        sampler("a cat", plugins=[Huge(scale=1e12)], steps=10, seed=0, preset="deep-dive")


def test_a_network_that_gives_nan_is_told_apart_from_a_guide(pipeline, monkeypatch):
    original = pipeline.unet.forward

    def broken(*args, **kwargs):
        return (original(*args, **kwargs)[0] * float("nan"),)

    monkeypatch.setattr(pipeline.unet, "forward", broken)
    with pytest.raises(
        NonFiniteError, match=r"after step 0 of 4 .*No guide acted.*own output is not"
    ):
        Sampler.from_pipeline(pipeline)("a cat", steps=4, seed=0)


def test_a_plugin_that_may_have_made_nan_is_named_where_no_guide_acted(sampler):
    class Blows(Plugin):
        def on_predicted_x0(self, x0, step):
            return x0 * float("inf")

    with pytest.raises(
        NonFiniteError, match=r"No guide acted: .* or what comes from .* of 'Blows' is"
    ):
        sampler("a cat", plugins=[Blows()], steps=4, seed=0)


def test_a_picture_that_is_not_finite_is_decoded_once_more_in_float32():
    pipeline = random_pipeline()
    with torch.no_grad():  # more than float16 holds, until a norm makes it small again
        pipeline.vae.decoder.conv_in.weight.mul_(1e5)
    expected = Sampler.from_pipeline(pipeline)("a cat", steps=2, seed=0).images[0]
    sampler = Sampler.from_pipeline(pipeline.to(torch.float16))
    result = sampler("a cat", steps=2, seed=0)
    assert not sampler.model.decode(result.latents).isfinite().all()
    difference = np.asarray(result.images[0], int) - np.asarray(expected, int)
    assert abs(difference).max() <= 40  # the network's own float16
    assert pipeline.vae.dtype == torch.float16
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.mul_(float("nan"))
    with pytest.raises(NonFiniteError, match="the decoded picture is not finite"):
        sampler("a cat", steps=2, seed=0)


HOOKS_THAT_RAISE = {
    "setup": lambda self, run: 1 / 0,
    "prompt_transform": lambda self, prompt: 1 / 0,
    "before_step": lambda self, step: 1 / 0,
    "on_predicted_x0": lambda self, x0: 1 / 0,
    "advance": lambda self, step: 1 / 0,
    "after_step": lambda self, step: 1 / 0,
}


@pytest.mark.parametrize("hook", HOOKS_THAT_RAISE)
def test_an_exception_in_any_hook_names_the_plugin_and_the_hook(sampler, hook):
    bad = type("Bad", (Plugin,), {hook: HOOKS_THAT_RAISE[hook]})
    with pytest.raises(PluginError, match=rf"plugin 'Bad': {hook}\(\) raised ZeroDivisionError"):
        sampler("a cat", plugins=[bad()], steps=2, seed=0)


WRONG_ANSWERS = {
    "before_step": (lambda self, step: step.latents[:, :2], r"shape \(1, 2, 16, 16\)"),
    "on_predicted_x0": (lambda self, x0: x0.double(), "dtype torch.float64"),
    "combine_predictions": (lambda self, cond: cond[..., :3], r"shape \(1, 4, 16, 3\)"),
    "advance": (lambda self, step: 3, "returned int; expected a tensor"),
    "prompt_transform": (lambda self, prompt: 3, "returned 3; expected text"),
    "embedding_transform": (lambda self, embedding: embedding.values, "expected an Embedding"),
    "start_latents": (lambda self, run: 3, "returned int; expected \\(latents, index"),
    "vocabulary": (lambda self: {"two words": 1}, "a word has no spaces"),
}


@pytest.mark.parametrize("hook", WRONG_ANSWERS)
def test_a_wrong_answer_of_any_hook_is_named(sampler, hook):
    function, what = WRONG_ANSWERS[hook]
    bad = type("Bad", (Plugin,), {hook: function})
    with pytest.raises(PluginError, match=rf"plugin 'Bad': {hook}\(\) .*{what}"):
        sampler("a cat", plugins=[bad()], steps=2, seed=0)


def test_changing_latents_in_place_is_refused(sampler):
    class InPlace(Plugin):
        def before_step(self, step):
            step.latents.mul_(2)

    with pytest.raises(PluginError, match="changed step.latents in place"):
        sampler("a cat", plugins=[InPlace()], steps=2, seed=0)


def test_a_near_miss_of_a_hooks_name_is_refused_with_a_suggestion():
    with pytest.raises(
        TypeError, match="on_predict_x0 is not a hook. Did you mean 'on_predicted_x0'"
    ):

        class Typo(Plugin):
            def on_predict_x0(self, x0):
                return x0


def test_an_unknown_argument_of_a_hook_is_refused(sampler):
    class Extra(Plugin):
        def before_step(self, step, temperature):
            return None

    with pytest.raises(
        PluginError, match=r"'Extra': before_step\(\) asks for temperature; it takes: step"
    ):
        sampler("a cat", plugins=[Extra()], steps=2)


def test_a_bare_object_with_an_unknown_hook_is_refused(sampler):
    class Bare:
        @pilotfish.hookimpl
        def before_step(self, step):
            return None

        @pilotfish.hookimpl
        def befor_step(self, step):
            return None

    with pytest.raises(
        PluginError, match="no hook called 'befor_step'. Did you mean 'before_step'"
    ):
        sampler("a cat", plugins=[Bare()], steps=2)


def test_an_object_without_hooks_and_a_class_are_refused(sampler):
    with pytest.raises(PluginError, match="implements no hook"):
        sampler("a cat", plugins=[object()], steps=2)
    with pytest.raises(PluginError, match=r"got the class Red; pass an instance: Red\(...\)"):
        sampler("a cat", plugins=[Red], steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scael": 2}, "no setting 'scael'. Did you mean 'scale'"),
        ({"every": 0}, "every must be greater than or equal to 1; got 0"),
        ({"scale": float("nan")}, "scale must be a finite number, or a curve .*; got nan"),
        ({"gradient": "image"}, "gradient must be 'x0', 'latents' or 'none'; got 'image'"),
    ],
)
def test_wrong_settings_say_what_was_expected_and_what_came(settings, message):
    with pytest.raises(SettingsError, match=message):
        Red(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number >= 0"),
        ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
        ({"steps": 2.5}, "steps must be a whole number >= 1; got 2.5"),
        ({"scheduler": "eular"}, "no scheduler called 'eular'. Did you mean 'euler'"),
        ({"preset": "balancd"}, "no preset called 'balancd'. Did you mean 'balanced'"),
        (
            {"height": 33},
            "height must be a multiple of 2 for this model; got 33. Nearest: 32 or 34",
        ),
        ({"on_error": "ignore"}, "on_error must be 'raise', 'skip' or 'disable'; got 'ignore'"),
        ({"num_images": -1}, "num_images must be a whole number >= 1"),
        ({"seed": "x"}, "seed must be a whole number >= 0; got 'x'"),
        ({"negative_prompt": 3}, "negative_prompt must be text, or .*; got 3"),
        ({"plugins": "blue"}, "plugins must be a list; got 'blue'"),
        ({"plugins": ["blu:e"]}, "expected setting=value|no plugin|does not import"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(sampler, options, message):
    with pytest.raises((InputError, PluginError), match=message):
        sampler.stream("a cat", **options)


def test_guides_inside_inference_mode_are_refused_with_what_to_do(sampler):
    with torch.inference_mode(), pytest.raises(pilotfish.ModelError, match="inference_mode"):
        sampler("a cat", plugins=[Red()], steps=2)


def test_offloaded_networks_are_refused_for_guides_only():
    pipeline = random_pipeline()
    pipeline.unet._hf_hook = type("CpuOffload", (), {})()
    sampler = Sampler.from_pipeline(pipeline)
    with pytest.raises(pilotfish.ModelError, match="offloads its networks"):
        sampler("a cat", plugins=[Red()], steps=2)


def test_x0_before_the_network_has_run_says_so(sampler):
    class Early(Plugin):
        def before_step(self, step):
            return step.x0

    named = (
        r"plugin 'Early': before_step\(\): .*known only after the network has run; .*\(at step 0"
    )
    with pytest.raises(pilotfish.PilotfishError, match=named):
        sampler("a cat", plugins=[Early()], steps=2)


def test_another_kind_of_pipeline_is_refused():
    with pytest.raises(
        pilotfish.ModelError,
        match="this pipeline is a dict, and no .* Families: .*StableDiffusionPipeline",
    ):
        Sampler.from_pipeline({})


@pytest.mark.parametrize(
    "other",
    [
        {"in_channels": 9},  # inpainting
        {  # Stable Diffusion XL
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
    ],
)
def test_a_unet_that_takes_more_than_latents_and_a_prompt_is_refused(other):
    pipeline = random_pipeline()
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, **other)
    with pytest.raises(pilotfish.ModelError, match="more than latents and a prompt"):
        Sampler.from_pipeline(pipeline)


@pytest.mark.parametrize("power", [-38, -30, -20, 20, 26, 38])
@pytest.mark.parametrize("rule", ["balanced", "dsg"])
def test_a_loss_of_any_size_gives_the_same_picture_where_the_rule_is_scale_free(power, rule):
    def latents(factor):
        def loss(step):
            return step.image.mean(dim=(1, 2, 3)) * factor

        options = {"steps": 3, "seed": 3, "guidance_scale": 4, "scheduler": "euler-ancestral"}
        result = random_sampler()("a cat", plugins=[guide(loss)], preset=rule, **options)
        assert all(share == (1.0,) for share in (r.share for r in result.trace))
        return result.latents

    torch.testing.assert_close(latents(10.0**power), latents(1.0), rtol=1e-4, atol=1e-4)


def test_what_a_guide_changes_in_place_no_other_guide_sees():
    def plain(step):
        return step.image.mean(dim=(1, 2, 3))

    def clamping(step):
        image = step.image
        with torch.no_grad():
            image.clamp_(0.4, 0.6)
            step.x0.zero_()
        return image.mean(dim=(1, 2, 3))

    def blue(step):
        return (step.image[:, 2] - 0.9).abs().mean(dim=(1, 2)) + 0 * step.x0.mean(dim=(1, 2, 3))

    def losses(first):
        plugins = [guide(first, name="first", scale=1e-9), guide(blue, name="blue")]
        return random_sampler()("a cat", plugins=plugins, steps=3, seed=3).trace.losses("blue")

    assert losses(clamping) == pytest.approx(losses(plain), rel=1e-5)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image):
        return image.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError("no gradient here")


def backward_by_itself(step):
    loss = step.image.square().mean(dim=(1, 2, 3))
    loss.sum().backward()
    return loss


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda step: Breaks.apply(step.image).mean(dim=(1, 2, 3)), "no gradient here"),
        (backward_by_itself, "backward through the graph a second time"),
    ],
    ids=["an operation that raises", "backward() called in the loss"],
)
def test_what_a_backward_pass_raises_names_the_guide_and_obeys_on_error(loss, cause):
    sampler, options = random_sampler(), {"steps": 2, "seed": 3}
    broken = guide(loss, name="broken")
    with pytest.raises(PluginError, match="'broken'.*gradient cannot be taken") as error:
        sampler("a cat", plugins=[broken], **options)
    assert cause in str(error.value)
    skipped = sampler("a cat", plugins=[broken], on_error="skip", **options)
    assert torch.equal(skipped.latents, sampler("a cat", **options).latents)
