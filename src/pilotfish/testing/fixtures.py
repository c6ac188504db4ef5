"""Fixtures for plugin authors' tests. Nothing heavy is imported until a test asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..sampling.sampler import Sampler
    from ..sampling.step import Step


@pytest.fixture(scope="session")
def random_sampler() -> Sampler:
    """A Stable Diffusion of random weights, 32 x 32 pixels, milliseconds a step."""
    from . import random_sampler

    return random_sampler()


@pytest.fixture(scope="session")
def emoji_sampler() -> Sampler:
    """The small trained model that ships; skips the test where it is not installed."""
    from .. import load
    from ..hooks.registry import MODEL_GROUP, installed

    if "emoji" not in installed(MODEL_GROUP):
        pytest.skip("the emoji model is not installed: pip install pilotfish-emoji")
    return load()


@pytest.fixture
def random_step() -> Step:
    """A step of two random images, to call a loss without a run."""
    from . import random_step

    return random_step()
