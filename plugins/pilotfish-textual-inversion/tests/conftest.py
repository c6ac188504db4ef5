"""Small random models, never changed by a test."""

from __future__ import annotations

import pytest
import torch

from pilotfish import Sampler
from pilotfish.testing import random_pipeline


@pytest.fixture(scope="session")
def pipeline():
    return random_pipeline()


@pytest.fixture(scope="session")
def sampler(pipeline):
    return Sampler.from_pipeline(pipeline)


@pytest.fixture(scope="session")
def wide_pipeline():
    """A text encoder as wide as Stable Diffusion 1.x's, 768, with heads as there; two layers."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = random_pipeline().components
    config = parts["text_encoder"].config.to_dict()
    config |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    unet = {**parts["unet"].config, "cross_attention_dim": 768}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**config)).eval()
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(unet).eval()
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
