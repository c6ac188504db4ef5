"""LoRAs: equal to the pipeline with the same LoRA loaded, and gone after the run."""

import functools

import pytest
import torch
from pilotfish_control import Lora
from pilotfish_kit import check_plugin
from safetensors.torch import load_file, save_file

from pilotfish import InputError, ModelError, Plugin, Run, Sampler, SettingsError
from pilotfish.testing import GaussianModel, random_pipeline

# Of PEFT's, where the pipeline to compare with gets its second one.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

FAMILIES = ("stable-diffusion", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module")
def loras(tmp_path_factory, make):
    """Two LoRA files of a family, made once."""
    written = functools.cache(
        lambda family, seed: make.lora(
            random_pipeline(family=family), tmp_path_factory.mktemp("lora"), seed, 4 * seed
        )
    )
    return lambda family: [written(family, seed) for seed in (1, 2)]


def theirs(family, files, weights, **options):
    """The latents of the pipeline itself, with these LoRAs loaded."""
    pipeline = random_pipeline(family=family)
    for i, file in enumerate(files):
        pipeline.load_lora_weights(str(file), adapter_name=f"a{i}")
    pipeline.set_adapters([f"a{i}" for i in range(len(files))], list(weights))
    return ours(Sampler.from_pipeline(pipeline), **options)


def diffusers_own(family, files, weights, num_images=1, **options):
    """The same, by the pipeline's own loop."""
    pipeline = random_pipeline(family=family)
    for i, file in enumerate(files):
        pipeline.load_lora_weights(str(file), adapter_name=f"a{i}")
    pipeline.set_adapters([f"a{i}" for i in range(len(files))], list(weights))
    generators = [torch.Generator().manual_seed(1 + i) for i in range(num_images)]
    latents = pipeline(
        "a red cat", num_inference_steps=2, num_images_per_prompt=num_images, height=32, width=32,
        output_type="latent", generator=generators, **options,
    ).images  # fmt: skip
    if family != "flux":
        return latents
    return torch.nn.functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (8, 8)), 2)


def ours(sampler, *plugins, **options):
    options = {"steps": 2, "seed": 1, "height": 32, "width": 32, **options}
    return sampler("a red cat", plugins=plugins, **options).latents


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_pipeline_with_that_lora_to_the_bit(family, guidance_scale, samplers, loras):
    file, run = loras(family)[0], {"guidance_scale": guidance_scale, "num_images": 2}
    latents = ours(samplers(family), Lora(file=file, weight=0.7), **run)
    assert torch.equal(latents, diffusers_own(family, [file], [0.7], **run))
    assert not torch.equal(latents, ours(samplers(family), **run))


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_text_encoders_have_it_too(family, samplers, tmp_path, make):
    """By the definition: W + weight * alpha / rank * up @ down."""
    parts = ("text_encoder", "text_encoder_2")[: 1 + (family == "sdxl")]
    file = make.lora(random_pipeline(family=family), tmp_path, 3, 8, parts)
    pipeline, content = random_pipeline(family=family), load_file(file)
    for name in [name for name in content if name.endswith("lora_A.weight")]:
        part, _, place = name.removesuffix(".lora_A.weight").partition(".")
        down, up = content[name], content[name.replace("lora_A", "lora_B")]
        weight = getattr(pipeline, part).get_submodule(place).weight
        weight.data += 0.7 * (8 / 2) * up @ down
    expected = ours(Sampler.from_pipeline(pipeline))
    latents = ours(samplers(family), Lora(file=file, weight=0.7))
    # Sums of float32 in another order.
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents, ours(samplers(family)), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_add_up_as_in_the_pipeline(family, samplers, loras):
    files = loras(family)
    plugins = [Lora(file=files[0], weight=0.7), Lora(file=files[1], weight=-0.4)]
    expected = diffusers_own(family, files, (0.7, -0.4), guidance_scale=3.0)
    assert torch.equal(ours(samplers(family), *plugins, guidance_scale=3.0), expected)


