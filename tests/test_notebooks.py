"""The notebooks run, shrunk, cell by cell, and are notebooks."""

import contextlib
import io
from pathlib import Path

import pytest

import pilotfish

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def emoji():
    pytest.importorskip("pilotfish_emoji")
    return pilotfish.load()


@pytest.fixture
def played(emoji, monkeypatch):
    """What a notebook has printed, and its names, with few steps."""
    monkeypatch.setattr(pilotfish, "load", lambda: emoji)

    def play(name, steps):
        text = (FOLDER / name).read_text("utf-8")
        first, last = text.index("STEPS"), text.index("\n", text.index("STEPS"))
        head = text[:first] + text[first:last].replace("25", str(steps)).replace(" 5,", " 2,")
        short = head + text[last:]
        assert short != text
        printed, names = io.StringIO(), {"__name__": "notebook"}
        with contextlib.redirect_stdout(printed):
            exec(compile(short, name, "exec"), names)
        return printed.getvalue(), names

    return play


def test_the_first_hour_guides_watches_and_writes_a_loss(played):
    pytest.importorskip("pilotfish_color")
    printed, names = played("first_hour.py", 4)
    assert "blue: loss " in printed and "[[plugins]]" in printed
    pixels = {name: names[name].latents.mean() for name in ("plain", "blue", "warm", "both")}
    assert len({float(value) for value in pixels.values()}) == 4
    for name, guide in (("blue", "blue"), ("warm", "Warmth")):
        losses = names[name].trace.losses(guide)
        assert len(losses) == 4 and losses[-1] < losses[0]
    assert names["both"].trace.cosines("blue", "Warmth")[0] < 0
    assert 0 < len(names["previews"]) < 4


def test_the_talks_loop_is_the_preset_to_the_bit(played):
    pytest.importorskip("pilotfish_color")
    printed, names = played("talk.py", 3)
    assert "equal to the bit: True" in printed
    assert len(names["losses"]) == 2
    assert names["losses"] == pytest.approx(names["ours"].trace.losses("blue"), rel=1e-5)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupytext_reads_a_notebook_of_text_and_code(path):
    jupytext = pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    notebook = jupytext.read(path)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and kinds.count("code") >= 5
    assert notebook.metadata.kernelspec.name == "python3"
