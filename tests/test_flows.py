"""Flows: the exact model, recurrence, and what `scale=1` means there, beside other schedules."""

import math

import pytest
import torch

from pilotfish import Guide, Plugin, Sampler
from pilotfish.guidance import moves
from pilotfish.guidance.noise import NoiseLevel
from pilotfish.testing import GaussianModel

STD = 0.7  # of the data
EULER = {"name": "flowmatch-euler"}
SHIFTED = {"name": "flowmatch-euler", "shift": 3.0}
KINDS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": EULER,
    "shifted": SHIFTED,
    "heun": {"name": "flowmatch-heun"},
    "dpmsolver": {"name": "dpmsolver-multistep", **KINDS},
    "unipc": {"name": "unipc-multistep", **KINDS},
}
TRAILING = {"name": "ddim", "timestep_spacing": "trailing"}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_x0_is_the_exact_posterior_mean_at_every_step_of_a_flow(scheduler):
    """For data N(0, s^2): (1 - t) s^2 / ((1 - t)^2 s^2 + t^2) of the latents."""
    run = {"scheduler": scheduler, "steps": 6, "guidance_scale": 1, "seed": 0}
    for step in Sampler(GaussianModel(STD)).stream(**run):
        t = step.sigma
        assert step.alpha == pytest.approx(1 - t)
        gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        torch.testing.assert_close(step.x0, gain * step.latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "order"), [(EULER, 1), (SHIFTED, 1), (SCHEDULERS["heun"], 2)]
)
def test_a_solver_converges_on_a_flow_with_its_order(scheduler, order):
    """The exact flow takes noise n to s n; errors fall as steps^-order."""

    def error(steps):
        run = {"scheduler": scheduler, "steps": steps, "guidance_scale": 1, "seed": 0}
        stream = Sampler(GaussianModel(STD)).stream(**run, num_images=4)
        noise = next(stream).latents
        return float((stream.result().latents - STD * noise).abs().max())

    assert math.log2(error(20) / error(40)) == pytest.approx(order, rel=0.2)


# ---- recurrence ----


def test_noise_that_is_put_back_keeps_the_marginal_of_a_flow():
    """From (1 - s) x0 + s n to (1 - t) x0 and noise of deviation t, also where t is 1."""
    one, none = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    for t, s in ((1.0, 0.9), (0.8, 0.3), (0.2, 0.0)):
        level, cleaner = (NoiseLevel.of(1 - u, u, "flow") for u in (t, s))
        of_x0 = float(level.noised((1 - s) * one, cleaner, none))
        of_noises = [float(level.noised(a * s, cleaner, b)) for a, b in ((one, none), (none, one))]
        assert of_x0 == pytest.approx(1 - t, abs=1e-12)
        assert math.hypot(*of_noises) == pytest.approx(t, abs=1e-12)


class Hardly(Guide):
    """So that steps are taken again."""

    def loss_guidance(self, step):
        return 1e-9 * step.x0.mean(dim=(1, 2, 3))


