"""Guides that look through a cheaper decoder than the model's own."""

from collections import Counter

import pytest
import torch

import pilotfish
from pilotfish import Guide, InputError, ModelError, Plugin, Run, Sampler
from pilotfish.models.schedulers import diffusers
from pilotfish.testing import GaussianModel, random_pipeline

TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}


class Red(Guide):
    """Reads the decoded picture."""

    def loss_guidance(self, step):
        return (step.image[:, 0] - 0.9).square().mean(dim=(1, 2))


class Look(Plugin):
    """Keeps the latents before and after the guides' move, x0, and reads the picture."""

    def before_step(self, step):
        self.before = step.latents

    def advance(self, step):
        self.moved, self.x0, self.sigma = step.latents - self.before, step.x0, step.sigma
        self.alpha = step.alpha

    def after_step(self, step):
        self.image = step.image


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of an AutoencoderTiny of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.AutoencoderTiny(**TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def named(tiny):
    """`linear`, or `tiny` with the folder."""
    return lambda kind: f"tiny:{tiny}" if kind == "tiny" else kind


def test_the_vae_is_the_default_to_the_bit(latents_of):
    assert torch.equal(latents_of(Red(), decoder="vae"), latents_of(Red()))


def test_the_linear_decoder_is_rgb_enlarged_by_interpolation(sampler):
    x0 = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    rgb = sampler.model.rgb(x0)
    enlarged = torch.nn.functional.interpolate(rgb, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(sampler.model.decoder("linear")(x0), enlarged)


def test_the_tiny_decoder_is_that_of_diffusers_on_latents_as_its_config_scales_them(sampler, tiny):
    x0 = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    network = diffusers.AutoencoderTiny.from_pretrained(tiny)
    with torch.no_grad():
        expected = network.decode(x0 / 0.5 + 0.1).sample / 2 + 0.5
    torch.testing.assert_close(sampler.model.decoder(f"tiny:{tiny}")(x0), expected)


def test_a_tiny_decoder_is_loaded_once_and_frozen(pipeline, tiny, monkeypatch):
    model = Sampler.from_pipeline(pipeline).model
    first = model.decoder(f"tiny:{tiny}").args[0]
    monkeypatch.setattr(diffusers.AutoencoderTiny, "from_pretrained", None)
    assert model.decoder(f"tiny:{tiny}").args[0] is first
    assert not first.training and not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("kind", ["vae", "tiny", "linear"])
def test_the_move_is_the_gradient_through_the_chosen_decoder(sampler, named, kind):
    look, decoder = Look(), named(kind)
    run = {"steps": 4, "seed": 0, "preset": "deep-dive", "decoder": decoder}
    next(sampler.stream("a cat", plugins=[look, Red(scale=1000)], **run))
    x0 = look.x0.requires_grad_()
    image = sampler.model.decoder(decoder)(x0)
    torch.testing.assert_close(look.image, image.detach())
    (gradient,) = torch.autograd.grad((image[:, 0] - 0.9).square().mean(), x0)
    assert gradient.abs().max() > 0
    expected = -1000 * look.sigma**2 * gradient / look.alpha
    # The move was added to latents of size one, in float32.
    torch.testing.assert_close(look.moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "decodes"), [("vae", 4 + 1), ("tiny", 1), ("linear", 1)])
def test_a_cheaper_decoder_leaves_the_vae_one_decode_for_the_pictures(
    pipeline, named, monkeypatch, kind, decodes
):
    calls, original = Counter(), pipeline.vae.decode

    def counted(*args, **kwargs):
        calls["decode"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", counted)
    sampler = Sampler.from_pipeline(pipeline)
    options = {"steps": 4, "seed": 0, "decoder": named(kind), "preset": "deep-dive"}
    sampler("a cat", plugins=[Red(), Look()] if kind != "vae" else [Red()], **options)
    assert calls["decode"] == decodes


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "linear"])
def test_the_trace_ends_with_each_guides_loss_on_the_finished_picture(sampler, named, kind, stops):
    class Stop(Plugin):
        def after_step(self, step):
            if stops and step.index == 1:
                step.stop()

    guides = [Red(), Red(every=2), Red(scale=0), Stop()]
    run = {"steps": 3, "seed": 0, "num_images": 2, "decoder": named(kind)}
    result = sampler("a cat", plugins=guides, **run)
    with torch.no_grad():
        image = sampler.model.decode(result.latents)
    loss = (image[:, 0] - 0.9).square().mean(dim=(1, 2))
    final = [record for record in result.trace if record.final]
    assert final == result.trace[-2:] and [r.plugin for r in final] == ["Red", "Red#2"]
    for record in final:
        assert record.loss == pytest.approx(loss.tolist(), rel=1e-5)
        assert (record.sigma, record.share) == (0, ())
    assert result.trace.final_loss("Red") == pytest.approx(float(loss.mean()), rel=1e-5)
    assert len(result.trace.losses("Red")) == (2 if stops else 3)


