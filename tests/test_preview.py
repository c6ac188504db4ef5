"""The small picture above the progress bar of a terminal."""

import io
import warnings
from types import SimpleNamespace

import pytest
from PIL import Image
from tqdm import tqdm

from pilotfish.cli import preview


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr(preview, "sys", SimpleNamespace(stderr=stderr))
    for name, value in {"COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stderr


def test_a_sign_is_two_pixels():
    picture = Image.new("RGB", (1, 4), "red")
    picture.putpixel((0, 1), (0, 0, 255))
    red, blue = "255;0;0", "0;0;255"
    assert preview.half_blocks(picture) == [
        f"\x1b[38;2;{red};48;2;{blue}m▀\x1b[0m",
        f"\x1b[38;2;{red};48;2;{red}m▀\x1b[0m",
    ]


@pytest.mark.parametrize(
    "change", [{"COLORTERM": ""}, {"NO_COLOR": "1"}, {"COLUMNS": "39"}, {"LINES": "20"}]
)
def test_it_is_drawn_only_where_there_are_colours_and_room(terminal, monkeypatch, change):
    assert preview.fits()
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert not preview.fits()


def test_it_is_not_drawn_into_a_pipe(terminal, monkeypatch):
    monkeypatch.setattr(preview, "sys", SimpleNamespace(stderr=io.StringIO()))
    assert not preview.fits()


def test_each_picture_is_drawn_over_the_last_and_warnings_come_after(terminal, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", lambda text, *_: terminal.write(f"!{text}\n"))
    warnings.simplefilter("always")
    steps = [
        SimpleNamespace(preview=lambda c=c: [Image.new("RGB", (64, 32), c)])
        for c in ("red", "blue")
    ]
    with tqdm(total=2, file=terminal) as bar, preview.thumbnail(bar) as draw:
        draw(steps[0])
        warnings.warn("look here", stacklevel=1)
        draw(steps[1])
    text = terminal.getvalue()
    first, second = text.split("\x1b[8A")  # 16 pixels are 8 lines
    assert first.count("255;0;0") == second.count("0;0;255") == 2 * 32 * 8
    assert "look here" in second and second.index("look here") > second.rindex("0;0;255")
