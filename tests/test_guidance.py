"""Several guides, one trunk: counted calls, exact sums, and rules."""

import itertools
from collections import Counter

import pytest
import torch

from pilotfish import PRESETS, Guide, Sampler
from pilotfish.guidance.gradients import Pull, leaf_gradients
from pilotfish.guidance.graph import Leaves, SharedGraph
from pilotfish.guidance.moves import (
    CLEAN,
    Place,
    combine,
    prompt_pull,
    schedule,
    spherical,
)
from pilotfish.guidance.noise import NoiseLevel

LEVEL = NoiseLevel(0.6, 0.8, 1 / 0.6, -0.8 / 0.6, "epsilon")
FOLLOWING = NoiseLevel(0.8, 0.6, 1 / 0.8, -0.6 / 0.8, "epsilon")
PULL = 0.3  # of the prompt, on x0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear64:
    """latents -> x0 -> image, smooth and not linear, float64."""

    def __init__(self):
        self.weight = torch.randn(3, 4, generator=generator(5), dtype=torch.float64)
        self.decodes = self.rgbs = 0

    def predict(self, latents):
        return torch.tanh(latents) + 0.1 * latents.square()

    def decode(self, x0):
        self.decodes += 1
        return torch.sin(torch.einsum("bchw,rc->brhw", x0, self.weight)).repeat(1, 1, 2, 2)

    def rgb(self, x0):
        self.rgbs += 1
        return torch.einsum("bchw,rc->brhw", x0, self.weight)


LOSSES = [
    lambda s: (s("image")[:, 2] - 0.9).abs().mean(dim=(1, 2)),
    lambda s: s("image").square().mean(dim=(1, 2, 3)) * 3,
    lambda s: s("x0").pow(4).sum(dim=(1, 2, 3)),
    lambda s: s("rgb")[:, 0].exp().mean(dim=(1, 2)),
    lambda s: s("rgb").mean(dim=(1, 2, 3)) * s("x0").square().mean(dim=(1, 2, 3)),
    lambda s: s("image").std(dim=(1, 2, 3)),
    lambda s: -s("image")[:, 0].mean(dim=(1, 2)) + s("rgb")[:, 1].square().mean(dim=(1, 2)),
    lambda s: s("x0").abs().mean(dim=(1, 2, 3)).sqrt(),
]


def step_of(losses, end, preset, model, batch=2, scales=None):
    """One guided step by the engine: its move, the pulls, and the latents."""
    latents = torch.randn(batch, 4, 5, 3, generator=generator(), dtype=torch.float64)
    with torch.enable_grad():
        leaf = latents.clone().requires_grad_()
        trunk = SharedGraph(model.predict(leaf), model.decode, model.rgb, leaf)
        pulls = []
        for i, loss in enumerate(losses):
            leaves = Leaves(trunk)
            value = loss(leaves)
            scale = 1.0 if scales is None else scales[i]
            gradients = leaf_gradients(value, leaves)
            pulls.append(Pull(str(i), scale, (end,), value.detach(), gradients))
    move = combine([trunk], pulls, preset, place_of(batch))
    return move.value, move.shares, latents


def place_of(batch):
    """Where the prompt pulls x0 by PULL."""
    pull = torch.full((batch, 1, 1, 1), PULL, dtype=torch.float64)
    return Place(LEVEL, FOLLOWING, pull)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("end", ["x0", "latents"])
