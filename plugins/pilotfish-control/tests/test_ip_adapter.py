"""IP-Adapters: equal to the pipeline with the same one loaded, and gone after the run."""

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from pilotfish_control import IPAdapter
from pilotfish_kit import check_plugin
from safetensors.torch import save_file

from pilotfish import InputError, ModelError, Plugin, Run
from pilotfish.testing import random_pipeline

FAMILIES = ("stable-diffusion", "sdxl")


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory, make):
    """A folder of a family's IP-Adapters, and of the image encoder that they see with."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp("adapter")
            (folder / "models").mkdir()
            for seed, kind in enumerate(("plain", "full")):
                file = folder / "models" / f"{kind}.safetensors"
                make.adapter(pipelines(family).unet, file, kind, seed)
            make.image_encoder().save_pretrained(folder / "models" / "image_encoder")
        return made[family]

    return of


def adapter(folder, image, kind="plain", **settings):
    return IPAdapter(model=str(folder), file=f"models/{kind}.safetensors", image=image, **settings)


def theirs(family, folder, kinds, images, scales, masks=None, num_images=1, **options):
    """The latents of the pipeline with these IP-Adapters loaded."""
    pipeline = random_pipeline(family=family)
    files = [f"{kind}.safetensors" for kind in kinds]
    pipeline.load_ip_adapter(str(folder), subfolder="models", weight_name=files)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_ip_adapter_scale(scales)
    if masks:
        processed = IPAdapterMaskProcessor().preprocess(masks, height=32, width=32)
        options["cross_attention_kwargs"] = {"ip_adapter_masks": list(processed.unsqueeze(1))}
    generators = [torch.Generator().manual_seed(1 + i) for i in range(num_images)]
    return pipeline(
        "a red cat", ip_adapter_image=[[image] for image in images] if masks else images,
        num_inference_steps=2, num_images_per_prompt=num_images, height=32, width=32,
        output_type="latent", generator=generators, **options,
    ).images  # fmt: skip


def opened(path, mode="RGB"):
    with Image.open(path) as image:
        return image.convert(mode)


def ours(sampler, *plugins, **options):
    options = {"steps": 2, "seed": 1, "height": 32, "width": 32, **options}
    return sampler("a red cat", plugins=plugins, **options).latents


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["plain", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_pipeline_with_that_adapter_to_the_bit(
    family, kind, guidance_scale, num_images, samplers, folders, pictures
):
    """The negative prompt gets no picture: zeros, or what the encoder sees in a grey one."""
    run = {"guidance_scale": guidance_scale, "num_images": num_images}
    expected = theirs(family, folders(family), [kind], [opened(pictures[0])], 0.6, **run)
    plugin = adapter(folders(family), pictures[0], kind, scale=0.6)
    latents = ours(samplers(family), plugin, **run)
    assert torch.equal(latents, expected)
    assert not torch.equal(latents, ours(samplers(family), **run))


@pytest.fixture
def masks(tmp_path):
    """The left half, and the right one, as files."""
    files = []
    for i in (0, 1):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (16 * i, 0, 16 * i + 16, 32))
        mask.save(tmp_path / f"mask{i}.png")
        files.append(tmp_path / f"mask{i}.png")
    return files


@pytest.mark.parametrize("family", FAMILIES)
def test_two_with_masks_add_up_as_in_the_pipeline(family, samplers, folders, pictures, masks):
    folder, kinds = folders(family), ("plain", "full")
    expected = theirs(
        family, folder, kinds, [opened(p) for p in pictures], [0.6, 0.3],
        [opened(m, "L") for m in masks], guidance_scale=3.0,
    )  # fmt: skip
    plugins = [
        adapter(folder, pictures[0], kinds[0], scale=0.6, mask=masks[0]),
        adapter(folder, pictures[1], kinds[1], scale=0.3, mask=[0.5, 0, 1, 1]),
    ]
    assert torch.equal(ours(samplers(family), *plugins, guidance_scale=3.0), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_0_leaves_the_image_bit_identical(family, samplers, folders, pictures):
    plugin = adapter(folders(family), pictures[0], scale=0)
    assert torch.equal(ours(samplers(family), plugin), ours(samplers(family)))


class Fails(Plugin):
    def after_step(self, step):
        raise InputError("on purpose")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_it_is_left_after_a_run_and_after_an_error(family, samplers, folders, pictures):
    sampler, plugin = samplers(family), adapter(folders(family), pictures[0])
    before, unet = ours(sampler), sampler.model.denoiser
    processors, config = dict(unet.attn_processors), dict(vars(unet.config))
    ours(sampler, plugin)
    with pytest.raises(InputError, match="on purpose"):
        ours(sampler, plugin, Fails())
    assert torch.equal(ours(sampler), before)
    assert all(unet.attn_processors[name] is p for name, p in processors.items())
    assert unet.encoder_hid_proj is None and vars(unet.config) == config
    assert sampler.model.pipeline().image_encoder is None


def test_two_runs_interleaved_do_not_see_each_others(samplers, folders, pictures):
    sampler, folder = samplers("stable-diffusion"), folders("stable-diffusion")
    stacks = [[adapter(folder, pictures[0])], [], [adapter(folder, pictures[1], "full")]]
    alone = [ours(sampler, *stack, steps=3) for stack in stacks]
    streams = [sampler.stream("a red cat", plugins=s, steps=3, seed=1) for s in stacks]
    for _ in zip(*streams, strict=True):
        pass
    assert all(torch.equal(s.result().latents, a) for s, a in zip(streams, alone, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_through_it_is_the_same_checkpointed(family, samplers, folders, pictures, make):
    plugins = [
        adapter(folders(family), pictures[0], mask=[0, 0, 0.5, 1]),
        make.perturbed(),
        make.blue(scale=2, gradient="latents"),
    ]
    runs = [ours(samplers(family), *plugins, checkpointing=c) for c in ("off", "on")]
    assert torch.isfinite(runs[0]).all()
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(runs[0], ours(samplers(family), *plugins[:2]), atol=1e-4)


def test_a_run_file_repeats_it(samplers, folders, pictures, tmp_path):
    sampler = samplers("stable-diffusion")
    plugin = {
        "use": "ip-adapter", "model": str(folders("stable-diffusion")), "image": str(pictures[0]),
        "file": "models/plain.safetensors", "mask": [0, 0, 0.5, 1],
    }  # fmt: skip
    result = sampler("a red cat", plugins=[plugin], steps=2, seed=1)
    run = tmp_path / "run.toml"
    run.write_text(result.run.to_toml())
    again = {k: v for k, v in Run.read(run).items() if k not in ("model", "dtype")}
    assert torch.equal(sampler(**again).latents, result.latents)


def test_what_does_not_fit_is_told(samplers, folders, pictures, pipelines, tmp_path, make):
    sd, xl = folders("stable-diffusion"), folders("sdxl")
    encoder = make.image_encoder(sees=7)
    make.adapter(pipelines("stable-diffusion").unet, tmp_path / "a.safetensors", "plain", 0)
    encoder.save_pretrained(tmp_path / "image_encoder")
    save_file({"weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no")
    narrow = {"model": str(tmp_path), "image": pictures[0]}
    cases = [
        ("sdxl", adapter(sd, pictures[0]), "does not fit this model's UNet2DConditionModel"),
        ("stable-diffusion", adapter(xl, pictures[0]), "does not fit"),
        ("stable-diffusion", adapter(sd, pictures[0], "none"), "no IP-Adapter .*none.safetensors"),
        ("stable-diffusion", adapter("./no", pictures[0]), "model must be a folder that exists"),
        ("stable-diffusion", adapter(sd, tmp_path / "no.png"), "Pillow"),
        ("stable-diffusion", adapter(sd, pictures[0], mask="no.png"), "mask must be"),
        ("stable-diffusion", IPAdapter(file="a.safetensors", **narrow), "shapes|size"),
        ("stable-diffusion", IPAdapter(file="b.safetensors", **narrow), "does not fit"),
        ("stable-diffusion", IPAdapter(file="c.safetensors", **narrow), "does not fit"),
        ("stable-diffusion", adapter(sd, pictures[0], image_encoder="eyes"), "does not fit"),
    ]
    for family, plugin, message in cases:
        with pytest.raises(InputError, match=message):
            ours(samplers(family), plugin)
    with pytest.raises(ModelError, match="run by a FluxPipeline"):
        ours(samplers("flux"), adapter(sd, pictures[0]))


def test_the_contract_of_plugins(samplers, folders, pictures):
    plugin = adapter(folders("stable-diffusion"), pictures[0])
    check_plugin(plugin, samplers("stable-diffusion"))