def test_a_file_of_kohyas_trainer_is_one_too(samplers, loras, tmp_path):
    """Its names have no dots, and each layer a strength of its own."""
    kohya = {}
    for name, tensor in load_file(loras("stable-diffusion")[0]).items():
        part, _, rest = name.partition(".")
        layer, kind, _ = rest.rsplit(".", 2)
        layer = f"lora_{part}_{layer.removesuffix('.lora').replace('.', '_')}"
        kohya[f"{layer}.{'lora_down' if 'A' in kind or 'down' in kind else 'lora_up'}.weight"] = (
            tensor
        )
        kohya[f"{layer}.alpha"] = torch.tensor(1.0)
    file = tmp_path / "kohya.safetensors"
    save_file(kohya, file)
    latents = ours(samplers("stable-diffusion"), Lora(file=file))
    assert torch.equal(latents, theirs("stable-diffusion", [file], [1.0]))
    assert not torch.equal(latents, ours(samplers("stable-diffusion")))


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_0_leaves_the_image_bit_identical(family, samplers, loras):
    plugin = Lora(file=loras(family)[0], weight=0)
    assert torch.equal(ours(samplers(family), plugin), ours(samplers(family)))


class Watch(Plugin):
    """Notes what a LoRA's layers multiply by, at each call of the network."""

    def setup(self, run):
        self.seen = []

    def around_network(self, step):
        module = next(m for m in step.run.model.denoiser.modules() if hasattr(m, "scaling"))
        self.seen.append(dict(module.scaling))


def test_the_weight_follows_the_run_with_straight_lines_between_points(samplers, loras):
    """What PEFT multiplies by is weight * alpha / rank."""
    watch = Watch()
    plugin = Lora(file=loras("stable-diffusion")[0], weight=[[0.25, 1], [0.75, 0]])
    ours(samplers("stable-diffusion"), plugin, watch, steps=4)
    assert [seen["pilotfish_0"] / (4 / 2) for seen in watch.seen] == [1.0, 1.0, 0.5, 0.0]


def test_a_weight_that_follows_the_run_equals_weights_set_between_steps(samplers, loras):
    file = loras("stable-diffusion")[0]

    class Set(Plugin):
        """Sets the weight of the pipeline's own LoRA in the run's copy."""

        def before_step(self, step):
            step.run.model.denoiser.set_adapters(["a0"], [1.0 - step.index / 4])

    pipeline = random_pipeline()
    pipeline.load_lora_weights(str(file), adapter_name="a0")
    expected = ours(Sampler.from_pipeline(pipeline), Set(), steps=4)
    plugin = Lora(file=file, weight=[[0, 1], [1, 0]])
    assert torch.equal(ours(samplers("stable-diffusion"), plugin, steps=4), expected)


def test_it_joins_the_loras_that_a_pipeline_has_and_leaves_them_alone(loras):
    first, second = loras("stable-diffusion")
    pipeline = random_pipeline()
    pipeline.load_lora_weights(str(first), adapter_name="own")
    pipeline.set_adapters(["own"], [0.6])
    sampler = Sampler.from_pipeline(pipeline)
    before = ours(sampler)
    latents = ours(sampler, Lora(file=second, weight=0.5))
    assert torch.equal(latents, theirs("stable-diffusion", (first, second), (0.6, 0.5)))
    assert torch.equal(ours(sampler), before)
    assert pipeline.get_list_adapters() == {"unet": ["own"]}
    assert pipeline.get_active_adapters() == ["own"]


def test_one_that_a_pipeline_switched_off_stays_off(loras):
    first, second = loras("stable-diffusion")
    pipeline = random_pipeline()
    pipeline.load_lora_weights(str(first), adapter_name="own")
    pipeline.disable_lora()
    latents = ours(Sampler.from_pipeline(pipeline), Lora(file=second, weight=0.5))
    assert torch.equal(latents, theirs("stable-diffusion", [second], [0.5]))


def test_one_that_is_fused_and_still_loaded_is_refused(loras):
    first, second = loras("stable-diffusion")
    pipeline = random_pipeline()
    pipeline.load_lora_weights(str(first), adapter_name="own")
    pipeline.fuse_lora()
    sampler = Sampler.from_pipeline(pipeline)
    with pytest.raises(ModelError, match="unload_lora_weights"):
        ours(sampler, Lora(file=second))
    pipeline.unload_lora_weights()
    fused = ours(sampler)
    assert not torch.equal(ours(sampler, Lora(file=second)), fused)


class Fails(Plugin):
    def after_step(self, step):
        raise InputError("on purpose")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_it_is_left_after_a_run_and_after_an_error(family, samplers, loras):
    sampler = samplers(family)
    before = ours(sampler)
    names = [n for n, _ in sampler.model.denoiser.named_modules()]
    plugin = Lora(file=loras(family)[0])
    ours(sampler, plugin)
    with pytest.raises(InputError, match="on purpose"):
        ours(sampler, plugin, Fails())
    assert torch.equal(ours(sampler), before)
    pipeline = sampler.model.pipeline()
    assert not any(hasattr(m, "lora_A") for p in pipeline.components.values()
                   if isinstance(p, torch.nn.Module) for m in p.modules())  # fmt: skip
    assert [n for n, _ in sampler.model.denoiser.named_modules()] == names
    assert not hasattr(sampler.model.denoiser, "peft_config")


