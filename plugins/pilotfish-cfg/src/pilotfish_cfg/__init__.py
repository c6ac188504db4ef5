"""What replaces or tames classifier-free guidance, one plugin a method; they stack."""

from .directions import Apg, CfgNorm, CfgZeroStar, Mambo, Tcfg
from .frequencies import Fdg
from .guidance import CfgInterval, CfgRescale
from .nag import Nag
from .plus_plus import CfgPlusPlus
from .threshold import Threshold

__all__ = [
    "Apg",
    "CfgInterval",
    "CfgNorm",
    "CfgPlusPlus",
    "CfgRescale",
    "CfgZeroStar",
    "Fdg",
    "Mambo",
    "Nag",
    "Tcfg",
    "Threshold",
]
