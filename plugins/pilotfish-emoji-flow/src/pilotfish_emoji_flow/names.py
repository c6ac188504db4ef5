"""The names of the flow model's world: the emoji model's objects and 32 more."""

from pathlib import Path
from typing import Final

import pilotfish_emoji.names as emoji
from pilotfish_emoji.names import BACKGROUNDS, STYLES

FOLDER: Final = Path(__file__).parent / "model"

_MORE: Final = """
wolf 🐺, hamster 🐹, horse 🐴, raccoon 🦝, shark 🦈, flamingo 🦩, hedgehog 🦔, alien 👽
lemon 🍋, cherries 🍒, pineapple 🍍, watermelon 🍉, pear 🍐, peach 🍑, avocado 🥑, tomato 🍅
carrot 🥕, corn 🌽, eggplant 🍆, donut 🍩, cupcake 🧁, burger 🍔, heart ❤, bell 🔔
trophy 🏆, bus 🚌, tractor 🚜, drum 🥁, umbrella ☂, snowman ⛄, ghost 👻, tulip 🌷
"""

MORE: Final = dict(pair.split() for pair in _MORE.replace("\n", ",").strip(",").split(","))
GLYPHS: Final = {**emoji.GLYPHS, **MORE}
OBJECTS: Final = tuple(GLYPHS)

# One background for each object, the emoji model's own for those that it draws too.
HELD_OUT_PAIRS: Final = (
    *emoji.HELD_OUT_PAIRS,
    *(
        (name, BACKGROUNDS[(7 * index + index // 10) % 10])
        for index, name in enumerate(OBJECTS)
        if name in MORE
    ),
)

__all__ = ["BACKGROUNDS", "FOLDER", "GLYPHS", "HELD_OUT_PAIRS", "MORE", "OBJECTS", "STYLES"]
