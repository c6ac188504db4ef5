"""What the package holds beside the weights: the names, and no training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from pilotfish_emoji import BACKGROUNDS, FOLDER, HELD_OUT_PAIRS, OBJECTS, STYLES

PLUGIN = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in the wheel, built from a copy whose files are empty."""
    copy = tmp_path_factory.mktemp("copy")
    for path in (*PLUGIN.glob("src/*/**/*"), *PLUGIN.glob("training/**/*")):
        if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts):
            (copy / path.relative_to(PLUGIN)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(PLUGIN)).touch()
    for name in ("pyproject.toml", "README.md"):
        (copy / name).write_bytes((PLUGIN / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (file,) = copy.glob("*.whl")
    return set(ZipFile(file).namelist())


def test_the_wheel_holds_the_whole_model_and_its_card(wheel: set[str]) -> None:
    files = {f"pilotfish_emoji/model/{p.relative_to(FOLDER).as_posix()}" for p in model_files()}
    assert files <= wheel
    assert "pilotfish_emoji/model/README.md" in files


def model_files() -> list[Path]:
    return [path for path in FOLDER.rglob("*") if path.is_file()]


def test_the_wheel_holds_the_folders_place_the_names_and_the_judge_and_no_training(
    wheel: set[str],
) -> None:
    code = {name for name in wheel if name.endswith((".py", ".typed"))}
    assert code == {
        f"pilotfish_emoji/{name}" for name in ("__init__.py", "judge.py", "names.py", "py.typed")
    }


def test_the_packages_modules_import_no_training() -> None:
    code = (
        "import sys, pilotfish_emoji.judge; print({name.split('.')[0] for name in sys.modules} "
        "& {'emoji_training', 'diffusers', 'transformers', 'PIL'})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, pilotfish_emoji; print({'torch', 'PIL', 'diffusers'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"


def test_sixty_four_objects_ten_backgrounds_three_styles() -> None:
    assert [len(set(names)) for names in (OBJECTS, BACKGROUNDS, STYLES)] == [64, 10, 3]


def test_held_out_pairs_are_a_tenth_of_all_pairs() -> None:
    assert len(set(HELD_OUT_PAIRS)) * 10 == len(OBJECTS) * len(BACKGROUNDS)


def test_every_object_and_every_background_has_a_held_out_pair() -> None:
    objects, backgrounds = zip(*HELD_OUT_PAIRS, strict=True)
    assert set(objects) == set(OBJECTS)
    assert set(backgrounds) == set(BACKGROUNDS)
