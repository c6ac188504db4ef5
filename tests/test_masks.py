"""A mask holds: what a guide changes outside of it is told, and a hard one keeps the outside."""

import numpy as np
import pytest
import torch

from pilotfish import Guide, InputError, Plugin

LEFT = (0, 0, 0.5, 1)


class Red(Guide):
    def loss_guidance(self, step):
        return (step.image[:, 0] - 0.9).abs().mean(dim=(1, 2))


def pixels_of(result):
    return torch.from_numpy(np.asarray(result.images[0], np.float32) / 255)


@pytest.mark.parametrize("preset", ["balanced", "deep-dive", "dps"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral", "dpmsolver-multistep"])
def test_outside_of_a_hard_mask_every_step_is_that_of_the_run_without_the_guide(
    sampler, preset, scheduler
):
    run = {"steps": 4, "seed": 1, "scheduler": scheduler, "preset": preset}
    others = [Red(mask=LEFT, mask_edge="soft", scale=0.5)]  # acts in both runs
    guides = [*others, Red(mask=LEFT, mask_edge="hard", gradient="latents")]
    for plain, guided in zip(
        sampler.stream("a cat", plugins=others, **run),
        sampler.stream("a cat", plugins=guides, **run),
        strict=True,
    ):
        if preset == "deep-dive":  # moves the latents of the step itself, which are put back after
            continue
        assert torch.equal(plain.latents[..., 8:], guided.latents[..., 8:])
        if plain.index:
            assert not torch.equal(plain.latents[..., :8], guided.latents[..., :8])


def test_a_hard_mask_keeps_the_picture_outside_to_the_vaes_own_error(emoji_sampler):
    run = {"steps": 12, "seed": 32}
    plain = pixels_of(emoji_sampler("a campfire on a black background", **run))
    changes = {}
    for edge in ("soft", "hard"):
        guide = Red(mask=LEFT, mask_edge=edge, scale=2)
        result = emoji_sampler("a campfire on a black background", plugins=[guide], **run)
        change = (pixels_of(result) - plain).abs()
        changes[edge] = (change[:, :32].mean(), change[:, 32:].mean())
        told = [record.outside[0] for record in result.trace]
        assert min(told) > 0 and max(told) < 0.5
    model, image = emoji_sampler.model, plain.permute(2, 0, 1)[None]
    again = model.decode(model.encode(image)).clamp(0, 1)
    assert changes["hard"][1] < (again - image).abs().mean()
    assert changes["hard"][1] < changes["soft"][1] / 4
    assert changes["hard"][0] > changes["soft"][0] / 2


def test_without_a_mask_nothing_is_told_of_an_outside(sampler):
    trace = sampler("a cat", plugins=[Red()], steps=2, seed=0).trace
    assert all(record.outside == () for record in trace)


def test_a_hard_mask_does_not_go_with_particles(sampler):
    class Particles(Plugin):
        def resample(self, step):
            return None

    with pytest.raises(InputError, match="mask_edge='hard' cannot go with .* resamples"):
        sampler("a", plugins=[Red(mask=LEFT, mask_edge="hard"), Particles()], steps=1)


def test_a_hard_mask_ends_early_as_the_run_does(sampler):
    class Stop(Plugin):
        def after_step(self, step):
            if step.index == 1:
                step.stop()

    guide = Red(mask=LEFT, mask_edge="hard")
    result = sampler("a cat", plugins=[guide, Stop()], steps=4, seed=0)
    assert result.latents.isfinite().all()
