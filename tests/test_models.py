"""Loading by family, and what the protocol's own classes do."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pilotfish
from pilotfish import InputError, ModelError, Plugin, Sampler
from pilotfish.models.protocol import Conditioning, Defaults
from pilotfish.testing import GaussianModel, random_pipeline, random_sampler


@pytest.mark.parametrize("name", ["AuraFlowPipeline", "NobodysPipeline"])
def test_a_family_that_is_not_here_is_refused_by_name_before_anything_is_read(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match=f"is a {name}, .*Families: .*StableDiffusionPipeline"):
        pilotfish.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_an_index_that_is_none_is_a_models_error(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError):
        pilotfish.load(tmp_path)


def test_a_file_that_holds_no_model_is_told_however_it_is_named(tmp_path, monkeypatch):
    file = tmp_path / "models" / "sd.safetensors"
    file.parent.mkdir()
    save_file({"a": torch.zeros(1)}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "models/sd.safetensors",
        "./models/sd.safetensors",
        str(file),
        "~/models/sd.safetensors",
    ):
        with pytest.raises(ModelError, match=r"it is no whole checkpoint: none of its tensors \(a"):
            pilotfish.load(name)
    for name in ("./models/not-there", "~nosuchuser/model"):
        with pytest.raises(InputError, match="no model folder"):
            pilotfish.load(name)


def test_a_folders_own_defaults_are_the_runs(tmp_path):
    pipeline = random_pipeline()
    pipeline.save_pretrained(tmp_path)
    assert pilotfish.load(tmp_path).stream("a").run.steps == 50
    (tmp_path / "pilotfish.toml").write_text(
        "steps = 7\nguidance_scale = 2.0\nscheduler = 'euler'\n"
    )
    run = pilotfish.load(tmp_path).stream("a").run
    assert (run.steps, run.guidance_scale, run.scheduler) == (7, 2.0, "euler")
    (tmp_path / "pilotfish.toml").write_text("stepps = 7\n")
    with pytest.raises(ModelError, match=r"pilotfish.toml, a TOML file with steps, guidance_scale"):
        pilotfish.load(tmp_path)


def test_a_pipeline_changed_later_counts_from_the_next_run_on():
    pipeline = random_pipeline()
    sampler = Sampler.from_pipeline(pipeline)
    before = sampler("a cat", steps=2, seed=0).latents
    stream = sampler.stream("a cat", steps=2, seed=0, plugins=[lambda s: s.x0.mean((1, 2, 3))])
    unguided = sampler.stream("a cat", steps=2, seed=0)
    pipeline.unet = random_pipeline(seed=1).unet
    after = sampler("a cat", steps=2, seed=0).latents
    assert torch.equal(unguided.result().latents, before)
    assert not torch.equal(after, before)
    expected = Sampler.from_pipeline(random_pipeline())
    guided = expected("a cat", steps=2, seed=0, plugins=[lambda s: s.x0.mean((1, 2, 3))]).latents
    assert torch.equal(stream.result().latents, guided)
    pipeline.unet = random_pipeline(seed=1).to(dtype=torch.bfloat16).unet
    with pytest.raises(ModelError, match="one number format"):
        sampler("a cat", steps=1)
    pipeline.text_encoder = None
    with pytest.raises(ModelError, match="the pipeline has no text_encoder"):
        sampler("a cat", steps=1)


def test_conditionings_of_two_lengths_are_padded_and_masked():
    long, short = (
        Conditioning({"values": torch.ones(1, n, 2), "pooled": torch.ones(1, 3)}) for n in (4, 2)
    )
    both = short.expand(2).cat(long.expand(2))
    assert both["values"].shape == (4, 4, 2) and both["pooled"].shape == (4, 3)
    assert both["values"].sum(dim=(1, 2)).tolist() == [4, 4, 8, 8]
    assert both["mask"].sum(dim=1).tolist() == [2, 2, 4, 4]
    assert "mask" not in long.cat(long).tensors


def test_sites_are_the_attention_of_the_denoiser_in_order(sampler):
    sites = sampler.model.sites
    names = [name for name, _ in sampler.model.denoiser.named_modules()]
    assert [site.name for site in sites] == [n for n in names if n.endswith(("attn1", "attn2"))]
    assert [site.kind for site in sites[:4]] == ["self", "cross"] * 2
    assert all(site.module is sampler.model.denoiser.get_submodule(site.name) for site in sites)


@pytest.mark.parametrize(
    ("family", "text_first"),
    [("sd3", False), ("flux", True), ("qwen-image", True), ("flux2-klein", True)],
)
def test_joint_sites_tell_whose_tokens_come_first_in_attention(family, text_first, monkeypatch):
    """By the values that attention gets: those of the image are the ones of its projection."""
    (site, *_) = random_sampler(family=family).model.sites
    attention, values = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query, key, value, **options):
        values.append(value[0].transpose(0, 1).flatten(1))  # (tokens, heads * D)
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    width = site.module.to_v.in_features
    image, text = torch.randn(1, 6, width), torch.randn(1, 3, width)
    site.module(hidden_states=image, encoder_hidden_states=text)
    assert site.kind == "joint" and site.text_first == text_first
    given = values[0][3:] if text_first else values[0][:6]
    torch.testing.assert_close(given, site.module.to_v(image)[0])


def test_the_second_attention_of_stable_diffusion_3_5_medium_is_a_site():
    pipeline = random_pipeline(family="sd3")
    network = pipeline.transformer
    pipeline.transformer = network.from_config(network.config, dual_attention_layers=(0,))
    sites = Sampler.from_pipeline(pipeline).model.sites
    assert [(site.name, site.kind) for site in sites] == [
        ("transformer_blocks.0.attn", "joint"),
        ("transformer_blocks.1.attn", "joint"),
        ("transformer_blocks.0.attn2", "self"),
    ]
    assert sites[2].module is pipeline.transformer.transformer_blocks[0].attn2


def test_the_exact_model_says_what_it_does_not_take():
    with pytest.raises(ModelError, match="takes no down"):
        GaussianModel().predict(torch.zeros(1, 3, 4, 4), 0, Conditioning({}), down=1)
    assert isinstance(GaussianModel.defaults, Defaults)


def test_a_runs_pipeline_is_over_its_own_networks_and_the_users_stays_as_it_was():
    pipeline = random_pipeline(family="sd3")
    before, seen = dict(pipeline.components), []

    class Loads(Plugin):
        def setup(self, run):
            own = run.model.pipeline()
            seen.append((type(own), own.transformer is run.model.denoiser))
            seen.append([e.network is getattr(own, e.name) for e in run.model.text_encoders])
            assert own.components.keys() == before.keys() and own.transformer.config.num_layers == 2
            own.register_modules(image_encoder=torch.nn.Linear(1, 1))
            own.transformer = None

    Sampler.from_pipeline(pipeline)("a red cat", plugins=[Loads()], steps=1, seed=0)
    assert seen == [(type(pipeline), True), [True] * 3]
    assert all(pipeline.components[name] is part for name, part in before.items())
    assert pipeline.config.transformer[1] == "SD3Transformer2DModel"
    assert GaussianModel().pipeline() is None
