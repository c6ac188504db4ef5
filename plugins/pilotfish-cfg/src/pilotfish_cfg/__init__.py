"""What replaces or tames classifier-free guidance, one plugin a method; they stack."""

from .guidance import CfgInterval, CfgRescale
from .threshold import Threshold

__all__ = ["CfgInterval", "CfgRescale", "Threshold"]
