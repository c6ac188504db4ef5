"""The core's own behaviour as plugins: where a run starts, what it keeps, and how it steps."""

from .img2img import Img2Img
from .inpaint import Inpaint
from .optimize import Optimize

__all__ = ["Img2Img", "Inpaint", "Optimize"]
