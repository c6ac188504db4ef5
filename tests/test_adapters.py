"""LoRAs and IP-Adapters in a user's pipeline: the picture is the pipeline's own to the bit."""

import copy
import warnings

import pytest
import torch
import transformers
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_flux

from pilotfish import ModelError, Sampler
from pilotfish.testing.random_models import families, random_pipeline

PROMPT, NEGATIVE = "a puppy on a cat background", "a red dog"
FAMILIES = sorted(families())
LONG = ("z-image", "qwen-image", "flux2-klein")
OPTIONS = {
    "sd3": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 60, "true_cfg_scale": 3.0},
    "qwen-image": {"max_sequence_length": 200, "true_cfg_scale": 3.0},
    "flux2-klein": {"max_sequence_length": 200},
    "z-image": {"max_sequence_length": 60},
}


def run_options(family):
    options = {"height": 32, "width": 32, **OPTIONS.get(family, {})}
    return options if family == "flux2-klein" else {**options, "negative_prompt": NEGATIVE}


def theirs(pipeline, family):
    """The picture, (1, 3, 32, 32), of the pipeline itself."""
    return pipeline(
        prompt=PROMPT,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        output_type="pt",
        **run_options(family),
    ).images


def ours(sampler, family, **options):
    return sampler(PROMPT, seed=3, steps=2, **run_options(family), **options)


@torch.no_grad()
def picture(sampler, found):
    return sampler.model.decode(found.latents).clamp(0, 1)


