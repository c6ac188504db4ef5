"""`offload="text"`: text encoders are where the network is while prompts are encoded, not longer.

On one device too they are copies that end with that: their lives are what is watched here.
"""

import gc
import weakref

import pytest
import torch
from click.testing import CliRunner

import pilotfish
from pilotfish import InputError, ModelError, Sampler
from pilotfish.cli import main
from pilotfish.models import copies, text
from pilotfish.testing import random_pipeline
from pilotfish.testing.random_models import families

RUN = {"steps": 2, "seed": 3, "height": 32, "width": 32}
GUIDE = {"use": "blue", "gradient": "latents"}


@pytest.fixture
def brought(monkeypatch):
    """Weak references to the copies of text encoders that were brought to a device."""
    seen = []

    def watched(network, device=None):
        copy = copies.own_copy(network, device)
        assert device is not None
        seen.append((type(network), device, weakref.ref(copy)))
        return copy

    monkeypatch.setattr(text, "own_copy", watched)
    return seen


def alive(brought):
    gc.collect()
    return [kind for kind, _, copy in brought if copy() is not None]


@pytest.mark.parametrize(
    ("family", "plugins"),
    [*((f, []) for f in sorted(families())), ("stable-diffusion", [GUIDE]), ("flux", [GUIDE])],
)
def test_the_picture_is_bit_identical_and_each_run_encodes_on_copies_of_its_own(
    family, plugins, brought
):
    pipeline = random_pipeline(family=family)
    run = {**RUN, "plugins": plugins, "negative_prompt": "a dog"}
    if family in ("flux", "qwen-image"):
        run["true_cfg_scale"] = 3.0
    expected = Sampler.from_pipeline(pipeline)("a red cat", **run).latents
    assert not brought
    sampler = Sampler.from_pipeline(pipeline, offload="text")
    encoders = len(sampler.model.text_encoders)
    for runs in (1, 2):
        stream = sampler.stream("a red cat", **run)
        for _ in stream:
            assert not alive(brought), "a text encoder stays while the network runs"
        assert torch.equal(stream.result().latents, expected)
        assert len(brought) == runs * encoders  # both prompts on one copy
    assert {device for _, device, _ in brought} == {sampler.model.device}


def test_the_pipelines_text_encoders_go_to_the_cpu_and_each_prompt_to_the_networks_device(brought):
    """A second device that every machine has is that of tensors without values."""
    pipeline, moved = random_pipeline(), []
    pipeline.text_encoder.to = lambda *where: moved.append(where)
    model = Sampler.from_pipeline(pipeline, offload="text").model
    assert moved == [("cpu",)]
    (encoder,) = model.differentiable("off").text_encoders
    ready = encoder.on(torch.device("meta"))
    assert {p.device.type for p in ready.network.parameters()} == {"meta"}
    assert {b.device.type for b in ready.network.buffers()} == {"meta"}
    found = ready.encode(ready.tokenize("a cat"), "positive", None)
    assert found.values.is_meta
    assert {p.device.type for p in pipeline.text_encoder.parameters()} == {"cpu"}


def test_tied_weights_and_words_of_plugins_come_along(brought):
    sampler = Sampler.from_pipeline(random_pipeline(family="flux"), offload="text")
    t5 = sampler.model.differentiable("off").text_encoders[1].on(torch.device("meta")).network
    assert t5.shared.weight is t5.encoder.embed_tokens.weight

    class Word(pilotfish.Plugin):
        def vocabulary(self, run):
            width = {e.name: e.width for e in run.model.text_encoders}
            return {"<birb>": {name: torch.ones(2, d) for name, d in width.items()}}

    run = {**RUN, "plugins": [Word()], "max_sequence_length": 20}
    found = sampler("a <birb>", **run).latents
    plain = Sampler.from_pipeline(random_pipeline(family="flux"))
    assert torch.equal(found, plain("a <birb>", **run).latents)


def test_a_prompt_that_is_asked_for_during_the_steps_comes_and_goes_too(brought):
    class Asks(pilotfish.Plugin):
        def combine_predictions(self, prediction, step):
            return prediction + 0.1 * step.predict(f"a dog, {step.index}")

    sampler = Sampler.from_pipeline(random_pipeline(), offload="text")
    for _ in sampler.stream("a cat", plugins=[Asks()], **RUN):
        assert not alive(brought)
    assert len(brought) == 1 + RUN["steps"]


def test_a_loaded_model_and_the_command_line_take_it(model, tmp_path, brought):
    run = {**RUN}
    expected = pilotfish.load(model)("a cat", **run).latents
    assert torch.equal(pilotfish.load(model, offload="text")("a cat", **run).latents, expected)
    assert len(brought) == 1
    command = ["generate", "a cat", "--model", model, "--steps", "2", "--size", "32x32"]
    command += ["--out", str(tmp_path / "a.png"), "--offload"]
    result = CliRunner().invoke(main, [*command, "text"])
    assert result.exit_code == 0, result.output
    assert len(brought) == 2
    for more in ([], ["--dry-run"]):
        refused = CliRunner().invoke(main, [*command, "everything", *more])
        assert refused.exit_code == 1
        assert "offload must be 'text'" in refused.output


def test_what_is_not_offloaded_here_is_refused(pipeline):
    with pytest.raises(InputError, match="offload must be 'text', or None for nothing; got 'all'"):
        Sampler.from_pipeline(pipeline, offload="all")
    hooked = random_pipeline()
    hooked.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ModelError, match="hooks of the pipeline offload its networks already"):
        Sampler.from_pipeline(hooked, offload="text")