def test_a_guide_that_fails_on_the_finished_picture_costs_no_picture(sampler):
    class Noisy(Guide):
        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3)) / float(step.eps.std())

    result = sampler("a cat", plugins=[Noisy()], steps=3, seed=0, decoder="linear")
    assert len(result.images) == 1 and len(result.trace.losses("Noisy")) == 3
    assert result.trace[-1].final and "not finite" in result.trace[-1].error
    assert result.trace.final_loss("Noisy") is None


def test_with_the_vae_the_trace_has_nothing_more(sampler):
    trace = sampler("a cat", plugins=[Red()], steps=3, seed=0).trace
    assert len(trace) == 3 and trace.final_loss("Red") is None


def test_a_run_file_keeps_the_decoder(sampler, tiny):
    result = sampler("a cat", steps=2, seed=0, decoder=f"tiny:{tiny}")
    again = Run.parse(result.run.to_toml())
    assert again["decoder"] == f"tiny:{tiny}"
    del again["dtype"]
    assert sampler(**again).run == result.run


def test_plain_tiny_is_the_one_in_the_models_own_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    diffusers.AutoencoderTiny(**TINY).save_pretrained(tmp_path / "tiny_vae")
    sampler = pilotfish.load(tmp_path)
    run = {"steps": 2, "seed": 0, "plugins": [Red()]}
    own = sampler("a cat", decoder="tiny", **run).latents
    assert torch.equal(own, sampler("a cat", decoder=f"tiny:{tmp_path}/tiny_vae", **run).latents)


@pytest.mark.parametrize("decoder", ["tny", "tiny:", "linear:3", "", 3, None])
def test_an_unknown_decoder_names_the_choices(sampler, decoder):
    with pytest.raises(InputError, match=r"decoder must be vae, linear, tiny .*got "):
        sampler("a cat", steps=1, decoder=decoder)


def test_a_model_without_a_tiny_decoder_says_how_to_name_one(sampler):
    with pytest.raises(InputError, match=r"Name an AutoencoderTiny .*tiny:FOLDER_OR_HUB_ID"):
        sampler("a cat", steps=1, decoder="tiny")


def test_a_folder_that_is_not_there_or_holds_no_tiny_decoder_is_refused(sampler, tmp_path):
    for place in (f"{tmp_path}/none", "./none"):
        with pytest.raises(InputError, match="no such folder"):
            sampler("a cat", steps=1, decoder=f"tiny:{place}")
    with pytest.raises(ModelError, match="cannot load an AutoencoderTiny"):
        sampler("a cat", steps=1, decoder=f"tiny:{tmp_path}")
    random_pipeline().vae.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it holds AutoencoderKL"):
        sampler("a cat", steps=1, decoder=f"tiny:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 16}, "latents of 16 channels"),
        ({"upsampling_scaling_factor": 4}, "enlarges 4 times; this model's .* enlarged 2 times"),
    ],
)
def test_a_tiny_decoder_of_another_family_is_refused(sampler, tmp_path, change, message):
    diffusers.AutoencoderTiny(**TINY, **change).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        sampler("a cat", steps=1, decoder=f"tiny:{tmp_path}")


def test_the_exact_model_takes_its_one_decoder_for_linear_and_has_no_tiny_one():
    run = {"steps": 3, "seed": 0, "scheduler": "ddim", "plugins": [Red()]}
    vae, linear = (Sampler(GaussianModel())(decoder=d, **run) for d in ("vae", "linear"))
    assert torch.equal(vae.latents, linear.latents)
    with pytest.raises(ModelError, match="no tiny decoder"):
        Sampler(GaussianModel())(decoder="tiny", **run)
