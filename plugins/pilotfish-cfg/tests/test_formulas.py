"""Each formula against a transcription of its own, and diffusers' guider where that is right."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pilotfish_cfg import Apg, CfgNorm, CfgPlusPlus, CfgZeroStar, Fdg, Mambo, Tcfg
from scipy import ndimage

from pilotfish import InputError, Plugin, SettingsError, guide, mend_torchvision, testing

mend_torchvision()

from diffusers import guiders  # noqa: E402

SCALE = 5.0
EXACT = {"rtol": 1e-6, "atol": 1e-6}


SPACES = ("x0", "output")
KINDS = ("epsilon", "v_prediction", "flow")


@dataclass
class Moment:
    """A step of random numbers: latents of a known level, and how an output gives x0 there."""

    kind: str = "epsilon"
    index: int = 3
    progress: float = 0.3
    alpha: float = 0.6

    def __post_init__(self):
        self.sigma = 0.4 if self.kind == "flow" else 0.8
        self.latents = random(0)
        combine = SimpleNamespace(combine=lambda cond, uncond, w: uncond + w * (cond - uncond))
        self.run = SimpleNamespace(cfg_scale=SCALE, model=combine)

    def to_x0(self, output):
        if self.kind == "epsilon":
            return (self.latents - self.sigma * output) / self.alpha
        scale = self.alpha if self.kind == "v_prediction" else 1
        return scale * self.latents - self.sigma * output

    def to_prediction(self, x0):
        if self.kind == "epsilon":
            return (self.latents - self.alpha * x0) / self.sigma
        scale = self.alpha if self.kind == "v_prediction" else 1
        return (scale * self.latents - x0) / self.sigma


def random(seed, shape=(2, 4, 16, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predictions(seed=1):
    """Cond and uncond of two images, which are alike as those of a network are."""
    shared = random(seed)
    return shared + 0.5 * random(seed + 1), 1.2 * shared + 0.3 * random(seed + 2)


def combined(plugin, step, state=None, seed=1):
    """What a plugin makes of classifier-free guidance at a step."""
    cond, uncond = predictions(seed)
    begun = step.run.model.combine(cond, uncond, SCALE)
    if type(plugin) is Fdg:
        return plugin.combine_predictions(begun, cond, uncond, step)
    return plugin.combine_predictions(begun, cond, uncond, step, state)


def in_space(space, step, came, seed=1):
    """Came, cond and uncond of each image, as vectors in a space: (came, cond, uncond), ..."""
    tensors = (came, *predictions(seed))
    if space == "x0":
        tensors = [step.to_x0(t) for t in tensors]
    return zip(*(t.flatten(1).numpy() for t in tensors), strict=True)


# ---- the papers' formulas, once more, for the vectors c and u of one image ----


def zero_star(c, u):
    s = (c @ u) / (u @ u)
    return s * u + SCALE * (c - s * u)


def mambo(c, u):
    w = 1 + (SCALE - 1) * np.exp(-3.0 * np.linalg.norm(c - u) / np.linalg.norm(u))
    return u + w * (c - u)


def tcfg(c, u):
    _, _, right = np.linalg.svd(np.stack([c, u]), full_matrices=False)
    projected = (u @ right[0]) * right[0]
    return projected + SCALE * (c - projected)


def normed(c, u):
    guided = u + SCALE * (c - u)
    return guided * np.linalg.norm(c) / np.linalg.norm(guided)


FORMULAS = {
    "cfg-zero-star": (functools.partial(CfgZeroStar, zero_steps=0), zero_star),
    "mambo": (functools.partial(Mambo, alpha=3.0), mambo),
    "tcfg": (Tcfg, tcfg),
    "cfg-norm": (CfgNorm, normed),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", FORMULAS)
def test_each_image_is_the_papers_formula(name, space, kind):
    plugin, formula = FORMULAS[name]
    step = Moment(kind)
    came = combined(plugin(space=space), step)
    for image, c, u in in_space(space, step, came):
        np.testing.assert_allclose(image, formula(c, u), **EXACT)
        assert not np.allclose(image, u + SCALE * (c - u), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_apg_is_the_papers_with_momentum_over_the_steps(space, kind, eta):
    plugin = Apg(eta=eta, threshold=9.0, momentum=-0.6, space=space)
    step, state, running, lengths = Moment(kind), plugin.setup(), [0.0, 0.0], []
    for seed in (1, 5, 9):
        came = combined(plugin, step, state, seed)
        for number, (image, c, u) in enumerate(in_space(space, step, came, seed)):
            running[number] = (c - u) - 0.6 * running[number]
            lengths.append(np.linalg.norm(running[number]))
            d = running[number] * min(1.0, 9.0 / lengths[-1])
            parallel = (d @ c) / (c @ c) * c
            np.testing.assert_allclose(
                image, c + (SCALE - 1) * (d - parallel + eta * parallel), **EXACT
            )
    assert max(lengths) > 9


def test_apg_with_all_of_it_switched_off_is_classifier_free_guidance():
    step, (cond, uncond) = Moment(), predictions()
    came = combined(Apg(eta=1.0, threshold=0.0, momentum=0.0), step, {})
    torch.testing.assert_close(came, uncond + SCALE * (cond - uncond), **EXACT)


def pyramid(image, weights):
    """Bands by scipy, each times its weight: image (C, H, W)."""
    taps = np.array([1, 4, 6, 4, 1]) / 16

    def blurred(x):
        for axis in (1, 2):
            x = ndimage.convolve1d(x, taps, axis=axis, mode="nearest")
        return x

    def halved(x):
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

    def doubled(x):
        # Linear between the middles of cells: a quarter of the neighbour at either side.
        for axis in (1, 2):
            edges = np.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
            before, here, after = (
                np.take(edges, range(i, i + x.shape[axis]), axis) for i in range(3)
            )
            pair = np.stack([0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after], axis + 1)
            x = pair.reshape([2 * n if a == axis else n for a, n in enumerate(x.shape)])
        return x

    if len(weights) == 1:
        return weights[0] * image
    coarse = halved(blurred(image))
    fine = image - blurred(doubled(coarse))
    return weights[0] * fine + blurred(doubled(pyramid(coarse, weights[1:])))


@pytest.mark.parametrize("scales", [[7.0], [8.0, 3.0], [9.0, 0.0, 4.0]])
def test_fdg_weighs_each_band_of_the_papers_pyramid(scales):
    came, (cond, uncond) = combined(Fdg(scales=scales), Moment()), predictions()
    for image, c, u in zip(came.numpy(), cond.numpy(), uncond.numpy(), strict=True):
        np.testing.assert_allclose(image, u + pyramid(c - u, scales), **EXACT)


@pytest.mark.parametrize("size", [(16, 24), (9, 13), (1, 2)])
def test_fdg_with_one_scale_for_all_bands_is_classifier_free_guidance_of_that_scale(size):
    step, cond, uncond = Moment(), random(1, (2, 4, *size)), random(2, (2, 4, *size))
    came = Fdg(scales=[3.0] * 3).combine_predictions(cond, cond, uncond, step)
    assert not torch.allclose(came, uncond + 3 * (cond - uncond))  # what came before counts
    begun = step.run.model.combine(cond, uncond, SCALE)
    came = Fdg(scales=[3.0] * 3).combine_predictions(begun, cond, uncond, step)
    torch.testing.assert_close(came, uncond + 3 * (cond - uncond), **EXACT)


# ---- cfg-norm ----


def test_cfg_norm_over_tokens_is_what_the_pipeline_of_qwen_image_does():
    """Its lines: the norm of each packed token, 4C long."""

    def packed(images):
        batch, channels, height, width = images.shape
        cells = images.view(batch, channels, height // 2, 2, width // 2, 2)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)

    cond, uncond = map(packed, predictions())
    guided = uncond + SCALE * (cond - uncond)
    expected = guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    came = packed(combined(CfgNorm(over="token"), Moment()))
    torch.testing.assert_close(came, expected, **EXACT)


def test_cfg_norm_over_cells_gives_each_cell_the_length_of_the_prompts_own():
    came, (cond, _) = combined(CfgNorm(over="cell"), Moment()), predictions()
    torch.testing.assert_close(came.norm(dim=1), cond.norm(dim=1), **EXACT)


def test_cfg_norm_refuses_half_a_token():
    odd = random(1, (2, 4, 15, 16))
    with pytest.raises(InputError, match="over = 'token' takes two by two cells.* 15 x 16"):
        CfgNorm(over="token").combine_predictions(odd, odd, odd, Moment(), None)


# ---- diffusers' own ----


def theirs(guider, index):
    guider.set_state(step=index, num_inference_steps=10, timestep=torch.tensor(0))
    return guider.forward(*predictions()).pred.double()


@pytest.mark.parametrize(
    ("plugin", "guider"),
    [
        (CfgZeroStar(zero_steps=1), guiders.ClassifierFreeZeroStarGuidance(SCALE)),
        (Tcfg(), guiders.TangentialClassifierFreeGuidance(SCALE)),
        (
            Apg(eta=0.3, threshold=20.0, momentum=0.0, space="output"),
            guiders.AdaptiveProjectedGuidance(
                SCALE - 1,
                adaptive_projected_guidance_rescale=20.0,
                eta=0.3,
                use_original_formulation=True,
            ),
        ),
    ],
    ids=["cfg-zero-star", "tcfg", "apg"],
)
@pytest.mark.parametrize("index", [0, 1])
def test_on_the_networks_output_it_equals_the_guider_of_diffusers(plugin, guider, index):
    came = combined(plugin, Moment(index=index), {})
    # Two of them reckon in float32: the decomposition of two long rows is then good to 1e-4.
    torch.testing.assert_close(came, theirs(guider, index), rtol=0, atol=2e-4)


# ---- in runs ----


class Keep(Plugin):
    """Writes down what each step has."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def combine_predictions(self, prediction, cond, uncond, step):
        both = {"prediction": prediction, "cond": cond, "uncond": uncond}
        level = {"alpha": step.alpha, "sigma": step.sigma, "latents": step.latents}
        self.seen.append({**both, **level, "next": (step.next_alpha, step.next_sigma)})

    def after_step(self, step):
        self.seen[-1]["x0"] = step.x0


