"""`gate`: what a detector finds is blurred, blackened or refused; its score is a reward."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from pilotfish_kit import check_plugin
from pilotfish_reward import Gate
from pilotfish_reward.gate import EXPOSED, blurred, find_detector

from pilotfish import PilotfishError, PluginError, Run, SettingsError
from pilotfish.testing import random_sampler

RUN = {"steps": 4, "seed": 3}


def brightness(picture: Image.Image) -> float:
    return float(np.asarray(picture).mean() / 255)


def left_half(picture: Image.Image) -> list[dict[str, object]]:
    box = [0, 0, picture.width // 2, picture.height]
    return [{"class": "LEFT", "score": 0.9, "box": box}, {"class": "DOUBT", "score": 0.1}]


def nothing(picture: Image.Image) -> list[dict[str, object]]:
    return []


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


def contrast(picture: Image.Image) -> float:
    return float(np.asarray(picture, dtype=float).std(axis=(0, 1)).mean())


def test_what_is_found_is_blurred_and_the_rest_stays(emoji_sampler):
    options = {"steps": 8, "seed": 3}
    plain = emoji_sampler("a fox", **options).images[0]
    gated = emoji_sampler("a fox", plugins=[Gate(detector=left_half)], **options).images[0]
    left, right = (0, 0, 32, 64), (36, 0, 64, 64)
    assert contrast(gated.crop(left)) < 0.5 * contrast(plain.crop(left))
    # What the VAE does not keep of any picture.
    difference = np.asarray(gated.crop(right), float) - np.asarray(plain.crop(right), float)
    assert np.abs(difference).mean() < 16


def test_a_clean_picture_is_the_one_without_the_gate(sampler):
    plain = sampler("a cat", **RUN)
    gated = sampler("a cat", plugins=[Gate(detector=nothing)], **RUN)
    assert torch.equal(gated.latents, plain.latents)


def test_at_scale_0_the_gate_is_open(sampler):
    plain = sampler("a cat", **RUN)
    gated = sampler("a cat", plugins=[Gate(detector=left_half, scale=0)], **RUN)
    assert torch.equal(gated.latents, plain.latents)


@pytest.mark.parametrize("preset", ["balanced", "dps", "clip-guided"])
def test_what_is_looked_at_is_what_comes_out_with_guides_and_another_decoder(sampler, preset):
    seen = []

    def keep(picture):
        seen.append(picture)
        return 0.0

    plugins = ["blue", Gate(detector=keep)]
    options = {**RUN, "scheduler": "euler", "preset": preset, "decoder": "linear"}
    result = sampler("a cat", plugins=plugins, **options)
    difference = np.asarray(seen[-1], int) - np.asarray(result.images[0], int)
    assert np.abs(difference).mean() < 2  # of 255: the last step's move, under some presets


def test_black_is_the_whole_picture_of_those_in_which_something_was_found(emoji_sampler):
    seen = []

    def second(picture):
        seen.append(picture)
        return float(len(seen) % 2 == 0)

    guide = Gate(detector=second, action="black", start=1.0)
    options = {"steps": 6, "seed": 3, "num_images": 2}
    first, other = emoji_sampler("a fox", plugins=[guide], **options).images
    assert brightness(other) < 0.05 < brightness(first)


def test_refused_pictures_end_the_run_with_what_was_found(sampler):
    guide = Gate(detector=left_half, action="refuse", classes=["LEFT"])
    with pytest.raises(PilotfishError, match="the gate refuses picture 1 of this run: LEFT 0.90"):
        sampler("a cat", plugins=[guide], **RUN)


@pytest.mark.parametrize(
    "settings", [{"classes": ["OTHER"]}, {"threshold": 0.95}], ids=["another class", "a low score"]
)
def test_what_does_not_count_is_let_through(sampler, settings):
    guide = Gate(detector=left_half, action="refuse", **settings)
    assert sampler("a cat", plugins=[guide], **RUN).images


def test_it_stands_beside_guides_that_move_and_does_not_itself(sampler):
    plain = sampler("a cat", plugins=["blue"], **RUN)
    found = sampler("a cat", plugins=["blue", Gate(detector=lambda _: 0.2)], **RUN)
    assert torch.equal(found.latents, plain.latents)
    (record,) = found.trace.of("Gate")  # a look costs a decode: one, at the end
    assert record.loss == pytest.approx((0.2,)) and not record.gradient_norm[0]


def test_it_is_a_reward_for_particles(sampler):
    gate = Gate(detector=brightness, threshold=1.0)
    found = sampler("a cat", plugins=[gate, "best-of:particles=4"], **RUN)
    alone = [sampler("a cat", **{**RUN, "seed": 3 + k}).images[0] for k in range(4)]
    darkest = min(alone, key=brightness)
    assert np.abs(np.asarray(found.images[0], int) - np.asarray(darkest, int)).max() <= 3
    assert len(found.trace.of("Gate")) == 4  # asked at each step


def test_of_particles_only_the_picture_that_comes_out_is_judged(sampler):
    def dark(picture):
        return 1.0 - brightness(picture)

    alone = [sampler("a cat", **{**RUN, "seed": 3 + k}).images[0] for k in range(4)]
    low, *_, high = sorted(dark(picture) for picture in alone)
    gate = Gate(detector=dark, threshold=(low + high) / 2, action="refuse")
    assert sampler("a cat", plugins=[gate, "best-of:particles=4"], **RUN).images


def test_every_candidate_in_which_something_is_found_is_refused(sampler):
    plugins = [Gate(detector=left_half, action="refuse"), "best-of:particles=2"]
    with pytest.raises(PilotfishError, match="picture 1 of this run"):
        sampler("a cat", plugins=plugins, **RUN)


def test_of_several_pictures_of_a_search_each_is_answered(emoji_sampler):
    gate = Gate(detector=lambda _: 1.0, action="black")
    options = {"steps": 3, "num_images": 2, "seed": 3}
    found = emoji_sampler("a fox", plugins=[gate, "best-of:particles=2"], **options)
    assert [brightness(picture) < 0.05 for picture in found.images] == [True, True]


def test_it_keeps_the_contract_of_plugins():
    check_plugin(Gate(detector="nudenet"))


def test_a_function_is_found_by_its_name(sampler, monkeypatch):
    module = ModuleType("my_detectors")
    module.left = left_half
    module.number = 3
    monkeypatch.setitem(sys.modules, "my_detectors", module)
    assert find_detector("my_detectors:left") is left_half
    result = sampler("a cat", plugins=["gate:detector='my_detectors:left'"], **RUN)
    assert Run.parse(result.run.to_toml())["plugins"][0]["detector"] == "my_detectors:left"
    for wrong in ("my_detectors:right", "no_such_module:left", "my_detectors:number"):
        with pytest.raises(SettingsError, match="Gate: detector"):
            find_detector(wrong)


def test_a_function_itself_must_be_passed_again(sampler):
    table = Gate(detector=left_half).settings.model_dump(mode="json")
    assert table["detector"].startswith("python:")
    with pytest.raises(SettingsError, match="passed again in Python"):
        Gate(detector=table["detector"])
    with pytest.raises(SettingsError, match="'module:function'"):
        Gate(detector="left_half")


def test_a_gradient_is_refused():
    with pytest.raises(SettingsError, match="gradient"):
        Gate(gradient="x0")


@pytest.mark.parametrize("answer", ["much", [1.0], [{"class": "A"}], [{"score": 1, "box": [1]}]])
def test_a_detector_that_answers_something_else_is_told(sampler, answer):
    with pytest.raises((SettingsError, PluginError), match="detector must answer a picture with"):
        sampler("a cat", plugins=[Gate(detector=lambda _: answer)], **RUN)


@pytest.mark.parametrize("box", [(10, 10, 40, 40), (-5, -5, 20, 70), (50, 50, 90, 90)])
def test_a_box_is_blurred_and_nothing_outside_of_it(box):
    places = np.indices((64, 64)).sum(axis=0) % 2 * 255
    picture = Image.fromarray(places.astype("uint8")).convert("RGB")
    changed = np.asarray(blurred(picture, [box]), int)
    inside = np.zeros((64, 64), bool)
    inside[max(box[1], 0) : box[3], max(box[0], 0) : box[2]] = True
    assert (changed[~inside] == np.asarray(picture)[~inside]).all()
    assert changed[inside].std() < 16  # of 127


def test_nudenet_sees_a_picture_as_it_was_trained_to(monkeypatch):
    nudenet = pytest.importorskip("nudenet")
    given = []
    monkeypatch.setattr(nudenet.NudeDetector, "detect", lambda self, array: given.append(array))
    find_detector("nudenet")(Image.new("RGB", (8, 6), (255, 128, 0)))
    assert given[0].shape == (6, 8, 3) and given[0][0, 0].tolist() == [0, 128, 255]  # blue first


def test_nudenet_runs_and_finds_nothing_in_a_plain_picture():
    module = pytest.importorskip("nudenet.nudenet")
    assert find_detector("nudenet")(Image.new("RGB", (64, 64), "gray")) == []
    assert set(EXPOSED) <= set(vars(module)["__labels"])


def test_nudenet_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(SettingsError, match=r"pip install 'pilotfish-reward\[gate\]'"):
        find_detector("nudenet")
