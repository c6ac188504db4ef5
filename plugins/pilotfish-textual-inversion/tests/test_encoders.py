"""Learned words in models of every family: one text encoder, two, or three.

The references are the families' own pipelines, with the word's rows in their encoders' tables: put
there by diffusers' loader where the family has one, else by hand.
"""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image
from pilotfish_textual_inversion import Concept, Plan, read, train
from pilotfish_textual_inversion.lesson import Batch
from pilotfish_textual_inversion.trainer import Training
from safetensors.torch import load_file, save_file

import pilotfish
from pilotfish import InputError, Plugin, Sampler
from pilotfish.testing import random_pipeline

SIZE = {"height": 32, "width": 32}
# What a run and the pipeline's call are told, and whether a space before the word belongs to it.
FAMILIES = {
    "sdxl": {},
    "sd3": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 20, "true_cfg_scale": 2.0},
    "z-image": {"max_sequence_length": 60},
    "qwen-image": {"max_sequence_length": 300, "true_cfg_scale": 2.0},
    "flux2-klein": {"max_sequence_length": 120},
}
QWEN = ("z-image", "qwen-image", "flux2-klein")
KEYS = {"sdxl": ("clip_l", "clip_g"), "sd3": ("clip_l", "clip_g", "t5"), "flux": ("clip_l", "t5")}
every_family = pytest.mark.parametrize("family", FAMILIES)


def own_pipeline(family):
    """One whose tokenizers are not one object, as those of the small pipelines are."""
    pipeline = random_pipeline(family=family)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
    return pipeline


def parts(pipeline):
    """Text encoders with their tokenizers."""
    names = [n for n in pipeline.components if n.startswith("text_encoder")]
    found = [
        (getattr(pipeline, n), getattr(pipeline, n.replace("text_encoder", "tokenizer")))
        for n in names
    ]
    return sorted(((n, *pair) for n, pair in zip(names, found, strict=True)), key=lambda p: p[0])


def vectors(pipeline, count):
    """Random vectors as large as the encoders' own, one tensor for each encoder."""
    generator = torch.Generator().manual_seed(9)
    tables = [encoder.get_input_embeddings().weight for _, encoder, _ in parts(pipeline)]
    return [
        torch.randn(count, table.shape[1], generator=generator) * table.detach().std()
        for table in tables
    ]


def written(path, family, values, token="<ink>"):
    keys = KEYS.get(family, (token,))
    save_file({key: value.clone() for key, value in zip(keys, values, strict=False)}, path)
    return path


def by_hand(pipeline, values):
    """The word's rows at the end of each encoder's table."""
    for (_, encoder, tokenizer), rows in zip(parts(pipeline), values, strict=True):
        tokenizer.add_tokens(["<ink>", *(f"<ink>_{i}" for i in range(1, len(rows)))])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[-len(rows) :] = rows
    return pipeline


def spelled(family, prompt, count):
    """The prompt as the pipeline's tokenizers take it."""
    if family in ("sdxl", "flux"):
        return prompt  # diffusers writes out words of several vectors there
    gap = "" if family in QWEN else " "
    pieces = gap.join(["<ink>", *(f"<ink>_{i}" for i in range(1, count))])
    return prompt.replace(" <ink>" if family in QWEN else "<ink>", pieces)


def theirs(pipeline, prompt, negative, options, **more):
    options = {"num_inference_steps": 2, "output_type": "latent", **SIZE, **options, **more}
    generator = torch.Generator().manual_seed(3)
    found = pipeline(prompt, negative_prompt=negative, generator=generator, **options).images
    if found.ndim == 3:
        found = pipeline._unpack_latents(found, 32, 32, pipeline.vae_scale_factor)
    return found[:, :, 0] if found.ndim == 5 else found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "flux2-klein"])
def test_latents_equal_those_of_a_pipeline_with_the_words_in_its_own_tables(
    family, count, tmp_path
):
    pipeline, options = own_pipeline(family), FAMILIES[family]
    values = vectors(pipeline, count)
    file = written(tmp_path / "ink.safetensors", family, values)
    sampler = Sampler.from_pipeline(pipeline)
    run = {"steps": 2, "seed": 3, **SIZE, **options}
    concept = Concept(file=file, token="<ink>")
    ours = sampler("a <ink> on a cat", negative_prompt="a <ink>", plugins=[concept], **run).latents
    prompts = [spelled(family, text, count) for text in ("a <ink> on a cat", "a <ink>")]
    assert torch.equal(ours, theirs(by_hand(own_pipeline(family), values), *prompts, options))
    plain = sampler("a cat on a cat", negative_prompt="a cat", **run).latents
    assert not torch.equal(ours, plain)


