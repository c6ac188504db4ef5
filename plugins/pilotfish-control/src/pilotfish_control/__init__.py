"""Networks that steer: the plugins `controlnet`, `lora` and `ip-adapter`."""

from .controlnet import ControlNet
from .ip_adapter import IPAdapter
from .lora import Lora

__all__ = ["ControlNet", "IPAdapter", "Lora"]
