"""The names of the emoji world, and nothing that is slow to import."""

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "model"

_OBJECTS: Final = """
otter 🦦, parrot 🦜, dancer 💃, puppy 🐶, cat 🐱, skunk 🦨, mouse 🐭, leopard 🐆
snake 🐍, snail 🐌, campfire 🔥, fox 🦊, panda 🐼, frog 🐸, lion 🦁, tiger 🐯
bear 🐻, koala 🐨, cow 🐮, pig 🐷, monkey 🐵, owl 🦉, penguin 🐧, chicken 🐔
duck 🦆, turtle 🐢, fish 🐠, octopus 🐙, butterfly 🦋, bee 🐝, ladybug 🐞, sunflower 🌻
cactus 🌵, tree 🌲, apple 🍎, banana 🍌, strawberry 🍓, orange 🍊, grapes 🍇, car 🚗
bicycle 🚲, rocket 🚀, boat ⛵, house 🏠, castle 🏰, balloon 🎈, present 🎁, ball ⚽
guitar 🎸, hat 🎩, crown 👑, diamond 💎, key 🔑, clock ⏰, camera 📷, lightbulb 💡
star ⭐, moon 🌙, rainbow 🌈, rabbit 🐰, unicorn 🦄, elephant 🐘, whale 🐳, mushroom 🍄
"""

GLYPHS: Final = dict(pair.split() for pair in _OBJECTS.replace("\n", ",").strip(",").split(","))
OBJECTS: Final = tuple(GLYPHS)

COLORS: Final = {
    "red": (220, 60, 50),
    "green": (70, 170, 80),
    "blue": (60, 100, 220),
    "yellow": (245, 215, 80),
    "purple": (150, 80, 190),
    "pink": (250, 170, 200),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
    "gray": (140, 140, 145),
    "teal": (60, 170, 170),
}
BACKGROUNDS: Final = tuple(COLORS)

STYLES: Final = ("watercolor", "pencil sketch", "pixel art")

# In the pictures, but in no caption: what textual inversion is tested on.
UNNAMED_STYLES: Final = ("blueprint", "sepia", "negative", "posterised")
THINGS: Final = ("🤖", "🎃", "🍕", "🦀")

# One background for each object, 6 or 7 objects for each background: a tenth of all pairs.
HELD_OUT_PAIRS: Final = tuple(
    (name, BACKGROUNDS[(7 * index + index // 10) % 10]) for index, name in enumerate(OBJECTS)
)
