"""A small trained flow model of emoji, in the layout of Stable Diffusion 3."""

from pilotfish_emoji_flow.names import BACKGROUNDS, FOLDER, HELD_OUT_PAIRS, OBJECTS, STYLES

__all__ = ["BACKGROUNDS", "FOLDER", "HELD_OUT_PAIRS", "OBJECTS", "STYLES"]
