"""What somebody gets wrong who writes a plugin or calls the sampler: one sentence that says so."""

import re
import warnings

import pydantic
import pytest
import torch

from pilotfish import (
    DefinitionError,
    Guide,
    GuideWarning,
    InputError,
    Plugin,
    PluginError,
    SettingsError,
)


def dark(step):
    return step.rgb.mean(dim=(1, 2, 3))


# ---- state ----


def test_what_setup_answers_is_the_plugins_state_of_that_run(sampler):
    class Count(Plugin):
        def setup(self, run):
            return {"seed": run.seed, "steps": 0}

        def before_step(self, step, state):
            assert state["seed"] == step.run.seed
            state["steps"] += 1

        def teardown(self, state):
            seen.append(state)

    seen, plugin = [], Count()
    streams = [sampler.stream("a", plugins=[plugin], steps=n, seed=n) for n in (2, 3)]
    for stream in streams:
        next(stream)  # both are under way
    for stream in streams:
        stream.result()
    assert seen == [{"seed": 2, "steps": 2}, {"seed": 3, "steps": 3}]


def test_every_hook_may_take_state_and_one_without_setup_has_none(sampler):
    class Watch(Plugin):
        def after_step(self, state):
            seen.append(state)

    class Fails(Plugin):
        def setup(self):
            raise RuntimeError("on purpose")

    class Late(Plugin):
        def teardown(self, state):
            seen.append(("late", state))

    seen = []
    sampler("a", plugins=[Watch()], steps=1)
    with pytest.raises(PluginError, match="on purpose"):
        sampler("a", plugins=[Fails(), Late()], steps=1)
    assert seen == [None, ("late", None)]


def test_an_error_at_teardown_hides_no_earlier_one(sampler):
    class Bad(Plugin):
        def before_step(self, step):
            raise RuntimeError("first")

        def teardown(self):
            raise RuntimeError("second")

    with pytest.raises(PluginError, match="first") as caught:
        sampler("a", plugins=[Bad()], steps=1)
    assert "second" in caught.value.__notes__[0]


# ---- guides that cannot be idle in silence ----


def test_a_bare_function_is_a_guide(sampler):
    result = sampler(
        "a cat", plugins=[dark, lambda step: step.x0.square().mean((1, 2, 3))], steps=2
    )
    assert result.trace.plugins == ["dark", "guide"]
    with pytest.raises(PluginError, match=r"'guide': .*takes 0 positional arguments"):
        sampler("a cat", plugins=[lambda: 3], steps=1)


@pytest.mark.parametrize(
    ("method", "near"),
    [("loss", "loss_guidance"), ("on_step", "before_step"), ("predicted", "on_pred")],
)
def test_a_class_that_implements_no_hook_is_refused_with_the_near_name(sampler, method, near):
    for base in (Plugin, Guide):
        lazy = type("Lazy", (base,), {method: lambda self, step: dark(step)})
        with pytest.raises(PluginError, match=f"Lazy implements no hook.*{near}.*{method}"):
            sampler("a", plugins=[lazy()], steps=1)


@pytest.mark.parametrize("method", ["guidance_loss", "loss_guidence", "befor_step", "step_after"])
def test_a_method_whose_name_is_nearly_a_hooks_is_refused_at_its_definition(method):
    with pytest.raises(DefinitionError, match=f"Typo.{method} is not a hook. Did you mean"):
        type("Typo", (Guide,), {method: lambda self, step: dark(step)})


class Never(Guide):
    def loss_guidance(self, step):
        return None


class Flat(Guide):
    def loss_guidance(self, step):
        return step.image.round().mean(dim=(1, 2, 3)) + 0 * dark(step)


class Rises(Guide):
    """Asks for the opposite of what it measures."""

    def loss_guidance(self, step):
        value = dark(step)
        return 2 * value.detach() - value + step.index


@pytest.mark.parametrize(
    ("guide", "remark"),
    [
        (Never(), "'Never' never gave a loss"),
        (Flat(), "'Flat' has a gradient of zero at every step"),
        (Rises(), "the loss of 'Rises' rose from"),
        (Flat(start=0.9, stop=0.95), "'Flat' never gave a loss"),
    ],
)
def test_a_guide_that_did_nothing_is_named_once_at_the_end_and_in_the_trace(sampler, guide, remark):
    with pytest.warns(GuideWarning, match=remark) as caught:
        result = sampler("a cat", plugins=[guide, Never(scale=0)], steps=4, seed=0)
    assert len(caught) == 1
    assert len(result.trace.remarks) == 1 and remark in result.trace.remarks[0]


def test_a_guide_that_works_is_not_remarked(emoji_sampler):
    class Darker(Guide):
        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = emoji_sampler("a cat", plugins=[Darker()], steps=8, seed=0)
    assert result.trace.remarks == []


# ---- classes that are written wrong ----


