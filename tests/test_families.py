"""What every model family must show: each against its own pipeline of diffusers, on tiny networks.

The references are diffusers' pipelines on schedulers that are made here, never ours.
"""

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import pilotfish
from pilotfish import InputError, ModelError, Sampler
from pilotfish.cli import main
from pilotfish.models.checkpointing import parts
from pilotfish.testing import random_sampler
from pilotfish.testing.random_models import random_pipeline

PROMPT, NEGATIVE = "a puppy on a cat background", "a red dog"
SIZE = {"height": 32, "width": 32}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        options: of every run here and of the pipeline's calls.
        guided, unguided: what switches classifier-free guidance on and off.
        schedulers: those that the pipeline takes, by our name, with how diffusers makes them.
    """

    options: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=lambda: {"negative_prompt": NEGATIVE})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    schedulers: dict[str, Any] = field(default_factory=dict)


def from_config(name, **changes):
    return lambda own: getattr(diffusers, name).from_config(own.config, **changes)


KARRAS = {
    "euler": from_config("EulerDiscreteScheduler"),
    "ddim": from_config("DDIMScheduler", clip_sample=False),
    "heun": from_config("HeunDiscreteScheduler"),
    "lms": from_config("LMSDiscreteScheduler"),
    "pndm": from_config("PNDMScheduler"),
    "euler-ancestral": from_config("EulerAncestralDiscreteScheduler"),
    "dpmsolver-multistep": from_config("DPMSolverMultistepScheduler"),
    "unipc": from_config("UniPCMultistepScheduler"),
}
EULER = {"flowmatch-euler": from_config("FlowMatchEulerDiscreteScheduler")}
FLOWS = {
    **EULER,
    "flowmatch-heun": from_config("FlowMatchHeunDiscreteScheduler"),
    "unipc": from_config("UniPCMultistepScheduler", **FLOW),
    "dpmsolver-multistep": from_config("DPMSolverMultistepScheduler", **FLOW),
}
SHORT = {"max_sequence_length": 60}
LONG = {"max_sequence_length": 200}  # of bytes, with a template
TRUE = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}
ROWS = {
    "sdxl": Row(schedulers=KARRAS),
    "sd3": Row({"max_sequence_length": 12}, schedulers=FLOWS),
    "flux": Row(SHORT, TRUE, {"true_cfg_scale": 1.0}, EULER),
    "z-image": Row(SHORT, unguided={"guidance_scale": 0.0}, schedulers=EULER),
    "qwen-image": Row(LONG, TRUE, {"true_cfg_scale": 1.0}, EULER),
    "flux2-klein": Row(LONG, {"guidance_scale": 4.0}, schedulers=EULER),
}
every_family = pytest.mark.parametrize("family", ROWS)


def theirs(family, *, num_images=1, steps=3, dtype=torch.float32, scheduler=None, **options):
    """The latents of diffusers' own pipeline, unpacked."""
    pipeline = random_pipeline(family=family, dtype=dtype)
    if scheduler:
        pipeline.scheduler = scheduler(pipeline.scheduler)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(num_images)]
    options = {**SIZE, **ROWS[family].options, **options}
    latents = pipeline(
        prompt=PROMPT,
        generator=generators if num_images > 1 else generators[0],
        num_images_per_prompt=num_images,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images
    if latents.ndim == 3:
        size = options["height"], options["width"], pipeline.vae_scale_factor
        latents = pipeline._unpack_latents(latents, *size)
    return latents[:, :, 0] if latents.ndim == 5 else latents


def ours(family, *, dtype=torch.float32, steps=3, **options):
    sampler = random_sampler(family=family, dtype=dtype)
    run = {**SIZE, **ROWS[family].options, "seed": 3, "steps": steps, **options}
    latents = sampler(PROMPT, **run).latents
    if family == "flux2-klein":  # its pipeline's latents are those of the VAE
        mean, variance = sampler.model.vae.bn.running_mean, sampler.model.vae.bn.running_var
        std = (variance + sampler.model.vae.config.batch_norm_eps).sqrt()
        latents = latents * std.view(1, -1, 1, 1).to(latents) + mean.view(1, -1, 1, 1).to(latents)
        latents = diffusers.Flux2KleinPipeline._unpatchify_latents(latents)
    return latents


@every_family
@pytest.mark.parametrize("form", ["guided", "unguided"])
@pytest.mark.parametrize(
    "more",
    [{}, {"num_images": 2, "height": 48}, {"dtype": torch.bfloat16}],
    ids=["one", "two, not square", "bfloat16"],
)
def test_latents_equal_the_familys_own_pipeline_to_the_bit(family, form, more):
    options = {**getattr(ROWS[family], form), **more}
    assert torch.equal(ours(family, **options), theirs(family, **options))


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, r in ROWS.items() for n in r.schedulers]
)
def test_so_they_do_on_each_scheduler_that_the_pipeline_takes(family, name):
    make = ROWS[family].schedulers[name]
    assert torch.equal(
        ours(family, scheduler=name, steps=4), theirs(family, scheduler=make, steps=4)
    )


