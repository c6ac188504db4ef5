"""Whatever a plugin raises, answers or changes, and whatever is switched on around a run."""

import numpy as np
import pytest
import torch

import pilotfish
from pilotfish import Guide, InputError, NonFiniteError, PilotfishError, Plugin, PluginError
from pilotfish.hooks import specs

# What each hook is asked with here, in the order of its arguments.
ASKED = {
    "setup": "run",
    "teardown": "run",
    "vocabulary": "run",
    "prompt_transform": "prompt",
    "embedding_transform": "embedding",
    "start_latents": "start",
    "network_inputs": "inputs, step",
    "combine_predictions": "prediction, cond, uncond, step",
    "on_predicted_x0": "x0, step",
}
RUN = {"steps": 2, "seed": 1}


def plugin(hook, body):
    """A plugin with one hook, whose body gets the hook's arguments by name."""
    arguments = ASKED.get(hook, "step")
    made = {}
    given = ", ".join(f"{name}={name}" for name in arguments.split(", "))
    exec(f"def {hook}(self, {arguments}): return body({given})", {"body": body}, made)
    base = Guide if hook == "loss_guidance" else Plugin
    return type("Bad", (base,), made)()


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


RAISED = [SystemExit(3), Mute(), GeneratorExit(), StopIteration(), RecursionError("deep")]


@pytest.mark.parametrize("hook", specs.KINDS)
def test_whatever_a_hook_raises_is_named_with_the_plugin(sampler, hook):
    for error in RAISED:

        def raises(error=error, **_):
            raise error

        told = rf"plugin 'Bad': {hook}\(\) raised {type(error).__name__}"
        with pytest.raises(PluginError, match=told) as caught:
            sampler("a cat", plugins=[plugin(hook, raises)], **RUN)
        assert caught.value.__cause__ is error


ANSWERS = {
    "float64": torch.zeros(1, 4, 16, 16, dtype=torch.float64),
    "meta": torch.zeros(1, 4, 16, 16, device="meta"),
    "shape": torch.zeros(1, 4, 8, 8),
    "sparse": torch.zeros(1, 4, 16, 16).to_sparse(),
    "list": [1],
    "text": "x",
    "object": object(),
    "array": np.zeros((1, 4, 16, 16)),
    "mapping": {"nosuch": 1},
}
# Nothing is expected of the first three, and any text is a prompt.
HEEDED = [hook for hook in specs.KINDS if hook not in ("setup", "teardown", "after_step")]


@pytest.mark.parametrize("hook", HEEDED)
def test_whatever_a_hook_answers_is_right_or_named(sampler, hook):
    for name, answer in ANSWERS.items():
        if (hook, name) != ("prompt_transform", "text"):
            with pytest.raises(PluginError, match=r"plugin 'Bad'"):
                sampler("a cat", plugins=[plugin(hook, lambda answer=answer, **_: answer)], **RUN)


@pytest.mark.parametrize("hook", ["before_step", "combine_predictions", "on_predicted_x0"])
def test_values_that_are_not_finite_are_not_laid_to_the_network_alone(sampler, hook):
    bad = plugin(hook, lambda **_: torch.full((1, 4, 16, 16), float("nan")))
    with pytest.raises(NonFiniteError, match=rf"or what comes from {hook}\(\) of 'Bad'"):
        sampler("a cat", plugins=[bad], **RUN)


