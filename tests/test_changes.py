"""One value of a run changed by its name."""

import copy

import pytest

from pilotfish import Guide, InputError, Setting, changed, split_values, with_value


class Warmth(Guide):
    class Settings(Guide.Settings):
        target: float = Setting(0.5)

    def loss_guidance(self, step):
        return step.rgb.mean(dim=(1, 2, 3)) - self.settings.target


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("steps=20", {"steps": 20}),
        (" seed = 3 ", {"seed": 3}),
        ("prompt=20", {"prompt": "20"}),
        ("rho=0.5", {"preset": {"base": "tfg", "rho": 0.5}}),
        ("plugins.blue.scale=2", {"plugins": [{"use": "blue", "scale": "2"}]}),
    ],
)
def test_one_value_is_changed_and_the_content_that_came_stays_as_it_is(change, expected):
    content = {"prompt": "a cat", "preset": "tfg", "plugins": ["blue:scale=1"]}
    before = copy.deepcopy(content)
    answer = changed(content, change)
    assert content == before
    kept = {"plugins": [{"use": "blue", "scale": "1"}]} if "plugins" in expected else {}
    assert answer == {**content, **kept, **expected}


def test_an_instance_gives_way_to_another_one_with_the_rest_of_its_settings():
    own = Warmth(target=0.25, every=2)
    (other,) = changed({"plugins": (own,)}, "plugins.Warmth.scale=3")["plugins"]
    assert (other.settings.target, other.settings.every, other.settings.scale) == (0.25, 2, 3)
    assert own.settings.scale != 3


def test_a_plugin_that_is_not_there_is_told():
    with pytest.raises(InputError, match="no plugin in this run called 'blue'"):
        changed({}, "plugins.blue.scale=2")


def test_values_are_parted_by_commas_outside_quotes_and_brackets():
    assert split_values('1, "a, b",[2, 3],{a=1,b=2}') == ["1", '"a, b"', "[2, 3]", "{a=1,b=2}"]
    with pytest.raises(InputError, match="not closed"):
        split_values("[1, 2")


@pytest.mark.parametrize(
    "value", ["3", 3, 0.1, ["a", "b"], 'a "quoted" text, with = and commas', {}]
)
@pytest.mark.parametrize("key", ["prompt", "scheduler", "plugins.blue.scale", "preset.rho", "rho"])
def test_a_value_that_is_no_text_to_be_read_stays_what_it_is(key, value):
    content = {"prompt": "a cat", "preset": "tfg", "plugins": ["blue:scale=1"]}
    before = copy.deepcopy(content)
    answer = with_value(content, key, value)
    assert content == before
    place = {"plugins.blue.scale": ("plugins", 0), "rho": ("preset",), "preset.rho": ("preset",)}
    inner = answer
    for part in place.get(key, ()):
        inner = inner[part]
    assert inner[key.rpartition(".")[2]] is value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("stepz", "no key called 'stepz'. Did you mean 'steps'?"),
        ("plugins.red.scale", "no plugin in this run called 'red'. Available: blue"),
        ("plugins.scale", "a change is plugins.NAME.SETTING=VALUE; got 'plugins.scale'"),
    ],
)
def test_a_value_for_what_does_not_exist_is_refused(key, message):
    with pytest.raises(InputError) as caught:
        with_value({"plugins": ["blue"]}, key, 1)
    assert message in str(caught.value)
