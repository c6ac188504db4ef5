"""One small random model for all tests; it is never changed."""

import pytest

from pilotfish import Sampler
from pilotfish.testing import random_pipeline


@pytest.fixture(scope="session")
def pipeline():
    return random_pipeline()


@pytest.fixture(scope="session")
def model(pipeline, tmp_path_factory):
    """Its folder, as `--model` takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sampler(pipeline):
    return Sampler.from_pipeline(pipeline)


@pytest.fixture
def latents_of(sampler):
    """The final latents of a short run: `latents_of(plugin, ..., steps=4)`."""

    def run(*plugins, **options):
        options = {"steps": 4, "seed": 3, **options}
        return sampler("a red cat", plugins=plugins, **options).latents

    return run
