"""A run as text, and plugins as text."""

import dataclasses

import pytest
import torch

from pilotfish import PRESETS, Guide, InputError, PilotfishError, PluginError, Run
from pilotfish.guidance.presets import find_preset
from pilotfish.hooks import registry
from pilotfish.hooks.registry import Installed, resolve
from pilotfish.hooks.use import parse_use

WARMTH = '''
from pilotfish import Guide, Setting

class Warmth(Guide):
    """Warm pictures."""
    class Settings(Guide.Settings):
        words: list[str] = []
        target: float = Setting(0.9, ge=0, le=1)

    def loss_guidance(self, step):
        return (step.image[:, 0] - self.settings.target).abs().mean(dim=(1, 2))
'''


@pytest.fixture
def warmth(tmp_path):
    path = tmp_path / "my_loss.py"
    path.write_text(WARMTH)
    return f"{path}:Warmth"


def test_a_run_written_and_read_gives_the_identical_picture(sampler, warmth):
    result = sampler(
        "a 'red' cat\nand \"more\"",
        plugins=[f"{warmth}:scale=2,words=[a,b]", {"use": warmth, "name": "second", "every": 2}],
        negative_prompt="blue",
        steps=4,
        guidance_scale=5,
        scheduler={"name": "dpmsolver-multistep", "use_karras_sigmas": True},
        seed=11,
        num_images=2,
        height=48,
    )
    again = Run.parse(result.run.to_toml())
    assert again.pop("model", None) is None
    assert again.pop("dtype") == "float32"
    repeated = sampler(**again)
    assert torch.equal(repeated.latents, result.latents)
    assert repeated.run == result.run
    assert [t["name"] for t in result.run.plugins] == ["Warmth", "second"]


def test_a_scheduler_object_is_written_as_its_difference_from_the_models(sampler):
    from diffusers import EulerDiscreteScheduler

    config = sampler.model.scheduler.config
    plain = EulerDiscreteScheduler.from_config(config)
    karras = EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True)
    described = sampler.model.describe_scheduler
    assert described(plain) == "euler"
    assert described(karras) == {"name": "euler", "use_karras_sigmas": True}
    assert described(None) == "ddim"


def test_a_class_that_cannot_be_found_again_is_refused_in_a_run_file(sampler):
    class Local(Guide):
        def loss_guidance(self, step):
            return step.x0.mean(dim=(1, 2, 3))

    run = sampler("a cat", plugins=[Local()], steps=1).run
    with pytest.raises(PilotfishError, match="'Local' was defined in this session"):
        run.to_toml()


@pytest.mark.parametrize("name", ["mine", "balanced"])
def test_a_preset_of_ones_own_comes_back_from_a_run_file(sampler, name):
    own = dataclasses.replace(PRESETS["balanced"], name=name, mu=0.5)
    content = Run.parse(sampler("a cat", preset=own, steps=1, seed=0).run.to_toml())
    assert find_preset(content["preset"]) == own
    assert Run.parse(Run(preset="tfg").to_toml())["preset"] == "tfg"


def test_a_seed_that_is_not_given_is_drawn_and_told(sampler):
    first, second = (sampler("a cat", steps=1) for _ in range(2))
    assert first.run.seed != second.run.seed
    repeated = sampler("a cat", steps=1, seed=first.run.seed)
    assert torch.equal(repeated.latents, first.latents)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "not valid TOML"),
        ("stesp = 3", "no key called 'stesp'. Did you mean 'steps'"),
        ("plugins = 3", r"plugins must be \[\[plugins\]\] tables"),
    ],
)
def test_a_broken_run_file_says_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        Run.parse(text)


