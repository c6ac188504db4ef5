"""ControlNets: equal to the families' own pipelines, and gone after the run."""

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from pilotfish_control import ControlNet
from pilotfish_control.controlnet import edges
from pilotfish_kit import examine
from torch import nn

from pilotfish import InputError, ModelError, Run, Sampler, pixels, to_pil
from pilotfish.testing import random_pipeline

# Of diffusers' own, where it makes a ControlNet of FLUX.1.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

FAMILIES = {
    "stable-diffusion": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
    "sd3": diffusers.StableDiffusion3ControlNetPipeline,
    "flux": diffusers.FluxControlNetPipeline,
}


@pytest.fixture(scope="module")
def nets(pipelines, make):
    """The same one for each family, made once; and its folder."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = make.controlnet(pipelines(family))
        return made[family]

    return of


@pytest.fixture
def encoded_once(monkeypatch):
    """Let diffusers' pipelines encode the picture as we do: once, and by the mean of the VAE's.

    They draw it, Stable Diffusion 3 from torch's global generator, and encode as many pictures as
    the network gets, which rounds otherwise.
    """
    encode = diffusers.AutoencoderKL.encode

    def once(self, pictures):
        mean = encode(self, pictures[:1]).latent_dist.mode().repeat(len(pictures), 1, 1, 1)
        distribution = DiagonalGaussianDistribution(torch.cat([mean, mean], dim=1))
        distribution.sample = lambda generator=None: mean
        distribution.mode = lambda: mean
        return AutoencoderKLOutput(latent_dist=distribution)

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", once)


def opened(path):
    with Image.open(path) as image:
        return image.copy()


def theirs(family, pipeline, network, image, num_images=1, steps=3, **options):
    """The latents of the family's own ControlNet pipeline, unpacked."""
    more = {"requires_safety_checker": False} if family == "stable-diffusion" else {}
    if family == "sdxl":
        more = {"add_watermarker": False}
    parts = {**pipeline.components, "controlnet": network}
    made = FAMILIES[family](**parts, **more)
    made.set_progress_bar_config(disable=True)
    name = "image" if hasattr(pipeline, "unet") else "control_image"
    generators = [torch.Generator().manual_seed(1 + i) for i in range(num_images)]
    latents = made(
        "a red cat", **{name: image}, num_inference_steps=steps, num_images_per_prompt=num_images,
        height=32, width=32, output_type="latent", generator=generators, **options,
    ).images  # fmt: skip
    if family != "flux":
        return latents
    return nn.functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (8, 8)), 2)


def ours(sampler, *plugins, **options):
    options = {"steps": 3, "seed": 1, "height": 32, "width": 32, **options}
    return sampler("a red cat", plugins=plugins, **options).latents


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "flux"])
def test_it_equals_the_familys_own_pipeline_to_the_bit(
    family, guidance_scale, num_images, pipelines, samplers, nets, pictures, encoded_once
):
    options = {"guidance_scale": guidance_scale, "num_images": num_images}
    image = opened(pictures[0])
    expected = theirs(family, pipelines(family), nets(family), image, **options)
    plugin = ControlNet(model=nets(family), image=pictures[0])
    latents = ours(samplers(family), plugin, **options)
    assert torch.equal(latents, expected)
    assert not torch.equal(latents, ours(samplers(family), **options))


