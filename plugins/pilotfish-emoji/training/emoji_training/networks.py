"""What this package takes from diffusers and transformers, imported when torchvision is mended."""

from pilotfish import mend_torchvision

mend_torchvision()

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

__all__ = [
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTokenizer",
    "DDIMScheduler",
    "DiffusionPipeline",
    "ResNetConfig",
    "ResNetForImageClassification",
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
]
