"""What theory says of samples and the exact posterior, held by the presets on the real sampler.

Data N(0, 1) in every value and a red channel that was measured as y = 1 with noise of variance 1/k.
The posterior is N(k / (1 + k), 1 / (1 + k)). In variance-preserving coordinates the exact x0 is
`a * latents` with variance `1 - a^2`, where a = alpha runs from `start`, nearly 0, to 1; so every
guided run is a linear equation in a, with a solution. `docs/guidance.md`, "Against a known
posterior", has the numbers.
"""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad

from pilotfish import PRESETS, Guide, Plugin, Sampler, Setting
from pilotfish.testing import GaussianModel

ROOT = Path(__file__).parents[1]
VP = {"timestep_spacing": "trailing"}  # from the noisiest level there is
KARRAS = {"use_karras_sigmas": True}


class Measured(Guide):
    """-log p(y | x0), or of the latents: then how uncertain x0 is counts too."""

    class Settings(Guide.Settings):
        k: float = Setting(4.0, gt=0)
        y: float = 1.0
        uncertain: bool = False

    def loss_guidance(self, step):
        variance = 1 / self.settings.k
        if self.settings.uncertain:
            variance += GaussianModel(std=1.0).variance(step)
        return (step.x0[:, 0] - self.settings.y).square().sum(dim=(1, 2)) / (2 * variance)


def run(guide, preset, scheduler="ddim", steps=50, **options):
    """The first step of a run, and its red channel in the end."""
    options = {"num_images": 4, "height": 4, "width": 4, "guidance_scale": 1, "seed": 0, **options}
    scheduler = {"name": scheduler, **(KARRAS if scheduler in ("euler", "heun") else VP)}
    plugins = [] if guide is None else [guide]
    stream = Sampler(GaussianModel(std=1.0)).stream(
        plugins=plugins, preset=preset, scheduler=scheduler, steps=steps, **options
    )
    return next(stream), stream.result().latents[:, 0]


def exact_line(guide, preset, scheduler, steps):
    """Mean and variance of infinitely many samples: without new noise they are a line in the first.

    Also `start`, the first alpha.
    """
    first, last = run(guide, preset, scheduler, steps, num_images=1)
    norm = math.hypot(first.alpha, first.sigma)
    noise = first.latents[0, 0].flatten() / norm
    design = torch.stack([torch.ones_like(noise), noise], dim=1)
    fit = torch.linalg.lstsq(design, last.flatten()[:, None])
    mean, slope = fit.solution.flatten().tolist()
    torch.testing.assert_close(design @ fit.solution, last.flatten()[:, None], rtol=0, atol=1e-5)
    return torch.tensor([mean, slope**2]), first.alpha / norm


def posterior(k):
    return torch.tensor([k / (1 + k), 1 / (1 + k)])


def from_unguided_noise(k, start):
    """Mean and variance of the exact sampler from N(0, 1): at the first level, too, y shifts the
    mean, by `start` times the posterior's, and no run begins there."""
    mean, variance = posterior(k).tolist()
    slope = (variance / (1 - start**2 + start**2 * variance)) ** 0.5
    return torch.tensor([mean * (1 - start * slope), slope**2])


def of_a_point_estimate(k, start, repeats=1):
    """Mean and variance where guidance divides by 1/k instead of by 1/k plus x0's variance.

    Each step is taken `repeats` times: that many probability-flow steps and one fewer of noise,
    `dx = [(1 - n) x + n k a (1 - a x)] da/a + sqrt(2 (n - 1) da/a) dw`.
    """
    n = repeats
    mean, _ = quad(lambda a: n * k * a ** (n - 1) * math.exp(n * k * (a * a - 1) / 2), start, 1)
    variance = start ** (2 * n - 2) * math.exp(-n * k * (1 - start**2))
    new, _ = quad(lambda a: a ** (2 * n - 3) * math.exp(n * k * (a * a - 1)), start, 1)
    return torch.tensor([mean, variance + 2 * (n - 1) * new])


