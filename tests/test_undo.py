"""What is switched on for a run is switched off after it, also when it raised."""

import pytest
import torch

from pilotfish import Guide, Plugin, PluginError, Sampler
from pilotfish.testing import random_pipeline


class Dark(Guide):
    class Settings(Guide.Settings):
        fail: bool = False

    def loss_guidance(self, step):
        if self.settings.fail and step.index == 2:
            raise RuntimeError("on purpose")
        return step.image.mean(dim=(1, 2, 3))


class Word(Plugin):
    def vocabulary(self):
        return {"<ink>": torch.ones(2, 16)}


def state(pipeline):
    """Everything a run could leave behind."""
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    modules = [m for n in networks for m in n.modules()]
    return {
        "parameters": [p.detach().clone() for n in networks for p in n.parameters()],
        "asks": [p.requires_grad for n in networks for p in n.parameters()],
        "gradients": [p.grad is None for n in networks for p in n.parameters()],
        "training": [m.training for m in modules],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in modules
        ],
        "tokens": len(pipeline.tokenizer),
        "scheduler": (type(pipeline.scheduler), dict(pipeline.scheduler.config)),
        "scheduler steps": pipeline.scheduler.num_inference_steps,
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("gradient", ["x0", "latents"])
@pytest.mark.parametrize("thawed", [False, True])
def test_a_run_leaves_nothing_behind(fail, gradient, thawed):
    pipeline = random_pipeline()
    pipeline.unet.requires_grad_(thawed)
    if thawed:
        pipeline.unet.enable_gradient_checkpointing()
    sampler, before = Sampler.from_pipeline(pipeline), state(pipeline)
    run = {"plugins": [Dark(gradient=gradient, fail=fail), Word()], "checkpointing": "on"}
    if fail:
        with pytest.raises(PluginError, match="on purpose"):
            sampler("a <ink> cat", steps=4, scheduler="euler", seed=0, **run)
    else:
        sampler("a <ink> cat", steps=4, scheduler="euler", seed=0, **run)
    after = state(pipeline)
    torch.testing.assert_close(after.pop("parameters"), before.pop("parameters"), rtol=0, atol=0)
    assert after == before


def test_a_run_has_frozen_and_checkpointed_networks_of_its_own_over_the_same_weights(pipeline):
    pipeline.unet.requires_grad_(True)
    own, shared = [], list(pipeline.unet.parameters())

    class Watch(Guide):
        def loss_guidance(self, step):
            own.append(step.run.model.denoiser)
            return step.x0.mean(dim=(1, 2, 3))

    sampler = Sampler.from_pipeline(pipeline)
    sampler("a cat", plugins=[Watch()], steps=2, checkpointing="on", seed=0)
    assert own[0] is own[1] and own[0] is not pipeline.unet
    assert not any(p.requires_grad for p in own[0].parameters())
    assert [p.data_ptr() for p in own[0].parameters()] == [p.data_ptr() for p in shared]
    assert any("forward" in vars(module) for module in own[0].modules())
    assert not any("forward" in vars(module) for module in pipeline.unet.modules())
    assert all(p.requires_grad for p in shared)


def test_a_run_after_an_aborted_one_equals_a_fresh_run(latents_of):
    expected = latents_of(Dark(), scheduler="lms")
    with pytest.raises(PluginError):
        latents_of(Dark(fail=True), scheduler="lms")
    assert torch.equal(latents_of(Dark(), scheduler="lms"), expected)


def test_interleaved_runs_equal_separate_ones(sampler):
    options = [
        {"plugins": [Dark(gradient="latents")], "scheduler": "pndm", "seed": 1},
        {"plugins": [Dark(gradient="x0")], "scheduler": "pndm", "seed": 2},
    ]
    streams = [sampler.stream("a cat", steps=4, **o) for o in options]
    for _ in zip(*streams, strict=True):
        pass
    for stream, option in zip(streams, options, strict=True):
        expected = sampler("a cat", steps=4, **option).latents
        assert torch.equal(stream.result().latents, expected)


def test_the_global_random_state_and_the_results_graph_are_left_alone(sampler):
    before = torch.random.get_rng_state()
    result = sampler("a cat", plugins=[Dark(gradient="latents")], steps=2, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not result.latents.requires_grad
    assert result.run.model is None
