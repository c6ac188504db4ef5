"""What `optimize` promises: an optimiser's steps, at the schedule's levels."""

from __future__ import annotations

import math

import pytest
import torch
from pilotfish_image import Optimize
from pilotfish_image.optimize import SETTLED

import pilotfish
from pilotfish import Guide, Plugin, Sampler, SettingsError
from pilotfish.testing import GaussianModel, random_sampler

pytestmark = pytest.mark.slow  # each is short, together they are not

PROMPT = "a red cat"
EULER = {"lr": 1, "momentum": 0, "tolerance": 0}
KINDS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.6, "weight_decay": 0.3},
    "adam": {"optimizer": "adam", "betas": (0.8, 0.95), "weight_decay": 0.3},
    "adamw": {"optimizer": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.3},
}


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def gaussian():
    """A model of float64 whose predictions are exact."""
    return Sampler(GaussianModel())


@pytest.fixture
def latents_of(sampler):
    def run(*plugins, **options):
        options = {"steps": 5, "seed": 3, "scheduler": "ddim", **options}
        return sampler(PROMPT, plugins=plugins, **options).latents

    return run


class Watch(Plugin):
    """Keeps the steps as they are when they are done."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def after_step(self, step):
        self.steps.append(step)


class Towards(Guide):
    """Pulls everything to one value."""

    def loss_guidance(self, step):
        return (step.x0 - 0.5).square().mean(dim=(1, 2, 3))


def rms(tensor):
    return tensor.square().mean(dim=(1, 2, 3)).sqrt()


# ---- the steps ----


@pytest.mark.parametrize(
    "scheduler", ["euler", {"name": "ddim", "set_alpha_to_one": True}, "flowmatch-euler"]
)
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_plain_sgd_at_the_schedules_pace_is_eulers_method(gaussian, scheduler, lr):
    """The projection makes up for a rate below 1: that is all it does to plain SGD."""
    run = {"steps": 10, "seed": 3, "scheduler": scheduler}
    ours = gaussian("", plugins=[Optimize(**{**EULER, "lr": lr})], **run).latents
    torch.testing.assert_close(ours, gaussian("", **run).latents, rtol=1e-4, atol=1e-5)


def directions(kind, gradients, values, rates):
    """Textbook moves of each optimiser, from its gradients and parameters at each step."""
    settings = KINDS[kind]
    decay, moves, mean, square = settings["weight_decay"], [], 0, 0
    for t, (gradient, value, rate) in enumerate(zip(gradients, values, rates, strict=True), 1):
        g = gradient if kind == "adamw" else gradient + decay * value
        if kind == "sgd":
            momentum = settings["momentum"]
            mean = g if t == 1 else momentum * mean + (1 - momentum) * g
            moves.append(-rate * mean)
            continue
        first, second = settings["betas"]
        mean = first * mean + (1 - first) * g
        square = second * square + (1 - second) * g**2
        move = -rate * mean / (1 - first**t) / ((square / (1 - second**t)).sqrt() + 1e-8)
        moves.append(move - (rate * decay * value if kind == "adamw" else 0))
    return moves


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_the_optimisers_and_a_projection(gaussian, kind):
    watch, lr = Watch(), 0.9
    plugin = Optimize(**KINDS[kind], lr=lr, tolerance=0)
    gaussian("", plugins=[plugin, watch], steps=6, seed=3, scheduler="ddim", num_images=2)
    steps = watch.steps
    rates = [lr * (s.sigma - s.alpha * s.next_sigma / s.next_alpha) for s in steps]
    moves = directions(kind, [s.eps for s in steps], [s.latents for s in steps], rates)
    for step, move, after in zip(steps, moves, steps[1:], strict=False):
        noise = (step.latents + move - step.alpha * step.x0) * step.next_alpha / step.alpha
        most = step.next_sigma * rms(step.eps)
        factor = (most / rms(noise)).clamp(max=1).view(-1, 1, 1, 1)
        expected = step.next_alpha * step.x0 + factor * noise
        torch.testing.assert_close(after.latents, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_leaves_more_noise_than_eulers_method(sampler, kind):
    watch = Watch()
    sampler(PROMPT, plugins=[Optimize(**KINDS[kind], lr=3), watch], steps=8, seed=1)
    for step, after in zip(watch.steps, watch.steps[1:], strict=False):
        left = rms(after.latents - after.alpha * step.x0)
        assert (left <= 1.001 * step.next_sigma * rms(step.eps)).all()


def test_optimisers_give_different_pictures(latents_of):
    pictures = [latents_of(Optimize(**settings)) for settings in KINDS.values()]
    pictures += [latents_of(Optimize(**EULER)), latents_of(Optimize(**EULER | {"lr": 1.3}))]
    for i, one in enumerate(pictures):
        assert not any(torch.allclose(one, other) for other in pictures[:i])


@pytest.mark.parametrize(
    ("schedule", "falls"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.5, 0.1]),
        ("cosine", [1, 0.5, (1 + math.cos(0.9 * math.pi)) / 2]),
    ],
)
def test_the_learning_rate_falls_by_its_schedule(schedule, falls):
    plugin = Optimize(lr=1.5, schedule=schedule)
    rates = [plugin._rate(progress) for progress in (0, 0.5, 0.9)]
    assert rates == pytest.approx([1.5 * fall for fall in falls])


# In adam it goes through the normalisation, which takes most of it away: so there is adamw.
@pytest.mark.parametrize(("optimizer", "most"), [("sgd", 0.9), ("adam", 1.0), ("adamw", 0.9)])
def test_weight_decay_makes_paler_pictures(gaussian, optimizer, most):
    run = {"steps": 20, "seed": 3, "scheduler": "ddim", "num_images": 4}
    sizes = [
        rms(gaussian("", plugins=[Optimize(optimizer=optimizer, weight_decay=w)], **run).latents)
        for w in (0, 0.5)
    ]
    assert (sizes[1] < most * sizes[0]).all()


@pytest.mark.parametrize(
    "scheduler",
    [
        *("ddim", "ddpm", "euler", "euler-ancestral", "heun", "lms", "pndm", "kdpm2-ancestral"),
        *("dpmsolver-multistep", "dpmsolver-singlestep", "unipc-multistep", "deis-multistep"),
        *("flowmatch-euler", "flowmatch-heun"),
    ],
)
def test_the_levels_of_every_scheduler_will_do(gaussian, scheduler):
    """They differ in their levels alone: all end where the exact flow leads, std * noise / norm."""
    run = {"steps": 60, "seed": 3, "scheduler": scheduler}
    first = next(gaussian.stream("", plugins=[Optimize(**EULER)], **run))
    ours = gaussian("", plugins=[Optimize(**EULER)], **run).latents
    exact = (
        gaussian.model.std
        * first.latents
        / math.hypot(first.alpha * gaussian.model.std, first.sigma)
    )
    assert rms(ours - exact) < 0.1 * rms(exact)


def test_a_first_level_without_any_signal_will_do(sampler):
    sampler = random_sampler(prediction_type="v_prediction")
    pure = {"name": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for settings in KINDS.values():
        result = sampler(PROMPT, plugins=[Optimize(**settings)], steps=4, scheduler=pure, seed=0)
        assert result.latents.isfinite().all()


# ---- the end ----


def test_an_image_is_done_where_it_predicts_less_noise_than_the_tolerance(gaussian):
    watch = Watch()
    plugins = [Optimize(tolerance=0.3), watch]
    stream = gaussian.stream("", plugins=plugins, steps=30, seed=3, scheduler="ddim")
    assert 5 < len(list(stream)) < 30
    sizes = [float(rms(step.eps)) for step in watch.steps]
    assert sizes[-1] < 0.3 <= min(sizes[:-1])
    torch.testing.assert_close(stream.result().latents, watch.steps[-1].x0)


def test_no_image_is_done_while_nothing_is_settled(gaussian):
    watch = Watch()
    gaussian("", plugins=[Optimize(lr=3), watch], steps=30, seed=3, scheduler="ddim")
    assert len(watch.steps) < 30
    levels = [step.sigma / step.alpha for step in watch.steps]
    assert levels[-1] <= SETTLED < levels[-2]
    assert max(rms(step.eps) for step in watch.steps[5:]) < 0.5


def test_with_tolerance_0_all_steps_are_taken(gaussian):
    run = {"steps": 30, "seed": 3, "scheduler": "ddim"}
    assert len(list(gaussian.stream("", plugins=[Optimize(tolerance=0)], **run))) == 30


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}], ids=["sgd", "adam"])
def test_images_are_done_at_different_steps_and_do_not_wait_for_each_other(gaussian, settings):
    run = {"steps": 30, "scheduler": "ddim"}

    def plugin():
        return Optimize(**{"tolerance": 0.3, **settings})

    batch = gaussian("", plugins=[plugin()], seed=3, num_images=6, **run).latents
    lengths = set()
    for i in range(6):
        stream = gaussian.stream("", plugins=[plugin()], seed=3 + i, **run)
        lengths.add(len(list(stream)))
        torch.testing.assert_close(batch[i : i + 1], stream.result().latents)
    if not settings:
        assert len(lengths) > 1


def test_nothing_is_kept_after_a_run(latents_of):
    plugin = Optimize()
    latents_of(plugin)
    assert vars(plugin).keys() == {"settings"}


# ---- with guides ----


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("preset", ["balanced", "deep-dive", "dps", "freedom", "mpgd", "tfg"])
def test_guides_lower_their_loss_on_top(gaussian, preset, optimizer):
    scale = {"balanced": 3.0, "mpgd": 0.5, "freedom": 5.0, "tfg": 2.0}.get(preset, 20.0)
    run = {"steps": 15, "seed": 3, "scheduler": "ddim", "preset": preset}

    def distance(scale):
        plugins = [Towards(scale=scale), Optimize(optimizer=optimizer, lr=1, tolerance=0)]
        latents = gaussian("", plugins=plugins, **run).latents
        return float((latents - 0.5).square().mean())

    assert distance(scale) < 0.9 * distance(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be 'sgd', 'adam' or 'adamw'; got 'lion'"),
        ({"lr": 0}, "lr must be greater than 0; got 0"),
        ({"schedule": "step"}, "schedule must be 'constant', 'linear' or 'cosine'; got 'step'"),
        ({"momentum": 1}, "momentum must be less than 1; got 1"),
        ({"betas": (0.9, 1.0)}, "betas.1 must be less than 1; got 1.0"),
        ({"weight_decay": -1}, "weight_decay must be greater than or equal to 0; got -1"),
        ({"tolerance": -1}, "tolerance must be greater than or equal to 0; got -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Optimize(**settings)


# ---- on a trained model ----


@pytest.fixture(scope="module")
def emoji():
    return pilotfish.load()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}], ids=["default", "adam"])
def test_the_judge_recognises_seven_of_ten_pictures(emoji, settings):
    from emoji_training.score import plain_wishes
    from pilotfish_emoji import judge as judges

    judge, right, calls = judges.load(), 0, []
    wishes = plain_wishes(64, 0)[::4]  # docs/measure.py has all of them
    for seed, wish in enumerate(wishes):
        plugin = {"use": "optimize", **settings}
        run = {"steps": 25, "guidance_scale": 4, "seed": seed, "scheduler": "ddim"}
        stream = emoji.stream(wish.prompt, plugins=[plugin], **run)
        calls.append(len(list(stream)))
        with torch.no_grad():
            image = emoji.model.decode(stream.result().latents).clamp(0, 1)
        right += judge.judge(image).names[0][0] == wish.object
    assert right >= 0.7 * len(wishes)
    assert max(calls) <= 25


@pytest.mark.slow
def test_blue_makes_an_optimised_picture_blue(emoji):
    run = {"steps": 25, "guidance_scale": 4, "seed": 32}

    def blue(*plugins):
        prompt = "a campfire on a black background"
        latents = emoji(prompt, plugins=[*plugins, "optimize"], **run).latents
        with torch.no_grad():
            return float((emoji.model.decode(latents)[:, 2] - 0.9).abs().mean())

    assert blue("blue") < 0.75 * blue()
