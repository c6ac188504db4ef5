"""Loading by family, and what the protocol's own classes do."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pilotfish
from pilotfish import InputError, ModelError, Plugin, Sampler
from pilotfish.models.protocol import Conditioning, Defaults
from pilotfish.testing import GaussianModel, random_pipeline


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