class Watch(Plugin):
    """The deviation of the latents that the network gets, at each call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_step(self, step):
        self.seen.append((step.alpha, step.sigma, float(step.latents.std())))


@pytest.mark.parametrize(
    ("scheduler", "tolerance"),
    [(SHIFTED, 0.1), (SCHEDULERS["dpmsolver"], 0.03)],  # solvers of order 1 and 2
    ids=["euler", "dpmsolver"],
)
def test_steps_taken_again_leave_every_level_of_a_flow_its_own_deviation(scheduler, tolerance):
    watch, preset = Watch(), {"base": "clip-guided", "recurrence": 2}
    run = {"scheduler": scheduler, "steps": 60, "guidance_scale": 1, "seed": 0, "preset": preset}
    size = {"num_images": 2, "height": 32, "width": 32}
    Sampler(GaussianModel(STD))(plugins=[Hardly(), watch], **run, **size)
    assert len(watch.seen) == 120
    for alpha, sigma, deviation in watch.seen:  # of 6,144 values: 0.9 %
        assert deviation == pytest.approx(math.hypot(alpha * STD, sigma), rel=tolerance)


# ---- one scale for all schedules ----


def drift(scheduler, preset, guide, steps):
    """By how much a guide shifts the red channel, (B,), and the first noise."""
    run = {"scheduler": scheduler, "preset": preset, "guidance_scale": 1, "seed": 0}
    size = {"num_images": 4, "height": 2, "width": 2, "steps": steps}
    found = []
    for plugins in ([guide], []):
        stream = Sampler(GaussianModel(1.0)).stream(plugins=plugins, **run, **size)
        first = next(stream)
        found.append(stream.result().latents[:, 0].mean(dim=(1, 2)))
    return found[0] - found[1], first.latents / math.hypot(first.alpha, first.sigma)


def limit(scheduler, preset, guide):
    """The same for infinitely many steps: Euler's error is of order 1. DDIM's step is right only
    where their number divides 1000."""
    (coarse, noise), (fine, _) = (drift(scheduler, preset, guide, n) for n in (20, 40))
    return 2 * fine - coarse, noise


FIRST = {"ddim": 14.6146, "flowmatch-euler": math.inf}  # sigma / alpha where a run begins


class Redder(Guide):
    def loss_guidance(self, step):
        return -step.x0[:, 0].mean(dim=(1, 2))


@pytest.mark.parametrize("scheduler", [TRAILING, EULER, SHIFTED], ids=["ddim", "flow", "shifted"])
def test_without_a_prompt_scale_one_pulls_alike_at_every_level_of_noise(scheduler):
    """For data N(0, 1) eps is r / hypot(1, r) of the first noise, r the ratio of sigma to alpha. A
    tenth of it times r is x0's move, and of what is moved at r the end keeps 1 / hypot(1, r): over
    all r below R the shift is `log(1 + R^2) / 20` of the noise. Beyond r = 15, where only flows
    begin, x0 moves as at 15: `1.5 (pi / 2 - atan 15)` more.
    """
    shift, noise = limit(scheduler, "balanced", Redder(scale=1e-3))
    first = FIRST[scheduler["name"]]
    expected = math.log(1 + min(first, moves.NOISIEST) ** 2) / 20
    if first > moves.NOISIEST:
        expected += 1.5 * (math.pi / 2 - math.atan(moves.NOISIEST))
    # A move of root mean square 1, all of it in one of three channels.
    shift = shift / (1e-3 * 3**0.5) / noise.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(shift, torch.full_like(shift, expected), rtol=0.02, atol=0)


class Measured(Guide):
    """-log p(y | x0), or of the latents: y = 1 with r^2 = 0.25."""

    class Settings(Guide.Settings):
        uncertain: bool = False

    def loss_guidance(self, step):
        further = GaussianModel(1.0).variance(step) if self.settings.uncertain else 0.0
        return (step.x0[:, 0] - 1).square().sum(dim=(1, 2)) / (0.5 + 2 * further)


@pytest.mark.parametrize("scheduler", [TRAILING, EULER, SHIFTED], ids=["ddim", "flow", "shifted"])
@pytest.mark.parametrize(
    ("preset", "guide"), [("clip-guided", Measured(uncertain=True)), ("mmps", Measured())]
)
def test_a_likelihood_ends_at_the_posterior_on_a_flow_as_elsewhere(scheduler, preset, guide):
    """N(0.8, 0.2), whose part at alpha is N(0.8 alpha, 1 - 0.8 alpha^2) of the latents: noise n at
    the first level ends at `0.8 + sqrt(0.2 / (1 - 0.8 alpha^2)) (n - 0.8 alpha)`. DDIM begins at
    alpha 0.07, the flow at 0."""
    shift, noise = limit(scheduler, preset, guide)
    alpha, red = 1 / math.hypot(1, FIRST[scheduler["name"]]), noise[:, 0].mean(dim=(1, 2))
    end = 0.8 + (0.2 / (1 - 0.8 * alpha**2)) ** 0.5 * (red - 0.8 * alpha)
    torch.testing.assert_close(shift, end - red, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["increase", "decrease"])
def test_strengths_over_the_run_are_those_of_the_noise_whatever_the_coordinates(kind):
    ratios = [14.6, 5.0, 2.0, 0.7, 0.1]
    preserving = [
        NoiseLevel.of((1 + r * r) ** -0.5, r / math.hypot(1, r), "epsilon") for r in ratios
    ]
    flow = [NoiseLevel.of(1 / (1 + r), r / (1 + r), "flow") for r in ratios]
    assert moves.schedule(flow, kind) == pytest.approx(moves.schedule(preserving, kind))
    # At pure noise abar is 0: the first step's part is 0 of what rises, and all of what falls.
    first, *_ = moves.schedule([NoiseLevel.of(0.0, 1.0, "flow"), *flow], kind)
    assert (first == 0) == (kind == "increase")