@every_family
@pytest.mark.parametrize("gradient", ["x0", "latents"])
def test_a_colour_loss_falls_and_checkpointing_changes_nothing(family, gradient):
    sampler = random_sampler(family=family)
    row = ROWS[family]
    run = {**SIZE, **row.options, **row.guided, "seed": 3, "steps": 3, "preset": "clip-guided"}
    target = 0.9

    def blue(step):
        return (step.image[:, 2] - target).square().mean(dim=(1, 2))

    def result(scale, checkpointing="off"):
        guide = pilotfish.guide(blue, scale=scale, gradient=gradient)
        return sampler(PROMPT, plugins=[guide], checkpointing=checkpointing, **run)

    @torch.no_grad()
    def loss(found):
        return float((sampler.model.decode(found.latents)[:, 2] - target).square().mean())

    with warnings.catch_warnings(action="ignore"):
        plain, guided, again = result(0.0), result(2.0), result(2.0, "on")
    assert torch.equal(plain.latents, sampler(PROMPT, **run).latents)
    assert loss(guided) < loss(plain)
    assert all(0 < norm < float("inf") for r in guided.trace for norm in r.gradient_norm)
    torch.testing.assert_close(again.latents, guided.latents, atol=1e-5, rtol=1e-5)


@every_family
def test_both_networks_have_layers_that_checkpointing_computes_again(family):
    model = random_sampler(family=family).model
    for network in (model.denoiser, model.vae.decoder):
        assert len(parts(network)) >= 2


@every_family
def test_a_batch_equals_single_runs(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, **ROWS[family].guided, "steps": 3}
    batch = sampler(PROMPT, seed=3, num_images=3, **run).latents
    single = torch.cat([sampler(PROMPT, seed=3 + i, **run).latents for i in range(3)])
    torch.testing.assert_close(batch, single, atol=1e-4, rtol=1e-4)


@every_family
def test_encode_is_decode_backwards_as_the_pipeline_normalises(family):
    model = random_sampler(family=family).model
    shape = model.latent_shape(32, 32)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model._from_vae(model._to_vae(latents)), latents, atol=1e-5, rtol=1e-5
    )
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    encoded = model.encode(image)
    assert encoded.shape == latents.shape
    assert model.decode(encoded).shape == (1, 3, 32, 32)
    (gradient,) = torch.autograd.grad(model.decode(encoded).sum(), image)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert model.decoder("linear")(latents).shape == (1, 3, 32, 32)


@every_family
def test_the_picture_is_the_pipelines(family):
    pipeline = random_pipeline(family=family)
    options = {**SIZE, **ROWS[family].options, **ROWS[family].guided}
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(
        prompt=PROMPT, num_inference_steps=2, generator=generator, **options
    ).images[0]
    found = random_sampler(family=family)(PROMPT, seed=3, steps=2, **options).images[0]
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@every_family
def test_a_replay_from_the_run_file_is_bit_identical(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, **ROWS[family].guided, "steps": 3, "seed": 5}
    first = sampler(PROMPT, plugins=["blue"], **run)
    content = pilotfish.Run.parse(first.run.to_toml())
    for key in ("model", "dtype"):
        content.pop(key, None)
    again = sampler(**content)
    assert torch.equal(first.latents, again.latents)