def test_flux_2_is_told_what_its_pipeline_makes_of_the_words_in_its_own_table(tmp_path):
    pipeline = own_pipeline("flux2-klein")
    values = vectors(pipeline, 2)
    concept = Concept(file=written(tmp_path / "ink.safetensors", "flux2-klein", values))
    sampler = Sampler.from_pipeline(pipeline)
    (step,) = sampler.stream(
        "a <ink> cat", plugins=[concept], steps=1, seed=0, guidance_scale=1.0,
        max_sequence_length=120,
    )  # fmt: skip
    with torch.no_grad():
        expected = by_hand(own_pipeline("flux2-klein"), values).encode_prompt(
            "a<ink><ink>_1 cat", max_sequence_length=120
        )[0]
    assert torch.equal(step.embeddings, expected)


def loaded(family, values):
    """A pipeline into which diffusers' own loader put the words."""
    pipeline = own_pipeline(family)
    for (_, encoder, tokenizer), rows in zip(parts(pipeline), values, strict=False):
        pipeline.load_textual_inversion(
            {"<ink>": rows}, token="<ink>", text_encoder=encoder, tokenizer=tokenizer
        )
    return pipeline


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("family", "encoders"), [("sdxl", 2), ("flux", 2), ("flux", 1)])
def test_latents_equal_those_of_diffusers_own_loader(family, encoders, count, tmp_path):
    """Also where the file has nothing for the T5, which then reads the word as text."""
    pipeline, options = own_pipeline(family), FAMILIES[family]
    values = vectors(pipeline, count)[:encoders]
    concept = Concept(file=written(tmp_path / "ink.safetensors", family, values), token="<ink>")
    run = {"steps": 2, "seed": 3, **SIZE, **options}
    ours = Sampler.from_pipeline(pipeline)(
        "a <ink> cat", negative_prompt="an <ink>", plugins=[concept], **run
    )
    expected = theirs(loaded(family, values), "a <ink> cat", "an <ink>", options)
    assert torch.equal(ours.latents, expected)


def test_a_word_counts_in_the_prompt_of_one_encoder_alone(tmp_path, recwarn):
    pipeline = own_pipeline("sdxl")
    values = vectors(pipeline, 2)
    concept = Concept(file=written(tmp_path / "ink.safetensors", "sdxl", values), token="<ink>")
    texts = {"text_encoder": "a cat", "text_encoder_2": "a <ink>"}
    ours = Sampler.from_pipeline(pipeline)(texts, plugins=[concept], steps=2, seed=3, **SIZE)
    expected = theirs(loaded("sdxl", values), "a cat", None, {}, prompt_2="a <ink>")
    assert torch.equal(ours.latents, expected)
    assert not [w for w in recwarn if "teaches the word" in str(w.message)]


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        ("sdxl", {"clip_l": 16}, "vectors for text_encoder; this model has text_encoder and "
         "text_encoder_2.*Missing: text_encoder_2, which takes width 24"),
        ("sdxl", {"clip_g": 24}, "Missing: text_encoder, which takes width 16"),
        ("sd3", {"clip_l": 16}, "Missing: text_encoder_2, which takes width 24"),
        ("flux", {"t5": 32}, "Missing: text_encoder, which takes width 16"),
        ("sdxl", {"clip_l": 16, "clip_g": 20},
         "of width 20, but this model's text_encoder_2 takes 24. It was made for another model"),
        ("sdxl", {"clip_l": 24, "clip_g": 16},
         "of width 24, but this model's text_encoder takes 16.*its encoders are swapped"),
        ("sd3", {"clip_l": 16, "clip_g": 24, "t5": 16},
         "of width 16, but this model's text_encoder_3 takes 48"),
        ("stable-diffusion", {"clip_l": 16, "clip_g": 24},
         r"for text_encoder and text_encoder_2; this model has text_encoder\. It"),
        ("stable-diffusion", {"clip_g": 24}, "for text_encoder_2; this model has text_encoder"),
        ("flux2-klein", {"<ink>": 20}, "of width 20, but this model's text_encoder takes 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_the_encoder_and_both_widths(
    family, content, message, tmp_path
):
    file = tmp_path / "ink.safetensors"
    save_file({key: torch.ones(2, width) for key, width in content.items()}, file)
    sampler = Sampler.from_pipeline(random_pipeline(family=family))
    with pytest.raises(InputError, match=message):
        sampler("an <ink>", plugins=[Concept(file=file, token="<ink>")], steps=1)


