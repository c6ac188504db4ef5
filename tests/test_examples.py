"""Every example runs, shrunk, on the emoji model, and reacts; the gallery shows them all."""

import ast
import importlib.util
import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pilotfish

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))
GALLERY = ROOT / "docs" / "gallery"
# How a run is made short, and what is changed to see whether the picture reacts to it.
SHRUNK = {
    "image_to_image": {"steps": 5},  # so that the least strength is still a step
    "schedulers": {"steps": (1, 2, 3, 4, 5), "reference": 6},
    "clip_guidance": {"steps": 1},
    "textual_inversion": {"steps": 2, "training": 2},
}
CHANGED = {"embeddings": {"other": "skunk"}}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(name):
    return load(ROOT / "examples" / f"{name}.py")


@pytest.fixture(scope="module")
def make_gallery():
    return load(ROOT / "docs" / "make_gallery.py")


@pytest.fixture(scope="module")
def emoji():
    return pilotfish.load()


@pytest.fixture
def make(emoji, monkeypatch, tmp_path):
    """Runs an example, shrunk, on a model that is loaded once; gives its picture."""
    monkeypatch.setattr(pilotfish, "load", lambda model: emoji)

    def run(name, **changed):
        main = example(name).main
        known = inspect.signature(main).parameters
        shrunk = SHRUNK.get(name, {"steps": 2} if "steps" in known else {})
        with Image.open(main(out=str(tmp_path), **{**shrunk, **changed})) as picture:
            return picture.convert("RGB")

    return run


def cells(picture, rows, columns):
    """The pictures of a `view.table` of squares of 128 pixels, from its lower right corner on."""
    side, gap = 128, 8
    values = np.asarray(picture, float)
    starts = [
        [length - (count - i) * (side + gap) for i in range(count)]
        for length, count in zip(values.shape[:2], (rows, columns), strict=True)
    ]
    return [[values[y : y + side, x : x + side] for x in starts[1]] for y in starts[0]]


def in_strip(picture):
    """The pictures of a `view.strip` of squares."""
    values = np.asarray(picture, float)
    return [values[16:272, left : left + 256] for left in range(16, values.shape[1] - 16, 272)]


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_makes_the_gallerys_picture_and_reacts(name, make, make_gallery):
    picture = make(name)
    (shown,) = GALLERY.glob(f"{name}.*")
    with Image.open(shown) as kept:
        assert make_gallery.fitted(picture.size) == kept.size
    other = make(name, **CHANGED.get(name, {"seed": 44}))
    assert other.size == picture.size
    assert np.abs(np.subtract(picture, other, dtype=int)).max() > 20


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_one_idea_on_a_screen(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert 20 <= len(text.splitlines()) <= 60
    assert text.endswith('\n\nif __name__ == "__main__":\n    print(main(*sys.argv[1:2]))\n')
    told = ast.get_docstring(ast.parse(text))
    assert re.search(r"\n\n\d+ seconds and \d\.\d GB on two CPU cores\.$", told)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_takes_any_model_and_has_defaults_for_all_else(name):
    main = example(name).main
    first, *others = inspect.signature(main).parameters.values()
    assert first.name == "model" and first.default is None
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in others)
    with pytest.raises(pilotfish.InputError, match=r"no model folder \./nowhere"):
        main("./nowhere")


def test_the_gallery_is_the_page_that_the_examples_give(make_gallery):
    assert sorted(name for names in make_gallery.ORDER.values() for name in names) == EXAMPLES
    page = (GALLERY.parent / "gallery.md").read_text()
    assert page == make_gallery.page(), "run python docs/make_gallery.py"


def test_the_gallery_has_a_small_picture_of_each_example_and_no_other():
    files = list(GALLERY.iterdir())
    assert sorted(file.stem for file in files) == EXAMPLES
    assert max(file.stat().st_size for file in files) < 120_000
    assert sum(file.stat().st_size for file in files) < 1_200_000


def test_the_bare_loop_and_pilotfish_make_the_same_pictures(make):
    bare, ours = cells(make("loop"), 2, 5)
    assert np.array_equal(bare, ours)
    assert not np.array_equal(ours[0], ours[-1])


def test_a_swapped_token_is_the_other_words_prompt(make):
    for plain, swapped, other in cells(make("token_swap"), 2, 3):
        assert np.array_equal(swapped, other)
        assert not np.array_equal(swapped, plain)


def test_a_stronger_blue_guide_makes_more_blue(make):
    blues = [picture[..., 2].mean() for picture in in_strip(make("blue"))]
    assert blues == sorted(set(blues))


def test_each_plugin_of_the_stack_changes_the_picture(make):
    pictures = in_strip(make("stack"))
    changes = [np.abs(a - b).max() for a, b in itertools.pairwise(pictures)]
    assert len(changes) == 4 and min(changes) > 20


def test_each_of_the_ten_plugins_did_something_and_the_example_says_what(make, capsys):
    make("ten_plugins")
    said = capsys.readouterr().out
    changes = re.findall(r"left out, the picture changes by ([\d.]+)%", said)
    assert len(changes) == 10 and min(map(float, changes)) > 0
    assert re.findall(r"^([\w-]+): loss ", said, flags=re.M) == ["palette", "blue", "clip"]


@pytest.mark.slow
def test_a_word_that_has_been_trained_no_longer_means_what_it_began_with(make):
    _, before, after = cells(make("textual_inversion"), 3, 4)
    assert not any(map(np.array_equal, before, after))