def test_a_flow_with_noise_at_each_step_is_replayed_to_the_bit_and_differs_from_one_without():
    sampler = random_sampler(family="sd3")
    run = {**SIZE, **ROWS["sd3"].options, "steps": 3, "seed": 5}
    noisy = {"name": "flowmatch-euler", "stochastic_sampling": True}
    first = sampler(PROMPT, scheduler=noisy, num_images=2, **run)
    content = pilotfish.Run.parse(first.run.to_toml())
    again = sampler(**{key: content[key] for key in content.keys() - {"model", "dtype"}})
    assert torch.equal(first.latents, again.latents)
    alone = sampler(PROMPT, scheduler=noisy, **run).latents
    torch.testing.assert_close(alone, first.latents[:1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, sampler(PROMPT, **run).latents, atol=0.1)


@every_family
def test_a_word_that_a_plugin_adds_reaches_every_text_encoder(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, "seed": 3, "steps": 2}

    class Word(pilotfish.Plugin):
        def __init__(self, only):
            super().__init__()
            self.only = only

        def vocabulary(self, run):
            generator = torch.Generator().manual_seed(0)
            vectors = {
                e.name: torch.randn(2, e.width, generator=generator)
                for e in run.model.text_encoders
            }
            for name in vectors:
                if name != self.only:
                    vectors[name] = torch.zeros_like(vectors[name])
            return {"<birb>": vectors}

    names = [e.name for e in sampler.model.text_encoders]
    found = [sampler("a <birb>", plugins=[Word(n)], **run).latents for n in [None, *names]]
    for other in found[1:]:
        assert not torch.equal(found[0], other)


@every_family
def test_plugins_that_mix_prompts_and_words_change_the_picture_and_no_other(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, "seed": 3, "steps": 2}
    plain = sampler("a cow", **run).latents
    blend = sampler("a cow", plugins=[{"use": "blend", "prompts": {"a cat": 1, "a dog": 1}}], **run)
    assert not torch.equal(blend.latents, plain)
    assert torch.equal(sampler("a cow", **run).latents, plain)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_where_no_prompt_is_padded_blend_mixes_the_shorter_one_with_zeros_behind_it(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, "steps": 1, "seed": 3}

    def told(prompt, *plugins):
        (step,) = sampler.stream(prompt, plugins=plugins, **run)
        return step.embeddings

    def blend(**prompts):
        return told("a cow", {"use": "blend", "prompts": {f"a {p}": w for p, w in prompts.items()}})

    short, long = told("a cat"), told("a skunk")
    assert short.shape[1] < long.shape[1]
    filled = torch.cat([short, torch.zeros_like(long[:, short.shape[1] :])], dim=1)
    torch.testing.assert_close(blend(cat=1, skunk=3), 0.25 * filled + 0.75 * long)
    assert torch.equal(blend(cat=1, skunk=0), short)
    assert torch.equal(blend(cat=0, skunk=1), long)
    travel = {"use": "blend", "prompts": {"a cat": 1, "a skunk": 1}, "schedule": "travel"}
    options = {**run, **ROWS[family].guided, "steps": 3}
    latents = sampler("a cow", plugins=[travel], **options).latents
    assert not torch.equal(latents, sampler("a cow", **options).latents)


@every_family
def test_a_swapped_word_is_the_prompt_with_the_other_word_to_the_bit(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, "steps": 2, "seed": 3}
    swap = {"use": "token-swap", "word": "puppy", "by": "cat"}
    found = sampler("a puppy on a background", plugins=[swap], **run).latents
    assert torch.equal(found, sampler("a cat on a background", **run).latents)
    mix = {"use": "token-blend", "word": "cat", "mix": {"cow": 0.5}}
    if family in ("z-image", "qwen-image", "flux2-klein"):  # of bytes: as many tokens
        mixed = sampler("a cat on a background", plugins=[mix], **run).latents
        assert not torch.equal(mixed, found)


def test_a_swapped_word_brings_its_space_along_where_words_begin_with_one():
    """As in a Qwen's tokenizer, where " cat" and "cat" are two tokens."""
    pipeline = random_pipeline(family="flux2-klein")
    old = pipeline.tokenizer
    vocabulary = {token: number for token, number in old.get_vocab().items() if number < 256}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("Ġ", "o"), ("Ġo", "n")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = type(old)(vocab=vocabulary, merges=merges, model_max_length=2048)
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = old.chat_template
    pipeline.tokenizer = tokenizer
    pipeline.text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    sampler = Sampler.from_pipeline(pipeline)
    (encoder,) = sampler.model.text_encoders
    assert tokenizer.convert_ids_to_tokens(encoder.ids("cat")) == ["Ġcat"]
    run = {**SIZE, **ROWS["flux2-klein"].options, "steps": 1, "seed": 3}
    swap = {"use": "token-swap", "word": "puppy", "by": "cat"}
    found = sampler("a puppy on", plugins=[swap], **run).latents
    assert torch.equal(found, sampler("a cat on", **run).latents)


def test_a_prompt_for_each_encoder_is_diffusers_prompt_2():
    texts = {"text_encoder": PROMPT, "text_encoder_2": "a skunk"}
    expected = theirs("sdxl", prompt_2="a skunk")
    sampler = random_sampler(family="sdxl")
    found = sampler(texts, seed=3, steps=3, **SIZE)
    assert torch.equal(found.latents, expected)
    content = pilotfish.Run.parse(found.run.to_toml())
    assert content["prompt"] == texts
    with pytest.raises(InputError, match="text_encoder_3"):
        sampler({"text_encoder_3": "a cat"}, steps=1)


@pytest.mark.parametrize("family", ["sdxl", "flux", "qwen-image"])
def test_an_empty_negative_prompt_is_one_where_the_pipeline_tells_it_from_none(family):
    options = {**ROWS[family].guided, "negative_prompt": ""}
    found = ours(family, **options)
    assert torch.equal(found, theirs(family, **options))
    del options["negative_prompt"]
    assert not torch.equal(found, ours(family, **options))


def test_qwen_image_gives_its_levels_to_a_scheduler_of_flow_sigmas_too():
    options = {**FLOW, "use_dynamic_shifting": True}

    def make(_):
        return diffusers.UniPCMultistepScheduler(**options)

    spec = {"name": "unipc", "use_dynamic_shifting": True}
    expected = theirs("qwen-image", scheduler=make, steps=4)
    assert torch.equal(ours("qwen-image", scheduler=spec, steps=4), expected)


def test_what_a_plugin_adds_to_sdxls_conditions_joins_its_own():
    class Adds(pilotfish.Plugin):
        def network_inputs(self, inputs, step):
            return {**inputs, "added_cond_kwargs": {"text_embeds": self.value(step)}}

        def value(self, step):
            return torch.zeros_like(step.conditioning["pooled"])

    sampler = random_sampler(family="sdxl")
    run = {**SIZE, "steps": 2, "seed": 3}
    changed = sampler(PROMPT, plugins=[Adds()], **run).latents
    assert not torch.equal(changed, sampler(PROMPT, **run).latents)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_dry_run_of_a_flow_model_tells_its_steps_and_refuses_what_a_run_would(family, tmp_path):
    random_pipeline(family=family).save_pretrained(tmp_path)
    command = ["generate", "a cat", "--model", str(tmp_path), "--dry-run"]
    assert "28" in CliRunner().invoke(main, command).output
    refused = CliRunner().invoke(main, [*command, "--scheduler", "ddim"])
    assert refused.exit_code == 1
    assert "does not go along a flow" in refused.output


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_a_negative_prompt_that_counts_for_nothing_is_told(family):
    sampler = random_sampler(family=family)
    run = {**SIZE, **ROWS[family].options, "steps": 1, "true_cfg_scale": 1.0}
    with pytest.warns(UserWarning, match="'a red dog' counts for nothing"):
        sampler(PROMPT, negative_prompt=NEGATIVE, **run)


@pytest.mark.parametrize(("key", "value"), [("true_cfg_scale", 2.0), ("max_sequence_length", 9)])
def test_a_key_that_the_pipeline_does_not_take_is_refused(key, value):
    with pytest.raises(InputError, match=f"{key} means nothing to this model"):
        random_sampler(family="sdxl")("a cat", steps=1, **{key: value})


@pytest.mark.parametrize("name", ["ddim", "euler", "lms", "ddpm"])
def test_a_scheduler_that_knows_no_flow_is_refused_before_the_first_step(name):
    with pytest.raises(InputError, match="does not go along a flow.*flowmatch-euler"):
        random_sampler(family="sd3")("a cat", scheduler=name, steps=2)
    other = diffusers.UniPCMultistepScheduler()
    with pytest.raises(InputError, match="does not go along a flow"):
        random_sampler(family="sd3")("a cat", scheduler=other, steps=2)


def test_without_its_t5_stable_diffusion_3_is_told_zeros_as_in_diffusers():
    def without(pipeline):
        pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
        return pipeline

    options = {**SIZE, "max_sequence_length": 5}
    expected = without(random_pipeline(family="sd3"))(
        prompt=PROMPT,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **options,
    ).images
    sampler = Sampler.from_pipeline(without(random_pipeline(family="sd3")))
    assert torch.equal(sampler(PROMPT, steps=3, seed=3, **options).latents, expected)


def test_the_refiner_is_refused_by_name():
    parts = random_pipeline(family="sdxl").components
    parts |= {"text_encoder": None, "tokenizer": None}
    refiner = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    with pytest.raises(ModelError, match="refiner"):
        Sampler.from_pipeline(refiner)


def test_a_half_precision_vae_that_asks_for_float32_gets_it_as_in_diffusers():
    pipeline = random_pipeline(family="sdxl", dtype=torch.float16)
    assert pipeline.vae.config.force_upcast
    model = Sampler.from_pipeline(pipeline).model
    assert model.vae.dtype == torch.float32
    assert pipeline.vae.dtype == torch.float16


def test_it_is_made_once_and_again_where_the_pipelines_was_changed():
    pipeline = random_pipeline(family="sdxl", dtype=torch.float16)
    model = Sampler.from_pipeline(pipeline).model

    def weight():
        return model.differentiable("off").vae.decoder.conv_in.weight

    first = weight()
    assert weight() is first
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(2)
    assert torch.equal(weight(), 2 * first)
    pipeline.vae.enable_tiling()
    assert model.differentiable("off").vae.use_tiling
    pipeline.vae = random_pipeline(family="sdxl", dtype=torch.float16, seed=1).vae
    assert torch.equal(weight(), pipeline.vae.decoder.conv_in.weight.float())


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_saved_pipeline_loads_by_its_class(family, tmp_path):
    random_pipeline(family=family).save_pretrained(tmp_path)
    run = {**SIZE, **ROWS[family].options, "seed": 3, "steps": 2}
    found = pilotfish.load(tmp_path)(PROMPT, **run).latents
    expected = random_sampler(family=family)(PROMPT, **run).latents
    # Weights read from a file lie elsewhere in memory, and products may round otherwise.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


IMAGE_TO_IMAGE = {
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "z-image": "ZImageImg2ImgPipeline",
    "qwen-image": "QwenImageImg2ImgPipeline",
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in IMAGE_TO_IMAGE), ("sdxl", torch.bfloat16)],
)
def test_img2img_equals_the_familys_own_image_to_image_pipeline_to_the_bit(family, dtype, tmp_path):
    noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(noise.byte().numpy())
    picture.save(tmp_path / "picture.png")
    pipeline = random_pipeline(family=family, dtype=dtype)
    kind = getattr(diffusers, IMAGE_TO_IMAGE[family])
    takes = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipeline.components.items() if name in takes}
    other = kind(**parts, **({"add_watermarker": False} if family == "sdxl" else {}))
    other.set_progress_bar_config(disable=True)
    options = {**ROWS[family].options, **ROWS[family].guided}
    if family == "flux":  # whose two pipelines have two defaults
        options["guidance_scale"] = 3.5
    size = SIZE if "height" in inspect.signature(kind.__call__).parameters else {}
    expected = other(
        prompt=PROMPT,
        image=picture,
        strength=0.5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **size,
        **options,
    ).images
    if expected.ndim == 3:
        expected = other._unpack_latents(expected, 32, 32, other.vae_scale_factor)
    expected = expected[:, :, 0] if expected.ndim == 5 else expected
    use = {"use": "img2img", "image": str(tmp_path / "picture.png"), "strength": 0.5}
    found = ours(family, plugins=[use], steps=4, dtype=dtype, **options)
    assert torch.equal(found, expected)


