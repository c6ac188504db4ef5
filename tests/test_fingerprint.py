"""What tells models of other weights apart."""

import time

import pytest
import torch
from peft import LoraConfig

import pilotfish
from pilotfish.models.fingerprint import Fingerprint
from pilotfish.testing import random_pipeline
from pilotfish.testing.random_models import families


@pytest.fixture
def own():
    """A pipeline that a test may change."""
    return random_pipeline()


@pytest.mark.parametrize("family", [*families()])
def test_models_of_one_kind_and_other_weights_have_other_fingerprints(family, tmp_path):
    pipeline = random_pipeline(family=family)
    found = Fingerprint(pipeline)()
    assert len(found) == 32 and found == Fingerprint(random_pipeline(family=family))()
    assert found != Fingerprint(random_pipeline(family=family, seed=1))()
    pipeline.save_pretrained(tmp_path)
    assert pilotfish.load(tmp_path, device="cpu").model.fingerprint() == found


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_change_in_place_of_any_network_is_seen(own, part):
    fingerprint = Fingerprint(own)
    before = fingerprint()
    with torch.no_grad():
        for parameter in getattr(own, part).parameters():
            parameter.data += 1e-3  # as a LoRA is fused: torch counts it as no new version
            break
    assert fingerprint() == Fingerprint(own)() != before


def test_a_swapped_part_is_seen_and_a_copy_of_it_is_not(own):
    fingerprint = Fingerprint(own)
    before = fingerprint()
    own.unet = random_pipeline().unet
    assert fingerprint() == before
    own.unet = random_pipeline(seed=1).unet
    assert fingerprint() != before


def test_an_adapter_its_strength_and_its_being_fused_are_seen(own):
    found = [(fingerprint := Fingerprint(own))()]
    own.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    found.append(fingerprint())
    own.unet.set_adapters("one", 0.5)
    found.append(fingerprint())
    own.unet.fuse_lora()
    found.append(fingerprint())
    own.unet.unload_lora()  # the layers as they were, with the sum in them
    found.append(fingerprint())
    assert len(set(found)) == 5


def test_memory_layout_and_the_safety_checker_change_nothing_and_a_cast_does(own):
    fingerprint = Fingerprint(own)
    before = fingerprint()
    own.unet.to(memory_format=torch.channels_last)
    own.register_modules(image_encoder=torch.nn.Linear(2, 2))
    assert fingerprint() == before
    own.unet.to(torch.bfloat16)
    assert fingerprint() != before


def test_a_compiled_network_is_the_same_one(own):
    before = Fingerprint(own)()
    compiled = torch.nn.Module()
    compiled._orig_mod = own.unet  # what torch.compile makes of it
    own.unet = compiled
    assert Fingerprint(own)() == before


def test_weights_that_wait_on_no_device_have_none(own):
    own.unet.to("meta")
    assert Fingerprint(own)() is None


def test_it_takes_less_than_50_ms_for_the_model_that_ships(emoji_sampler):
    spent = []
    for _ in range(3):
        begin = time.process_time()
        Fingerprint(emoji_sampler.model.pipeline())()
        spent.append(time.process_time() - begin)
    assert min(spent) < 0.05