@pytest.mark.parametrize("uncertain", [True, False], ids=["exact", "point"])
def test_samples_converge_to_the_closed_form(uncertain):
    """With the exact likelihood to the posterior, with a point estimate beyond it and narrower: in
    Euler's steps with order 1, and Heun's are there."""

    def error(scheduler, steps):
        guide = Measured(uncertain=uncertain)
        found, start = exact_line(guide, "clip-guided", scheduler, steps)
        limit = (from_unguided_noise if uncertain else of_a_point_estimate)(4.0, start)
        return float((found - limit).norm())

    assert math.log2(error("euler", 20) / error("euler", 40)) == pytest.approx(1, rel=0.15)
    assert error("heun", 40) < 0.004  # the last step's: from sigma 0.03 to 0, in one


def test_a_point_estimate_overshoots_in_proportion_to_what_it_leaves_out():
    """For small k the mean is 1 + 2k/3 times too far: a weak measurement is followed exactly."""
    excess = []
    for k in (0.1, 0.05):
        point, exact = (
            exact_line(Measured(k=k, uncertain=uncertain), "clip-guided", "heun", 40)[0]
            for uncertain in (False, True)
        )
        assert point[0] > exact[0] and point[1] < exact[1]
        excess.append(float(point[0] / exact[0] - 1))
    assert excess[1] == pytest.approx(2 * 0.05 / 3, rel=0.1)
    assert excess[0] / excess[1] == pytest.approx(2, rel=0.1)


def test_taking_a_step_again_brings_samples_nearer_to_the_posterior():
    """New noise forgets the overshoot of earlier levels, and the last levels have none: the more
    often each step is taken, the better. An ancestral sampler is where it is taken twice."""
    errors = []
    for repeats in (1, 2, 4):
        preset = {"base": "clip-guided", "recurrence": repeats}
        first, last = run(Measured(), preset, height=16, width=16)
        found = torch.tensor([float(last.mean()), float(last.var())])
        errors.append((found - posterior(4.0)).abs())
        expected = of_a_point_estimate(4.0, first.alpha, repeats)
        # 1,024 samples: 0.01; the variance falls short by the order of repeats / steps.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.06)
    assert (errors[0] > errors[1]).all() and (errors[1] > errors[2]).all()
    _, ancestral = run(Measured(), "clip-guided", "ddpm", height=16, width=16)
    found = torch.tensor([float(ancestral.mean()), float(ancestral.var())])
    torch.testing.assert_close(found, of_a_point_estimate(4.0, 0, 2), rtol=0, atol=0.06)


def test_the_mean_over_samples_of_x0_converges_to_the_exact_likelihood():
    """Where the samples have x0's own variance, as `lgd`'s have for data N(0, 1), the mean of the
    likelihoods is the exact one, and the error falls with the root of their number."""

    def x0(preset, **settings):
        guide = Measured(stop=0.1, **settings)
        options = {"num_images": 128, "height": 1, "width": 1}
        stream = Sampler(GaussianModel(std=1.0)).stream(
            plugins=[guide], preset=preset, scheduler="ddim", steps=10, guidance_scale=1, seed=0,
            **options,
        )  # fmt: skip
        return next(stream).x0[:, 0]

    exact, point = x0("clip-guided", uncertain=True), x0("clip-guided")
    few, many = (x0({"base": "lgd", "samples": n}) for n in (16, 64))
    errors = [float((found - exact).square().mean().sqrt()) for found in (point, few, many)]
    assert errors[2] < 0.1 * errors[0]
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.35)  # of 128 values


def test_samples_of_x0_bring_a_run_nearer_to_the_posterior_than_a_point_estimate():
    options = {"num_images": 64, "height": 1, "width": 1, "steps": 20}
    _, point = run(Measured(), "clip-guided", **options)
    _, exact = run(Measured(uncertain=True), "clip-guided", **options)
    distances = [
        float((run(Measured(), {"base": "lgd", "samples": n}, **options)[1] - exact).abs().mean())
        for n in (4, 16, 64)
    ]
    assert float((point - exact).abs().mean()) > distances[0] > distances[1] > distances[2]


def test_a_gradient_at_x0_is_longer_by_what_the_network_makes_of_it():
    """By 1 / alpha^2 for such data: 200 times and more at the first step."""
    moves = []
    for end in ("x0", "latents"):
        guided, plain = (
            run(guide, {"base": "clip-guided", "gradient": end}, steps=2)[0]
            for guide in (Measured(scale=1e-3), None)
        )
        moves.append(guided.x0[:, 0] - plain.x0[:, 0])
    assert 1 / plain.alpha**2 > 200
    torch.testing.assert_close(moves[0], moves[1] / plain.alpha**2)


