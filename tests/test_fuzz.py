"""Whatever the bytes, the words and the order: our own errors, in bounded time, and no files.

`make fuzz` tries many more cases than the suite, and other ones each time.
"""

import contextlib
import io
import json
import os
import resource
import time
from pathlib import Path

import diffusers
import pytest
import tomli_w
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pilotfish import PilotfishError, Run
from pilotfish.cli import main
from pilotfish.cli.generate import build
from pilotfish.cli.overrides import completed
from pilotfish.cli.trust import asks
from pilotfish.runs.metadata import Picture, read_run

EXAMPLES = int(os.environ.get("PILOTFISH_FUZZ", "0"))  # 2000 of `make fuzz`
SECONDS, BYTES = 5, 2**30


def fuzzed(usual, part=1.0):
    """Of each test so many cases, always the same; or that part of `PILOTFISH_FUZZ`, new ones."""
    return settings(
        max_examples=round(EXAMPLES * part) or usual,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,  # `bounded` has one, in the process's own time
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def bounded():
    """Less than 5 seconds of a core and 1 GB more; no file comes or goes in this folder."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    before, begin, there = peak(), time.process_time(), sorted(Path().rglob("*"))
    yield
    assert time.process_time() - begin < SECONDS
    assert peak() - before < BYTES
    assert sorted(Path().rglob("*")) == there


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@st.composite
def mutated(draw, whole):
    """Bytes of which some are changed, taken out, doubled or put in, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.integers(1, 9))
        match draw(st.sampled_from(["change", "delete", "insert", "double", "cut"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "delete":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "double":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
    return bytes(data)


# ---- embedding files ----


@pytest.fixture(scope="module")
def embeddings():
    """Files of learned words, by their endings."""
    words = {"<ink>": torch.ones(3, 16)}
    params = {"string_to_token": {"*": 265}, "string_to_param": {"*": words["<ink>"]}, "step": 5}
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(words["<ink>"])})
    found = {}
    for name, content, zipped in [
        ("old.bin", words, False),
        ("new.bin", words, True),
        ("old.pt", {"string_to_param": parameters}, False),
        ("new.pt", params, True),
        ("dict.pt", {"string_to_param": parameters}, True),
    ]:
        torch.save(content, file := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    return found


NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**60, 2**64, 10**400]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X", ""]),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)


@st.composite
def safetensors(draw):
    """A header of anything, and some values: NaN too."""
    header = draw(st.dictionaries(st.text(max_size=9), ENTRY | st.none() | NUMBERS, max_size=4))
    if draw(st.booleans()):
        header |= {"<ink>": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}
        header |= {"__metadata__": draw(st.dictionaries(st.text(max_size=9), st.text(max_size=9)))}
    text = json.dumps(header).encode()
    size = draw(st.sampled_from([len(text)] * 9 + [0, 2**40, 2**63]))
    return size.to_bytes(8, "little") + text + draw(st.sampled_from([bytes(32), b"\xff" * 32]))


def read_embedding(name, content):
    read = pytest.importorskip("pilotfish_textual_inversion").read
    Path(name).write_bytes(content)
    with bounded():
        try:
            words = read(name)
        except PilotfishError as refusal:
            assert name in str(refusal) and len(str(refusal)) < 1000
        else:
            assert all(v.isfinite().all() for parts in words.values() for v in parts.values())


@fuzzed(200, part=0.8)
@given(data=st.data())
def test_any_pickled_embedding_is_read_or_refused_by_name(embeddings, data):
    name = data.draw(st.sampled_from(sorted(embeddings)))
    read_embedding(name, data.draw(mutated(embeddings[name])))


@fuzzed(50, part=0.2)
@given(content=safetensors())
def test_any_safetensors_embedding_is_read_or_refused_by_name(content):
    read_embedding("a.safetensors", content)


# ---- pictures that hold runs, and run files ----

HOLDING = Run(prompt="a 'red' cat, \"été\"\n日本 🦊", seed=3, plugins=[{"use": "blue"}])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files as a run saves them, by their endings."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for ending in ("png", "jpg", "webp"):
        path = folder / f"cat.{ending}"
        Picture.of(Image.effect_noise((9, 7), 40).convert("RGB"), HOLDING).save(path)
        found[path.name] = path.read_bytes()
    return found


@fuzzed(150)
@given(data=st.data())
def test_any_picture_gives_a_run_or_our_own_error(pictures, data):
    name = data.draw(st.sampled_from(sorted(pictures)))
    Path(name).write_bytes(data.draw(mutated(pictures[name])))
    with bounded(), contextlib.suppress(PilotfishError):
        assert isinstance(read_run(name), str)


TEXT = 'prompt = "a cat"\nsteps = 5\nscheduler = {name = "euler", beta_end = 0.1}\n'
TEXT += 'preset = {base = "tfg", rho = 2}\n[[plugins]]\nuse = "blue"\nname = "b"\nscale = 2.0\n'
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3000),
    st.sampled_from([2**63, -(2**80), 10**400, 1e-320, 1e308]),
    st.floats(),
    st.text(max_size=9),
    st.dates(),
    st.sampled_from(["ddim", "euler", "lms", "blue", "palette", "tfg", "balanced", "tiny", "~x"]),
)
KEYS = [*Run.model_fields, "model", "use", "name", "base", "scale", "mask", "colors", "a"]
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=9,
)
SETTINGS = ("name", "scale", "start", "every", "mask", "colors", "image", "a")
PLUGIN = st.fixed_dictionaries(
    {"use": st.sampled_from(["blue", "palette", "cfg-rescale", "img2img", "blend", "x"])},
    optional=dict.fromkeys(SETTINGS, VALUES),
)
CONTENT = st.fixed_dictionaries({}, optional=dict.fromkeys(Run.model_fields, VALUES))