def test_a_run_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the run file .*none\.toml"):
        Run.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "use", "settings"),
    [
        ("blue", "blue", {}),
        ("blue:scale=2,every=5", "blue", {"scale": "2", "every": "5"}),
        (
            "clip:text='a watercolor, by hand: 10:30',scale=1",
            "clip",
            {"text": "a watercolor, by hand: 10:30", "scale": "1"},
        ),
        ("palette:colors=[#035,#fa0]", "palette", {"colors": ["#035", "#fa0"]}),
        ('blend:prompts={"a cat"=1,dog=0.5}', "blend", {"prompts": {"a cat": "1", "dog": "0.5"}}),
        ("clip:text=the dog's day", "clip", {"text": "the dog's day"}),
        ("./my_loss.py:Warmth:scale=2", "./my_loss.py:Warmth", {"scale": "2"}),
        ("./my_loss.py", "./my_loss.py", {}),
        ("package.module:Class", "package.module:Class", {}),
        ("x:a=[],b={c=[1,2]}", "x", {"a": [], "b": {"c": ["1", "2"]}}),
        ("x:path=c:/a/b", "x", {"path": "c:/a/b"}),
    ],
)
def test_a_plugin_on_the_command_line(text, use, settings):
    assert parse_use(text) == (use, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip:text='a watercolor", "a quote or bracket is not closed"),
        ("palette:colors=[#035", "a quote or bracket is not closed"),
        ("blue:scale=1,every", "expected setting=value .* got 'every'"),
        ("blue:scale=1,scale=2", "'scale' is given twice"),
        (":scale=1", "expected NAME"),
    ],
)
def test_a_malformed_plugin_on_the_command_line_says_what_was_expected(text, message):
    with pytest.raises(InputError, match=message):
        parse_use(text)


def test_text_becomes_numbers_where_the_setting_is_a_number(warmth):
    plugin = resolve(f"{warmth}:scale=2.5,every=3,words=[1,x]").plugin
    assert (plugin.settings.scale, plugin.settings.every) == (2.5, 3)
    assert plugin.settings.words == ["1", "x"]


def test_a_file_may_leave_out_its_only_class(warmth):
    assert type(resolve(warmth.removesuffix(":Warmth")).plugin).__name__ == "Warmth"


def test_faults_of_a_plugin_file_are_named(tmp_path, warmth):
    with pytest.raises(InputError, match="no plugin file nothing.py"):
        resolve("nothing.py:Warmth")
    with pytest.raises(InputError, match="no plugin class in .* called 'Warmht'. .*'Warmth'"):
        resolve(warmth.replace(":Warmth", ":Warmht"))
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_like_this")
    with pytest.raises(PluginError, match=r"broken.py does not import: ModuleNotFoundError"):
        resolve(f"{broken}:X")


class FakeEntry:
    def __init__(self, name, value, distribution):
        self.name, self.value = name, value
        metadata = type("Metadata", (), {"json": {"summary": f"about {name}"}})()
        self.dist = type("Dist", (), {"name": distribution, "version": "1.2", "metadata": metadata})


@pytest.fixture
def fake_installed(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(registry, "_entry_points", lambda group: entries)

    return install


def test_a_name_that_is_not_installed_suggests_the_nearest(fake_installed):
    fake_installed(FakeEntry("blue", "x:Blue", "pilotfish-x"))
    with pytest.raises(InputError, match="no plugin called 'bleu'. Did you mean 'blue'"):
        resolve("bleu:scale=1")


def test_two_packages_that_claim_one_name_are_both_named(fake_installed):
    fake_installed(FakeEntry("blue", "x:Blue", "pilotfish-x"), FakeEntry("blue", "y:B", "other-y"))
    with pytest.raises(InputError, match=r"pilotfish-x 1.2 and other-y 1.2. Uninstall one"):
        resolve("blue")


def test_a_package_that_does_not_import_is_named_and_hurts_only_itself(fake_installed, warmth):
    fake_installed(FakeEntry("blue", "not_there_at_all:Blue", "pilotfish-x"))
    with pytest.raises(PluginError, match=r"plugin 'blue' \(pilotfish-x 1.2\) does not import"):
        resolve("blue")
    assert not registry.installed()["blue"][0].found
    assert resolve(warmth).plugin


def test_discovery_can_be_limited_by_the_environment(fake_installed, monkeypatch):
    fake_installed(FakeEntry("blue", "x:Blue", "a"), FakeEntry("red", "x:Red", "a"))
    assert list(registry.installed()) == ["blue", "red"]
    assert registry.installed()["red"] == [Installed("red", "x:Red", "a", "1.2", "about red")]
    monkeypatch.setenv("PILOTFISH_PLUGINS", "red")
    assert list(registry.installed()) == ["red"]
    monkeypatch.setenv("PILOTFISH_PLUGINS", "none")
    assert list(registry.installed()) == []


def test_the_trace_is_plain_data(sampler, warmth):
    result = sampler("a cat", plugins=[warmth, warmth], steps=3, seed=0)
    assert result.trace.plugins == ["Warmth", "Warmth#2"]
    assert len(result.trace.to_dicts()) == 6
    assert len(result.trace.losses("Warmth")) == 3
