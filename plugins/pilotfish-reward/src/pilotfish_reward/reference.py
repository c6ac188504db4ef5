"""Losses of likeness to a given picture, as networks see it: `clip-style` and `perceptual`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlparse

import torch
from torch import Tensor

from pilotfish import (
    Guide,
    ModelError,
    Setting,
    SettingsError,
    mend_torchvision,
    pixels,
    read_picture,
)

from .clips import CONFIG
from .files import fill, read_tensors
from .networks import Looks, Network, shared, wide

if TYPE_CHECKING:
    from pilotfish import Run, Step

OWN = "clip"  # in a diffusion model's folder, the folder of its own CLIP
TORCHVISION = "torchvision"
TRUNKS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}  # torchvision's names


class ClipStyle(Guide):
    """Give the picture the style of a given one: what of CLIP's features goes together.

    After FreeDoM (Yu et al. 2023, arXiv 2303.09833), whose style loss compares the Gram matrices
    (Gatys et al. 2016) of an inner layer of CLIP's image encoder. We differ: the squared distance
    in place of its root, as a part of the given picture's own square, so that neither the number of
    features nor their size counts.
    """

    class Settings(Guide.Settings):
        image: Path = Setting(description="a picture file to be like", examples=["picture.png"])
        compare: Literal["gram", "features"] = Setting(
            "gram",
            description="gram: which features go together, wherever they are, the style; features: "
            "what is where, the content",
        )
        layer: int = Setting(
            2, ge=0, description="which inner layer, from 0; of a ResNet, which stage, 0 to 4"
        )
        model: str | None = Setting(
            None,
            description="a folder as open_clip writes it, open_clip's name of a model, or "
            "'hf-hub:ID'; the one in the diffusion model's own folder, where not given",
        )
        pretrained: str | None = Setting(
            None, description="with a name: open_clip's name of a checkpoint, or a file"
        )

    def setup(self, run: Run) -> tuple[InnerClip, Tensor]:
        settings = self.settings
        clip = InnerClip.of(settings.model, settings.pretrained, run)
        picture = read_picture(settings.image, "ClipStyle: image")
        with torch.no_grad():
            return clip, self._seen(clip, pixels(picture).to(run.model.device))

    def _seen(self, clip: InnerClip, images: Tensor) -> Tensor:
        features = clip.features(images, self.settings.layer)
        return gram(features) if self.settings.compare == "gram" else features

    def loss_guidance(self, step: Step, state: tuple[InnerClip, Tensor]) -> Tensor:
        clip, wanted = state
        difference = self._seen(clip, step.image) - wanted
        loss: Tensor = difference.square().sum(dim=(1, 2)) / wanted.square().sum()
        return loss


def gram(features: Tensor) -> Tensor:
    """How features (B, N, C) go together, on average over the places: (B, C, C)."""
    return features.mT @ features / features.shape[1]


class InnerClip(Network):
    """The image encoder of an open_clip model, layer by layer."""

    @classmethod
    def of(cls, model: str | None, pretrained: str | None, run: Run) -> InnerClip:
        """The one that is named, loaded once for all guides of the same.

        Raises:
            SettingsError: none is named, and the diffusion model brings none.
            ModelError: open_clip cannot load it.
        """
        name, device, dtype = inner_name(model, run), run.model.device, run.model.dtype

        def make() -> InnerClip:
            mend_torchvision()
            import open_clip

            tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
            try:
                clip = open_clip.create_model(
                    name,
                    pretrained,
                    force_quick_gelu=bool(tag.get("quick_gelu")),  # else as the name says
                    require_pretrained=True,
                )
            except Exception as error:  # whatever a loader of foreign files raises
                cause = " ".join(str(error).split())
                raise ModelError(
                    f"ClipStyle: open_clip cannot load model={name!r}, pretrained={pretrained!r}: "
                    f"{cause}"
                ) from error
            return cls(
                clip.visual, looks_of(open_clip.get_model_preprocess_cfg(clip)), device, dtype
            )

        return shared((cls, name, pretrained, str(device), dtype), make)

    def features(self, images: Tensor, layer: int) -> Tensor:
        """What a layer answers to images (B, 3, H, W) in about [0, 1]: (B, places, C).

        Raises:
            SettingsError: there is no such layer.
        """
        return self.see(images, partial(self._inner, layer=layer)).flatten(2).mT

    def _inner(self, shown: Tensor, layer: int) -> Tensor:
        try:
            answer = self.module.forward_intermediates(
                shown, indices=[layer], stop_early=True, intermediates_only=True
            )
        except AssertionError as error:
            raise SettingsError(
                f"ClipStyle: layer must be one of this CLIP's; got {layer} ({error})"
            ) from error
        inner: Tensor = answer["image_intermediates"][0]
        return inner


def inner_name(model: str | None, run: Run) -> str:
    """open_clip's name of a model.

    Raises:
        SettingsError: none is named, and the diffusion model brings none.
    """
    folder = getattr(run.model, "folder", None)
    if model is None and folder is not None and (Path(folder) / OWN / CONFIG).is_file():
        model = str(Path(folder) / OWN)
    if model is None:
        raise SettingsError(
            "ClipStyle: model must be named, since the diffusion model brings no CLIP: "
            "model=ViT-B-16 with pretrained=openai is FreeDoM's, and is downloaded (600 MB)"
        )
    return f"local-dir:{model}" if Path(model).is_dir() else model


def looks_of(config: Mapping[str, Any]) -> Looks:
    """How an open_clip model wants its pictures; those of another shape are squeezed."""
    size = config["size"]
    return Looks(
        (size, size) if isinstance(size, int) else tuple(size),
        tuple(config["mean"]),
        tuple(config["std"]),
        fit="squash",
        kernel="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
    )


class Perceptual(Guide):
    """Make the picture look to people like a given one: LPIPS.

    Zhang et al. 2018, arXiv 1801.03924: the distance of the features of a network that knows
    pictures, weighed by layers and channels as people's judgements taught. The weights (version
    0.1) come with the package `lpips`, those of the network from torchvision.
    """

    class Settings(Guide.Settings):
        image: Path = Setting(description="a picture file to look like", examples=["picture.png"])
        net: Literal["vgg", "alex", "squeeze"] = Setting(
            "vgg", description="the network: vgg is the better loss, alex the better measure"
        )
        model: str | None = Setting(
            None,
            description="its weights for ImageNet: torchvision's file, or 'torchvision', which "
            "downloads it; the one that was downloaded before, where not given",
        )

    def setup(self, run: Run) -> tuple[Lpips, list[Tensor]]:
        size = cast("tuple[int, int]", (run.height, run.width))  # known once a run is set up
        picture = read_picture(self.settings.image, "Perceptual: image", size=size)
        lpips = Lpips.of(self.settings.net, self.settings.model, run)
        with torch.no_grad():
            return lpips, lpips.features(pixels(picture).to(run.model.device))

    def loss_guidance(self, step: Step, state: tuple[Lpips, list[Tensor]]) -> Tensor:
        lpips, wanted = state
        return lpips.distance(lpips.features(step.image), wanted)


class Lpips:
    """The network of the package `lpips`, frozen, at least float32."""

    def __init__(self, module: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.module = module.to(device, dtype).requires_grad_(False)
        self.dtype = dtype

    @classmethod
    def of(cls, net: str, model: str | None, run: Run) -> Lpips:
        """The one of that name, loaded once for all guides of the same.

        Raises:
            ModelError: its weights cannot be read, or are not whole.
        """
        device, dtype = run.model.device, wide(run.model.dtype)
        return shared(
            (cls, net, model, str(device), dtype),
            lambda: cls(read_lpips(net, model), device, dtype),
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images (B, 3, H, W) in about [0, 1]: (B, C, h, w) of each layer, of length one."""
        scaled = self.module.scaling_layer(2 * images.to(self.dtype) - 1)
        # lpips divides by a root whose slope is infinite where all features are 0: its gradient is
        # NaN there. This norm's is 0.
        return [
            layer / (torch.linalg.vector_norm(layer, dim=1, keepdim=True) + 1e-10)
            for layer in self.module.net(scaled)
        ]

    def distance(self, some: list[Tensor], others: list[Tensor]) -> Tensor:
        """Equation 1 of the paper: (B,), 0 for equal pictures."""
        layers = zip(self.module.lins, some, others, strict=True)
        parts = [weigh((a - b).square()).mean(dim=(1, 2, 3)) for weigh, a, b in layers]
        return torch.stack(parts).sum(dim=0)