model = functools.cache(testing.random_sampler)
MODELS = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "flow": {"family": "sd3"},
}


def seen(*plugins, kind="epsilon", **options):
    """What each step of a run had at the end of the chain, and the final latents."""
    keep, sampler = Keep(), model(dtype=torch.float64, **MODELS[kind])
    options = {"steps": 3, "num_images": 2, "seed": 4, "guidance_scale": SCALE, **options}
    negative = "a puppy" if options["guidance_scale"] > 1 else None
    run = {"negative_prompt": negative, "height": 32, "width": 32, **options}
    return keep.seen, sampler("a red cat", plugins=[*plugins, keep], **run).latents


def x0_of(kind, step, name):
    moment = Moment(kind, alpha=step["alpha"])
    moment.sigma, moment.latents = step["sigma"], step["latents"]
    return moment.to_x0(step[name])


@pytest.mark.parametrize("kind", KINDS)
def test_x0_is_that_of_the_models_kind(kind):
    for step in seen(CfgNorm(space="x0"), kind=kind)[0]:
        came, cond = (x0_of(kind, step, n).flatten(1).norm(dim=1) for n in ("prediction", "cond"))
        torch.testing.assert_close(came, cond, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_steps_output_is_zero(kind):
    steps, _ = seen(CfgZeroStar(zero_steps=2), kind=kind)
    assert [bool(step["prediction"].any()) for step in steps] == [False, False, True]
    if kind == "flow":  # its scheduler steps in float32
        first, third = steps[0]["latents"], steps[2]["latents"]
        torch.testing.assert_close(first, third, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "scale"), [("epsilon", 0.3), ("v_prediction", 0.6), ("flow", 1)])
