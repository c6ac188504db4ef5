"""A small trained latent diffusion model of emoji, in the diffusers folder layout."""

from pilotfish import mend_torchvision
from pilotfish_emoji.names import BACKGROUNDS, FOLDER, HELD_OUT_PAIRS, OBJECTS, STYLES

mend_torchvision()  # modules of this package import diffusers by themselves

__all__ = ["BACKGROUNDS", "FOLDER", "HELD_OUT_PAIRS", "OBJECTS", "STYLES"]