@pytest.mark.parametrize(("num_images", "true_cfg_scale"), [(1, 1.0), (1, 4.0), (2, 4.0)])
def test_it_equals_fluxs_own_pipeline_to_the_bit(
    true_cfg_scale, num_images, pipelines, samplers, nets, pictures, encoded_once
):
    """Whose second prediction gets the residuals of the first."""
    run = {"guidance_scale": 3.5, "true_cfg_scale": true_cfg_scale, "num_images": num_images}
    # A negative prompt that counts for nothing is told.
    run |= {"negative_prompt": "a blue puppy"} if true_cfg_scale > 1 else {}
    image = opened(pictures[0])
    expected = theirs("flux", pipelines("flux"), nets("flux"), image, **run)
    plugin = ControlNet(model=nets("flux"), image=pictures[0])
    assert torch.equal(ours(samplers("flux"), plugin, **run), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_add_up_as_in_the_familys_own_pipeline(
    family, pipelines, samplers, nets, pictures, encoded_once, make
):
    pipeline, first = pipelines(family), nets(family)
    second = make.controlnet(pipeline, seed=6)
    options = {"guidance_scale": 3.0}
    expected = theirs(
        family, pipeline, [first, second], [opened(p) for p in pictures], **options,
        controlnet_conditioning_scale=[0.5, 0.8], control_guidance_start=[0.0, 0.3],
        control_guidance_end=[0.7, 1.0],
    )  # fmt: skip
    plugins = [
        ControlNet(model=first, image=pictures[0], scale=0.5, stop=0.7),
        ControlNet(model=second, image=pictures[1], scale=0.8, start=0.3),
    ]
    assert torch.equal(ours(samplers(family), *plugins, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_0_leaves_the_image_bit_identical(family, samplers, nets, pictures):
    plugin = ControlNet(model=nets(family), image=pictures[0], scale=0)
    assert torch.equal(ours(samplers(family), plugin), ours(samplers(family)))


def test_a_mode_chooses_what_a_union_controlnet_sees(
    pipelines, samplers, pictures, encoded_once, make
):
    net = make.controlnet(pipelines("flux"), num_mode=3)
    options = {"guidance_scale": 3.5, "control_mode": 2}
    expected = theirs("flux", pipelines("flux"), net, opened(pictures[0]), **options)
    latents = [
        ours(samplers("flux"), ControlNet(model=net, image=pictures[0], mode=mode))
        for mode in (2, 1)
    ]
    assert torch.equal(latents[0], expected) and not torch.equal(latents[1], expected)
    for mode, where in ((None, "below 3"), (3, "below 3")):
        with pytest.raises(InputError, match=f"mode must be {where}"):
            ours(samplers("flux"), ControlNet(model=net, image=pictures[0], mode=mode))


def test_flux_controlnets_of_pixels_equal_the_pipeline_too(pipelines, samplers, pictures, make):
    """Those of XLabs, whose blocks are added again and again."""
    net = make.controlnet(pipelines("flux"), conditioning_embedding_channels=16, patch_size=2)
    for i in (1, 3):  # halves the picture once instead of three times, as the random VAE does
        net.input_hint_block.blocks[i].stride = (1, 1)
    image = opened(pictures[0])
    expected = theirs("flux", pipelines("flux"), net, image, guidance_scale=3.5)
    plugin = ControlNet(model=net, image=pictures[0])
    assert torch.equal(ours(samplers("flux"), plugin), expected)


def test_those_that_share_the_networks_places_and_see_no_prompt_equal_the_pipeline_too(
    pipelines, samplers, pictures, encoded_once, make
):
    """Those of Stable Diffusion 3.5 large."""
    options = {"use_pos_embed": False, "pos_embed_type": None, "joint_attention_dim": None}
    options["force_zeros_for_pooled_projection"] = False
    net = make.controlnet(pipelines("sd3"), **options)
    latents = ours(samplers("sd3"), ControlNet(model=net, image=pictures[0]))
    assert net.pos_embed is None  # the pipeline gives it one
    assert torch.equal(latents, theirs("sd3", pipelines("sd3"), net, opened(pictures[0])))


def test_residuals_spread_over_more_blocks_as_the_networks_spread_them(
    pictures, encoded_once, make
):
    """A ControlNet of one block, and one of two, for networks of two and three."""
    for family, options in (("sd3", {"num_layers": 1}), ("flux", {"num_layers": 2})):
        pipeline = random_pipeline(family=family)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = {**pipeline.transformer.config, "num_layers": 3, "num_single_layers": 3}
            config = {k: v for k, v in config.items() if k in pipeline.transformer.config}
            pipeline.transformer = type(pipeline.transformer).from_config(config).eval()
        net = make.controlnet(pipeline, **options)
        image = opened(pictures[0])
        expected = theirs(family, pipeline, net, image, guidance_scale=3.5)
        plugin = ControlNet(model=net, image=pictures[0])
        latents = ours(Sampler.from_pipeline(pipeline), plugin, guidance_scale=3.5)
        assert torch.equal(latents, expected)


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_a_gradient_through_it_is_the_same_checkpointed(family, samplers, nets, pictures, make):
    plugins = [
        ControlNet(model=nets(family), image=pictures[0]),
        make.perturbed(),
        make.blue(scale=2, gradient="latents"),
    ]
    runs = [ours(samplers(family), *plugins, checkpointing=c) for c in ("off", "on")]
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    other = [*plugins[:2], make.blue(scale=2, gradient="x0")]
    assert not torch.allclose(runs[0], ours(samplers(family), *other), atol=1e-3)


def test_guidance_changes_with_the_controlnets_own_part_of_the_gradient(
    samplers, nets, pictures, make
):
    """The residuals' gradient is the latents': cutting it off gives another picture."""

    class Cut(ControlNet):
        def network_inputs(self, inputs, step, state):
            with torch.no_grad():
                return super().network_inputs(inputs, step, state)

    blue = make.blue(scale=2, gradient="latents")
    whole, cut = (
        ours(
            samplers("stable-diffusion"),
            kind(model=nets("stable-diffusion"), image=pictures[0]),
            blue,
        )
        for kind in (ControlNet, Cut)
    )
    assert torch.isfinite(whole).all() and not torch.allclose(whole, cut, atol=1e-4)


def test_the_network_that_was_passed_stays_as_it_was(samplers, nets, pictures, make):
    net = nets("stable-diffusion")
    net.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    plugin = ControlNet(model=net, image=pictures[0])
    ours(samplers("stable-diffusion"), plugin, make.blue(gradient="latents"), checkpointing="on")
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


@pytest.fixture(scope="module")
def folder(nets, tmp_path_factory):
    """The folder of the one for Stable Diffusion."""
    place = tmp_path_factory.mktemp("controlnet")
    nets("stable-diffusion").save_pretrained(place)
    return place


def test_a_folder_gives_what_the_network_in_it_gives_also_from_a_run_file(
    folder, samplers, nets, pictures, tmp_path
):
    sampler = samplers("stable-diffusion")
    expected = ours(sampler, ControlNet(model=nets("stable-diffusion"), image=pictures[0]))
    plugin = {"use": "controlnet", "model": str(folder), "image": str(pictures[0])}
    result = sampler("a red cat", plugins=[plugin], steps=3, seed=1)
    assert torch.equal(result.latents, expected)
    run = tmp_path / "run.toml"
    run.write_text(result.run.to_toml())
    again = {k: v for k, v in Run.read(run).items() if k not in ("model", "dtype")}
    assert torch.equal(sampler(**again).latents, expected)


def test_a_run_file_says_that_a_network_must_be_passed_again(samplers, nets, pictures):
    net = nets("stable-diffusion")
    result = samplers("stable-diffusion")(
        "a red cat", plugins=[ControlNet(model=net, image=pictures[0])], steps=1
    )
    (table,) = Run.parse(result.run.to_toml())["plugins"]
    with pytest.raises(InputError, match="must be passed again in Python"):
        ControlNet(model=table["model"], image=table["image"])


def test_detected_edges_of_a_square_run_along_its_border_and_nowhere_else():
    picture = torch.zeros(1, 3, 32, 32)
    picture[..., 8:24, 8:24] = 1
    found = edges(picture)
    assert found.shape == picture.shape and set(found.unique().tolist()) == {0, 1}
    rows, columns = found[0, 0].nonzero().T
    border = torch.stack([(rows - 7.5).abs(), (rows - 23.5).abs(), (columns - 7.5).abs()])
    away = torch.cat([border, (columns - 23.5).abs()[None]]).amin(dim=0)
    assert away.max() <= 1.5
    assert 40 <= len(rows) <= 130  # its border is 60 pixels long, on either side


def test_a_picture_whose_edges_are_detected_controls_as_the_picture_of_its_edges_does(
    samplers, nets, tmp_path, pictures
):
    with Image.open(pictures[0]) as picture:
        found = edges(pixels(picture.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)))
    to_pil(found)[0].save(tmp_path / "edges.png")
    net, sampler = nets("stable-diffusion"), samplers("stable-diffusion")
    detected = ours(sampler, ControlNet(model=net, image=pictures[0], detect="canny"))
    drawn = ours(sampler, ControlNet(model=net, image=tmp_path / "edges.png"))
    plain = ours(sampler, ControlNet(model=net, image=pictures[0]))
    assert torch.equal(detected, drawn) and not torch.equal(detected, plain)


def test_what_does_not_fit_is_told(folder, samplers, pipelines, nets, pictures, tmp_path, make):
    far = make.controlnet(pipelines("stable-diffusion"), factor=4)
    Image.new("RGB", (32, 16)).save(tmp_path / "wide.png")
    (tmp_path / "config.json").write_text("{")
    cases = [
        ("sdxl", folder, "addition_embed_type|cross_attention_dim"),
        ("sd3", folder, "is a ControlNetModel; .* takes a SD3ControlNetModel"),
        ("stable-diffusion", nets("sd3"), "is a SD3ControlNetModel; .* takes a ControlNetModel"),
        ("stable-diffusion", nets("sdxl"), "it was made for another model"),
        ("stable-diffusion", tmp_path / "nothing", "model must be a folder that exists"),
        ("stable-diffusion", tmp_path, "damaged, or was made for another model"),
        ("stable-diffusion", nn.Linear(1, 1), "is a Linear"),
        ("stable-diffusion", far, "a cell in 4 x 4 pixels, and this model's VAE in 2 x 2"),
    ]
    for family, model, message in cases:
        with pytest.raises(InputError, match=message):
            ours(samplers(family), ControlNet(model=model, image=pictures[0]))
    for image, message in ((tmp_path / "wide.png", "32 x 16"), (tmp_path / "no.png", "Pillow")):
        with pytest.raises(InputError, match=message):
            ours(samplers("stable-diffusion"), ControlNet(model=folder, image=image))
    with pytest.raises(InputError, match="a folder, a hub id or a network"):
        ControlNet(model=3, image=pictures[0])
    with pytest.raises(InputError, match="mode must be left out"):
        ours(samplers("stable-diffusion"), ControlNet(model=folder, image=pictures[0], mode=1))
    with pytest.raises(ModelError, match="this model's is a ZImageTransformer2DModel"):
        ours(samplers("z-image"), ControlNet(model=folder, image=pictures[0]))


def test_the_contract_of_plugins(folder, samplers, pictures):
    """All of it but other sizes, for which its picture has not the shape."""
    plugin = ControlNet(model=str(folder), image=pictures[0])
    kept = {o.check.name: o for o in examine(plugin, samplers("stable-diffusion"))}
    assert "must have the shape of the run's picture, 48 x 32" in kept.pop("sizes").message
    assert {o.status for o in kept.values()} <= {"ok", "not tried"}, kept
    tried = {name for name, o in kept.items() if o.status == "ok"}
    assert kept.keys() - tried == {"loss", "scale-0"}