def test_cfg_plus_plus_is_the_papers_algorithm(kind, scale):
    steps, end = seen(CfgPlusPlus(scale=scale), kind=kind)
    for step, after in zip(steps, [*(step["latents"] for step in steps[1:]), end], strict=True):
        cond, uncond = (x0_of(kind, step, name) for name in ("cond", "uncond"))
        noise = (step["latents"] - step["alpha"] * uncond) / step["sigma"]
        x0, (alpha, sigma) = uncond + scale * (cond - uncond), step["next"]
        torch.testing.assert_close(step["x0"], x0, **EXACT)
        torch.testing.assert_close(after, alpha * x0 + sigma * noise, **EXACT)


@pytest.mark.parametrize("preset", ["balanced", "deep-dive"])
def test_a_guide_beside_cfg_plus_plus_lowers_its_loss(preset):
    def loss(step):
        return (step.x0 - 1).square().mean(dim=(1, 2, 3))

    def end(*plugins):
        return float((seen(*plugins, preset=preset)[1] - 1).square().mean())

    assert end(CfgPlusPlus(), guide(loss, scale=1.0)) < 0.99 * end(CfgPlusPlus())


def test_outside_its_window_the_scheduler_takes_the_step():
    steps, end = seen(CfgPlusPlus(stop=0.5), steps=4)
    plain = [step["uncond"] + SCALE * (step["cond"] - step["uncond"]) for step in steps]
    acts = [not torch.allclose(s["prediction"], p) for s, p in zip(steps, plain, strict=True)]
    assert acts == [True, True, False, False]
    assert not torch.equal(end, seen(steps=4)[1])


