"""Learning a word: the right gradient, for the vectors alone; stopped, resumed, repeated."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pilotfish_textual_inversion import Concept, Plan, read, train
from pilotfish_textual_inversion.command import concept
from pilotfish_textual_inversion.lesson import Batch, read_lesson
from pilotfish_textual_inversion.trainer import Training
from safetensors.torch import load_file

from pilotfish import InputError, ModelError, NonFiniteError, Sampler
from pilotfish.testing import random_pipeline, random_sampler

pytestmark = pytest.mark.slow  # each is short, together they are not

PLAN = Plan(token="<ink>", init="cat", steps=6, batch=2, every=3)


@pytest.fixture(autouse=True)
def quick_samples(monkeypatch):
    """Sample sheets in two steps a picture."""
    monkeypatch.setattr("pilotfish_textual_inversion.sheet.STEPS", 2)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of one colour each, of other sizes than the model's."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color, size in (
        ("a", "red", (40, 64)),
        ("b", "blue", (64, 40)),
        ("c", "#080", (9, 9)),
    ):
        Image.new("RGB", size, color).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


def changed(plan=PLAN, **values):
    return Plan(**{**vars(plan), **values})


def learned(sampler, pictures, out, plan=PLAN):
    """The vectors after a whole training in a folder of its own."""
    return train(sampler, pictures, out / "ink.safetensors", plan)


def fixed_batch(lesson, count=8):
    generator = torch.Generator().manual_seed(4)
    x0 = lesson.latents[:1].expand(count, -1, -1, -1)
    noise = torch.randn(x0.shape, generator=generator)
    return Batch(x0, noise, torch.linspace(50, 950, count).long(), ("a {token}",) * count)


# ---- the gradient ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_loss_and_gradient_equal_those_of_diffusers_with_a_resized_encoder(
    pictures, prediction_type, vectors
):
    import diffusers

    pipeline = random_pipeline(prediction_type)
    training = Training(Sampler.from_pipeline(pipeline).model, pictures, changed(vectors=vectors))
    captions = ("a {token}", "{token} and a red {token}", "a {token}")
    batch = dataclasses.replace(fixed_batch(training.lesson, 3), captions=captions)
    ours = training.error(batch).mean()
    (start,) = training.vectors.values()
    (gradient,) = torch.autograd.grad(ours, start)

    # The usual way: the word in the tokenizer, its rows in the encoder's own table.
    theirs = copy.deepcopy(pipeline)
    theirs.load_textual_inversion({"<ink>": start.detach()}, token="<ink>")
    table = theirs.text_encoder.get_input_embeddings().weight
    prompts = theirs.maybe_convert_prompt(
        ["a <ink>", "<ink> and a red <ink>", "a <ink>"], theirs.tokenizer
    )
    ids = theirs.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    scheduler = diffusers.DDPMScheduler.from_config(theirs.scheduler.config)
    latents = scheduler.add_noise(batch.x0, batch.noise, batch.timesteps)
    output = theirs.unet(latents, batch.timesteps, theirs.text_encoder(ids)[0])
    velocity = scheduler.get_velocity(batch.x0, batch.noise, batch.timesteps)
    target = velocity if prediction_type == "v_prediction" else batch.noise
    loss = torch.nn.functional.mse_loss(output.sample, target)
    (whole,) = torch.autograd.grad(loss, table)

    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(gradient, whole[-vectors:], rtol=1e-4, atol=1e-7)
    assert gradient.abs().sum(1).min() > 0


def test_captions_are_encoded_as_in_a_run_with_the_plugin(sampler, pictures, tmp_path):
    plan = changed(vectors=2)
    learned(sampler, pictures, tmp_path, plan)
    training = Training(sampler.model, pictures, plan)
    file = tmp_path / "ink.safetensors"
    ((_, parts),) = read(file).items()
    ours = training.condition("a red <ink> cat", parts)["values"]
    (step,) = sampler.stream("a red <ink> cat", plugins=[Concept(file=file)], steps=1, seed=0)
    assert torch.equal(ours, step.embeddings)


def test_only_the_vectors_change_and_no_network_keeps_a_trace(pictures, tmp_path):
    pipeline = random_pipeline()
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)

    def state():
        return [
            (name, p.requires_grad, p.grad is None, network.training)
            for network in networks
            for name, p in network.named_parameters()
        ]

    weights = [copy.deepcopy(network.state_dict()) for network in networks]
    before, words = state(), len(pipeline.tokenizer)
    table = pipeline.text_encoder.get_input_embeddings()
    learned(Sampler.from_pipeline(pipeline), pictures, tmp_path)
    assert state() == before
    for network, weight in zip(networks, weights, strict=True):
        torch.testing.assert_close(dict(network.state_dict()), dict(weight), rtol=0, atol=0)
    assert len(pipeline.tokenizer) == words and not table._forward_hooks


def test_a_run_on_the_same_sampler_goes_on_beside_a_training(sampler, pictures):
    def stream():
        return sampler.stream("a red cat", steps=PLAN.steps, seed=1)

    alone = Training(sampler.model, pictures, PLAN)
    for _ in alone.steps():
        pass
    beside, run = Training(sampler.model, pictures, PLAN), stream()
    for _ in zip(beside.steps(), run, strict=True):
        pass
    assert torch.equal(beside.word, alone.word)
    assert torch.equal(run.result().latents, stream().result().latents)


def test_learning_lowers_the_loss_on_noise_that_it_did_not_see(sampler, pictures):
    training = Training(sampler.model, pictures, changed(steps=60, batch=4, captions=("{token}",)))
    batch = fixed_batch(training.lesson)
    before = training.error(batch).mean().item()
    for _ in training.steps():
        pass
    assert training.error(batch).mean().item() < before


def test_it_starts_from_the_first_word(sampler, pictures):
    table = sampler.model.text_encoder.get_input_embeddings().weight
    tokenizer = sampler.model.tokenizer

    def row(word):
        return table[tokenizer.convert_tokens_to_ids(f"{word}</w>")]

    def first(**values):
        return Training(sampler.model, pictures, changed(**values)).word

    assert torch.equal(first(), row("cat")[None])
    three = torch.stack([row("red"), row("cat"), row("red")])
    assert torch.equal(first(vectors=3, init="red cat"), three)
    torch.testing.assert_close(first(init="red cat"), (row("red") + row("cat"))[None] / 2)


# ---- stopped, resumed, repeated ----


def test_a_resumed_training_gives_the_same_vectors_to_the_bit(sampler, pictures, tmp_path):
    whole = learned(sampler, pictures, tmp_path / "whole")
    first = Training(sampler.model, pictures, PLAN)
    for _ in zip(range(3), first.steps(), strict=False):
        pass
    (tmp_path / "part").mkdir()
    first.save(tmp_path / "part" / "ink.training")
    again = learned(sampler, pictures, tmp_path / "part")
    assert torch.equal(again, whole)
    assert {p.name for p in (tmp_path / "part").iterdir()} == {"ink.safetensors", "ink.png"}


def test_a_stopped_training_leaves_a_word_that_works_and_goes_on(
    sampler, pictures, tmp_path, monkeypatch
):
    step = Training._step

    def stopped(self):
        if self.index == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", stopped)
        learned(sampler, pictures, tmp_path / "part")
    halfway = load_file(tmp_path / "part" / "ink.safetensors")["<ink>"]
    assert (tmp_path / "part" / "ink.png").exists()
    whole = learned(sampler, pictures, tmp_path / "whole")
    assert not torch.equal(halfway, whole)
    assert torch.equal(learned(sampler, pictures, tmp_path / "part"), whole)


def test_a_failed_write_leaves_the_last_checkpoint(sampler, pictures, tmp_path, monkeypatch):
    training = Training(sampler.model, pictures, PLAN)
    path = tmp_path / "ink.training"
    training.save(path)
    before = path.read_bytes()

    def half(state, part):
        Path(part).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot write"):
        patch.setattr(torch, "save", half)
        training.save(path)
    assert path.read_bytes() == before
    training.resume(path)


def test_the_seed_decides_everything(sampler, pictures, tmp_path):
    state = torch.random.get_rng_state()
    one, same = (learned(sampler, pictures, tmp_path / name) for name in ("one", "same"))
    other = learned(sampler, pictures, tmp_path / "other", changed(seed=1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(sampler, pictures, tmp_path):
    path = tmp_path / "ink.training"
    Training(sampler.model, pictures, PLAN).save(path)
    other = changed(steps=7, init="watercolor", every=1, prompts=("{token}",))
    with pytest.raises(InputError, match=r"ink\.training belongs to .* with other init, steps\."):
        learned(sampler, pictures, tmp_path, other)
    with pytest.raises(InputError, match="with other captions, pictures"):
        learned(sampler, pictures[:2], tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"ink\.training is no checkpoint; remove it"):
        learned(sampler, pictures, tmp_path)


def test_a_learned_word_is_never_overwritten(sampler, pictures, tmp_path):
    learned(sampler, pictures, tmp_path)
    before = (tmp_path / "ink.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"ink\.safetensors exists already; choose another name"):
        learned(sampler, pictures, tmp_path)
    assert (tmp_path / "ink.safetensors").read_bytes() == before


def test_diffusers_loads_the_file(sampler, pipeline, pictures, tmp_path):
    vectors = learned(sampler, pictures, tmp_path, changed(vectors=2))
    theirs = copy.deepcopy(pipeline)
    theirs.load_textual_inversion(str(tmp_path / "ink.safetensors"))
    ids = theirs.tokenizer.convert_tokens_to_ids(["<ink>", "<ink>_1"])
    assert torch.equal(theirs.text_encoder.get_input_embeddings().weight[ids], vectors)


def test_the_sheet_shows_pictures_samples_before_and_samples_after(sampler, pictures, tmp_path):
    plan = changed(steps=2, prompts=("a {token}", "{token}", "red {token}", "a cat, {token}"))
    learned(sampler, pictures, tmp_path, plan)
    with Image.open(tmp_path / "ink.png") as sheet:
        assert sheet.size == (4 * 32, 3 * (32 + 24))
        assert sheet.getpixel((16, 24 + 16)) == (255, 0, 0)  # the first picture
        first = sampler("a <ink>", plugins=[Concept(file=tmp_path / "ink.safetensors")], steps=2,
                        seed=0).images[0]  # fmt: skip
        assert sheet.crop((0, 2 * 56 + 24, 32, 3 * 56)).tobytes() == first.tobytes()


# ---- draws, pictures, captions ----


def test_a_step_draws_the_same_whatever_was_drawn_before(sampler, pictures):
    lesson = read_lesson(sampler.model, pictures, changed(captions=("a {token}", "{token}")))
    plan = changed(batch=64)
    one, again, other = (lesson.draw(plan, index, 1000) for index in (5, 5, 6))
    assert one.captions == again.captions and torch.equal(one.noise, again.noise)
    assert not torch.equal(one.noise, other.noise)
    assert set(one.captions) == {"a {token}", "{token}"}
    assert len({float(x.sum()) for x in one.x0}) == 3  # every picture
    first = torch.arange(64) * 1000 / 64  # of each one's part of the range
    assert ((one.timesteps > first - 1) & (one.timesteps < first + 1000 / 64)).all()


def test_a_text_beside_a_picture_is_its_captions(sampler, pictures):
    pictures[1].with_suffix(".txt").write_text("a {token} of a cat\n\n a blue {token}\n")
    lesson = read_lesson(sampler.model, pictures, PLAN)
    assert lesson.captions == (
        ("a {token}",),
        ("a {token} of a cat", "a blue {token}"),
        ("a {token}",),
    )
    pictures[1].with_suffix(".txt").write_text("a cat")
    with pytest.raises(InputError, match=r"b\.txt: caption 'a cat' has no \{token\}"):
        read_lesson(sampler.model, pictures, PLAN)
    pictures[1].with_suffix(".txt").write_text("\n")
    with pytest.raises(InputError, match=r"b\.txt is empty; expected captions for b\.png"):
        read_lesson(sampler.model, pictures, PLAN)


def test_latents_are_the_models_own_of_the_picture(sampler, pictures):
    lesson = read_lesson(sampler.model, pictures, PLAN)
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1
    with torch.no_grad():
        torch.testing.assert_close(lesson.latents[:1], sampler.model.encode(red))


# ---- what cannot work ----


@pytest.mark.filterwarnings("ignore:the prompt is")  # of what is too long, beside the refusal
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token": "a b"}, "token must be a word without spaces; got 'a b'"),
        ({"token": "cat</w>"}, "'cat</w>' cannot be added: text_encoder knows it already"),
        ({"init": " "}, "init must be a word that the model knows; got ' '"),
        ({"captions": ("a cat",)}, r"caption 'a cat' has no \{token\}: write it where the word"),
        ({"captions": ()}, "captions must be one or more texts; got none"),
        ({"prompts": ("a cat",)}, r"'a cat' has no \{token\}"),
        ({"captions": ("a " * 75 + "{token}",)}, r"<ink>' is too long: '<ink>' with its 1 vectors"),
        ({"vectors": 76}, "does not fit into the 75 tokens"),
        ({"vectors": 0}, "vectors must be a whole number >= 1; got 0"),
        ({"steps": 1.5}, r"steps must be a whole number >= 1; got 1\.5"),
        ({"learning_rate": 0}, "learning_rate must be a number > 0; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number > 0; got nan"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_it_begins(
    sampler, pictures, tmp_path, values, message
):
    with pytest.raises(InputError, match=message):
        learned(sampler, pictures, tmp_path / "new", changed(**values))
    assert not (tmp_path / "new").exists()


def test_a_caption_that_is_cut_behind_the_word_is_told_once(sampler, pictures):
    plan = changed(steps=2, captions=("a {token} of " + "a " * 75 + "cat",))
    with pytest.warns(UserWarning, match="text_encoder takes 75. Dropped: '.*cat") as told:
        training = Training(sampler.model, pictures, plan)
        for _ in training.steps():
            pass
    assert len(told) == 1


def test_pictures_that_cannot_be_read_are_named(sampler, pictures, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="pictures must be one or more files; got none"):
        learned(sampler, [], tmp_path)
    with pytest.raises(InputError, match=r"to learn from must be .*none\.png.*FileNotFoundError"):
        learned(sampler, [tmp_path / "none.png"], tmp_path)
    with pytest.raises(InputError, match=r"out\.pt: end its name in \.safetensors"):
        train(sampler, pictures, tmp_path / "out.pt", PLAN)
    monkeypatch.setattr("pilotfish.runs.pictures.PIXELS", 64 * 40 - 1)
    with pytest.raises(InputError, match=r"a\.png.*\(40, 64\) pixels; at most 2559"):
        learned(sampler, pictures, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_checkpoint(
    pictures, tmp_path, monkeypatch
):
    sampler = random_sampler()
    predict = type(sampler.model).predict
    calls = []

    def failing(*arguments):
        calls.append(1)
        return predict(*arguments) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(type(sampler.model), "predict", failing)
    with pytest.raises(NonFiniteError, match="not finite at step 1 of 6; lower learning_rate"):
        learned(sampler, pictures, tmp_path)
    assert (tmp_path / "ink.training").exists()


def test_an_offloaded_model_is_refused(pictures, tmp_path, monkeypatch):
    sampler = random_sampler()
    monkeypatch.setattr(sampler.model, "refuse_gradients", lambda: "it is elsewhere")
    with pytest.raises(ModelError, match="no gradient can be taken: it is elsewhere"):
        learned(sampler, pictures, tmp_path)


def test_half_precision_trains(pictures, tmp_path):
    vectors = learned(random_sampler(dtype=torch.bfloat16), pictures, tmp_path)
    assert vectors.dtype == torch.float32 and vectors.isfinite().all()


# ---- the command ----


def test_the_command_trains_a_word(pictures, tmp_path):
    random_pipeline().save_pretrained(tmp_path / "model")
    out = tmp_path / "ink.safetensors"
    options = {"token": "<ink>", "init": "cat", "out": out, "model": tmp_path / "model"}
    options |= {"vectors": 2, "steps": 2, "caption": "a red {token}", "device": "cpu"}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = CliRunner().invoke(concept, ["train", *map(str, pictures), *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"{out}  <ink>: 2 x 16",
        f"{out.with_suffix('.png')}  samples",
    ]
    assert "2/2" in done.stderr  # the progress bar
    expected = learned(
        random_sampler(), pictures, tmp_path / "python",
        Plan(token="<ink>", init="cat", vectors=2, steps=2, captions=("a red {token}",)),
    )  # fmt: skip
    assert torch.equal(load_file(out)["<ink>"], expected)


def test_the_command_is_installed_and_its_help_loads_no_torch():
    (entry,) = [e for e in entry_points(group="pilotfish.commands") if e.name == "concept"]
    code = (
        f"import sys; from {entry.module} import {entry.attr} as command\n"
        "command(['train', '--help'], standalone_mode=False)\n"
        "loaded = {'torch', 'diffusers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout
