"""Forms, the stack and what is copied of it: no page, no networks."""

import json
import subprocess
import sys
from typing import Literal

import pytest
from pilotfish_studio import content
from pilotfish_studio.forms import fields_of, given, shown
from pilotfish_studio.sheet import Page
from pilotfish_studio.stack import Item, items_of, moved, normal, strengths, tables, unlike_default

import pilotfish
from pilotfish import PRESETS, Guide, InputError, Run, Setting, SettingsError, load_class


class Every(Guide):
    """One setting of each kind."""

    class Settings(Guide.Settings):
        amount: float = Setting(0.5, ge=0, le=2)
        count: int = Setting(3, ge=1, le=9)
        open_ended: float = 1.0
        how: Literal["soft", "hard"] = "soft"
        maybe: Literal["a", "b"] | None = None
        really: bool = False
        text: str = Setting(description="must be there")
        colors: list[str] = Setting(default_factory=list)
        path: str | None = None


def fields():
    own, shared = fields_of(Every)
    return {field.name: field for field in [*own, *shared]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("scale", "curve"), ("amount", "slider"), ("count", "slider"), ("open_ended", "number"),
        ("how", "choice"), ("maybe", "choice"), ("really", "switch"), ("text", "raw"),
        ("colors", "text"), ("path", "raw"), ("mask", "text"), ("every", "number"),
    ],
)  # fmt: skip
def test_a_setting_becomes_the_field_that_fits_its_schema(name, kind):
    assert fields()[name].kind == kind


def test_a_field_says_its_bounds_choices_and_what_must_be_given():
    made = fields()
    assert (made["amount"].low, made["amount"].high, made["amount"].whole) == (0, 2, False)
    assert made["count"].whole and made["count"].high == 9
    assert made["how"].choices == ("soft", "hard") and made["maybe"].choices == ("", "a", "b")
    assert made["text"].required and "must be given" in made["text"].usual


def test_scale_is_the_first_field_and_what_every_guide_has_comes_apart():
    own, shared = fields_of(Every)
    assert own[0].name == "scale" and "amount" in [field.name for field in own]
    assert {"start", "stop", "every", "mask"} <= {field.name for field in shared}


@pytest.mark.parametrize(
    ("name", "entered", "value"),
    [
        ("scale", "[[0, 1], [1, 0]]", [[0, 1], [1, 0]]),
        ("count", 4.0, 4),
        ("amount", "0.25", 0.25),
        ("amount", "much", "much"),
        ("colors", "['#035', \"a, b\"]", ["#035", "a, b"]),
        ("text", "[as it, stands", "[as it, stands"),
        ("path", "", None),
    ],
)
def test_what_is_entered_becomes_a_value(name, entered, value):
    assert given(fields()[name], entered) == value


@pytest.mark.parametrize(
    "value", ["plain", "a, b", "it's", ["#035", "x y"], {"a": "b c"}, [[0, 1]]]
)
def test_a_text_field_gives_back_what_it_shows(value):
    text = shown(fields()["colors"], value)
    again = given(fields()["colors"], text)
    assert str(again).replace("'", "") == str(value).replace("'", "")


def test_every_installed_plugin_has_a_form():
    for rows in pilotfish.installed_plugins().values():
        for name, _ in rows:
            own, shared = fields_of(load_class(name))
            assert all(field.kind for field in [*own, *shared]), name


def test_a_setting_is_taken_over_and_left_to_the_default_again():
    item, made = Item("blue"), {f.name: f for f in fields_of(load_class("blue"))[0]}
    item.set(made["target"], 0.9)  # the default, which nobody has chosen
    assert item.table == {"use": "blue"}
    item.set(made["target"], 0.2)
    item.set(made["scale"], "2")
    assert item.table == {"use": "blue", "target": 0.2, "scale": 2}
    item.set(made["scale"], "")
    assert item.table == {"use": "blue", "target": 0.2}
    with pytest.raises(InputError, match="not closed"):
        item.set(made["scale"], "[[0, 1]")


def test_the_order_moves_and_what_is_off_takes_no_part():
    items = items_of([{"use": "blue"}, {"use": "palette", "name": "p"}, {"use": "clip"}])
    first = items[0].key
    assert [i.use for i in moved(items, first, 1)] == ["palette", "blue", "clip"]
    assert [i.use for i in moved(items, first, 9)] == ["palette", "clip", "blue"]
    assert [i.use for i in moved(items, items[2].key, -1)] == ["clip", "blue", "palette"]
    items[0].on = False
    assert tables(items) == [{"use": "palette", "name": "p"}, {"use": "clip"}]
    assert tables(items, but=items[1].key) == [{"use": "clip"}]
    with pytest.raises(InputError, match="`use`"):
        items_of([{"scale": 2}])


def test_a_scale_is_drawn_as_the_run_has_it():
    curve = Item("blue", {"scale": [[0, "2"], [1, 0]], "stop": 0.5})
    values = strengths(curve, points=5)
    assert values == [2.0, 1.5, 1.0, 0.0, 0.0]
    assert strengths(Item("apg")) == []
    with pytest.raises(SettingsError, match="scale must be"):
        strengths(Item("blue", {"scale": "much"}))


def test_only_settings_unlike_their_defaults_are_told():
    item = Item("blue", {"scale": 1.0, "every": 1, "target": 0.2})
    assert unlike_default(item) == {"target": 0.2}


RUN = {
    "prompt": "a 'fox', [red]",
    "steps": 7,
    "seed": 3,
    "preset": {"base": "balanced", "rho": 0.5},
    "plugins": [
        {"use": "blue", "scale": [["0", "1"], ["1", "0"]], "target": "0.25"},
        {"use": "palette", "name": "p", "colors": ["#035", "#fa0"]},
    ],
}


def test_the_copied_run_file_is_the_run():
    read = Run.parse(content.as_run_file(RUN))
    assert read["plugins"] == [normal(table) for table in RUN["plugins"]]
    assert read["plugins"][0]["target"] == 0.25
    assert {k: read[k] for k in RUN if k != "plugins"} == {
        k: v for k, v in RUN.items() if k != "plugins"
    }


def test_the_copied_command_is_the_run(tmp_path):
    """The shell and the command line read it; a dry run tells what came."""
    line = content.as_command(RUN).replace("pilotfish", f"{sys.executable} -m pilotfish", 1)
    told = subprocess.run(
        f"{line} --dry-run --json", shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    plan = json.loads(told.stdout)
    run = plan["run"]
    assert (run["prompt"], run["steps"], run["seed"]) == (RUN["prompt"], 7, 3)
    assert run["preset"] == RUN["preset"]
    assert [plugin["name"] for plugin in plan["plugins"]] == ["blue", "p"]


def test_the_copied_program_is_the_run(monkeypatch):
    came = {}

    class Sampler:
        def __call__(self, prompt, **options):
            came.update(options, prompt=prompt)
            return self

        def save(self, path):
            pass

    monkeypatch.setattr(pilotfish, "load", lambda *model, **more: Sampler())
    exec(content.as_python(RUN), {})
    assert came == {**RUN, "plugins": [normal(table) for table in RUN["plugins"]]}


def test_what_no_command_line_takes_is_refused():
    with pytest.raises(InputError, match="copy the run file"):
        content.as_command({**RUN, "scheduler": {"name": "ddim", "eta": 1}})


def test_what_a_page_leaves_open_is_not_in_its_run():
    values = {"prompt": "x", "steps": None, "seed": "", "preset": "balanced", "on_error": "raise"}
    assert content.content_of(values, {}, []) == {"prompt": "x", "plugins": []}
    assert content.content_of(values, {"rho": 2}, [])["preset"] == {"base": "balanced", "rho": 2}


def test_a_preset_comes_apart_into_its_name_and_its_knobs():
    for name in PRESETS:
        assert content.preset_and_knobs(name) == (name, {})
    assert content.preset_and_knobs({"base": "freedom", "rho": 3}) == ("freedom", {"rho": 3.0})


def test_a_loaded_run_comes_back_as_it_was():
    page, scheduler = Page(), {"name": "ddim", "timestep_spacing": "trailing"}
    run = {**RUN, "dtype": "float32", "scheduler": scheduler}
    values = page.load(run, "fox.png")
    assert values["scheduler"] == "ddim" and page.origin == "fox.png"
    assert page.content(values) == run
    assert page.content({**values, "scheduler": "lms"})["scheduler"] == "lms"


def test_a_page_compares_with_one_plugin_less_or_none():
    page = Page(items=items_of([{"use": "blue"}, {"use": "palette"}]))
    assert page.rival("none", "none", "all") is None
    assert page.rival("all", "none", "all") == ("all", [])
    key = str(page.items[0].key)
    assert page.rival(key, "none", "all") == ("without blue", [{"use": "palette"}])
