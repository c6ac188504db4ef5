"""What all plugins of the package keep."""

from __future__ import annotations

import pytest
import torch
from pilotfish_cfg import (
    Apg,
    CfgInterval,
    CfgNorm,
    CfgPlusPlus,
    CfgRescale,
    CfgZeroStar,
    Fdg,
    Mambo,
    Nag,
    Tcfg,
    Threshold,
)
from pilotfish_kit import parametrize_with_checks

from pilotfish import Run

PLUGINS = {
    "threshold": Threshold(limit=1),
    "cfg-rescale": CfgRescale(),
    "cfg-interval": CfgInterval(high=3),
    "cfg-zero-star": CfgZeroStar(zero_steps=0),
    "apg": Apg(threshold=0.01),
    "mambo": Mambo(space="x0"),
    "tcfg": Tcfg(),
    "fdg": Fdg(scales=[8, 4, 2]),
    "cfg-norm": CfgNorm(over="token"),
    "cfg-plus-plus": CfgPlusPlus(scale=0.5),
    "nag": Nag(negative_prompt="a puppy", alpha=0.5),
}


@pytest.mark.slow
@parametrize_with_checks(PLUGINS.values())
def test_plugins_keep_the_contract_of_plugins(plugin, check, random_sampler):
    check(plugin, random_sampler)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_run_is_repeated_from_its_file(random_sampler, name):
    result = random_sampler("a red cat", plugins=[PLUGINS[name]], steps=3, seed=0)
    (table,) = Run.parse(result.run.to_toml())["plugins"]
    assert table["use"] == name
    again = random_sampler("a red cat", plugins=[table], steps=3, seed=0)
    assert torch.equal(again.latents, result.latents)