def read_lpips(net: str, model: str | None) -> Any:
    """The network of `lpips`, with its linear layers, on the trunk that is named.

    Raises:
        ModelError: the trunk's weights cannot be read, or are not whole.
    """
    mend_torchvision()
    import lpips

    with warnings.catch_warnings():
        # It asks torchvision for a network in a way that is deprecated; of no weights, here.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    tensors = trunk_tensors(net, model)
    # slice2.3.weight there is features.3.weight in torchvision.
    own = {f"features.{name.split('.', 1)[1]}": name for name in network.net.state_dict()}
    fill(network.net, {own[n]: t for n, t in tensors.items() if n in own}, f"trunk {net} of LPIPS")
    return network


def trunk_tensors(net: str, model: str | None) -> Mapping[str, Tensor]:
    """torchvision's weights for ImageNet.

    Raises:
        ModelError: they cannot be read.
    """
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(TRUNKS[net])["IMAGENET1K_V1"]
    file = Path(urlparse(weights.url).path).name
    path = Path(model or Path(torch.hub.get_dir()) / "checkpoints" / file)
    try:
        if model == TORCHVISION:
            downloaded: Mapping[str, Tensor] = weights.get_state_dict(progress=False)
            return downloaded
        return read_tensors(path)
    except Exception as error:  # whatever a loader of foreign files raises
        hint = f"; model={TORCHVISION} downloads it" if model is None else ""
        raise ModelError(
            f"Perceptual: model: {model or path} cannot be read{hint}. "
            f"{type(error).__name__}: {error}"
        ) from error
