"""Sampling with plugins, from Python: `Sampler`, and what its runs give."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OutOfMemoryError, PluginError
from ..hooks.stack import Stack
from ..runs import pictures as images
from ..runs.metadata import Picture
from ..runs.run import KEYS, Run, check_keywords
from . import shown
from .loop import Sampling
from .memory import merged
from .step import Step
from .trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..models.protocol import LatentDiffusion


@dataclass(frozen=True, repr=False)
class Result:
    """What a run gives.

    Attributes:
        images: one PIL picture per image; a file that its `save` writes holds the run.
        latents: (B, C, H, W), at noise level zero.
        trace: what each guide did at each step.
        run: the resolved run; `run.to_toml()` holds everything needed to repeat it.
    """

    images: list[Image]
    latents: Tensor
    trace: Trace
    run: Run

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures: `cat.png`, or `cat-1.png`, `cat-2.png` ... where there are several.

        A PNG, JPEG or WebP also holds the run, which `pilotfish replay` repeats, as the file of
        `images[0].save` does.

        Raises:
            InputError: the ending names no format, or the place cannot be written.

        Warns:
            GuideWarning: the files do not hold the run, and why.
        """
        files = images.numbered(path, len(self.images))
        return [images.save_picture(p, file) for p, file in zip(self.images, files, strict=True)]

    def __repr__(self) -> str:
        return shown.result_line(self)

    def _repr_html_(self) -> str:
        return shown.result_html(self)


class Stream(Iterator[Step]):
    """The steps of a run, one at a time; leaving early tears the plugins down.

    Attributes:
        run: as in `Result`.
        trace: as in `Result`; it grows with the steps.
    """

    def __init__(self, sampling: Sampling, *, show: bool = False) -> None:
        self._sampling = sampling
        self._steps = _showing(sampling) if show else sampling.steps()
        self.run, self.trace = sampling.described, sampling.trace

    def __next__(self) -> Step:
        with self._sampling.as_loaded():
            return next(self._steps)

    def __len__(self) -> int:
        return self._sampling.num_steps

    @property
    def divisible(self) -> bool:
        """Whether its images can be made apart: there are several, and none takes another place."""
        return self.run.num_images > 1 and not self._sampling.stack.calls["resample"]

    def close(self) -> None:
        """End the run without a result."""
        self._steps.close()

    def result(self) -> Result:
        """Take the remaining steps and decode the pictures.

        Raises:
            NonFiniteError: the picture is not finite, in float32 neither.
            PilotfishError: the run was ended by `close` or by an error before.
        """
        for _ in self:
            pass
        latents, image = self._sampling.finished
        pictures: list[Image] = [Picture.of(picture, self.run) for picture in images.to_pil(image)]
        return Result(pictures, latents, self.trace, self.run)


class Sampler:
    """Samples pictures from a latent diffusion model with plugins.

    Args:
        model: the networks, usually from `pilotfish.load` or `Sampler.from_pipeline`.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model

    def __repr__(self) -> str:
        return shown.sampler_line(self)

    def _repr_html_(self) -> str:
        return shown.sampler_html(self)

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, offload: str | None = None) -> Sampler:
        """Use the networks of a pipeline, with its LoRAs and textual inversions.

        They are used as they are when a run begins: what is loaded, swapped or cast later counts
        from the next run on. The pipeline itself is never changed, its safety checker not run.

        Args:
            offload: "text" moves its text encoders to the CPU, for good; see `pilotfish.load`.

        Raises:
            InputError: `offload` is another word.
            ModelError: no model family takes a pipeline of this kind, or not this one.
        """
        from ..models.loading import adapt

        return cls(adapt(pipeline, offload=offload))

    def __call__(
        self, prompt: str = "", *, plugins: Sequence[object] = (), **options: Any
    ) -> Result:
        """Make pictures.

        Args:
            plugins: in order; instances, strings `"blue:scale=2,every=5"`, mappings
                `{"use": "blue", "scale": 2}`, or functions of a step: losses.
            options: see `pilotfish.Run`. With `made_with`, as `Run.read` gives it, what differs
                from what the picture was made with is refused; `anyway=True` lets it go on.
                `show=True` as in `stream`.

        Raises:
            InputError: a value or name is wrong; nothing has run then.
            PluginError: a plugin broke its contract; names plugin, hook and step.
            NonFiniteError: the latents or the picture became NaN or infinite.
            OutOfMemoryError: memory is not enough for one image, or plugins let images of one run
                change places.

        Warns:
            UserWarning: memory is not enough for all images at once; they come in several batches.
        """
        stream = self.stream(prompt, plugins=plugins, **options)
        try:
            return stream.result()
        except OutOfMemoryError as error:
            if not stream.divisible:
                raise
            problem = str(error)
        # Outside of the handler, where what the first try has left in memory is gone.
        run, count = stream.run, stream.run.num_images // 2
        del stream
        warnings.warn(f"made in batches of {count}: {problem}", UserWarning, stacklevel=2)
        parts = [
            self(prompt, plugins=plugins, **{**options, "seed": seed, "num_images": number})
            for seed, number in ((run.seed, count), (run.seed + count, run.num_images - count))
        ]
        pictures: list[Image] = [Picture.of(i, run) for part in parts for i in part.images]
        latents = torch.cat([part.latents for part in parts])
        return Result(pictures, latents, merged([part.trace for part in parts]), run)

    def losses(self, result: Result, plugins: Sequence[object]) -> dict[str, tuple[float, ...]]:
        """Each guide's loss on the pictures of a result, by its name in the list, (B,) each.

        The guides see the finished latents at noise level zero and the VAE's decode of them, with
        the run's prompts; no step and no gradient is taken. A reward's loss is minus its score.

        Args:
            plugins: as in `__call__`; of those without a loss nothing is told.

        Raises:
            InputError, PluginError: as `__call__`.
        """
        usual = {"preset": KEYS["preset"].default, "decoder": "vae", "on_error": "raise"}
        run = result.run.model_copy(update={**usual, "made_with": None})
        sampling = Sampling(self.model, run, Stack(plugins), measuring=True)
        trace = sampling.judge(result.latents)
        if failed := next((record for record in trace if record.error), None):
            raise PluginError(str(failed.error), plugin=failed.plugin, hook="loss_guidance")
        return {record.plugin: record.loss for record in trace}

    def stream(
        self,
        prompt: str = "",
        *,
        plugins: Sequence[object] = (),
        show: bool = False,
        **options: Any,
    ) -> Stream:
        """The same as an iterator over steps: watch, preview, or break when it is good enough.

        Everything is checked before the first step is asked for. Other arguments as in `__call__`.

        Args:
            show: in a notebook, small pictures that change with every step, by the linear estimate
                of the colours: no decode. Anywhere else nothing.
        """
        check_keywords(options)
        run = Run(prompt=prompt, **options)
        return Stream(Sampling(self.model, run, Stack(run.prepared(plugins))), show=show)


def _showing(sampling: Sampling) -> Generator[Step]:
    """The steps of a run, each shown where a notebook can."""
    live = shown.Live()
    with contextlib.closing(sampling.steps()) as steps:
        for step in steps:
            live.show(step, sampling.trace)
            yield step
