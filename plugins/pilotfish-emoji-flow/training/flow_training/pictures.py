"""The flow model's pictures: the emoji world with more objects, and more of them plain."""

from typing import Final

from emoji_training.world import World
from pilotfish_emoji_flow.names import GLYPHS, HELD_OUT_PAIRS

WORLD: Final = World(
    GLYPHS, HELD_OUT_PAIRS, thing_share=0.02, unnamed_share=0.05, styled_share=0.35
)