# ---- learning ----

PLAN = Plan(token="<ink>", init="a cat", vectors=2, steps=25, batch=2, every=25)


@pytest.fixture
def pictures(tmp_path):
    found = []
    for name in ("red", "blue"):
        found.append(tmp_path / f"{name}.png")
        Image.new("RGB", (32, 32), name).save(found[-1])
    return found


@pytest.fixture(autouse=True)
def quick_samples(monkeypatch):
    monkeypatch.setattr("pilotfish_textual_inversion.sheet.STEPS", 1)


def small(pipeline, folder):
    """The pipeline as one whose folder says that its pictures are small, and prompts short."""
    length = "max_sequence_length = 120\n" if hasattr(pipeline, "transformer") else ""
    (folder / "pilotfish.toml").write_text(f"height = 32\nwidth = 32\nsteps = 2\n{length}")
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def fixed_batch(lesson, count=4):
    generator = torch.Generator().manual_seed(4)
    x0 = lesson.latents[[0, 1] * (count // 2)]
    noise = torch.randn(x0.shape, generator=generator)
    return Batch(x0, noise, torch.linspace(50, 950, count).long(), ("a {token}",) * count)


@pytest.mark.slow
@every_family
def test_learning_lowers_the_loss_on_its_own_pictures_and_changes_nothing_else(
    family, pictures, tmp_path
):
    pipeline = small(random_pipeline(family=family), tmp_path)
    networks = {n: p for n, p in pipeline.components.items() if isinstance(p, torch.nn.Module)}
    before = {n: copy.deepcopy(network.state_dict()) for n, network in networks.items()}
    sampler = Sampler.from_pipeline(pipeline)
    training = Training(sampler.model, pictures, PLAN)
    batch = fixed_batch(training.lesson)
    first, loss = training.word, training.error(batch).mean().item()
    for _ in training.steps():
        pass
    assert training.error(batch).mean().item() < loss
    changed = training.word
    for name in changed if isinstance(changed, dict) else ():
        assert not torch.equal(changed[name], first[name])
    for name, network in networks.items():
        torch.testing.assert_close(dict(network.state_dict()), dict(before[name]), rtol=0, atol=0)


@pytest.mark.slow
@every_family
def test_the_file_teaches_a_run_what_was_learned(family, pictures, tmp_path):
    sampler = Sampler.from_pipeline(small(random_pipeline(family=family), tmp_path))
    plan = Plan(**{**vars(PLAN), "steps": 1, "every": 1})
    word = train(sampler, pictures, tmp_path / "ink.safetensors", plan)
    parts_ = word if isinstance(word, dict) else {"text_encoder": word}
    found = read(tmp_path / "ink.safetensors")["<ink>"]
    torch.testing.assert_close(found, parts_, rtol=0, atol=0)
    training = Training(sampler.model, pictures, plan)
    told_in_run = []

    class Watch(Plugin):
        def around_network(self, step):
            told_in_run.append(step.conditioning)

    off = {"z-image": 0.0, "sdxl": 1.0, "sd3": 1.0, "flux2-klein": 1.0}
    guidance = {"guidance_scale": off[family]} if family in off else {}
    concept = Concept(file=tmp_path / "ink.safetensors")
    sampler("a <ink>", plugins=[concept, Watch()], steps=1, seed=0, **guidance)
    with torch.no_grad():
        told = training.condition("a <ink>", found)
    for name, tensor in told.tensors.items():
        torch.testing.assert_close(told_in_run[0][name], tensor, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_diffusers_loads_the_file_of_several_encoders(family, pictures, tmp_path):
    pipeline = small(own_pipeline(family), tmp_path)
    plan = Plan(**{**vars(PLAN), "steps": 1, "every": 1})
    train(Sampler.from_pipeline(pipeline), pictures, tmp_path / "ink.safetensors", plan)
    content = load_file(tmp_path / "ink.safetensors")
    assert content.keys() == set(KEYS[family])
    filled = loaded(family, [content[key] for key in KEYS[family]])
    for (_, encoder, _), key in zip(parts(filled), KEYS[family], strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight[-2:], content[key])


def reference_error(family, pipeline, batch):
    """Squared error of pipeline's network for its own prompt's embeddings, written out here."""
    texts = [spelled(family, "a <ink>", 2)] * len(batch.x0)
    options = {"device": "cpu", "num_images_per_prompt": 1}
    if family == "sdxl":
        values, _, pooled, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, **options
        )
        import diffusers

        scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        latents = scheduler.add_noise(batch.x0, batch.noise, batch.timesteps)
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(len(texts), -1)
        told = {"text_embeds": pooled, "time_ids": ids}
        output = pipeline.unet(latents, batch.timesteps, values, added_cond_kwargs=told).sample
        return (output - batch.noise).square()
    # Logit-normal places in the schedule of the scheduler that the model has.
    places = torch.distributions.Normal(0, 1).icdf((batch.timesteps + 0.5) / 1000).sigmoid()
    index = (places * 1000).long()
    sigmas = pipeline.scheduler.sigmas[index]
    timesteps, level = pipeline.scheduler.timesteps[index], sigmas.view(-1, 1, 1, 1)
    latents = (1 - level) * batch.x0 + level * batch.noise
    values, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=120, **options
    )
    output = pipeline.transformer(
        hidden_states=latents, timestep=timesteps, encoder_hidden_states=values,
        pooled_projections=pooled,
    ).sample  # fmt: skip
    return (output - (batch.noise - batch.x0)).square()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_loss_and_gradients_equal_those_of_a_pipeline_with_the_word_in_its_tables(
    family, pictures, tmp_path
):
    pipeline = small(own_pipeline(family), tmp_path)
    training = Training(Sampler.from_pipeline(pipeline).model, pictures, PLAN)
    batch = fixed_batch(training.lesson)
    ours = training.error(batch)
    gradients = torch.autograd.grad(ours.mean(), list(training.vectors.values()))
    other = by_hand(own_pipeline(family), [v.detach() for v in training.vectors.values()])
    tables = [encoder.get_input_embeddings().weight for _, encoder, _ in parts(other)]
    for table in tables:
        table.requires_grad_()
    expected = reference_error(family, other, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    wholes = torch.autograd.grad(expected.mean(), tables)
    for gradient, whole in zip(gradients, wholes, strict=True):
        torch.testing.assert_close(gradient, whole[-2:], rtol=1e-3, atol=1e-7)
        assert gradient.abs().sum(1).min() > 0


@pytest.mark.slow
def test_on_the_trained_flow_model_25_steps_halve_what_a_wrong_word_loses(tmp_path):
    """From `bus` towards a word for its own picture of a fox; 40 steps leave an eighth of the gap.

    What is lost is the error beyond that of the right word, on noise that the training did not see.
    """
    sampler = pilotfish.load("emoji-flow", device="cpu")
    picture = tmp_path / "fox.png"
    sampler("a fox on a teal background", steps=8, seed=0).images[0].save(picture)
    captions = ("a {token} on a teal background",)
    plan = Plan(token="<it>", init="bus", steps=25, learning_rate=0.3, captions=captions)
    training = Training(sampler.model, [picture], plan)
    generator = torch.Generator().manual_seed(7)
    x0 = training.lesson.latents.expand(16, -1, -1, -1)
    noise = torch.randn(x0.shape, generator=generator)
    batch = Batch(x0, noise, torch.linspace(30, 970, 16).long(), captions * 16)

    @torch.no_grad()
    def loss():
        return training.error(batch).mean().item()

    wrong = loss()
    for _ in training.steps():
        pass
    learned = loss()
    for encoder in sampler.model.text_encoders:
        table = encoder.network.get_input_embeddings().weight.detach()
        training.vectors[encoder.name] = table[encoder.ids("fox")].float()
    right = loss()
    assert right < wrong
    assert learned < (right + wrong) / 2
