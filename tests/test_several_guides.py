"""Several guides, one move: how large each one's part is, and what becomes of their conflicts."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pilotfish import PRESETS, Guide, InputError, Sampler
from pilotfish.guidance.gradients import (
    LONGER,
    Pull,
    cosines,
    leaf_gradients,
    rms,
    without_conflicts,
)
from pilotfish.guidance.graph import Leaves, SharedGraph
from pilotfish.guidance.moves import Place, combine
from pilotfish.guidance.noise import NoiseLevel
from pilotfish.guidance.presets import find_preset
from pilotfish.testing import GaussianModel

ROOT = Path(__file__).parents[1]
SCALE_FREE = [name for name, preset in PRESETS.items() if preset.normalizes]
LEVEL = NoiseLevel(0.6, 0.8, 1 / 0.6, -0.8 / 0.6, "epsilon")
FOLLOWING = NoiseLevel(0.8, 0.6, 1 / 0.8, -0.6 / 0.8, "epsilon")
PULL = 0.3  # of the prompt, on x0


class Red(Guide):
    """Of the image, and as large as asked for."""

    factor = 1.0

    def loss_guidance(self, step):
        return self.factor * (step.image[:, 0] - 0.9).square().mean(dim=(1, 2))


class LoudRed(Red):
    factor = 1000.0


class Flat(Guide):
    """Of x0."""

    def loss_guidance(self, step):
        return step.x0.pow(4).mean(dim=(1, 2, 3))


def latents(preset, *guides, **settings):
    """What a run in float64 ends with."""
    run = {"steps": 10, "seed": 1, "num_images": 2, "guidance_scale": 1, "preset": preset}
    run["scheduler"] = "ddpm" if preset == "dsg" else "ddim"
    plugins = [guide(**settings) for guide in guides]
    return Sampler(GaussianModel())(plugins=plugins, **run).latents


@pytest.mark.parametrize("end", ["x0", "latents"])
@pytest.mark.parametrize("preset", SCALE_FREE)
def test_a_loss_times_1000_gives_the_same_picture_under_every_scale_free_preset(preset, end):
    """Beside another guide, too, to which it is not louder: each is normalised on its own."""
    for others in ([], [Flat]):
        quiet, loud = (latents(preset, g, *others, gradient=end) for g in (Red, LoudRed))
        torch.testing.assert_close(loud, quiet, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(quiet, latents(preset, Flat, gradient=end), atol=1e-2)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(SCALE_FREE)))
def test_a_loss_times_1000_is_another_picture_where_the_rule_sees_its_size(preset):
    quiet, loud = (latents(preset, g, scale=1e-3) for g in (Red, LoudRed))
    assert not torch.allclose(loud, quiet, atol=1e-3)


def gradient_surgery(gradient, others):
    """Yu et al. 2020, algorithm 1, on vectors; then as long as it takes. A transcription."""
    left = gradient
    for other in others:
        product = torch.dot(left, other)
        if product < 0:
            left = left - product / torch.dot(other, other) * other
    kept = torch.dot(left, gradient) / torch.dot(gradient, gradient)
    return left * min(1 / kept, LONGER) if kept > 0 else 0 * left


def test_projected_gradients_are_those_of_gradient_surgery_for_each_image():
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(40, 5, 3, 1, 1, generator=generator, dtype=torch.float64)
    for gradients in zip(*found.chunk(10), strict=True):  # ten guides are mostly in conflict
        for own, result in zip(gradients, without_conflicts(gradients), strict=True):
            for image in range(5):
                others = [g[image].flatten() for g in gradients if g is not own]
                expected = gradient_surgery(own[image].flatten(), others)
                torch.testing.assert_close(result[image].flatten(), expected)


@pytest.mark.parametrize("cosine", [0.5, 0.0, -0.3, -0.8, -0.95, -1.0])
def test_of_two_opposed_gradients_each_gets_as_far_as_alone(cosine):
    """To first order. Where they are too much opposed it is less, and nothing at -1."""
    first = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).view(1, 4, 1, 1)
    second = 3 * torch.tensor([cosine, (1 - cosine**2) ** 0.5, 0, 0]).double().view(1, 4, 1, 1)
    move = sum(without_conflicts([first, second]))
    reached = [float((g * move).sum() / g.square().sum()) for g in (first, second)]
    alone = 1.0 if cosine > -0.87 else LONGER * (1 - cosine**2)
    shared = max(cosine, 0) * torch.tensor([3, 1 / 3])  # the other one helps
    assert reached == pytest.approx((alone + shared).tolist(), abs=1e-6)


def decode(x0):
    """Two channels that rise together with the first of x0 and apart with the second."""
    first, second = x0.unbind(1)
    return torch.stack([3 * first + second, 3 * first - second], dim=1)


def raised(combination, *active):
    """How much each of two losses rises, to first order, along the move that the active make."""
    x0 = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    trunk, pulls = SharedGraph(x0, decode, decode), []
    losses = [lambda image: image[:, 0].mean((1, 2)), lambda image: -image[:, 1].mean((1, 2))]
    with torch.enable_grad():
        for loss, scale in zip(losses, (3.0, 1.0), strict=True):
            leaves = Leaves(trunk)
            value = loss(leaves("image"))
            found = leaf_gradients(value, leaves)
            pulls.append(Pull("guide", scale, ("x0",), value.detach(), found))
    assert cosines(pulls)[0, 0, 1] == 0  # in the picture, nothing shows
    preset = dataclasses.replace(PRESETS["balanced"], combine=combination)
    place = Place(LEVEL, FOLLOWING, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    image = decode(combine([trunk], [pulls[i] for i in active], preset, place).value)
    return [float(loss(image)) for loss in losses]


def test_projected_guides_lower_both_losses_as_alone_where_their_sum_raises_one():
    """Though they meet only behind the decoder: conflicts are those of the gradients at x0."""
    assert max(raised("sum", 0, 1)) > 0.1
    alone = [raised("project", guide)[guide] for guide in (0, 1)]
    assert raised("project", 0, 1) == pytest.approx(alone)


def move(preset, scale, end):
    """Of one guide, by the engine, on latents (2, 4, 5, 3) and a network that is no identity."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    with torch.enable_grad():
        leaf = start.requires_grad_()
        trunk = SharedGraph(torch.tanh(leaf) + 0.1 * leaf.square(), torch.sin, torch.sin, leaf)
        leaves = Leaves(trunk)
        loss = leaves("image").square().mean(dim=(1, 2, 3))
        gradient = leaf_gradients(loss, leaves)
        pull = torch.full((2, 1, 1, 1), PULL, dtype=torch.float64)
        pulls = [Pull("guide", scale, (end,), loss.detach(), gradient)]
        return combine([trunk], pulls, preset, Place(LEVEL, FOLLOWING, pull)).value


