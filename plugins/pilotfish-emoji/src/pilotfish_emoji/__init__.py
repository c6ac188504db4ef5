"""A small trained latent diffusion model of emoji, in the diffusers folder layout."""

from pilotfish_emoji.names import BACKGROUNDS, FOLDER, HELD_OUT_PAIRS, OBJECTS, STYLES

__all__ = ["BACKGROUNDS", "FOLDER", "HELD_OUT_PAIRS", "OBJECTS", "STYLES"]