@every_family
def test_the_linear_decoder_is_the_least_squares_fit_of_the_familys_own_vae(family):
    model = random_sampler(family=family).model
    factor = model.factor
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(24, 3, 4, 4, generator=generator)
    size = (16 * factor, 16 * factor)
    pictures = torch.nn.functional.interpolate(colors, size=size, mode="bilinear")
    with torch.no_grad():
        latents = model.encode(pictures).double().numpy()
    cells = pictures.double().numpy().reshape(24, 3, 16, factor, 16, factor).mean(axis=(3, 5))
    rows = np.concatenate([latents, np.ones_like(latents[:, :1])], axis=1)
    rows, wanted = (np.moveaxis(a, 1, -1).reshape(-1, a.shape[1]) for a in (rows, cells))
    # A thousandth of a row's weight keeps what the VAE does not use near zero.
    ridge = np.sqrt(1e-3 * len(rows)) * np.eye(rows.shape[1])[:-1]
    fit, *_ = np.linalg.lstsq(
        np.concatenate([rows, ridge]), np.concatenate([wanted, np.zeros((len(ridge), 3))])
    )
    asked = torch.randn(2, *model.latent_shape(32, 32), generator=generator)
    expected = np.einsum("bchw,cr->brhw", asked.numpy(), fit[:-1]) + fit[-1].reshape(3, 1, 1)
    found = model.rgb(asked)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-4)


