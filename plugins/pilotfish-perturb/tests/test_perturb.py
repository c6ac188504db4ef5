"""What all five keep: equal to diffusers' pipelines, off to the bit, gone after the call."""

from __future__ import annotations

import contextlib
import inspect
import types

import diffusers
import pytest
import torch
from pilotfish_kit import parametrize_with_checks
from pilotfish_perturb import Autoguidance, Pag, Sag, Seg, Slg
from pilotfish_perturb.attention import attending, own_token
from pilotfish_perturb.layers import Layer, all_layers, chosen, usual

import pilotfish
from pilotfish import Guide, InputError, ModelError, Plugin, PluginError, Sampler, SettingsError
from pilotfish.testing import GaussianModel, random_pipeline, random_sampler

PLUGINS = {
    "pag": Pag(),
    "seg": Seg(blur=0.8),
    "slg": Slg(stop=1),
    "sag": Sag(),
    "autoguidance": Autoguidance(),
}
PROMPT = "a red cat"


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


class Blue(Guide):
    def loss_guidance(self, step):
        return (step.image[:, 2] - 0.9).abs().mean(dim=(1, 2))


@pytest.mark.slow
@parametrize_with_checks([*PLUGINS.values()])
def test_plugins_keep_the_contract_of_plugins(plugin, check, random_sampler):
    check(plugin, random_sampler)


# ---- diffusers ----


def theirs_of(kind, pipeline, layers=None, **options):
    """The latents of diffusers' own pipeline of a kind."""
    parts = {**pipeline.components, "pag_applied_layers": layers}
    parts |= {"requires_safety_checker": False, "add_watermarker": False}
    takes = inspect.signature(kind.__init__).parameters
    theirs = kind(**{name: part for name, part in parts.items() if name in takes})
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return theirs(PROMPT, generator=generator, output_type="latent", **options).images


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(
    ("family", "kind", "layers"),
    [
        ("stable-diffusion", diffusers.StableDiffusionPAGPipeline, ["mid"]),
        ("sdxl", diffusers.StableDiffusionXLPAGPipeline, ["mid"]),
        ("sd3", diffusers.StableDiffusion3PAGPipeline, ["transformer_blocks.1"]),
    ],
)
def test_pag_equals_the_pipelines_of_diffusers(family, kind, layers, guidance_scale):
    """That of Stable Diffusion 3 leaves out the norms of queries and keys: a network without."""
    pipeline = random_pipeline(family=family)
    if family == "sd3":
        network = pipeline.transformer
        pipeline.transformer = network.from_config(network.config, qk_norm=None).eval()
    run = {"guidance_scale": guidance_scale, "height": 32, "width": 32}
    expected = theirs_of(kind, pipeline, layers, pag_scale=3.0, num_inference_steps=2, **run)
    sampler = Sampler.from_pipeline(own_processors(pipeline))
    ours = sampler(PROMPT, plugins=[Pag(layers=layers)], seed=1, steps=2, **run).latents
    # Three predictions in one call sum in another order.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def own_processors(pipeline):
    """The pipeline, with the attention that diffusers' PAG has left replaced."""
    for name, module in (getattr(pipeline, "unet", None) or pipeline.transformer).named_modules():
        if name.endswith(("attn1", "attn")):
            joint = name.endswith("attn")
            kind = diffusers.models.attention_processor
            module.set_processor(kind.JointAttnProcessor2_0() if joint else kind.AttnProcessor2_0())
    return pipeline