def test_two_runs_interleaved_do_not_see_each_others(samplers, loras):
    sampler, (first, second) = samplers("stable-diffusion"), loras("stable-diffusion")
    stacks = [[Lora(file=first)], [], [Lora(file=second, weight=[[0, 1], [1, 0]])]]
    alone = [ours(sampler, *stack, steps=4) for stack in stacks]
    streams = [sampler.stream("a red cat", plugins=s, steps=4, seed=1) for s in stacks]
    for _ in zip(*streams, strict=True):
        pass
    assert all(torch.equal(s.result().latents, a) for s, a in zip(streams, alone, strict=True))
    assert not torch.equal(alone[0], alone[2])


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_a_gradient_through_it_is_the_same_checkpointed(family, samplers, loras, make):
    plugins = [Lora(file=loras(family)[0], weight=0.5), make.blue(scale=2, gradient="latents")]
    runs = [ours(samplers(family), *plugins, checkpointing=c) for c in ("off", "on")]
    assert torch.isfinite(runs[0]).all()
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(runs[0], ours(samplers(family), plugins[0]), atol=1e-4)


def test_its_weights_take_no_gradient(samplers, loras):
    class Frozen(Plugin):
        def before_step(self, step):
            model = step.run.model
            networks = [model.denoiser, *(e.network for e in model.text_encoders)]
            named = [(n, p) for network in networks for n, p in network.named_parameters()]
            assert any("lora" in n for n, _ in named)
            assert not any(p.requires_grad for _, p in named)

    ours(samplers("sdxl"), Lora(file=loras("sdxl")[0]), Frozen())


def test_a_run_file_repeats_it(samplers, loras, tmp_path):
    sampler = samplers("stable-diffusion")
    plugin = {
        "use": "lora",
        "file": str(loras("stable-diffusion")[0]),
        "weight": [[0, 1], [1, 0.2]],
    }
    result = sampler("a red cat", plugins=[plugin], steps=2, seed=1)
    run = tmp_path / "run.toml"
    run.write_text(result.run.to_toml())
    again = {k: v for k, v in Run.read(run).items() if k not in ("model", "dtype")}
    assert torch.equal(sampler(**again).latents, result.latents)


def test_what_does_not_fit_is_told(samplers, loras, tmp_path):
    damaged, other, part = (tmp_path / f"{n}.safetensors" for n in ("damaged", "other", "part"))
    damaged.write_bytes(b"no")
    save_file({"weight": torch.zeros(2)}, other)
    content = load_file(loras("stable-diffusion")[0])
    more = {f"unet.no_such.{i}.lora.{kind}.weight": torch.zeros(2, 2)
            for i in (0, 1) for kind in ("down", "up")}  # fmt: skip
    save_file({**content, **more}, part)
    cases = [
        ("stable-diffusion", tmp_path / "no.safetensors", "no LoRA file .*no.safetensors"),
        ("stable-diffusion", tmp_path, "expected .safetensors"),
        ("stable-diffusion", damaged, "cannot read the LoRA"),
        ("stable-diffusion", other, "is no LoRA"),
        ("stable-diffusion", part, "of its [0-9]+ matrices [0-9]+ have a place|does not fit"),
        ("sdxl", loras("stable-diffusion")[0], "does not fit"),
        ("stable-diffusion", loras("sdxl")[0], "does not fit"),
        ("flux", loras("stable-diffusion")[0], "does not fit"),
        ("stable-diffusion", loras("flux")[0], "does not fit"),
        ("sd3", loras("flux")[0], "does not fit"),
    ]
    for family, file, message in cases:
        with pytest.raises(InputError, match=message):
            ours(samplers(family), Lora(file=file))
    for weight in ([], [[0.5, 1], [0.2, 1]], [[0, 1], [2, 1]], "strong"):
        with pytest.raises(SettingsError, match="weight.* must be"):
            Lora(file=other, weight=weight)
    with pytest.raises(ModelError, match="diffusers loads no LoRA"):
        Sampler(GaussianModel())("", plugins=[Lora(file=loras("flux")[0])])


def test_the_contract_of_plugins(samplers, loras):
    check_plugin(Lora(file=loras("stable-diffusion")[0]), samplers("stable-diffusion"))