@pytest.mark.parametrize("part", [0.3, 1.0])
def test_noise_that_is_drawn_anew_takes_variance_away(part):
    """The latents x become `(a' a + s' s sqrt(1 - z)) x + s' sqrt(z) n`, for data N(0, 1)."""
    watch = []

    class Watch(Plugin):
        def before_step(self, step):
            watch.append((step.alpha, step.sigma))

    preset = {"base": "diffpir", "renoise": part}
    size = {"num_images": 8, "height": 16, "width": 16, "guidance_scale": 1, "seed": 0}
    result = Sampler(GaussianModel(std=1.0))(
        plugins=[Measured(scale=1e-9), Watch()], preset=preset, scheduler={"name": "ddim", **VP},
        steps=20, **size,
    )  # fmt: skip
    variance = 1.0
    for (a, s), (next_a, next_s) in itertools.pairwise([*watch, (1.0, 0.0)]):
        kept = next_a * a + next_s * s * (1 - part) ** 0.5
        variance = kept**2 * variance + next_s**2 * part
    assert variance < 0.95
    # 6,144 values: 1.8 %
    assert float(result.latents.var()) == pytest.approx(variance, rel=0.06)


def moved(name, scale, steps=50, y=1.0, **knobs):
    """By how much a weak guide shifts the samples, apart from what noise is drawn on the way."""
    preset = {"base": name, "recurrence": 1, "renoise": 0.0, **knobs}
    scheduler = "ddpm" if name == "dsg" else "ddim"
    plain, guided = (
        run(guide, preset, scheduler, steps)[1] for guide in (None, Measured(scale=scale, y=y))
    )
    return float((guided - plain).mean())


WEAK = {
    **{"balanced": 0.1, "clip-guided": 0.01, "deep-dive": 1e-5, "dps": 1e-3, "dsg": 0.1},
    **{"freedom": 0.05, "lgd": 0.01, "mpgd": 0.05, "tfg": 1e-5, "ugd": 1e-3},
    **{"diffpir": 1e-4, "flowchef": 1e-5, "flowdps": 1e-3, "mmps": 0.01, "pgdm": 0.01},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_moved_prediction_pulls_alike_in_any_number_of_steps_and_moved_latents_by_each(name):
    """A scheduler integrates a prediction over the noise levels. Latents are moved once a step, so
    twice the steps pull twice as far; `dsg` moves within noise that falls with the root."""
    twice = {"prediction": 1.0, "latents": 2.0, "after_step": 2.0}[PRESETS[name].applied_to]
    twice = 2**0.5 if name == "dsg" else twice
    ratio = moved(name, WEAK[name], steps=100) / moved(name, WEAK[name], steps=50)
    assert ratio == pytest.approx(twice, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_only_a_rule_that_sees_the_gradients_size_pulls_more_towards_what_is_farther(name):
    """The posterior's mean is proportional to y. Under `rms` and `sphere` the gradient has only a
    direction, and under `residual` the root's slope is one: they sample no posterior."""
    proportional = PRESETS[name].rule in ("sigma2", "plain")
    ratio = moved(name, WEAK[name], y=20.0) / moved(name, WEAK[name], y=10.0)
    assert ratio == pytest.approx(2.0 if proportional else 1.0, rel=0.05)


@pytest.fixture(scope="module")
def closed_form():
    """The benchmark's module."""
    path = ROOT / "benchmarks" / "closed_form.py"
    spec = importlib.util.spec_from_file_location("closed_form", path)
    module = sys.modules["closed_form"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["closed_form"]


def test_the_benchmark_has_every_preset_and_runs(closed_form, tmp_path, capsys):
    assert {row.name for row in closed_form.ROWS} >= set(PRESETS)
    closed_form.main(["--quick", "--out", str(tmp_path / "quick.json")])
    result = json.loads((tmp_path / "quick.json").read_text())
    assert capsys.readouterr().out == closed_form.table(result) + "\n"


def test_the_table_in_the_docs_is_that_of_the_result(closed_form):
    result = json.loads((ROOT / "benchmarks" / "results" / "closed_form.json").read_text())
    assert closed_form.table(result) in (ROOT / "docs" / "guidance.md").read_text()
