"""The plugin `ip-adapter`: a picture as part of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from pilotfish import (
    Area,
    InputError,
    ModelError,
    Plugin,
    Setting,
    area_weights,
    mend_torchvision,
    read_picture,
)

from .loading import check_place, fitting

mend_torchvision()

from diffusers.loaders import IPAdapterMixin  # noqa: E402  # it may import torchvision

if TYPE_CHECKING:
    from pilotfish import Run, Step


class IPAdapter(Plugin):
    """Let a picture say what the prompt cannot: a style, a face, a thing.

    Ye et al. 2023, "IP-Adapter", arXiv 2308.06721: beside the text, the network attends to what a
    CLIP sees in the picture. Latents equal those of the family's own pipeline of diffusers, whose
    loader is used, to the bit. Several add up. We differ: what is grey in a mask counts in part.
    """

    heading = "networks that steer"

    class Settings(Plugin.Settings):
        model: str = Setting(
            description="the adapter's folder, or hub id", examples=["h94/IP-Adapter"]
        )
        file: str = Setting(
            description="the weights in it", examples=["models/ip-adapter_sd15.safetensors"]
        )
        image: Path = Setting(
            title="a path to a picture",
            description="what the result is to take after",
            examples=["picture.png"],
        )
        scale: float = Setting(1.0, description="strength; 0 is off")
        mask: Area | None = Setting(
            None,
            description="where it counts: a picture file, white there, or a box [left, top, right, "
            "bottom] in fractions of the picture",
        )
        image_encoder: str = Setting(
            "image_encoder",
            description="where the model brings no CLIP to see with: the folder of one, beside the "
            "weights, or with a / in it in the adapter's folder",
        )

    def setup(self, run: Run) -> Embedded:
        settings, network = self.settings, run.model.denoiser
        if reason := run.model.refuse_gradients():
            raise ModelError(f"plugin 'ip-adapter' cannot change this network: {reason}")
        pipeline = run.model.pipeline()
        if not isinstance(pipeline, IPAdapterMixin):
            raise ModelError(
                "plugin 'ip-adapter' steers Stable Diffusion 1.x, 2.x and XL; this model is run by "
                f"a {type(pipeline).__name__}"
            )
        place, file = check_place(settings.model, "IPAdapter: model"), PurePosixPath(settings.file)
        if Path(place).is_dir() and not Path(place, file).is_file():
            raise InputError(f"no IP-Adapter {place}/{file}; expected its weights")
        what, before = f"the IP-Adapter {place}/{file}", Loaded.of(network)
        picture = read_picture(settings.image, "IPAdapter: image")
        with fitting(what, network):
            pipeline.load_ip_adapter(
                place,
                subfolder="" if str(file.parent) == "." else str(file.parent),
                weight_name=file.name,
                image_encoder_folder=settings.image_encoder,
            )
            (embeds,) = pipeline.prepare_ip_adapter_image_embeds(
                picture, None, run.model.device, 1, True
            )  # (2, 1, ...): of no picture, and of this one
            network.encoder_hid_proj([embeds])  # an encoder of another width is told now
        for processor in Loaded.of(network).processors.values():
            processor.scale = [settings.scale]
        before.join(network)
        network.requires_grad_(False)
        return Embedded(embeds, self._mask(run))

    def network_inputs(
        self, inputs: Mapping[str, Any], step: Step, state: Embedded
    ) -> Mapping[str, Any]:
        added = dict(inputs.get("added_cond_kwargs", {}))
        told = dict(inputs.get("cross_attention_kwargs", {}))
        count, images = len(step.network_latents), step.run.num_images
        embeds = state.embeds if count == 2 * images else state.embeds[1:]
        embeds = embeds.repeat_interleave(images, dim=0)
        added["image_embeds"] = [*added.get("image_embeds", ()), embeds]
        told["ip_adapter_masks"] = [*told.get("ip_adapter_masks", ()), state.mask]
        return {**inputs, "added_cond_kwargs": added, "cross_attention_kwargs": told}

    def _mask(self, run: Run) -> Tensor | None:
        """(1, 1, 8H, 8W) in [0, 1]."""
        if self.settings.mask is None:
            return None
        size = cast("tuple[int, int]", (run.height, run.width))  # known in a run
        mask: Tensor = area_weights(self.settings.mask, size, what="IPAdapter: mask")
        return mask.to(run.model.device)


@dataclass(frozen=True)
class Embedded:
    """What an image encoder sees in the picture, in one run, and where that counts.

    Attributes:
        embeds: (2, 1, ...): of no picture, and of the picture.
        mask: (1, 1, 8H, 8W); None is everywhere.
    """

    embeds: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Loaded:
    """The IP-Adapters that a network has: diffusers' loader puts others in their place.

    Attributes:
        layers: one for each, which makes tokens of what an image encoder sees.
        processors: by the name of the attention.
    """

    layers: tuple[nn.Module, ...]
    processors: dict[str, Any]

    @classmethod
    def of(cls, network: Any) -> Loaded:
        """Those of a network."""
        found = network.attn_processors if network.encoder_hid_proj is not None else {}
        own = {name: p for name, p in found.items() if hasattr(p, "to_k_ip")}
        return cls(tuple(network.encoder_hid_proj.image_projection_layers) if own else (), own)

    def join(self, network: Any) -> None:
        """Put these before the one that the network has now."""
        if not self.layers:
            return
        projection, now = network.encoder_hid_proj, Loaded.of(network)
        projection.image_projection_layers = nn.ModuleList([*self.layers, *now.layers])
        for name, before in self.processors.items():
            processor = now.processors[name]
            for part in ("to_k_ip", "to_v_ip"):
                both = [*getattr(before, part), *getattr(processor, part)]
                setattr(processor, part, nn.ModuleList(both))
            processor.scale = [*before.scale, *processor.scale]
            processor.num_tokens = [*before.num_tokens, *processor.num_tokens]