def lora(network, prefix, seed=0):
    """Random matrices of rank 2 beside each projection of the attention, and of the text's too."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(
            ("to_q", "to_k", "to_v", "q_proj", "v_proj")
        ):
            down, up = (2, module.in_features), (module.out_features, 2)
            for key, shape in (("lora_A", down), ("lora_B", up)):
                drawn = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"{prefix}.{name}.{key}.weight"] = drawn
    assert tensors
    return tensors


def part_of(family):
    return "unet" if family in ("stable-diffusion", "sdxl") else "transformer"


@pytest.fixture
def with_lora():
    """A pipeline with a LoRA in its network, and in the text encoder of those with a UNet."""

    def make(family, seed=0):
        pipeline, part = random_pipeline(family=family), part_of(family)
        tensors = lora(getattr(pipeline, part), part, seed)
        if family in ("stable-diffusion", "sdxl"):
            tensors |= lora(pipeline.text_encoder, "text_encoder", seed)
        pipeline.load_lora_weights(tensors, adapter_name="one")
        return pipeline

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_changes_the_picture_as_it_does_in_the_familys_own_pipeline(family, with_lora):
    pipeline = with_lora(family)
    plain = ours(Sampler.from_pipeline(random_pipeline(family=family)), family)
    sampler = Sampler.from_pipeline(pipeline)
    found = ours(sampler, family)
    assert not torch.equal(found.latents, plain.latents)
    assert torch.equal(picture(sampler, found), theirs(pipeline, family))
    # Beside a plugin the run works on copies, adapters and all.
    idle = ours(sampler, family, plugins=["blue:scale=0"])
    assert torch.equal(idle.latents, found.latents)
    guided = ours(
        sampler, family, plugins=["blue:scale=0.5,gradient='latents'"], checkpointing="on"
    )
    assert not torch.equal(guided.latents, found.latents)
    assert all(0 < norm < float("inf") for r in guided.trace for norm in r.gradient_norm)
    assert torch.equal(ours(sampler, family).latents, found.latents)


# peft tells of a second adapter in the same network.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_loras_that_are_scaled_switched_off_and_unloaded_count_from_the_next_run_on(
    family, with_lora
):
    pipeline = with_lora(family)
    sampler, part = Sampler.from_pipeline(pipeline), getattr(pipeline, part_of(family))
    whole = ours(sampler, family).latents
    pipeline.set_adapters(["one"], adapter_weights=[0.5])
    half = ours(sampler, family)
    assert torch.equal(picture(sampler, half), theirs(pipeline, family))
    assert not torch.equal(half.latents, whole)
    network = random_pipeline(family=family).components[part_of(family)]
    more = lora(network, part_of(family), seed=1)
    pipeline.load_lora_weights(more, adapter_name="two")
    pipeline.set_adapters(["one", "two"], adapter_weights=[0.5, 0.7])
    both = ours(sampler, family)
    assert torch.equal(picture(sampler, both), theirs(pipeline, family))
    pipeline.disable_lora()
    off = ours(sampler, family).latents
    pipeline.unload_lora_weights()
    assert not any("lora" in name for name, _ in part.named_modules())
    plain = ours(Sampler.from_pipeline(random_pipeline(family=family)), family).latents
    assert torch.equal(off, plain)
    assert torch.equal(ours(sampler, family).latents, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_guided_run_with_a_lora_leaves_nothing_behind(family, with_lora):
    pipeline = with_lora(family)

    def state():
        return {
            name: (
                {n: (p.data_ptr(), p.requires_grad, p.grad) for n, p in part.named_parameters()},
                {n: [*vars(m)] for n, m in part.named_modules()},
                {n: t.clone() for n, t in part.state_dict().items()},
            )
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }

    before, active = state(), copy.deepcopy(pipeline.get_active_adapters())
    ours(Sampler.from_pipeline(pipeline), family, plugins=["blue:gradient='latents'"])
    after = state()
    for name, (parameters, modules, values) in before.items():
        assert after[name][:2] == (parameters, modules)
        assert all(torch.equal(after[name][2][n], t) for n, t in values.items())
    assert pipeline.get_active_adapters() == active == ["one"]


def test_a_fused_lora_and_one_beside_offloaded_text_encoders_are_the_same(with_lora):
    pipeline = with_lora("stable-diffusion")
    expected = ours(Sampler.from_pipeline(pipeline), "stable-diffusion")
    away = ours(Sampler.from_pipeline(pipeline, offload="text"), "stable-diffusion")
    assert torch.equal(away.latents, expected.latents)
    pipeline.fuse_lora()
    sampler = Sampler.from_pipeline(pipeline)
    fused = picture(sampler, ours(sampler, "stable-diffusion"))
    assert torch.equal(fused, theirs(pipeline, "stable-diffusion"))


def ip_adapter(pipeline):
    """Weights of an IP-Adapter for a pipeline's UNet, by the processors that it would have."""
    width = pipeline.unet.config.cross_attention_dim
    generator, adapter, number = torch.Generator().manual_seed(0), {}, 1
    for name in pipeline.unet.attn_processors:
        if "attn1" in name or "motion" in name:
            continue
        attention = pipeline.unet.get_submodule(name.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            shape = attention.to_k.weight.shape
            adapter[f"{number}.{key}.weight"] = torch.randn(shape, generator=generator)
        number += 2
    projection = {
        "proj.weight": torch.randn(4 * width, 8, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_an_ip_adapter_is_refused_by_name_and_gone_once_it_is_unloaded(family):
    pipeline = random_pipeline(family=family)
    plain = ours(Sampler.from_pipeline(pipeline), family).latents
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=8,
    )
    image_encoder = transformers.CLIPVisionModelWithProjection(config).eval()
    pipeline.register_modules(image_encoder=image_encoder)
    sampler = Sampler.from_pipeline(pipeline)
    with warnings.catch_warnings(action="ignore"):
        pipeline.load_ip_adapter(ip_adapter(pipeline), subfolder="", weight_name="")
    for refused in (lambda: Sampler.from_pipeline(pipeline), lambda: ours(sampler, family)):
        with pytest.raises(ModelError, match="an IP-Adapter is loaded.*unload_ip_adapter"):
            refused()
    pipeline.unload_ip_adapter()
    assert torch.equal(ours(sampler, family).latents, plain)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_so_is_one_in_a_transformers_attention(family):
    """As `load_ip_adapter` puts it there; its pipeline would draw the prompt alone, untold."""
    pipeline = random_pipeline(family=family)
    attention = pipeline.transformer.transformer_blocks[0].attn
    if family == "flux":
        adapter = transformer_flux.FluxIPAdapterAttnProcessor(32, 32)
    else:
        adapter = attention_processor.SD3IPAdapterJointAttnProcessor2_0(32, 32, 8, 32)
    plain, sampler = attention.processor, Sampler.from_pipeline(pipeline)
    expected = ours(sampler, family).latents
    attention.set_processor(adapter)
    for refused in (lambda: Sampler.from_pipeline(pipeline), lambda: ours(sampler, family)):
        with pytest.raises(ModelError, match="an IP-Adapter is loaded.*unload_ip_adapter"):
            refused()
    attention.set_processor(plain)
    assert torch.equal(ours(sampler, family).latents, expected)
