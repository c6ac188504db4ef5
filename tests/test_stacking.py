"""All installed plugins side by side: pairs on two random models, a stack on the emoji model."""

import ast
import functools
import re
import tomllib
import warnings
from itertools import combinations

import pytest
import torch
from PIL import Image
from pilotfish_emoji import FOLDER
from safetensors.torch import save_file

import pilotfish
from pilotfish import Guide
from pilotfish.cli import listing
from pilotfish.hooks.plugin import implemented
from pilotfish.hooks.registry import installed, load_class
from pilotfish.hooks.stack import Stack
from pilotfish.testing import random_sampler

PROMPT = "a <ink> of a puppy and a skunk++"
SEARCHES = {"best-of", "das", "feynman-kac", "svdd"}  # by a guide: tests of their own
# Of networks: their packages' tests stack them.
FILES = {"controlnet", "ip-adapter", "lora"}
FILES |= {"aesthetic", "hps", "image-reward", "perceptual", "pickscore"}
GATES = {"gate"}  # they change nothing but what must not be seen, and have no gradient
INSTALLED = sorted(installed())
NAMES = [name for name in INSTALLED if name not in SEARCHES | FILES | GATES]
# Each plugin beside eight others, near and far in the list: all pairs would take minutes.
PAIRS = [
    (name, NAMES[(i + apart) % len(NAMES)])
    for apart in (1, 3, 7, 11)
    for i, name in enumerate(NAMES)
]
# On a flow each beside four others, none of which it has beside it above.
FLOW_PAIRS = [
    (name, NAMES[(i + apart) % len(NAMES)]) for apart in (2, 9) for i, name in enumerate(NAMES)
]
STEPPERS = {name for name in NAMES if "advance" in implemented(load_class(name))}
GUIDES = [name for name in NAMES if issubclass(load_class(name), Guide)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Tables for plugins by name; one that has no settings here fails its tests."""
    folder = tmp_path_factory.mktemp("files")
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(folder / "grey.png")
    save_file({"<ink>": torch.linspace(-1, 1, 16)}, folder / "ink.safetensors")
    settings = {
        "blend": {"prompts": {"a red cat": 0.5}},
        "blue": {},
        "apg": {"threshold": 0.0},
        "autoguidance": {},
        "cfg-interval": {},
        "cfg-norm": {},
        "cfg-plus-plus": {},
        "cfg-rescale": {},
        "cfg-zero-star": {"zero_steps": 0},
        "classifier": {"label": "fox", "model": str(FOLDER / "classifier")},
        "clip": {"text": "a fox", "model": f"local-dir:{FOLDER / 'clip'}", "cutouts": 2},
        "clip-style": {"image": str(folder / "grey.png"), "model": str(FOLDER / "clip")},
        "concept": {"file": str(folder / "ink.safetensors")},
        "edges": {},
        "fdg": {},
        "img2img": {"image": str(folder / "grey.png"), "strength": 1},
        "long-prompt": {"chunks": 2},
        "pag": {},
        "regions": {"prompts": ["a red cat"], "areas": [[0, 0, 0.5, 1]], "by": "whole"},
        "sag": {},
        "seg": {},
        "sharpness": {},
        "slg": {"stop": 1},
        "symmetry": {},
        "weights": {"dialect": "compel"},
        "inpaint": {"image": str(folder / "grey.png"), "mask": [0.25, 0.25, 1, 1]},
        "mambo": {},
        "nag": {"negative_prompt": "an otter"},
        "optimize": {},
        "palette": {"colors": ["#14213d", "#fca311"]},
        "reference": {"image": str(folder / "grey.png")},
        "tcfg": {},
        "threshold": {},
        "token-blend": {"word": "skunk", "mix": {"otter": 0.5}},
        "token-swap": {"word": "puppy", "by": "cat"},
    }

    def tables(*names, **changes):
        return [{"use": name, **settings[name], **changes.get(name, {})} for name in names]

    return tables


@pytest.fixture(scope="module")
def run(sampler):
    def run(plugins):
        return sampler(PROMPT, plugins=plugins, steps=2, seed=5)

    return run


@pytest.fixture(scope="module")
def alone(run, stack):
    """The latents of a run with one plugin alone, by its name."""
    return functools.cache(lambda name: run(stack(name)).latents)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_each_pair_gives_a_finite_picture_that_both_change_and_the_same_when_rerun(
    run, stack, alone, pair
):
    both = run(stack(*pair)).latents
    assert both.isfinite().all()
    assert torch.equal(both, run(stack(*pair)).latents)
    # Of two that take the step the first one does, and the other has nothing to do.
    for name in pair[1:] if STEPPERS.issuperset(pair) else pair:
        assert not torch.equal(both, alone(name))


@pytest.mark.parametrize("pair", list(combinations(GUIDES, 2)), ids="+".join)
def test_guides_act_in_the_listed_order(run, stack, pair):
    for names in (pair, pair[::-1]):
        trace = run(stack(*names)).trace
        assert [record.plugin for record in trace] == 2 * list(names)
        assert all(
            sum(r.share[0] for r in trace if r.index == i) == pytest.approx(1) for i in (0, 1)
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_at_scale_zero_leaves_every_others_picture_bit_identical(run, stack, guide, name):
    others = [] if name == guide else stack(name)
    off = stack(guide, **{guide: {"scale": 0.0}})
    assert torch.equal(run([*others, *off]).latents, run(others).latents)


def test_two_clips_pull_in_their_own_directions(run, stack):
    clips = stack("clip") + stack("clip", clip={"text": "a castle"})
    trace = run(clips).trace
    assert trace.plugins == ["clip", "clip#2"]
    assert all(abs(cosine) < 0.999 for cosine in trace.cosines("clip", "clip#2"))
    opposed = stack("clip") + stack("clip", clip={"scale": -1.0, "cutouts": 0})
    same_view = stack("clip", clip={"cutouts": 0}) + opposed[1:]
    assert run(same_view).trace.cosines("clip", "clip#2") == pytest.approx([-1.0, -1.0], abs=1e-4)


def test_opposed_palettes_show_as_a_conflict(run):
    black, white = ({"use": "palette", "colors": [color]} for color in ("#000000", "#ffffff"))
    conflict = run([black, white]).trace
    agreement = run([black, {**black, "colors": ["#101010"]}]).trace
    assert max(conflict.cosines("palette", "palette#2")) < -0.3
    assert min(agreement.cosines("palette", "palette#2")) > 0.9


# ---- a flow: Stable Diffusion 3 ----


@pytest.fixture(scope="module")
def flow_stack(stack, tmp_path_factory):
    """The same tables, with a word for both CLIPs, and a window in which the second step lies."""
    word = tmp_path_factory.mktemp("flow") / "ink.safetensors"
    clips = {"clip_l": torch.linspace(-1, 1, 16), "clip_g": torch.linspace(1, -1, 24)}
    save_file({name: vector[None] for name, vector in clips.items()}, word)
    flow = {"concept": {"file": str(word), "token": "<ink>"}, "cfg-interval": {"low": 0.0}}

    def tables(*names, **changes):
        return stack(*names, **{**flow, **changes})

    return tables


@pytest.fixture(scope="module")
def flow_run():
    sampler = random_sampler(family="sd3")

    def run(plugins):
        with warnings.catch_warnings():  # of random weights
            warnings.filterwarnings("ignore", "the loss of '[a-z]+' rose")
            return sampler(PROMPT, plugins=plugins, steps=2, seed=5)

    return run


@pytest.fixture(scope="module")
def flow_alone(flow_run, flow_stack):
    return functools.cache(lambda name: flow_run(flow_stack(name)).latents)


@pytest.mark.parametrize("pair", FLOW_PAIRS, ids="+".join)
def test_each_pair_gives_a_finite_picture_of_a_flow_that_both_change_and_the_same_when_rerun(
    flow_run, flow_stack, flow_alone, pair
):
    both = flow_run(flow_stack(*pair)).latents
    assert both.isfinite().all()
    assert torch.equal(both, flow_run(flow_stack(*pair)).latents)
    for name in pair[1:] if STEPPERS.issuperset(pair) else pair:
        assert not torch.equal(both, flow_alone(name))


def test_guides_of_a_flow_act_in_the_listed_order(flow_run, flow_stack):
    for names in (GUIDES, GUIDES[::-1]):
        trace = flow_run(flow_stack(*names)).trace
        assert [record.plugin for record in trace] == 2 * list(names)
        for i in (0, 1):
            assert sum(r.share[0] for r in trace if r.index == i) == pytest.approx(1)


@pytest.mark.parametrize("pair", [("fdg", "cfg-rescale"), ("apg", "cfg-norm"), ("pag", "cfg-norm")])
def test_what_combines_predictions_of_a_flow_does_so_in_the_listed_order(
    flow_run, flow_stack, pair
):
    """Each takes up what those before it made, so that two orders are two pictures."""
    one, other = (flow_run(flow_stack(*names)).latents for names in (pair, pair[::-1]))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_guide_at_scale_zero_leaves_a_flows_picture_bit_identical(
    flow_run, flow_stack, flow_alone, number
):
    name, guide = NAMES[number], GUIDES[number % len(GUIDES)]
    if name == guide:
        guide = GUIDES[number % len(GUIDES) - 1]
    off = flow_stack(guide, **{guide: {"scale": 0.0}})
    assert torch.equal(flow_run([*flow_stack(name), *off]).latents, flow_alone(name))


# A plugin that a family cannot take says so, with the plugin's name and why.
REFUSED = {
    ("sd3", "concept"): "'concept'.* holds vectors for text_encoder.*Missing: text_encoder_2",
    ("sd3", "regions"): "regions: by='attention' needs attention from the picture to the text",
    ("flux", "regions"): "regions: by='attention' needs attention from the picture to the text",
    ("z-image", "weights"): "weights reads prompts for CLIP and T5.*is a qwen3",
    ("flux2-klein", "weights"): "weights reads prompts for CLIP and T5.*is a qwen3",
    ("qwen-image", "weights"): "weights reads prompts for CLIP and T5.*is a qwen2_5_vl",
}


@pytest.mark.parametrize(("family", "name"), REFUSED, ids="-".join)
def test_what_cannot_work_on_a_flow_is_refused_by_name(stack, family, name):
    plugins = stack(name, regions={"by": "attention"})
    size = {"height": 32, "width": 32}
    with pytest.raises(pilotfish.PilotfishError, match=REFUSED[family, name]):
        random_sampler(family=family)(PROMPT, plugins=plugins, steps=2, seed=5, **size)


COMBINING = [name for name in NAMES if name.startswith("cfg-")] + ["apg", "fdg", "mambo", "tcfg"]


def test_what_changes_guidance_leaves_a_flow_that_has_none_bit_identical(stack):
    sampler, run = random_sampler(family="flux"), {"steps": 2, "seed": 5}
    run |= {"height": 32, "width": 32}
    plain = sampler(PROMPT, **run).latents
    assert torch.equal(sampler(PROMPT, plugins=stack(*COMBINING), **run).latents, plain)
    guided = {**run, "true_cfg_scale": 4, "negative_prompt": "an otter"}
    plain = sampler(PROMPT, **guided).latents
    for name in COMBINING:
        changed = stack(name, **{"cfg-interval": {"low": 0.0}})
        assert not torch.equal(sampler(PROMPT, plugins=changed, **guided).latents, plain)


@pytest.mark.slow
def test_a_stack_of_five_plugins_runs_on_the_emoji_model(stack, tmp_path):
    save_file(
        {"<ink>": torch.randn(128, generator=torch.Generator().manual_seed(0))},
        tmp_path / "ink.safetensors",
    )
    plugins = stack(
        "clip",
        "palette",
        "concept",
        "blend",
        "classifier",
        clip={"model": None},
        classifier={"model": None, "scale": 0.5},
        concept={"file": str(tmp_path / "ink.safetensors")},
        blend={"prompts": {"a fox on a teal background": 0.5}},
    )
    sampler = pilotfish.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt, run = "a <ink> of a fox on a gray background", {"steps": 10, "seed": 1}
        result = sampler(prompt, plugins=plugins, num_images=4, **run)
    assert result.trace.plugins == ["clip", "palette", "classifier"]
    for name in result.trace.plugins:
        losses = result.trace.losses(name)
        assert losses[-1] < losses[0]
    last = result.trace[-1]
    assert last.cosine.keys() == {"clip", "palette"}
    assert result.latents.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_search_goes_along_with_every_other_plugin(sampler, stack, name):
    measured = {"use": "blue", "name": "measured", "gradient": "none"}
    search = {"use": "svdd", "particles": 2, "guides": ["measured"]}

    def latents():
        plugins = [*stack(name), measured, search]
        return sampler(PROMPT, plugins=plugins, steps=2, seed=5, scheduler="ddpm").latents

    if name == "optimize":  # whose own steps draw no noise
        with pytest.raises(pilotfish.InputError, match="candidates of one origin stay the same"):
            latents()
        return
    assert latents().isfinite().all()
    assert torch.equal(latents(), latents())


@pytest.mark.parametrize("name", INSTALLED)
def test_what_show_prints_of_an_installed_plugin_can_be_pasted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"<ink>": torch.zeros(16)}, "ink.safetensors")
    block = listing.paste_block(name, load_class(name))
    (table,) = tomllib.loads(block[block.index("[[plugins]]") :])["plugins"]
    item = re.search(r"plugins=\[(.*)\]", block)
    written, made = Stack([ast.literal_eval(item[1])]).tables(), Stack([table]).tables()
    assert written == made
    assert made[0].keys() >= table.keys()
