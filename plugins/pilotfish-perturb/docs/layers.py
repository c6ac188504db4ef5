"""How much each layer of a model counts: `python docs/layers.py emoji`.

Prints, for each layer that is weakened alone and each way of doing so, the size of c - c_perturbed
as a part of that of c - u (root mean squares), on average over six steps of three pictures.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial
from typing import Any

from pilotfish_perturb.attention import attending, own_token, smoothed
from pilotfish_perturb.layers import all_layers
from pilotfish_perturb.weaker import skipping
from torch import Tensor

import pilotfish
from pilotfish import Plugin


class Weighed(Plugin):
    """Asks the network once more for each layer and each way, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def combine_predictions(self, cond: Tensor, uncond: Tensor, step: Any) -> None:
        mean = partial(smoothed, None, tuple(step.latents.shape[2:]))
        for layer in all_layers(step.run.model):
            ways = {
                "pag": partial(attending, [layer], own_token),
                "seg": partial(attending, [layer], mean),
                "slg": partial(skipping, (layer,)),
            }
            for name, patch in ways.items():
                part = rms(cond - step.predict(patch=patch)) / rms(cond - uncond)
                self.parts[layer.name][name] += part / step.num_steps


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    weighed, run = Weighed(), {"steps": 6, "num_images": 3, "seed": 5}
    pilotfish.load(sys.argv[1])("a fox on a red background", plugins=[weighed], **run)
    for name, parts in weighed.parts.items():
        print(name, *(f"{way} {part:.3f}" for way, part in parts.items()))
