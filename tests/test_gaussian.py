"""The closed form: Gaussian data has an exact x0, and an exact posterior under a measurement."""

import dataclasses

import pytest
import torch

from pilotfish import PRESETS, Guide, Sampler
from pilotfish.sampling.schedule import noise_level
from pilotfish.testing import GaussianModel

STD = 0.7  # of the data, in every coordinate


class Measured(Guide):
    """-log p(y | x0) for y = red channel + noise, y = 1 everywhere."""

    noise_std = 0.5

    def loss_guidance(self, step):
        return (step.x0[:, 0] - 1).square().sum(dim=(1, 2)) / (2 * self.noise_std**2)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver-multistep", "heun", "lms"])
def test_x0_is_the_exact_posterior_mean_at_every_step(scheduler):
    model = GaussianModel()
    for step in Sampler(model).stream(scheduler=scheduler, steps=6, guidance_scale=1, seed=0):
        level = noise_level(model.scheduler, step.index)
        # Schedulers keep their sigmas in float32.
        torch.testing.assert_close(step.x0, model.x0(step.latents, level), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step.latents, step.alpha * step.x0 + step.sigma * step.eps)


@pytest.mark.parametrize(("scheduler", "order"), [("euler", 1), ("heun", 2)])
def test_a_solver_converges_with_its_order(scheduler, order):
    """The exact flow of Gaussian data only scales the latents; the error falls as steps^-order."""

    def error(steps):
        spec = {"name": scheduler, "use_karras_sigmas": True}
        stream = Sampler(GaussianModel()).stream(
            scheduler=spec, steps=steps, guidance_scale=1, seed=0, num_images=4
        )
        first, *_, last = stream
        exact = first.latents * ((STD**2 + last.sigma**2) / (STD**2 + first.sigma**2)) ** 0.5
        return float((last.latents - exact).abs().max() / exact.abs().max())

    coarse, fine = error(20), error(40)
    assert torch.tensor(coarse / fine).log2() == pytest.approx(order, rel=0.15)


def exact_guided_mean(level, latents):
    """E[x0 | latents, y]: the exact posterior, which guidance approximates."""
    variance = GaussianModel(STD).variance(level)
    gain = variance / (variance + Measured.noise_std**2)
    mean = GaussianModel(STD).x0(latents, level)
    guided = mean.clone()
    guided[:, 0] += gain * (1 - mean[:, 0])
    return guided, gain


def test_one_guided_step_moves_x0_by_the_formula_and_towards_the_exact_posterior():
    """sigma2 through the network: the move is -sigma^2 / alpha * dx0/dlatents * dL/dx0.

    For Gaussian data dx0/dlatents * sigma^2 / alpha is the exact posterior variance V, and the
    exact gain V / (V + r^2) is the move's V / r^2 to first order: guidance overshoots by a known
    factor, which the test fixes.
    """
    preset = dataclasses.replace(PRESETS["deep-dive"], gradient="latents", applied_to="prediction")
    model = GaussianModel()
    common = {"scheduler": "ddim", "steps": 10, "guidance_scale": 1, "seed": 0}
    step = next(Sampler(model).stream(**common, plugins=[Measured()], preset=preset))
    level = noise_level(model.scheduler, 0)
    exact, gain = exact_guided_mean(level, step.latents)
    plain = model.x0(step.latents, level)
    overshoot = 1 / (1 - gain)  # (V / r^2) / (V / (V + r^2)) = (V + r^2) / r^2
    torch.testing.assert_close(step.x0 - plain, (exact - plain) * overshoot)


def test_guided_samples_have_the_posterior_mean_where_noise_is_small():
    """Late in the run V << r^2, the overshoot vanishes, and x0 is the exact posterior mean."""
    preset = dataclasses.replace(PRESETS["deep-dive"], gradient="latents", applied_to="prediction")
    model = GaussianModel()
    *_, step = Sampler(model).stream(
        scheduler="ddim", steps=200, guidance_scale=1, seed=0,
        plugins=[Measured(start=0.9)], preset=preset,
    )  # fmt: skip
    level = noise_level(model.scheduler, step.index)
    exact, gain = exact_guided_mean(level, step.latents)
    assert gain < 0.02
    moved = exact - model.x0(step.latents, level)
    torch.testing.assert_close(step.x0 - model.x0(step.latents, level), moved, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("applied_to", ["latents", "prediction"])
def test_the_sigma2_rule_moves_x0_alike_in_every_family(applied_to):
    """Variance preserving or sigma-space, x0 moves by -(sigma / alpha)^2 * dL/dx0."""
    preset = dataclasses.replace(PRESETS["deep-dive"], applied_to=applied_to)
    for scheduler in ("ddim", "euler"):
        run = {"scheduler": scheduler, "steps": 10, "guidance_scale": 1, "seed": 0}
        run |= {"preset": preset, "plugins": [Measured(scale=0.1)]}
        plain = next(Sampler(GaussianModel()).stream(**{**run, "plugins": []}))
        guided = next(Sampler(GaussianModel()).stream(**run))
        moved = {
            "prediction": guided.x0 - plain.x0,
            "latents": (guided.latents - plain.latents) / plain.alpha,
        }[applied_to]
        gradient = torch.zeros_like(moved)
        gradient[:, 0] = 0.1 * (plain.x0[:, 0] - 1) / Measured.noise_std**2
        torch.testing.assert_close(moved, -((plain.sigma / plain.alpha) ** 2) * gradient)
