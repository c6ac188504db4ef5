"""The files that `pilotfish plugins new` writes; `string.Template` fills them in."""

from __future__ import annotations

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "pilotfish-$name"
version = "0.1.0"
description = "The guide $name for pilotfish"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["pilotfish>=$least"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points."pilotfish.plugins"]
$name = "$module:$kind"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
$module = ["py.typed"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["src"]
addopts = "--import-mode=importlib"
"""

README = """\
# pilotfish-$name

The guide `$name` for [pilotfish](https://pypi.org/project/pilotfish/): pulls the picture towards
one brightness.

```
pip install pilotfish-$name
pilotfish generate "a campfire" --use $name --out campfire.png
```

| setting | default | meaning |
|---|---|---|
| `target` | 0.8 | the brightness that every pixel should have, 0 to 1 |

It also has every guide's settings: `scale` (1: in balance with the prompt; 0 is off), `start`,
`stop`, `every`, `gradient`.

The loss is each picture's mean squared distance from the target.
"""

MODULE = '''\
"""The guide `$name`: a picture of one brightness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pilotfish import Guide, Setting

if TYPE_CHECKING:
    from pilotfish import Step
    from torch import Tensor

__all__ = ["$kind"]


class $kind(Guide):
    """Pull the picture towards one brightness: mean squared distance from a target."""

    class Settings(Guide.Settings):
        target: float = Setting(
            0.8, ge=0, le=1, description="the brightness that every pixel should have"
        )

    def loss_guidance(self, step: Step) -> Tensor:
        distance = step.image - self.settings.target  # (B, 3, 8H, 8W)
        loss: Tensor = distance.square().mean(dim=(1, 2, 3))  # (B,)
        return loss
'''

TEST = '''\
"""What `$name` promises."""

import torch
from pilotfish.testing import parametrize_with_checks, random_step

from $module import $kind


@parametrize_with_checks([$kind(), $kind(target=0.2)])
def test_it_keeps_the_contract_of_plugins(plugin, check, random_sampler):
    check(plugin, random_sampler)


def test_the_loss_is_each_pictures_own_distance_from_the_target():
    image = torch.stack([torch.full((3, 16, 16), brightness) for brightness in (0.2, 0.5, 0.9)])
    loss = $kind(target=0.5).loss_guidance(random_step(image=image))
    torch.testing.assert_close(loss, torch.tensor([0.09, 0, 0.16]))


def test_guiding_lowers_the_loss_and_a_negative_scale_raises_it(random_sampler):
    def final_loss(scale):
        run = {"plugins": [$kind(scale=scale)], "steps": 8, "seed": 0}
        latents = random_sampler("a red cat", **run).latents
        image = random_sampler.model.decode(latents)
        return $kind().loss_guidance(random_step(image=image)).item()

    assert final_loss(0.5) < final_loss(0) < final_loss(-0.5)
'''

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "src/$module/__init__.py": MODULE,
    "src/$module/py.typed": "",
    "tests/test_$module.py": TEST,
}