ALL = {
    "cfg-zero-star": functools.partial(CfgZeroStar, zero_steps=0),
    "apg": Apg,
    "mambo": Mambo,
    "tcfg": Tcfg,
    "fdg": Fdg,
    "cfg-norm": CfgNorm,
    "cfg-plus-plus": CfgPlusPlus,
}


def test_without_guidance_the_picture_is_bit_identical():
    off = seen(guidance_scale=1)[1]
    assert torch.equal(seen(*(made() for made in ALL.values()), guidance_scale=1)[1], off)


def test_a_window_that_no_step_lies_in_leaves_the_picture_bit_identical():
    never = [made(start=0.4, stop=0.4) for made in ALL.values()]
    assert torch.equal(seen(*never)[1], seen()[1])


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("fdg", "cfg-plus-plus")])
def test_each_takes_up_what_the_plugins_before_it_made(name):
    """A prediction of less guidance than the run's gives what less guidance gives."""
    plugin = ALL[name](**({"threshold": 0.0, "momentum": 0.0} if name == "apg" else {}))
    step, (cond, uncond) = Moment(), predictions()
    less = uncond + 3 * (cond - uncond)
    came = plugin.combine_predictions(less, cond, uncond, step, {})
    assert not torch.allclose(came, combined(plugin, step, {}))
    if name in ("mambo", "cfg-norm"):  # those that know of no scale
        step.run.cfg_scale = 3
        alone = plugin.combine_predictions(less, cond, uncond, step, {})
        torch.testing.assert_close(came, alone, **EXACT)


@pytest.mark.parametrize(
    ("plugin", "settings", "message"),
    [
        (Apg, {"momentum": 1}, "momentum must be less than 1; got 1"),
        (CfgPlusPlus, {"scale": 1.5}, "scale must be less than or equal to 1; got 1.5"),
        (CfgZeroStar, {"zero_steps": -1}, "zero_steps must be greater than or equal to 0; got -1"),
        (Fdg, {"scales": []}, "scales must be List should have at least 1 item"),
        (CfgNorm, {"over": "row"}, "over must be 'image', 'token' or 'cell'; got 'row'"),
        (Mambo, {"space": "latents"}, "space must be 'x0' or 'output'; got 'latents'"),
    ],
)
def test_wrong_settings_are_named(plugin, settings, message):
    with pytest.raises(SettingsError, match=message):
        plugin(**settings)