LOSSES = {
    "complex": (lambda loss: loss.to(torch.complex64), "a tensor of complex64"),
    "whole": (lambda loss: torch.ones(1, dtype=torch.long), "a tensor of int64"),
    "sparse": (lambda loss: loss.to_sparse(), "sparse_coo"),
    "meta": (lambda loss: loss.to("meta"), "on meta"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_another_kind_is_refused_and_obeys_on_error(sampler, kind):
    change, words = LOSSES[kind]
    bad = plugin("loss_guidance", lambda step: change(step.image.mean(dim=(1, 2, 3))))
    with pytest.raises(PluginError, match=f"'Bad'.*{words}.*floating-point"):
        sampler("a cat", plugins=[bad], **RUN)
    skipped = sampler("a cat", plugins=[bad], on_error="skip", **RUN)
    assert all(words in record.error for record in skipped.trace)
    assert torch.equal(skipped.latents, sampler("a cat", **RUN).latents)


@pytest.mark.parametrize("scale", [1e39, -1e39, "1e400", [[0, 1], [1, 1e39]]])
def test_a_scale_that_float32_cannot_hold_is_refused(scale):
    with pytest.raises(InputError, match="scale must be a finite number"):
        pilotfish.guide(lambda step: step.rgb.mean((1, 2, 3)), scale=scale)


CHANGED = {
    "embedding_transform": ["embedding.values"],
    "before_step": ["step.latents", "step.embeddings", "step.timestep"],
    "network_inputs": ["step.network_latents", "step.conditioning['values']"],
    "around_network": ["step.network_latents", "step.conditioning['values']", "step.latents"],
    "further_prediction": ["step.latents", "step.embeddings"],
    "combine_predictions": ["cond", "uncond", "prediction", "step.latents"],
    "on_predicted_x0": ["x0", "step.latents"],
    "loss_guidance": ["step.latents", "step.embeddings"],
    "advance": ["step.x0", "step.image", "step.rgb", "step.latents"],
    "after_step": ["step.x0", "step.image", "step.rgb", "step.latents"],
    "resample": ["step.x0"],
}


@pytest.mark.parametrize(("hook", "value"), [(h, v) for h, vs in CHANGED.items() for v in vs])
def test_what_a_hook_changes_in_place_is_named(sampler, hook, value):
    def change(**given):
        with torch.no_grad():
            eval(value, given).mul_(0)

    before = sampler("a cat", **RUN).latents
    with pytest.raises(PluginError, match=rf"'Bad': {hook}\(\) changed .* in place"):
        sampler("a cat", plugins=[plugin(hook, change)], **RUN)
    assert torch.equal(sampler("a cat", **RUN).latents, before)


def test_a_network_that_raises_with_what_plugins_change_of_it_names_them(sampler):
    class Unknown(Plugin):
        def network_inputs(self, inputs):
            return {**inputs, "nosuch": 1}

    with pytest.raises(PluginError, match=r"'Unknown': the network, .* raised TypeError.*nosuch"):
        sampler("a cat", plugins=[Unknown()], **RUN)


# ---- what is switched on around a run ----


def test_autocast_and_defaults_around_a_run_change_nothing(latents_of):
    expected = latents_of("blue")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(latents_of("blue"), expected)
    for kind in (torch.float64, torch.float16):
        torch.set_default_dtype(kind)
        try:
            assert torch.equal(latents_of("blue"), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert torch.equal(latents_of("blue"), expected)


def test_the_default_device_meta_is_refused(sampler):
    with torch.device("meta"), pytest.raises(InputError, match="default device is meta"):
        sampler("a cat", **RUN)


def test_values_first_read_in_inference_mode_serve_guides_after_it(sampler):
    guide = pilotfish.guide(lambda step: (step.rgb[:, 2] - 0.9).abs().mean((1, 2)))
    expected = sampler("a cat", plugins=[guide], **RUN).latents
    stream = sampler.stream("a cat", plugins=[guide], **RUN)
    for step in stream:
        with torch.inference_mode():
            assert step.rgb.isfinite().all() and step.image.isfinite().all()
    assert torch.equal(stream.result().latents, expected)


@pytest.mark.parametrize("option", ["height", "width", "num_images", "seed", "steps"])
@pytest.mark.parametrize("value", [0, -1, 10**400, float("nan"), "x", b"\xff", [], 1.5])
def test_a_number_that_cannot_be_is_our_own_error_at_once(sampler, option, value):
    if (option, value) != ("seed", 0):
        with pytest.raises(PilotfishError):
            sampler.stream("a cat", **{**RUN, option: value})
