"""What plugin authors find in the core: functions as guides, fixtures of pytest, discovery."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import pilotfish
from pilotfish import Guide, InputError, PilotfishError, PluginError, SettingsError
from pilotfish.cli import main
from pilotfish.hooks import registry
from pilotfish.testing import random_step


def call(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, and nothing installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(registry, "_entry_points", lambda group: ())
    return tmp_path


def install(monkeypatch, **targets):
    entries = [EntryPoint(name, target, registry.PLUGIN_GROUP) for name, target in targets.items()]
    monkeypatch.setattr(
        registry, "_entry_points", lambda g: tuple(e for e in entries if e.group == g)
    )


# ---- pilotfish.guide ----


def brightness(step):
    """How bright it is."""
    return step.image.mean(dim=(1, 2, 3))


def test_a_function_is_a_guide_like_the_class_with_the_same_loss(latents_of):
    class Brightness(Guide):
        def loss_guidance(self, step):
            return brightness(step)

    settings = {"scale": -0.5, "every": 2, "gradient": "latents"}
    ours = latents_of(pilotfish.guide(brightness, **settings))
    assert torch.equal(ours, latents_of(Brightness(**settings)))
    assert not torch.equal(ours, latents_of())


def test_a_function_gives_the_guide_its_name_unless_one_is_chosen(sampler):
    guides = [
        pilotfish.guide(brightness, scale=2),
        pilotfish.guide(brightness, name="light"),
        pilotfish.guide(lambda step: brightness(step)),
        pilotfish.guide(lambda step: brightness(step)),
    ]
    assert repr(guides[0]) == "brightness(scale=2.0)"
    assert type(guides[0]).__doc__ == "How bright it is."
    trace = sampler("a cat", plugins=guides, steps=1, seed=0).trace
    assert trace.plugins == ["brightness", "light", "guide", "guide#2"]


def test_a_run_with_a_function_says_that_no_file_can_repeat_it(sampler):
    run = sampler("a cat", plugins=[pilotfish.guide(brightness)], steps=1).run
    with pytest.raises(PilotfishError, match="'brightness' .* cannot be repeated from a file"):
        run.to_toml()


def test_errors_of_a_function_name_it(sampler):
    broken = pilotfish.guide(lambda step: step.image.mean(), name="flat")
    with pytest.raises(PluginError, match=r"plugin 'flat': loss_guidance\(\) returned shape \(\)"):
        sampler("a cat", plugins=[broken], steps=1, num_images=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), r"guide\(\) takes a function of the step, .*; got 3"),
        ((Guide,), r"takes a function of the step, .*; got <class"),
    ],
)
def test_what_is_no_function_of_the_step_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        pilotfish.guide(*arguments)


def test_settings_and_name_of_a_function_are_checked():
    with pytest.raises(SettingsError, match="brightness: no setting 'scael'. Did you mean 'scale'"):
        pilotfish.guide(brightness, scael=2)
    with pytest.raises(InputError, match="a plugin's name takes letters, .*; got 'so bright'"):
        pilotfish.guide(brightness, name="so bright")


def test_a_plugin_that_cannot_be_made_is_named(folder):
    (folder / "mine.py").write_text(
        "from pilotfish import Plugin\n"
        "class Mine(Plugin):\n"
        "    def __init__(self):\n        super().__init__()\n        open('nothing.txt')\n"
        "    def after_step(self, step): ...\n"
    )
    with pytest.raises(PluginError, match=r"'./mine.py:Mine' cannot be made: FileNotFoundError"):
        registry.resolve("./mine.py:Mine")


# ---- in pytest ----


def test_the_pytest_plugin_imports_nothing_heavy_until_a_fixture_is_asked_for():
    code = (
        "import sys, pilotfish.testing.fixtures\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_offers_its_pytest_plugin():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, _ = project["entry-points"]["pytest11"]["pilotfish"].partition(":")
    assert module == "pilotfish.testing.fixtures"


# ---- the step ----


def test_a_random_step_shows_the_given_picture_and_takes_gradients():
    image = torch.rand(3, 3, 8, 12)
    step = random_step(image=image)
    assert torch.equal(step.image, image)
    assert step.x0.shape == (3, 4, 16, 16) and step.rgb.shape == (3, 3, 16, 16)
    red, _, blue = step.image.unbind(dim=1)
    loss = (red - blue - 0.2).abs().mean(dim=(1, 2))
    (gradient,) = torch.autograd.grad(loss.sum(), step.image)
    assert gradient.shape == image.shape and gradient.abs().sum() > 0


def test_a_random_step_depends_on_its_seed_alone():
    same, other = random_step(seed=0), random_step(seed=1)
    assert torch.equal(random_step().image, same.image)
    assert not torch.equal(other.image, same.image)
    assert not torch.equal(same.image[0], same.image[1])
    assert (same.index, same.num_steps, same.run.num_images) == (0, 10, 2)
    torch.testing.assert_close(same.alpha * same.x0 + same.sigma * same.eps, same.latents)


# ---- PILOTFISH_PLUGINS ----


def test_a_hidden_plugin_is_said_to_be_hidden(folder, monkeypatch):
    install(monkeypatch, blue="nowhere:Blue", red="nowhere:Red")
    monkeypatch.setenv(registry.LIMIT, " red , green")
    done = call("plugins", "list")
    assert "\n  red " in done.stdout and "\n  blue " not in done.stdout
    note = "Discovery is limited by PILOTFISH_PLUGINS= red , green; hidden: blue; "
    assert done.stdout.endswith(f"{note}not installed: green\n")
    assert "'blue' is installed, but PILOTFISH_PLUGINS" in call("plugins", "show", "blue").stderr


@pytest.mark.parametrize("value", ["none", ""])
def test_discovery_can_be_switched_off_but_files_are_found(folder, monkeypatch, value):
    install(monkeypatch, blue="nowhere:Blue")
    monkeypatch.setenv(registry.LIMIT, value)
    (folder / "mine.py").write_text(
        "from pilotfish import Plugin\nclass Mine(Plugin):\n    def after_step(self, step): ...\n"
    )
    assert call("plugins", "list").stdout == (
        f"Discovery is limited by PILOTFISH_PLUGINS={value}; hidden: blue\n"
    )
    assert registry.resolve("./mine.py:Mine").use == "./mine.py:Mine"


def test_doctor_tells_of_a_limit_and_leaves_hidden_plugins_alone(folder, monkeypatch):
    install(monkeypatch, broken="no_such_module:Blue")
    monkeypatch.setenv(registry.LIMIT, "none")
    done = call("doctor")
    assert done.exit_code == 0, done.output
    assert "Discovery is limited by PILOTFISH_PLUGINS=none; hidden: broken\n" in done.stdout
