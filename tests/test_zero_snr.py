"""Steps that begin at nothing but noise: zero terminal SNR (alpha 0), and sigma 1 of a flow."""

import dataclasses

import diffusers
import pytest
import torch

from pilotfish import PRESETS, Guide, InputError, PilotfishError, Sampler
from pilotfish.testing import GaussianModel, random_pipeline, random_sampler

pytestmark = pytest.mark.slow  # each is short, together they are not

KINDS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmsolver-multistep": diffusers.DPMSolverMultistepScheduler,
    "unipc-multistep": diffusers.UniPCMultistepScheduler,
}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"name": "FlowMatchEulerDiscreteScheduler"}
BOX = (0, 0, 0.5, 1)


class Red(Guide):
    def loss_guidance(self, step):
        return (step.image[:, 0] - 2).square().mean(dim=(1, 2))


@pytest.fixture(scope="module")
def pipeline():
    return random_pipeline("v_prediction")


@pytest.fixture(scope="module")
def latents_of(pipeline):
    sampler = Sampler.from_pipeline(pipeline)

    def run(*plugins, scheduler="ddim", **options):
        options = {"steps": 4, "seed": 3, "scheduler": {"name": scheduler, **ZERO}, **options}
        return sampler("a red cat", plugins=plugins, **options).latents

    return run


def acts(preset):
    """The preset, acting from the first step on."""
    return dataclasses.replace(PRESETS[preset], start=0.0, stop=1.0)


@pytest.mark.parametrize("name", KINDS)
def test_without_plugins_the_latents_equal_diffusers(pipeline, latents_of, name):
    scheduler = KINDS[name].from_config(pipeline.scheduler.config, **ZERO)
    pipe = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red cat",
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    assert expected.isfinite().all()
    assert torch.equal(latents_of(scheduler=name), expected)


@pytest.mark.parametrize(("name", "alpha"), [("ddim", 0), ("ddpm", 0), ("unipc-multistep", 2**-12)])
def test_the_first_step_has_the_alpha_that_the_scheduler_gives_it(pipeline, name, alpha):
    stream = Sampler.from_pipeline(pipeline).stream(
        "a", steps=4, seed=0, scheduler={"name": name, **ZERO}
    )
    step = next(stream)
    assert step.alpha == pytest.approx(alpha, rel=1e-3)
    assert step.x0.isfinite().all() and step.eps.isfinite().all()
    assert step.image.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_guides_and_stays_finite(latents_of, name, preset):
    if PRESETS[preset].rule == "sphere" and name != "ddpm":
        with pytest.raises(InputError, match="sphere"):
            latents_of(Red(), scheduler=name, preset=acts(preset))
        return
    knobs = acts(preset)
    if name == "unipc-multistep":  # it keeps latents of the step before
        knobs = dataclasses.replace(knobs, recurrence=1, renoise=0.0)
    guided = latents_of(Red(scale=0.1), scheduler=name, preset=knobs)
    assert guided.isfinite().all()
    assert not torch.equal(guided, latents_of(scheduler=name))


@pytest.mark.parametrize("preset", ["deep-dive", "clip-guided", "balanced"])
def test_rules_with_an_alpha_below_the_line_move_nothing_where_it_is_0_and_rms_does(
    pipeline, preset
):
    run = {"steps": 4, "seed": 0, "scheduler": {"name": "ddim", **ZERO}, "preset": preset}
    sampler = Sampler.from_pipeline(pipeline)
    plain, guided = (next(sampler.stream("a", plugins=p, **run)) for p in ((), (Red(),)))
    assert plain.alpha == 0
    stays = torch.equal(plain.x0, guided.x0) and torch.equal(plain.latents, guided.latents)
    assert stays == (preset != "balanced")


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize(
    "plugin",
    [
        {"use": "img2img", "strength": 1.0},
        {"use": "img2img", "strength": 0.5},
        {"use": "inpaint", "mask": BOX},
        {"use": "threshold"},
        {"use": "cfg-interval", "low": 0.3, "high": 5.0},
        {"use": "cfg-rescale"},
        {"use": "optimize"},
    ],
    ids=lambda plugin: f"{plugin['use']}-{plugin.get('strength', '')}",
)
def test_plugins_of_the_whole_run_stay_finite(latents_of, tmp_path, name, plugin):
    if plugin["use"] in ("img2img", "inpaint"):
        from PIL import Image

        path = tmp_path / "red.png"
        Image.new("RGB", (32, 32), "red").save(path)
        plugin = {**plugin, "image": str(path)}
    guides = [Red(scale=0.1)]
    assert latents_of(plugin, *guides, scheduler=name).isfinite().all()


def test_steps_taken_again_stay_finite(latents_of):
    preset = {"base": "balanced", "recurrence": 3}
    for name in ("ddim", "ddpm", "euler", "dpmsolver-multistep"):
        assert latents_of(Red(), scheduler=name, preset=preset).isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_model_that_predicts_noise_is_refused_before_the_first_step(name):
    with pytest.raises(PilotfishError, match="cannot begin at pure noise"):
        random_sampler().stream("a red cat", steps=4, scheduler={"name": name, **ZERO})


# ---- sigma 1 of a flow ----


class Measured(Guide):
    def loss_guidance(self, step):
        return (step.x0[:, 0] - 1).square().mean(dim=(1, 2))


def test_a_flow_begins_at_sigma_1_with_the_exact_posterior_mean():
    std = 0.7
    stream = Sampler(GaussianModel(std)).stream(scheduler=FLOW, steps=5, seed=0, guidance_scale=1)
    steps = [*stream]
    assert (steps[0].alpha, steps[0].sigma) == (0, 1)
    for step in steps:
        gain = step.alpha * std**2 / ((step.alpha * std) ** 2 + step.sigma**2)
        torch.testing.assert_close(step.x0, gain * step.latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_guides_a_flow_and_stays_finite(preset):
    knobs = acts(preset)
    run = {"scheduler": FLOW, "steps": 5, "seed": 0, "preset": knobs}
    sampler = Sampler(GaussianModel())
    if knobs.rule == "sphere":
        with pytest.raises(InputError, match="sphere"):
            sampler(plugins=[Measured()], **run)
        run["scheduler"] = {**FLOW, "stochastic_sampling": True}
    guided = sampler(plugins=[Measured(scale=0.1)], **run).latents
    assert guided.isfinite().all()
    assert not torch.equal(guided, sampler(**run).latents)