def test_the_gradient_of_any_number_of_guides_is_that_of_the_summed_losses(count, end):
    model, scales = Linear64(), [0.5 + i for i in range(count)]
    move, _, latents = step_of(LOSSES[:count], end, PRESETS["deep-dive"], model, scales=scales)
    plain, latents = Linear64(), latents.requires_grad_()
    with torch.enable_grad():
        x0 = plain.predict(latents)
        source = latents
        if end == "x0":
            x0 = source = x0.detach().requires_grad_()
        values = {"x0": x0, "rgb": plain.rgb(x0), "image": plain.decode(x0)}
        summed = sum(s * f(values.__getitem__).sum() for s, f in zip(scales, LOSSES, strict=False))
    gradient = torch.autograd.grad(summed, source)[0] / (LEVEL.alpha if end == "x0" else 1)
    # float64: the sums are taken in another order, nothing else
    torch.testing.assert_close(move, -(LEVEL.sigma**2) * gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_guides_costs_one_decode(count):
    model = Linear64()
    step_of(LOSSES[:count], "latents", PRESETS["balanced"], model)
    assert (model.decodes, model.rgbs) == (1, 1 if count >= 4 else 0)


def test_a_guide_that_reads_rgb_only_costs_no_decode():
    model = Linear64()
    step_of([LOSSES[3]], "x0", PRESETS["balanced"], model)
    assert model.decodes == 0


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("end", ["x0", "latents"])
def test_a_run_calls_network_and_decoder_as_often_for_eight_guides_as_for_one(
    pipeline, monkeypatch, count, end
):
    class Red(Guide):
        def loss_guidance(self, step):
            return step.image[:, 0].mean(dim=(1, 2))

    calls = Counter()

    def counted(network, method):
        original = getattr(network, method)

        def call(*args, **kwargs):
            calls[method] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(network, method, call)

    counted(pipeline.unet, "forward")
    counted(pipeline.vae, "decode")
    sampler = Sampler.from_pipeline(pipeline)
    sampler("a cat", plugins=[Red(gradient=end) for _ in range(count)], steps=4, seed=0)
    assert calls == {"forward": 4, "decode": 4 + 1}  # and the picture itself


@pytest.mark.parametrize("end", ["x0", "latents"])
def test_under_rms_a_loss_times_1000_gives_the_same_move(end):
    small, *_ = step_of([LOSSES[0]], end, PRESETS["balanced"], Linear64())
    large, *_ = step_of([lambda s: 1000 * LOSSES[0](s)], end, PRESETS["balanced"], Linear64())
    torch.testing.assert_close(small, large, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("end", ["x0", "latents"])
@pytest.mark.parametrize("loss", LOSSES)
def test_under_rms_scale_one_moves_as_far_as_the_prompt_pulls(loss, end):
    for scale in (1.0, 2.5, -1.0):
        move, *_ = step_of([loss], end, PRESETS["balanced"], Linear64(), scales=[scale])
        size = move.square().mean(dim=(1, 2, 3)).sqrt()
        leaves = len({"x0", "rgb", "image"} & set(loss.__code__.co_consts))
        if leaves == 1:
            torch.testing.assert_close(size, torch.full_like(size, abs(scale) * PULL))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_two_opposed_guides_of_equal_scale_cancel(preset):
    move, shares, _ = step_of([LOSSES[0]] * 2, "x0", preset, Linear64(), scales=[1.0, -1.0])
    assert move.abs().max() < 1e-12
    assert shares.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_shares_add_up_to_one_and_follow_the_scales(preset):
    _, shares, _ = step_of([LOSSES[0]] * 2, "x0", preset, Linear64(), scales=[3.0, 1.0])
    expected = torch.tensor([0.75, 0.75], dtype=torch.float64)
    torch.testing.assert_close(shares[0], expected)
    torch.testing.assert_close(shares[0] + shares[1], torch.ones_like(expected))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_zero_gradient_moves_nothing(preset):
    move, *_ = step_of([lambda s: 0 * s("image").sum(dim=(1, 2, 3))], "x0", preset, Linear64())
    assert torch.equal(move, torch.zeros_like(move))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_guides_with_both_gradient_ends_add_up(preset):
    model = Linear64()
    a, *_ = step_of([LOSSES[0]], "x0", preset, model)
    b, *_ = step_of([LOSSES[1]], "latents", preset, model)
    latents = torch.randn(2, 4, 5, 3, generator=generator(), dtype=torch.float64)
    with torch.enable_grad():
        leaf = latents.requires_grad_()
        trunk = SharedGraph(model.predict(leaf), model.decode, model.rgb, leaf)
        pulls = []
        for loss, end in ((LOSSES[0], "x0"), (LOSSES[1], "latents")):
            leaves = Leaves(trunk)
            value = loss(leaves)
            pulls.append(Pull("g", 1.0, (end,), value.detach(), leaf_gradients(value, leaves)))
    both = combine([trunk], pulls, preset, place_of(2)).value
    torch.testing.assert_close(both, a + b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_gradients_survive_a_half_precision_trunk(dtype):
    """1e-7 a pixel is below the smallest normal float16; the pulled gradient must not suffer."""
    weight = torch.randn(3, 4, generator=generator())

    def decode(x0):
        return torch.einsum("bchw,rc->brhw", x0.to(dtype), weight.to(dtype)).float()

    def pulled(size, decode):
        trunk = SharedGraph(torch.ones(2, 4, 3, 3), decode, decode)
        leaves = Leaves(trunk)
        loss = size * leaves("image").sum(dim=(1, 2, 3)) * torch.tensor([1.0, 1e-4])
        pull = Pull("g", 1.0, ("x0",), loss.detach(), leaf_gradients(loss, leaves))
        place = Place(LEVEL, CLEAN, torch.ones(2, 1, 1, 1))
        return combine([trunk], [pull], PRESETS["deep-dive"], place).value

    with torch.enable_grad():
        tiny, usual = pulled(1e-7, decode), pulled(1.0, decode)
        exact = pulled(1.0, lambda x0: torch.einsum("bchw,rc->brhw", x0, weight))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(tiny * 1e7, usual, rtol=2 * rounding, atol=0)
    torch.testing.assert_close(tiny * 1e7, exact, rtol=4 * rounding, atol=0)


def test_the_prompts_pull_does_not_jump_where_guidance_is_switched_off():
    cond = torch.randn(2, 4, 8, 8, generator=generator())
    uncond = cond + 0.03 * torch.randn(2, 4, 8, 8, generator=generator(1))
    latents = torch.randn(2, 4, 8, 8, generator=generator(2))
    off = prompt_pull(LEVEL, latents, cond, None, 1.0)
    on = prompt_pull(LEVEL, latents, cond, uncond, 1.001)
    empty = prompt_pull(LEVEL, latents, cond, cond, 7.5)
    torch.testing.assert_close(on, off)
    torch.testing.assert_close(empty, off)


COORDINATES = {
    "variance preserving": (lambda ratio: (1 + ratio**2) ** -0.5, "epsilon"),
    "predicting v": (lambda ratio: (1 + ratio**2) ** -0.5, "v_prediction"),
    "sigma-space": (lambda ratio: 1.0, "epsilon"),
    "flow": (lambda ratio: 1 / (1 + ratio), "flow"),
}


@pytest.mark.parametrize("ratio", [0.1, 1.0, 14.6])
@pytest.mark.parametrize("uncond", [False, True], ids=["alone", "prompted"])
def test_the_pull_is_the_same_in_all_coordinates_and_whatever_is_predicted(ratio, uncond):
    """One x0 and one noise, at one ratio of sigma to alpha, as four kinds of network tell them."""
    shape = (2, 4, 8, 8)
    x0, eps, other = (torch.randn(shape, generator=generator(i)).double() for i in range(3))
    found = []
    for alpha_of, kind in COORDINATES.values():
        alpha = alpha_of(ratio)
        level = NoiseLevel.of(alpha, ratio * alpha, kind)
        latents = level.alpha * x0 + level.sigma * eps
        cond, told = (level.output(latents, clean) for clean in (x0, x0 + 0.3 * other))
        found.append(prompt_pull(level, latents, cond, told if uncond else None, 4.0).flatten())
    for pull in found:
        torch.testing.assert_close(pull, found[0])
    if not uncond:  # for a network that predicts noise, that is a tenth of the prediction
        size = eps.square().mean(dim=(1, 2, 3)).sqrt()
        torch.testing.assert_close(found[0], 0.1 * ratio * size)


def test_the_pull_stays_finite_towards_pure_noise_and_does_not_jump_there():
    noise = torch.randn(2, 4, 8, 8, generator=generator()).double()

    def pull(alpha):
        level = NoiseLevel.of(alpha, 1 - alpha, "flow")
        return prompt_pull(level, level.sigma * noise, noise, None, 1.0)

    assert pull(0.0).isfinite().all()
    torch.testing.assert_close(pull(1e-6), pull(0.0), rtol=1e-5, atol=0)


def test_the_prompts_pull_is_how_far_guidance_moves_x0():
    latents = torch.randn(1, 4, 8, 8, generator=generator(2))
    uncond = torch.randn(1, 4, 8, 8, generator=generator())
    cond = torch.randn(1, 4, 8, 8, generator=generator(1))
    guided = LEVEL.x0(latents, uncond + 4 * (cond - uncond)) - LEVEL.x0(latents, uncond)
    expected = guided.square().mean().sqrt()
    place = Place(LEVEL, CLEAN, prompt_pull(LEVEL, latents, cond, uncond, 4.0))
    torch.testing.assert_close(place.pull_in("x0").squeeze(), expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("end", ["x0", "latents"])
def test_a_guided_run_lowers_its_loss(sampler, preset, end):
    class Dark(Guide):
        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3))

    scale = {"balanced": 1.0, "freedom": 20.0, "mpgd": 1.0, "dsg": 10.0}.get(preset, 300.0)
    scheduler = "euler-ancestral" if preset == "dsg" else "euler"
    run = {"steps": 10, "seed": 0, "preset": preset, "scheduler": scheduler}
    plain = sampler("a cat", **run)
    guided = sampler("a cat", plugins=[Dark(scale=scale, gradient=end)], **run)
    with torch.no_grad():
        means = [float(sampler.model.decode(r.latents).mean()) for r in (plain, guided)]
    assert means[1] < means[0]
    first = guided.trace[0]
    *_, seen = itertools.islice(sampler.stream("a cat", **run), first.index + 1)
    if PRESETS[preset].samples == 1:
        assert first.loss[0] == pytest.approx(float(seen.image.mean()), rel=1e-4)


def test_checkpointing_changes_memory_not_the_picture(sampler):
    class Dark(Guide):
        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3))

    run = {"steps": 3, "seed": 0, "plugins": [Dark(gradient="latents")]}
    on, off = (sampler("a cat", checkpointing=c, **run).latents for c in ("on", "off"))
    torch.testing.assert_close(on, off, rtol=1e-5, atol=1e-5)


