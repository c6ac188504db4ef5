"""The plugin `threshold`: predicted latents that do not run away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pilotfish import Plugin, Setting

if TYPE_CHECKING:
    from torch import Tensor


class Threshold(Plugin):
    """Dynamic thresholding of x0: less glare and fewer burnt colours under strong guidance.

    Saharia et al. 2022 ("Imagen"), arXiv 2205.11487, section 2.3: s is a high percentile of an
    image's absolute values, or the limit where that is more; x0 is clipped to -s and s and then
    divided by s. We differ: Imagen's values are pixels, which end at 1. Latents have no end, so
    the limit is a setting, in their own units (about one standard deviation of a real picture's),
    and x0 is divided by s / limit. A limit that is too low makes pictures pale.
    """

    heading = "classifier-free guidance"

    class Settings(Plugin.Settings):
        percentile: float = Setting(
            0.995, gt=0, le=1, description="the part of an image's latents that is never clipped"
        )
        limit: float = Setting(
            3.0, gt=0, description="the largest latent, in standard deviations, that may stay"
        )

    def on_predicted_x0(self, x0: Tensor) -> Tensor | None:
        limit, sizes = self.settings.limit, x0.detach().abs().flatten(1)  # (B, C * H * W)
        if sizes.amax() <= limit:
            return None
        size = sizes.quantile(self.settings.percentile, dim=1).clamp(min=limit).view(-1, 1, 1, 1)
        thresholded: Tensor = x0.clamp(-size, size) * (limit / size)
        return thresholded