@every_family
def test_a_tiny_decoder_fits_by_channels_and_factor_whatever_the_family(family, tmp_path):
    model = random_sampler(family=family).model
    channels, blocks = model.latent_shape(32, 32)[0], model.factor.bit_length()
    shape = {
        "latent_channels": channels,
        "encoder_block_out_channels": (8,) * blocks,
        "decoder_block_out_channels": (8,) * blocks,
        "num_encoder_blocks": (1,) * blocks,
        "num_decoder_blocks": (1,) * blocks,
    }
    tiny = diffusers.AutoencoderTiny(**shape)
    tiny.save_pretrained(tmp_path / "tiny")
    latents = torch.randn(
        1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0)
    )
    latents.requires_grad_()
    image = model.decoder(f"tiny:{tmp_path}/tiny")(latents)
    with torch.no_grad():
        expected = tiny.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(image, expected)
    assert image.shape == (1, 3, 32, 32)
    (gradient,) = torch.autograd.grad(image.sum(), latents)
    assert gradient.abs().sum() > 0
    diffusers.AutoencoderTiny(**{**shape, "latent_channels": channels + 1}).save_pretrained(
        tmp_path / "other"
    )
    message = f"latents of {channels + 1} channels and enlarges {model.factor} times; this model's"
    with pytest.raises(ModelError, match=f"{message} have {channels}, enlarged {model.factor}"):
        model.decoder(f"tiny:{tmp_path}/other")


@torch.no_grad()
def test_flowmatch_lcm_draws_from_the_runs_generator_as_diffusers_scheduler_does():
    """By hand: the pipelines give that scheduler no generator."""
    pipeline = random_pipeline(family="sd3")
    values, _, pooled, _ = pipeline.encode_prompt(
        PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
    scheduler = diffusers.FlowMatchLCMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 16, 16, generator=generator)
    for timestep in scheduler.timesteps:
        velocity = pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(1),
            encoder_hidden_states=values,
            pooled_projections=pooled,
        ).sample
        latents = scheduler.step(velocity, timestep, latents, generator=generator).prev_sample
    run = {"guidance_scale": 1.0, "scheduler": "flowmatch-lcm", "steps": 4}
    assert torch.equal(ours("sd3", **run), latents)