def test_windows_are_applied_by_the_host(sampler):
    class Dark(Guide):
        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3))

    guide = Dark(start=0.2, stop=0.7, every=2)
    trace = sampler("a cat", plugins=[guide], steps=10, seed=0).trace
    assert [r.index for r in trace] == [2, 4, 6]


def test_the_trace_shows_the_cosine_between_the_gradients(sampler):
    class Red(Guide):
        def loss_guidance(self, step):
            return step.image[:, 0].mean(dim=(1, 2))

    class NotRed(Guide):
        def loss_guidance(self, step):
            return -1000 * step.image[:, 0].mean(dim=(1, 2))

    class Blue(Guide):
        def loss_guidance(self, step):
            return step.image[:, 2].mean(dim=(1, 2))

    class Less(Red):
        pass

    class Coarse(Guide):
        def loss_guidance(self, step):
            return step.rgb.mean(dim=(1, 2, 3))

    guides = [Red(), NotRed(), Blue(), Coarse(), Less(scale=-1.0)]
    trace = sampler("a cat", plugins=guides, steps=3, seed=0, num_images=2).trace
    assert trace.cosines("Red", "NotRed") == pytest.approx([-1.0] * 3)
    assert trace.cosines("Red", "Less") == pytest.approx([-1.0] * 3)
    assert trace.cosines("NotRed", "Less") == pytest.approx([1.0] * 3)
    assert trace.cosines("Blue", "Red") == pytest.approx([0.0] * 3)
    assert trace.cosines("Coarse", "Red") == []  # they read the picture in different forms
    assert all(len(r.cosine["NotRed"]) == 2 for r in trace.of("Red"))


def test_a_guide_that_answers_none_changes_nothing(latents_of):
    class Sometimes(Guide):
        def loss_guidance(self, step):
            return None

    assert torch.equal(latents_of(Sometimes()), latents_of())


def test_a_direction_turns_the_noise_at_most_all_the_way():
    noise, direction = (torch.randn(1, 4, 8, 8, generator=generator(i)) for i in (0, 1))
    direction = direction / direction.square().mean().sqrt()
    deviation, mean = torch.full((1, 1, 1, 1), 0.5), torch.zeros_like(noise)
    whole = spherical(mean, noise, deviation, direction)
    torch.testing.assert_close(whole, 0.5 * direction)
    torch.testing.assert_close(spherical(mean, noise, deviation, 3 * direction), whole)


def test_a_schedule_of_strengths_is_finite_where_two_levels_hold_nothing_of_x0():
    levels = [NoiseLevel.of(alpha, 1.0, "v_prediction") for alpha in (0.0, 0.0, 1.0)]
    first, second, third = schedule(levels, "increase")  # abar: 0, 0, 1/2, and 1 at the end
    assert (first, second, third) == pytest.approx((2.0, 0.0, 1.0))
