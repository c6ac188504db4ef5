"""What `plugins list` and `plugins show` tell a newcomer, on a wide terminal and a narrow one."""

import importlib.util
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pilotfish import Area, Guide, Plugin, Setting, Strength
from pilotfish.cli import main, sources, wording
from pilotfish.hooks import registry
from pilotfish.hooks.registry import installed, load_class

NAMES = sorted(installed())
HEADINGS = {
    "checks of the finished picture",
    "classifier-free guidance",
    "losses on the picture",
    "networks that steer",
    "perturbed guidance",
    "prompts",
    "rewards",
    "search among particles",
    "start and steps",
    "text and classifier guidance",
}


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *words: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    done = CliRunner().invoke(main, ["plugins", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def listed(text: str) -> dict[str, dict[str, str]]:
    """Each heading's plugins with their summaries, put together again."""
    found: dict[str, dict[str, str]] = {}
    for block in text.split("\n\n"):
        heading, *lines = block.splitlines()
        rows = found[heading] = {}
        for line in lines:
            if line[2] != " ":
                name, _, rest = line.strip().partition(" ")
                rows[name] = rest.strip()
            else:
                rows[name] += " " + line.strip()
    return found


@pytest.mark.parametrize("width", [60, 80, 100])
def test_each_plugin_stands_once_under_its_own_heading_with_its_own_whole_summary(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    text = printed(monkeypatch, width, "list")
    assert max(map(len, text.splitlines())) <= width
    found = listed(text)
    rows = [(h, name, said) for h in HEADINGS for name, said in found[h].items()]
    classes = {name: load_class(name) for name in NAMES}
    paragraphs = {name: (kind.__doc__ or "").split("\n\n")[0] for name, kind in classes.items()}
    summaries = {name: " ".join(said.split()) for name, said in paragraphs.items()}
    assert sorted(rows) == sorted((classes[n].heading, n, summaries[n]) for n in NAMES)
    packages = found["packages"]
    assert {e.distribution for (e,) in installed().values()} <= set(
        re.findall(r"pilotfish-[\w-]+", str(packages))
    )


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_plugin_takes_fits_and_has_no_words_of_python(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    text, _, pasted = printed(monkeypatch, width, "show", name).partition("\n\nuse it\n")
    assert max(map(len, text.splitlines())) <= width
    assert f'use = "{name}"' in pasted
    told, whole = text[text.index("\nsettings\n") :], " ".join(text.split())
    for setting, field in load_class(name).Settings.model_fields.items():
        assert re.search(rf"^  {setting} +\S", told, flags=re.M)
        assert f"{wording.takes(field)} ({wording.default(field)})" in whole
        assert " ".join((field.description or "").split()) in whole
        assert not re.search(r"\||\bNone|Annotated|\bstr\b|\bfloat\b|dict\b", wording.takes(field))


# ---- a source that is read, not run ----


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What is read of `module:Class` in a package of these files, none of which can be imported."""

    def about(target: str, **files: str) -> tuple[str, str] | None:
        package = tmp_path / "unread"
        package.mkdir()
        for name, text in {"__init__": "", **files}.items():
            (package / f"{name}.py").write_text(f"{text}\nraise RuntimeError('imported')\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        sources._statements.cache_clear()
        found = sources.about(target)
        assert not [name for name in sys.modules if name.startswith("unread")]
        return found

    return about


def test_a_class_is_found_through_the_modules_that_hand_it_on(read: Any) -> None:
    files = {
        "__init__": "from .inner import Fog as Mist",
        "inner": "from pilotfish import Guide\n"
        'class Fog(Guide):\n    """Less\n    to see.\n\n    More."""',
    }
    assert read("unread:Mist", **files) == ("losses on the picture", "Less to see.")


def test_a_heading_is_the_nearest_bases(read: Any) -> None:
    files = {
        "bases": "import pilotfish\nfrom typing import ClassVar\n"
        'class Base(pilotfish.Plugin):\n    heading: ClassVar[str] = "weather"',
        "own": 'from unread.bases import Base\nclass Fog(Base):\n    """Fog."""',
    }
    assert read("unread.own:Fog", **files) == ("weather", "Fog.")


@pytest.mark.parametrize(
    "text", ["", "class Fog(", "from .own import Fog", "from ....own import Fog", "Fog = make()"]
)
def test_what_is_no_class_in_its_source_is_left_to_its_package(read: Any, text: str) -> None:
    assert read("unread.own:Fog", own=text) is None


def test_a_plugin_without_a_heading_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"a": "tests_no_module:A", "blue": "pilotfish_color:Blue"}
    entries = tuple(EntryPoint(n, t, registry.PLUGIN_GROUP) for n, t in targets.items())
    monkeypatch.setattr(registry, "_entry_points", lambda group: entries)
    assert list(listed(printed(monkeypatch, 80, "list")))[:2] == ["losses on the picture", "others"]


# ---- words ----


class Everything(Guide):
    """One of each."""

    class Settings(Guide.Settings):
        below: float = Setting(1.0, lt=2)
        betas: tuple[Annotated[float, Setting(ge=0, lt=1)], float] = (0.9, 0.999)
        between: float = Setting(0.0, gt=-1, lt=1)
        box: Area | None = None
        curve: Strength = 1.0
        either: Literal["a", "b"] | dict[float, list[float]] = "a"
        few: list[Annotated[int | str, Setting(union_mode="left_to_right")]] | None = Setting(
            None, min_length=1, max_length=4
        )
        least: int | None = Setting(None, ge=3)
        most: int = Setting(1, le=3)
        object: Any = None
        part: float = Setting(0.5, gt=0, le=1)
        path: Path
        switch: bool = False

    def loss_guidance(self, step: Any) -> None: ...


def test_every_kind_of_setting_has_its_words() -> None:
    fields = Everything.Settings.model_fields
    said = {n: wording.takes(f) for n, f in fields.items() if n not in Guide.Settings.model_fields}
    assert said == {
        "below": "a number below 2",
        "betas": "2 numbers from 0 to below 1",
        "between": "a number between -1 and 1",
        "box": "a path to a picture, or a box [left, top, right, bottom]",
        "curve": "a number, or a curve [[progress, strength], ...]",
        "either": "a or b, or a table of numbers, each with a list of numbers",
        "few": "a list of whole numbers or texts; at least 1; at most 4",
        "least": "a whole number, 3 or more",
        "most": "a whole number, 3 or less",
        "object": "a text, or a Python object",
        "part": "a number above 0, up to 1",
        "path": "a path to a file",
        "switch": "true or false",
    }
    assert wording.default(fields["betas"]) == "default [0.9, 0.999]"
    assert wording.default(fields["path"]) == "must be given"
    assert wording.default(fields["object"]) == "optional"


def test_the_headings_are_those_of_the_classes() -> None:
    assert {load_class(name).heading for name in NAMES} == HEADINGS
    assert (Guide.heading, Plugin.heading) == ("losses on the picture", "others")


# ---- docs/shipped.md ----


@pytest.fixture(scope="module")
def make_shipped() -> Any:
    path = Path(__file__).parents[1] / "docs" / "make_shipped.py"
    spec = importlib.util.spec_from_file_location("make_shipped", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_plugin_that_ships_stands_under_its_heading_on_the_page(make_shipped: Any) -> None:
    sections = make_shipped.FILE.read_text().split("\n## ")
    for name in NAMES:
        heading = load_class(name).heading
        (section,) = [s for s in sections if s.startswith(heading[0].upper() + heading[1:] + "\n")]
        assert f"\n| `{name}` | " in section


def test_every_plugin_that_ships_has_one_picture_or_is_named_among_those_without(
    make_shipped: Any,
) -> None:
    shown = [name for names in make_shipped.SHEETS.values() for name in names]
    assert sorted([*shown, *make_shipped.PAIRS, *make_shipped.NO_PICTURE]) == NAMES
    page = make_shipped.FILE.read_text()
    files = {make_shipped.FILE.parent / target for target in re.findall(r"!\[.*?\]\((.*?)\)", page)}
    assert len(files) == len(make_shipped.SHEETS) + len(make_shipped.PAIRS)
    assert all(file.is_file() for file in files)


def test_the_pages_own_pictures_are_small_and_show_two_different_things(make_shipped: Any) -> None:
    files = sorted(make_shipped.PICTURES.iterdir())
    assert [file.stem for file in files] == sorted(make_shipped.PAIRS)
    assert sum(file.stat().st_size for file in files) < 400_000
    side, gap = make_shipped.SIDE, make_shipped.GAP
    for file in files:
        with Image.open(file) as both:
            assert both.size == (2 * side + gap, side)
            left, right = (
                both.convert("RGB").crop((x, 0, x + side, side)) for x in (0, side + gap)
            )
        assert np.abs(np.subtract(left, right, dtype=float)).mean() > 5
