"""A guide's scale as a curve over the run."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pilotfish import Guide, Run, SettingsError
from pilotfish.cli import main
from pilotfish.hooks.stack import Stack

CURVE = [[0, 0], [0.3, 1], [1, 0.2]]


class Red(Guide):
    """Pulls to red."""

    def loss_guidance(self, step):
        return (1 - step.rgb[:, 0]).square().mean(dim=(1, 2))


def acted(result):
    return [record.index for record in result.trace if not record.final]


@pytest.mark.parametrize("preset", ["balanced", "deep-dive", "dps"])
def test_a_constant_curve_leaves_the_picture_of_the_number_bit_identical(latents_of, preset):
    number = latents_of(Red(scale=0.3), preset=preset)
    for curve in ([[0, 0.3], [1, 0.3]], [[0.5, 0.3]], [[0.2, 0.3], [0.2, 0.3], [0.9, 0.3]]):
        assert torch.equal(latents_of(Red(scale=curve), preset=preset), number)


@pytest.mark.parametrize(
    ("curve", "window"),
    [
        ([[0, 0.3], [0.5, 0.3], [0.5, 0], [1, 0]], {"stop": 0.5}),
        ([[0, 0], [0.5, 0], [0.5, 0.3]], {"start": 0.5}),
        ([[0.25, 0], [0.25, 0.3], [0.75, 0.3], [0.75, 0]], {"start": 0.25, "stop": 0.75}),
    ],
)
def test_where_a_curve_is_zero_the_picture_is_that_of_a_window_to_the_bit(sampler, curve, window):
    run = {"steps": 4, "seed": 3}
    curved = sampler("a cat", plugins=[Red(scale=curve)], **run)
    windowed = sampler("a cat", plugins=[Red(scale=0.3, **window)], **run)
    assert torch.equal(curved.latents, windowed.latents)
    assert acted(curved) == acted(windowed)
    assert len(acted(curved)) == 2


def test_a_curve_of_zero_leaves_the_picture_bit_identical(latents_of):
    assert torch.equal(latents_of(Red(scale=[[0, 0], [1, 0]])), latents_of())


@pytest.mark.parametrize("curve", [CURVE, [[0.2, -1], [0.6, 2]], [[0.5, 3]]])
def test_between_its_points_a_curve_is_straight_and_outside_it_stays(curve):
    guide, steps = Red(scale=curve), 40
    ours = [guide.scale_at(index, steps) for index in range(steps)]
    moments, strengths = zip(*curve, strict=True)
    np.testing.assert_allclose(ours, np.interp(np.arange(steps) / steps, moments, strengths))


def test_the_moves_follow_the_curve(sampler):
    """Under the plain rule the first step's move is as long as the scale says."""
    preset = {"base": "mpgd", "schedule": "constant"}

    def moved(scale):
        run = {"steps": 2, "seed": 3, "preset": preset, "scheduler": "ddim"}
        plain, guided = (
            next(sampler.stream("a cat", plugins=plugins, **run)).x0
            for plugins in ((), (Red(scale=scale),))
        )
        return guided - plain

    torch.testing.assert_close(moved([[0, 2], [1, 9]]), moved(2.0))
    torch.testing.assert_close(moved([[0, 2], [1, 9]]), 2 * moved(1.0), rtol=1e-3, atol=1e-4)


def test_a_curve_survives_a_run_file(sampler):
    first = sampler("a cat", plugins=[{"use": "blue", "scale": CURVE}], steps=3, seed=1)
    (table,) = Run.parse(first.run.to_toml())["plugins"]
    assert table["scale"] == CURVE
    assert torch.equal(sampler("a cat", plugins=[table], steps=3, seed=1).latents, first.latents)


def test_a_curve_may_be_written_on_the_command_line():
    (table,) = Stack(["blue:scale=[[0,0],[0.3,1],[1,0.2]],every=2"]).tables()
    assert table["scale"] == CURVE


def dry_run(*words):
    done = CliRunner().invoke(main, ["generate", "a cat", "--dry-run", "--steps", "10", *words])
    return done.stdout or done.stderr


def test_a_dry_run_tells_on_which_steps_a_curve_acts():
    told = dry_run("--use", "blue:scale=[[0.2,0],[0.5,1],[0.8,0]]")
    assert "5 of 10 steps, 3 to 7" in told
    assert "scale=[[0.2, 0.0], [0.5, 1.0], [0.8, 0.0]]" in told
    assert "never: its scale is 0" in dry_run("--use", "blue:scale=[[0,0],[1,0]]")


def test_one_value_may_be_changed_to_a_curve():
    told = dry_run("--use", "blue", "-s", "plugins.blue.scale=[[0,1],[0.5,0]]")
    assert "5 of 10 steps, 0 to 4" in told


@pytest.mark.parametrize(
    "scale",
    [
        [],
        [[0.5, 1], [0.2, 1]],
        [[0, 1], [1.5, 1]],
        [[-0.1, 1]],
        [[0, float("nan")]],
        [[float("nan"), 1]],
        [0, 1],
        [[0, 1, 2]],
        [["a", 1]],
        "strong",
        None,
        float("inf"),
    ],
)
def test_a_wrong_curve_says_what_a_curve_is(scale):
    expected = r"scale must be a finite number, or a curve \[\[progress, strength\], ...\] whose"
    with pytest.raises(SettingsError, match=expected) as caught:
        Red(scale=scale)
    assert repr(scale) in str(caught.value)
