"""The core's own behaviour as plugins: where a run starts, what it keeps, and how it steps."""

from .guidance import CfgInterval, CfgRescale
from .img2img import Img2Img
from .inpaint import Inpaint
from .optimize import Optimize
from .threshold import Threshold

__all__ = ["CfgInterval", "CfgRescale", "Img2Img", "Inpaint", "Optimize", "Threshold"]