def test_settings_of_the_wrong_class_are_refused_with_the_right_one():
    class Warm(Guide):
        class Settings(Plugin.Settings):
            target: float = 1.0

    class Cold(Plugin):
        class Settings(pydantic.BaseModel):
            target: float = 1.0

    with pytest.raises(DefinitionError, match=r"Warm.Settings must inherit from Guide.Settings"):
        Warm()
    with pytest.raises(DefinitionError, match=r"Cold.Settings must inherit from Plugin.Settings"):
        Cold(target=2)


def test_an_init_without_super_is_told_what_to_write(sampler):
    class Forgets(Guide):
        def __init__(self, target):
            self.target = target

        def loss_guidance(self, step):
            return dark(step)

    with pytest.raises(PluginError, match=r"Forgets.__init__ .*super\(\).__init__\(\*\*settings\)"):
        sampler("a", plugins=[Forgets(3)], steps=1)


@pytest.mark.parametrize(
    "member",
    [staticmethod(dark), classmethod(lambda cls, step: dark(step))],
    ids=["static", "class"],
)
def test_a_static_or_class_method_is_a_hook_like_any_other(sampler, member):
    odd = type("Odd", (Guide,), {"loss_guidance": member})
    expected = sampler("a", plugins=[dark], steps=2, seed=0).latents
    assert torch.equal(sampler("a", plugins=[odd()], steps=2, seed=0).latents, expected)


@pytest.mark.parametrize("member", [property(lambda self: 1 / 0), 3, "loss"])
def test_a_hook_that_cannot_be_called_is_refused(sampler, member):
    odd = type("Odd", (Guide,), {"loss_guidance": member, "before_step": lambda self: None})
    with pytest.raises(PluginError, match=r"Odd.loss_guidance is a .*def loss_guidance\(self"):
        sampler("a", plugins=[odd()], steps=1)


def test_an_unknown_argument_of_a_hook_is_named_with_those_it_has(sampler):
    class Asks(Plugin):
        def before_step(self, step, latents):
            return latents

    with pytest.raises(PluginError, match=r"'Asks'.*asks for latents; it takes: step, state"):
        sampler("a", plugins=[Asks()], steps=1)


def test_system_exit_in_a_hook_is_a_plugins_error(sampler):
    class Exits(Plugin):
        def before_step(self, step):
            raise SystemExit(3)

    with pytest.raises(
        PluginError, match=r"'Exits'.*before_step\(\) raised SystemExit: 3 \(at step"
    ):
        sampler("a", plugins=[Exits()], steps=1)


# ---- keywords ----


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_inference_steps", "steps"),
        ("generator", "seed"),
        ("callback", "stream"),
        ("callback_on_step_end", "stream"),
        ("plugin", "plugins"),
        ("num_images_per_prompt", "num_images"),
        ("guidance_rescale", "cfg-rescale"),
        ("stepps", "Did you mean 'steps'"),
        ("model", "no option of a run called 'model'"),
    ],
)
def test_a_wrong_keyword_names_the_right_one(sampler, wrong, right):
    with pytest.raises(InputError, match=right):
        sampler("a cat", **{wrong: 3})


def test_what_is_left_open_is_the_models_own(sampler, emoji_sampler):
    assert sampler.stream("a cat").run.steps == 50
    assert sampler.stream("a cat").run.guidance_scale == 7.5
    own = emoji_sampler.stream("a cat").run
    assert (own.steps, own.guidance_scale, own.height, own.width) == (25, 4.0, 64, 64)
    assert emoji_sampler.stream("a cat", steps=3, guidance_scale=1).run.steps == 3


def test_a_setting_that_is_no_utf_8_is_refused():
    class Says(Guide):
        class Settings(Guide.Settings):
            words: dict[str, list[str]] = {}  # noqa: RUF012

        def loss_guidance(self, step):
            return dark(step)

    with pytest.raises(SettingsError, match="words must be text in UTF-8"):
        Says(words={"a": ["\udce9"]})


def test_a_loss_that_is_wrong_in_the_middle_of_a_run_is_named_with_its_step(sampler):
    def late(step):
        return dark(step) if step.index < 2 else torch.tensor(float("nan")) * dark(step)

    with pytest.raises(PluginError, match=r"'late': loss_guidance\(\) returned a loss .*at step 2"):
        sampler("a", plugins=[late], steps=4)


@pytest.mark.parametrize(
    ("hook", "answer", "words"),
    [
        (
            "before_step",
            lambda step: setattr(step, "latents", step.latents),
            "has no setter; a step is read-only; a hook returns what it changes (at step 0 of 1",
        ),
        (
            "loss_guidance",
            lambda step: step.image.numpy().mean(),
            "instead; a loss is made of torch operations; what needs NumPy takes",
        ),
        (
            "loss_guidance",
            lambda step: step.image.detach().numpy().mean(),
            "returned numpy.float32; expected a tensor of shape (B,), made by torch",
        ),
    ],
)
def test_what_authors_stumble_over_is_told_with_what_to_do(sampler, hook, answer, words):
    kind = type("Own", (Guide,), {hook: lambda self, step: answer(step)})
    with pytest.raises(PluginError, match=re.escape(words)):
        sampler("a cat", plugins=[kind()], steps=1)
