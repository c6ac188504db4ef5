"""What the package holds beside the weights: the names, and no training."""

from __future__ import annotations

import subprocess
import sys

import pilotfish_emoji
from pilotfish_emoji_flow import BACKGROUNDS, HELD_OUT_PAIRS, OBJECTS, STYLES
from pilotfish_emoji_flow.names import GLYPHS, MORE


def test_ninety_six_objects_ten_backgrounds_three_styles() -> None:
    assert [len(set(names)) for names in (OBJECTS, BACKGROUNDS, STYLES)] == [96, 10, 3]


def test_the_emoji_models_objects_come_first_in_their_order() -> None:
    assert OBJECTS[: len(pilotfish_emoji.OBJECTS)] == pilotfish_emoji.OBJECTS
    assert OBJECTS[len(pilotfish_emoji.OBJECTS) :] == tuple(MORE)


def test_every_object_has_a_glyph_of_its_own() -> None:
    assert len(set(GLYPHS.values())) == len(OBJECTS)


def test_the_emoji_models_held_out_pairs_are_held_out_here_too() -> None:
    assert set(pilotfish_emoji.HELD_OUT_PAIRS) < set(HELD_OUT_PAIRS)


def test_held_out_pairs_are_a_tenth_of_all_pairs() -> None:
    assert len(set(HELD_OUT_PAIRS)) * 10 == len(OBJECTS) * len(BACKGROUNDS)
    objects, backgrounds = zip(*HELD_OUT_PAIRS, strict=True)
    assert (set(objects), set(backgrounds)) == (set(OBJECTS), set(BACKGROUNDS))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, pilotfish_emoji_flow; "
        "print({'torch', 'PIL', 'diffusers', 'flow_training'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"