@st.composite
def run_files(draw):
    if draw(st.booleans()):
        return draw(mutated(TEXT.encode())).decode("latin-1")
    content = {**draw(CONTENT), "plugins": draw(st.lists(PLUGIN | VALUES, max_size=3))}
    return tomli_w.dumps(without_none(content))


def without_none(value):
    """As TOML can have it, which knows no null."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value if v is not None] if isinstance(value, list) else value


@fuzzed(200)
@given(text=run_files())
def test_any_run_file_is_checked_or_our_own_error(text):
    with bounded(), contextlib.suppress(PilotfishError):
        content = completed(Run.parse(text), (), (), {})
        if not list(asks(content)):  # nothing foreign is imported here
            for key in ("model", "config", "dtype"):
                content.pop(key, None)
            stack, run = build(content)
            assert isinstance(run.to_toml(), str) and len(stack.entries) <= 3


# ---- command lines ----

LONG = ["1" * 400, "1" * 5000, "[" * 1500, "[" * 999 + "]" * 999, "{a=" * 500, "x" * 300, "é" * 99]
ODD = ["0", "-1", "nan", "inf", "1e999", "", "\0", "a\0b", "\udcff", "\n", "'", '"', "=", ":", ","]
NEAR = ["blue", "blue:scale=2", "blue:mask=[0,0,1,1]", "palette:colors=#fa0", "ddim", "euler"]
NEAR += ["tfg", "32x32", "0x0", "99999x8", "true", "steps=3", "rho=nan", "1", "~nosuchuser/a", "./"]
NEAR += ["plugins.blue.scale=2", "plugins.blue.=", "prompt={a=1}", "scheduler={name=3}", "~nobody"]
WORDS = st.sampled_from([*LONG, *ODD, *NEAR]) | st.text(max_size=12)
OPTIONS = ["--use", "-s", "--size", "--steps", "--seed", "--num-images", "--guidance-scale"]
OPTIONS += ["--scheduler", "--preset", "--decoder", "--negative-prompt", "--out", "--save-run"]
OPTIONS += ["--film", "--prompts", "--run", "--config", "--device", "--dtype", "--offload"]
OPTIONS += ["--on-error", "--checkpointing", "--true-cfg-scale", "--max-sequence-length", "--model"]


@st.composite
def command_lines(draw, model):
    """Words to the commands that can be asked without a picture being made."""
    pairs = draw(st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=4))
    options = [word for pair in pairs for word in pair]
    match draw(st.sampled_from(["generate"] * 5 + ["replay", "show", "grid", "any"])):
        case "generate":
            given = [*options, *draw(st.lists(WORDS, max_size=2))]
            return ["generate", "--dry-run", "--model", model, *given]
        case "replay":
            return ["replay", *draw(st.lists(WORDS, max_size=3)), *options[:2]]
        case "show":
            return ["plugins", "show", *draw(st.lists(WORDS, max_size=2))]
        case "grid":
            return ["grid", draw(WORDS), "--x", draw(WORDS), *options[:2]]
    return draw(st.lists(WORDS, min_size=1, max_size=3))


@fuzzed(120)
@given(data=st.data())
def test_any_command_line_ends_by_itself_with_a_line(model, data):
    line = data.draw(command_lines(model))
    with bounded():
        done = CliRunner().invoke(main, line)
        assert done.exit_code in (0, 1, 2)
        if done.exit_code:
            assert isinstance(done.exception, SystemExit), done.exception
            assert done.stderr.count("\n") <= 6 and "Error" in done.stderr.title()


# ---- stacks of plugins ----

FRACTIONS = st.sampled_from([0, 0.25, 0.4, 0.5, 0.75, 1])
BLUE = st.fixed_dictionaries(
    {
        "target": st.floats(0, 1, width=16),
        "scale": st.floats(-20, 20, width=16),
        "start": FRACTIONS,
        "stop": FRACTIONS,
        "every": st.integers(1, 4),
    }
)


def plain_loop(pipe, name, steps, seed, guidance_scale, guides):
    """Losses on the decoded x0, as a careful user of diffusers writes them by hand."""
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        length = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        tokens = pipe.tokenizer(["", "a red cat"], truncation=True, **length).input_ids
        prompts = pipe.text_encoder(tokens)[0]
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))
    latents = latents * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = pipe.unet(both, t, encoder_hidden_states=prompts).sample.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
        sigma = scheduler.sigmas[i]
        x0 = (latents - sigma * noise).requires_grad_()
        image = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
        total = image.sum() * 0
        for guide in guides:
            inside = guide["start"] <= i / steps < guide["stop"]
            if inside and i % guide["every"] == 0:
                total = total + guide["scale"] * (image[:, 2] - guide["target"]).abs().mean()
        latents = latents - sigma**2 * torch.autograd.grad(total, x0)[0]
        latents = scheduler.step(noise, t, latents).prev_sample
    return latents.detach()


@fuzzed(12, part=0.25)
@given(
    guides=st.lists(BLUE, max_size=4),
    name=st.sampled_from(["EulerDiscreteScheduler", "LMSDiscreteScheduler"]),
    steps=st.integers(1, 4),
    seed=st.integers(0, 99),
    guidance_scale=st.sampled_from([1.5, 3.0, 7.5]),
    order=st.randoms(use_true_random=False),
)
def test_any_stack_of_guides_is_the_plain_loop(
    pipeline, sampler, guides, name, steps, seed, guidance_scale, order
):
    pipeline.vae.requires_grad_(False)
    expected = plain_loop(pipeline, name, steps, seed, guidance_scale, guides)
    plugins = [{"use": "blue", **guide} for guide in guides]
    order.shuffle(plugins)
    options = {"steps": steps, "seed": seed, "guidance_scale": guidance_scale}
    with bounded():
        ours = sampler(
            "a red cat", plugins=plugins, preset="deep-dive", scheduler=name, **options
        ).latents
    # Two orders of a sum differ by rounding, which steps let grow.
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
