"""Networks that steer: the plugins `controlnet` and `lora`."""

from .controlnet import ControlNet
from .lora import Lora

__all__ = ["ControlNet", "Lora"]
