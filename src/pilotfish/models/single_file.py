"""One `.safetensors` file of a whole checkpoint, in the layout of its model's makers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor

from ..errors import ModelError
from .hub import load_config
from .schedulers import diffusers
from .weights import check_shapes, check_whole, load_networks, told_of, without_value

import diffusers.loaders.single_file_model as readers  # isort: skip  # after torchvision is mended
import diffusers.loaders.single_file_utils as layouts  # isort: skip

# The pipeline's class by diffusers' name of the layout.
CLASSES = {
    **dict.fromkeys(("v1", "v2"), "StableDiffusionPipeline"),
    **dict.fromkeys(("xl_base", "playground-v2-5"), "StableDiffusionXLPipeline"),
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large"), "StableDiffusion3Pipeline"),
    **dict.fromkeys(("flux-dev", "flux-schnell"), "FluxPipeline"),
    "z-image-turbo": "ZImagePipeline",
}
# How the names of a part's tensors begin, in any of them.
BEGIN = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.", "text_encoders."),
}


@dataclass(frozen=True)
class Checkpoint:
    """A file, of which the names and shapes were read.

    Attributes:
        layout: diffusers' name of it.
        tensors: by name, without values.
    """

    file: str
    layout: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, file: str) -> Checkpoint:
        """Read a file's names and shapes.

        Raises:
            ModelError: it is cut off, or holds no network that predicts.
        """
        with told_of("file"), safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        if any(name.startswith("lora_") or ".lora" in name for name in shapes):
            raise ModelError(
                "it is a LoRA. Load it into its model's pipeline, "
                "pipeline.load_lora_weights(FILE), and take Sampler.from_pipeline(pipeline)"
            )
        with told_of("file"):
            layout = layouts.infer_diffusers_model_type(tensors)
        if layout == "v1" and not any(n.startswith("model.diffusion_model.") for n in shapes):
            few = ", ".join(sorted(shapes)[:3])
            raise ModelError(
                f"it is no whole checkpoint: none of its tensors ({few} ...) is of a network that "
                "predicts"
            )
        return cls(file, str(layout), tensors)

    @property
    def usual(self) -> str:
        """The hub id of a model that has the configuration of such files."""
        found = layouts.DIFFUSERS_DEFAULT_PIPELINE_PATHS[self.layout]
        return str(found["pretrained_model_name_or_path"])

    def index(self, config: str | None, **place: Any) -> Any:
        """The index of the pipeline that the file is of.

        Args:
            config: where it is from; None is `usual`.
            place: options of diffusers that say where to find it.

        Raises:
            ModelError: it cannot be had, or the file is of another pipeline, or of none here.
        """
        expected = CLASSES.get(self.layout)
        if config is None and expected is None:
            known = ", ".join(CLASSES)
            raise ModelError(f"its layout is {self.layout!r}; expected one of {known}")
        try:
            index = load_config(diffusers.DiffusionPipeline, config or self.usual, **place)
        except (OSError, ModelError) as error:
            raise ModelError(
                f"the configuration of such a file, {config or self.usual}, is not here and cannot "
                "be downloaded. Give a folder in the diffusers layout that has it, with weights or "
                "without: config='FOLDER', or --config FOLDER"
            ) from error
        found = index["_class_name"]
        if found != expected and found in CLASSES.values():
            raise ModelError(
                f"its layout is {self.layout!r}, and the configuration {config!r} is that of a "
                f"{found}"
            )
        return index

    def pipeline(
        self, place: str, index: Mapping[str, Any], dtype: torch.dtype, options: Mapping[str, Any]
    ) -> Any:
        """The pipeline; text encoders and a VAE that the file lacks come from a folder.

        Args:
            place: folder or hub id of the configuration.
            options: of diffusers' `from_single_file`.

        Raises:
            ModelError: a part is neither here nor there, or not whole.
        """
        lacking = {n: index[n] for n in index if self._lacks(n) and n not in options}
        try:
            parts = load_networks(Path(place), lacking, dtype, options)
        except ModelError as error:
            raise ModelError(
                f"it is no whole checkpoint: it holds no {' and no '.join(lacking)}, and neither "
                f"does the configuration's folder: {error}"
            ) from error
        kind = getattr(diffusers, index["_class_name"])
        if not hasattr(kind, "from_single_file"):
            raise ModelError(f"diffusers reads no single files of a {kind.__name__}")
        options = {"dtype": dtype, **options, **parts}
        self._check({n: v for n, v in index.items() if n not in options}, place)
        with told_of(f"file with the configuration {place!r}"):
            pipeline = kind.from_single_file(self.file, config=place, **options)
        check_text_encoders(pipeline)
        if os.path.isdir(place):
            pipeline.register_to_config(_name_or_path=place)
        return pipeline

    def _check(self, index: Mapping[str, Any], place: str) -> None:
        """Hold the networks of diffusers to their configurations, by names and shapes alone.

        Raises:
            ModelError: one is not whole.
        """
        for name, value in index.items():
            reader = (
                readers.SINGLE_FILE_LOADABLE_CLASSES.get(value[1])
                if isinstance(value, list | tuple)
                else None
            )
            if reader is not None:
                kind = getattr(diffusers, value[1])
                config = kind.load_config(place, subfolder=name)
                with init_empty_weights():
                    network = kind.from_config(config)
                with told_of(name):
                    convert = reader["checkpoint_mapping_fn"]
                    found = convert(checkpoint=dict(self.tensors), config=config)
                check_shapes(name, network, {n: tuple(t.shape) for n, t in found.items()})

    def _lacks(self, part: str) -> bool:
        begin = BEGIN.get(part.rstrip("_0123456789"))
        return begin is not None and not any(name.startswith(begin) for name in self.tensors)


def check_text_encoders(pipeline: Any) -> None:
    """Hold a pipeline's networks of transformers to what diffusers found in a file.

    Raises:
        ModelError: one is not whole.
    """
    for name, network in pipeline.components.items():
        if hasattr(network, "tie_weights"):
            network.tie_weights()  # diffusers leaves a T5's embedding without its shared tensor
            fault = f"{{}} of its {len(network.state_dict())} tensors are missing"
            check_whole(name, {fault: without_value(network)})