@pytest.mark.parametrize("end", ["x0", "latents"])
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"dsg"}))
def test_trust_bounds_every_presets_move_in_terms_of_x0(name, end):
    preset = dataclasses.replace(PRESETS[name], iterations=1, trust=0.5)
    kept = FOLLOWING.sigma if preset.keeps == "v" else 0.0
    per_x0 = {"prediction": 1, "latents": LEVEL.alpha, "after_step": FOLLOWING.alpha + kept}
    longest = torch.full((2, 1, 1, 1), 0.5 * PULL * per_x0[preset.applied_to]).double()
    free = dataclasses.replace(preset, trust=None)
    torch.testing.assert_close(rms(move(preset, 1e6, end)), longest)
    assert torch.equal(move(preset, 1e-6, end), move(free, 1e-6, end))


def test_trust_is_refused_where_the_move_has_the_length_of_the_steps_noise():
    with pytest.raises(InputError, match="'sphere' keeps the length of the step's noise: no trust"):
        find_preset({"base": "dsg", "trust": 1.0})


@pytest.fixture(scope="module")
def conflict():
    """The benchmark's module."""
    pytest.importorskip("pilotfish_emoji")
    path = ROOT / "benchmarks" / "conflict.py"
    spec = importlib.util.spec_from_file_location("conflict", path)
    module = sys.modules["conflict"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["conflict"]


def test_the_table_of_conflicts_in_the_docs_is_that_of_the_result(conflict):
    result = json.loads((ROOT / "benchmarks" / "results" / "conflict.json").read_text())
    assert conflict.table(result) in (ROOT / "docs" / "guidance.md").read_text()


@pytest.mark.slow
def test_two_opposed_guides_keep_what_they_reach_alone_where_their_sum_gives_one_up(conflict):
    """On the four pictures of one prompt; benchmarks/conflict.py has sixteen."""
    lab = conflict.Lab({"rocket": conflict.PROMPTS["rocket"]})
    settings = {name: conflict.SETTINGS[name] for name in ("sum", "project")}
    together = conflict.compare(lab, ("blue", "dim"), lab.measure([], {}), settings)["together"]
    least = {name: min(x["mean"] for x in m["left"].values()) for name, m in together.items()}
    assert least["sum"] < 0.6
    assert least["project"] > 0.75