def test_slg_equals_what_the_pipeline_of_stable_diffusion_3_skips():
    """That begins after `skip_layer_guidance_start`, so below 0 at the first step."""
    pipeline = random_pipeline(family="sd3")
    expected = pipeline(
        PROMPT, num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        skip_guidance_layers=[1], skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=-0.1, skip_layer_guidance_stop=0.5,
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    plugin, run = Slg(layers=[1], scale=2, stop=0.5), {"steps": 4, "guidance_scale": 5.0}
    ours = Sampler.from_pipeline(pipeline)(PROMPT, plugins=[plugin], seed=1, **run).latents
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("sd3", "transformer_blocks.0"),
        ("flux", "transformer_blocks.0"),
        ("flux", "single_transformer_blocks.0"),
        ("z-image", "noise_refiner.0"),
        ("z-image", "layers.0"),
        ("qwen-image", "transformer_blocks.0"),
        ("flux2-klein", "transformer_blocks.0"),
        ("flux2-klein", "single_transformer_blocks.0"),
    ],
)
def test_a_network_that_skips_a_layer_is_one_that_does_not_have_it(family, layer):
    """At scale -1 and without other guidance, the weakened prediction is all that is left."""
    run = {"height": 32, "width": 32, "guidance_scale": 0.0 if family == "z-image" else 1.0}
    ours = random_sampler(family=family)(
        PROMPT, plugins=[Slg(layers=[layer], scale=-1, stop=1)], seed=1, steps=2, **run
    )
    pipeline = random_pipeline(family=family)
    del pipeline.transformer.get_submodule(layer.partition(".")[0])[0]
    theirs = Sampler.from_pipeline(pipeline)(PROMPT, seed=1, steps=2, **run)
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sag_equals_the_pipeline_of_diffusers(guidance_scale):
    run = {"guidance_scale": guidance_scale}
    expected = theirs_of(
        diffusers.StableDiffusionSAGPipeline, random_pipeline(dtype=torch.float64),
        num_inference_steps=3, sag_scale=0.75, **run,
    )  # fmt: skip
    sampler = random_sampler(dtype=torch.float64)
    ours = sampler(PROMPT, plugins=[Sag()], steps=3, seed=1, **run).latents
    # diffusers keeps its noise levels in float32.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Pag, Slg])
def test_the_first_step_counts_as_diffusers_guiders_have_it_for_the_second(sampler, kind):
    guider = diffusers.PerturbedAttentionGuidance(
        guidance_scale=5.0, perturbed_guidance_scale=2.0, perturbed_guidance_layers=[0],
        perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
    )  # fmt: skip
    guider.set_state(step=1, num_inference_steps=2, timestep=torch.tensor(0))
    watch = Watch()
    sampler(PROMPT, plugins=[kind(scale=2), watch], steps=1, seed=1, guidance_scale=5.0)
    sampler(PROMPT, plugins=[kind(scale=-1), bad := Watch()], steps=1, seed=1, guidance_scale=1.0)
    expected = guider.forward(watch.cond, watch.uncond, bad.prediction).pred
    torch.testing.assert_close(watch.prediction, expected, rtol=1e-4, atol=1e-5)


class Watch(Plugin):
    """Counts the network's calls, and keeps the latest predictions."""

    calls = 0

    def around_network(self):
        self.calls += 1

    def combine_predictions(self, prediction, cond, uncond):
        self.prediction, self.cond, self.uncond = prediction, cond, uncond


# ---- in company ----


@pytest.mark.parametrize("name", PLUGINS)
def test_zero_scale_leaves_the_image_bit_identical_without_a_call(sampler, name):
    off = PLUGINS[name].settings.model_copy(update={"scale": 0.0}).model_dump()
    watch = Watch()
    latents = sampler(PROMPT, plugins=[type(PLUGINS[name])(**off), watch], steps=2, seed=1).latents
    assert torch.equal(latents, sampler(PROMPT, steps=2, seed=1).latents)
    assert watch.calls == 2


@pytest.mark.parametrize("name", PLUGINS)
def test_two_runs_interleaved_do_not_know_of_each_other(sampler, name):
    options = [{"plugins": [PLUGINS[name]], "seed": 1}, {"seed": 1}]
    alone = [sampler(PROMPT, steps=3, **o).latents for o in options]
    streams = [sampler.stream(PROMPT, steps=3, **o) for o in options]
    for _ in zip(*streams, strict=True):
        pass
    assert all(torch.equal(s.result().latents, a) for s, a in zip(streams, alone, strict=True))
    assert not torch.equal(*alone)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_gradient_through_it_is_the_same_checkpointed(sampler, name):
    run = {"steps": 2, "seed": 1, "plugins": [PLUGINS[name], Blue(gradient="latents")]}
    plain = sampler(PROMPT, checkpointing="off", **run).latents
    checkpointed = sampler(PROMPT, checkpointing="on", **run).latents
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5)
    guided = sampler(PROMPT, steps=2, seed=1, plugins=[Blue(gradient="latents")]).latents
    assert not torch.allclose(plain, guided, atol=1e-3)


