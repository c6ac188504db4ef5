"""Networks of random weights that steer, and the family's own pipelines with them."""

import pytest
import torch
from PIL import Image

from pilotfish import Sampler
from pilotfish.testing import random_pipeline


@pytest.fixture(scope="session")
def pipelines():
    """The random pipeline of a family, made once; nobody changes it."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = random_pipeline(family=family)
        return made[family]

    return of


@pytest.fixture(scope="session")
def samplers(pipelines):
    return lambda family: Sampler.from_pipeline(pipelines(family))


def noise_picture(seed, size=32):
    values = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((values * 255).byte().numpy())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Two picture files of 32 x 32 random pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{seed}.png" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        noise_picture(seed).save(path)
    return paths