class Sizes(Plugin):
    """Keeps how many images each call of the network has."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def network_inputs(self, step):
        self.sizes.append(len(step.network_latents))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("stable-diffusion", [8]), ("sd3", [8]), ("z-image", [8]), ("flux", [2] * 4)],
)
def test_weakened_predictions_share_a_batch_with_the_others_where_those_do(family, sizes):
    double = random_pipeline(family=family).to(torch.float64)
    run = {"steps": 1, "seed": 1, "num_images": 2, "height": 32, "width": 32}
    run |= {"true_cfg_scale": 3.0} if family == "flux" else {"guidance_scale": 3.0}
    run |= {"negative_prompt": "a blue puppy on a very long street"}
    plugins = [Pag(scale=1, layers=[0]), Slg(scale=2, stop=1, layers=[0])]
    answers = []
    for more in (Sizes(), Watch()):  # the second one has `around_network`
        stack = [*plugins, more, Small(gradient="latents")]
        answers.append(Sampler.from_pipeline(double)(PROMPT, plugins=stack, **run).latents)
        if isinstance(more, Sizes):
            assert more.sizes == sizes
    # Z-Image rotates and embeds in float32, whatever the network's own type.
    tolerance = 1e-4 if family == "z-image" else 1e-6
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance)


class Small(Guide):
    def loss_guidance(self, step):
        return step.x0.square().mean(dim=(1, 2, 3))


def test_they_stack_each_with_a_call_of_its_own_where_the_network_is_changed(sampler):
    def change(*plugins):
        watch = Watch()
        sampler(PROMPT, plugins=[*plugins, watch], steps=1, seed=1)
        return watch.prediction, watch.calls

    (plain, _), (pag, calls) = change(), change(PLUGINS["pag"])
    (slg, _), (both, more) = change(PLUGINS["slg"]), change(PLUGINS["pag"], PLUGINS["slg"])
    assert (calls, more) == (2, 3)
    torch.testing.assert_close(both - plain, (pag - plain) + (slg - plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "stop", "calls"), [(0, 0.5, 2), (0.5, 1, 2), (0.25, 0.75, 2)])
def test_it_acts_in_its_part_of_the_run_alone(sampler, start, stop, calls):
    watch = Watch()
    sampler(PROMPT, plugins=[Pag(start=start, stop=stop), watch], steps=4, seed=1)
    assert watch.calls == 4 + calls


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_sag_takes_the_negative_prompts_call_where_it_is_one_of_its_own(family):
    """At scale -1 the degraded prediction of that prompt stands in the place of its own."""
    sampler = random_sampler(family=family)
    run = {"steps": 1, "seed": 1, "height": 32, "width": 32, "true_cfg_scale": 3.0}
    told = {"negative_prompt": "a blue puppy"}
    plugins = [Sag(blur=3, threshold=0, start=0), watch := Watch(), Asked()]
    sampler(PROMPT, plugins=plugins, **run, **told)
    prompts = plugins[-1].values
    assert watch.calls == len(prompts) == 3
    assert torch.equal(prompts[2], prompts[1]) and not torch.equal(prompts[2], prompts[0])


class Asked(Plugin):
    """Keeps what the network is told at each call."""

    def __init__(self):
        super().__init__()
        self.values = []

    def around_network(self, step):
        self.values.append(step.conditioning["values"])


def test_nothing_is_left_behind_by_a_call_that_raises(sampler):
    layers = all_layers(sampler.model)
    modules = list(sampler.model.denoiser.modules())
    before = [dict(vars(module)) for module in modules]

    class Broken(Plugin):
        def around_network(self, step):
            calls.append(True)
            if len(calls) == 2:
                raise RuntimeError("on purpose")

    calls = []
    with pytest.raises(PluginError, match="on purpose"):
        sampler(PROMPT, plugins=[Pag(), Broken()], steps=2)
    with contextlib.suppress(ZeroDivisionError), attending(layers, own_token):
        assert [dict(vars(module)) for module in modules] != before
        1 / 0  # noqa: B018
    assert [dict(vars(module)) for module in modules] == before


# ---- layers ----


def test_the_usual_layers_are_a_unets_middle_and_what_sd35_medium_skips(sampler):
    (middle,) = chosen(sampler.model, None)
    assert middle.name == "mid_block.attentions.0.transformer_blocks.0"
    for count, expected in ((24, [7, 8, 9]), (38, [11, 12, 13, 14]), (2, [0]), (1, [0])):
        layers = [Layer(f"transformer_blocks.{i}", None, ()) for i in range(count)]
        assert list(usual(layers)) == [layers[i] for i in expected]


def test_layers_are_numbers_or_how_names_begin(sampler):
    network = types.SimpleNamespace(get_submodule=lambda name: name)
    sites = [
        types.SimpleNamespace(name=f"transformer_blocks.{i}.attn", kind="joint") for i in range(12)
    ]
    model = types.SimpleNamespace(denoiser=network, sites=sites)

    def numbers(*wanted):
        return [int(layer.name.split(".")[1]) for layer in chosen(model, wanted)]

    assert numbers(7, "transformer_blocks.1", "3") == [1, 3, 7]
    assert numbers("transformer_blocks") == list(range(12))
    names = [layer.name for layer in chosen(sampler.model, ["down", "mid_block"])]
    assert [name.split(".")[0] for name in names] == ["down_blocks", "mid_block"]
    written = sampler(PROMPT, plugins=["pag:layers=[mid]"], steps=1, seed=1).latents
    assert torch.equal(written, sampler(PROMPT, plugins=[Pag()], steps=1, seed=1).latents)


@pytest.mark.parametrize("wanted", [99, "nowhere"])
def test_a_layer_that_there_is_not_is_answered_with_all_that_there_are(sampler, wanted):
    with pytest.raises(InputError, match=r"no layer .* 0: down_blocks.0.attentions.0"):
        sampler(PROMPT, plugins=[Pag(layers=[wanted])], steps=1)


def test_a_model_without_sites_is_refused_but_for_a_weaker_one():
    with pytest.raises(ModelError, match="GaussianModel has no sites"):
        Sampler(GaussianModel())("", plugins=[Pag()], steps=1)


def test_a_weaker_model_takes_the_networks_place_whatever_the_family(tmp_path):
    """At scale -1 its prediction is all that is left."""
    run = {"steps": 1, "height": 32, "width": 32, "seed": 1, "guidance_scale": 0.0}
    weaker = random_pipeline(family="z-image")
    with torch.no_grad():
        for parameter in weaker.transformer.parameters():
            parameter *= 1.1
    weaker.save_pretrained(tmp_path)
    plugin, sampler = Autoguidance(model=str(tmp_path), scale=-1), random_sampler(family="z-image")
    ours = sampler(PROMPT, plugins=[plugin], **run).latents
    theirs = Sampler.from_pipeline(weaker)(PROMPT, **run).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attention_that_is_not_torchs_is_refused_by_name():
    pipeline = random_pipeline()
    pipeline.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.raises(ModelError, match=r"mid_block.* attends by AttnProcessor; expected"):
        Sampler.from_pipeline(pipeline)(PROMPT, plugins=[Pag()], steps=1)


# ---- a weaker model ----


def test_a_model_of_another_kind_is_refused(tmp_path):
    random_pipeline(family="sdxl").save_pretrained(tmp_path)
    sampler = random_sampler(family="sd3")
    with pytest.raises(ModelError, match="expected a weaker network .* SD3Transformer2DModel"):
        sampler(PROMPT, plugins=[Autoguidance(model=str(tmp_path))], steps=1)


def test_a_weaker_model_and_layers_are_either_or():
    with pytest.raises(SettingsError, match="model must be left out where layers are given"):
        Autoguidance(model="emoji", layers=[1])


def test_a_weaker_model_is_loaded_for_the_run_and_let_go(sampler, tmp_path, monkeypatch):
    random_pipeline(seed=7).save_pretrained(tmp_path)
    load, loaded = pilotfish.load, []

    def watched(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(pilotfish, "load", watched)
    sampler(PROMPT, plugins=[Autoguidance(model=str(tmp_path))], steps=2, seed=1)
    assert len(loaded) == 1
    assert not any(p.requires_grad for p in loaded[0].model.denoiser.parameters())
