"""The command line, from the outside."""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pilotfish import Guide, Setting, hookimpl
from pilotfish.cli import listing, main
from pilotfish.cli.program import OWN, PACKAGES
from pilotfish.cli.report import latest_losses
from pilotfish.hooks import registry
from pilotfish.hooks.stack import Stack
from pilotfish.runs.run import KEYS
from pilotfish.sampling.trace import Record, Trace

MY_LOSS = '''
from typing import Literal

from pilotfish import Guide, Setting


class Warmth(Guide):
    """Pull the picture towards warm colours:
    more red than blue.

    A second paragraph.
    """

    class Settings(Guide.Settings):
        target: float = Setting(0.5, ge=0, le=1, description="how much more red than blue")

    def loss_guidance(self, step):
        warm = step.image[:, 0] - step.image[:, 2]
        return (warm - self.settings.target).abs().mean(dim=(1, 2))


class Prepared(Guide):
    """Needs its setup."""

    def setup(self, run):
        self.ready = 1

    def loss_guidance(self, step):
        return self.ready * step.rgb.var(dim=(1, 2, 3))


class Cheap(Guide):
    """Reads no picture."""

    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))


class Interrupted(Guide):
    """As if somebody pressed Ctrl-C."""

    def loss_guidance(self, step):
        raise KeyboardInterrupt


class Torn(Guide):
    """A bug, found at step 1."""

    def loss_guidance(self, step):
        print("a plugin that prints")
        if step.index > 0:
            raise ValueError("torn")
        return step.rgb.var(dim=(1, 2, 3))
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own, with my_loss.py in it and nothing installed."""
    (tmp_path / "my_loss.py").write_text(MY_LOSS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is wrapped where a test looks
    monkeypatch.setattr(registry, "_entry_points", only())
    return tmp_path


FAMILIES = tuple(entry_points(group=registry.FAMILY_GROUP))


def only(*entries: EntryPoint) -> Callable[[str], tuple[EntryPoint, ...]]:
    """Nothing is installed but these and the model families."""
    return lambda group: tuple(e for e in (*FAMILIES, *entries) if e.group == group)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def generate(model: str, *arguments: str) -> Result:
    steps = () if "--run" in arguments else ("--steps", "3")
    return call("generate", "a red cat", "--model", model, "--seed", "5", *steps, *arguments)


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def install(
    monkeypatch: pytest.MonkeyPatch, group: str = registry.PLUGIN_GROUP, **targets: str
) -> None:
    entries = [EntryPoint(n.rstrip("_"), t, group) for n, t in targets.items()]
    monkeypatch.setattr(registry, "_entry_points", only(*entries))


def test_help_and_plugins_list_load_neither_torch_nor_diffusers() -> None:
    commands = [["--help"], ["plugins", "list"], ["--version"]]
    commands += [[command, "--help"] for command in OWN]
    code = (
        "import sys; from pilotfish.cli import main\n"
        f"for command in {commands}: main(command, standalone_mode=False)\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [False, True])
def test_the_installed_command_and_the_module_are_one_program(module: bool) -> None:
    own = [str(Path(sys.executable).with_name("pilotfish"))]
    words = [sys.executable, "-m", "pilotfish"] if module else own
    done = subprocess.run([*words, "stpes"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: pilotfish [OPTIONS]")


# ---- generate ----


def test_a_run_writes_the_picture_and_tells_each_loss(model: str) -> None:
    done = generate(model, "--use", "./my_loss.py:Warmth:every=2", "--out", "new/cat.png")
    assert done.exit_code == 0, done.output
    assert size("new/cat.png") == (32, 32)
    first, second, _ = done.stdout.splitlines()
    assert first == "new/cat.png  32x32, seed 5"
    assert second.startswith("  Warmth: loss 0.") and second.endswith("(2 steps)")
    assert "Warmth 0." in done.stderr  # the progress bar


def test_json_is_all_there_is_on_stdout(model: str) -> None:
    use = ("--use", "./my_loss.py:Torn", "--on-error", "skip")
    done = generate(model, "--json", "--num-images", "2", "--out", "cat.png", *use)
    answer = json.loads(done.stdout)
    assert answer["files"] == ["cat-1.png", "cat-2.png"]
    assert all(Path(file).is_file() for file in answer["files"])
    assert answer["seed"] == answer["run"]["seed"] == 5
    torn = answer["guides"]["Torn"]
    assert torn["first_loss"] == torn["last_loss"] > 0 and torn["steps"] == 1
    assert len(torn["errors"]) == 2 and "torn" in torn["errors"][0]


def test_a_tolerated_failure_is_told(model: str) -> None:
    done = generate(model, "--use", "./my_loss.py:Torn", "--on-error", "disable")
    assert "Torn: failed at 1 step, the first time: plugin 'Torn'" in done.stdout


def test_a_saved_run_gives_the_identical_picture(model: str) -> None:
    use = ("--use", "./my_loss.py:Warmth:scale=3", "--scheduler", "lms", "--save-run", "run.toml")
    assert generate(model, *use, "--size", "48x32", "--out", "one.png").exit_code == 0
    again = call("generate", "--run", "run.toml", "--out", "two.png")
    assert again.exit_code == 0, again.output
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert size("two.png") == (48, 32)


RUN = """
prompt = "a red cat"
steps = 40
seed = 7
[[plugins]]
use = "./my_loss.py:Warmth"
name = "subject"
scale = 2.0
[[plugins]]
use = "./my_loss.py:Cheap"
[[plugins]]
use = "./my_loss.py:Cheap"
"""


def planned(model: str, *arguments: str) -> dict[str, object]:
    Path("run.toml").write_text(RUN)
    done = call(
        "generate", "--run", "run.toml", "--model", model, "--dry-run", "--json", *arguments
    )
    assert done.exit_code == 0, done.output
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_options_override_changes_which_override_the_run_file(model: str) -> None:
    answer = planned(
        model,
        *("-s", "plugins.subject.scale=40", "-s", "plugins.Cheap#2.every=5", "-s", "steps=20"),
        *("-s", "seed=1", "-s", "guidance_scale=3", "-s", "scheduler={name='heun'}"),
        *("--seed", "9", "-s", "prompt=12"),
    )
    run, plugins = answer["run"], answer["plugins"]
    assert isinstance(run, dict) and isinstance(plugins, list)
    assert (run["steps"], run["seed"], run["guidance_scale"], run["prompt"]) == (20, 9, 3, "12")
    assert [p["settings"] for p in plugins] == [{"scale": 40.0}, {}, {"every": 5}]
    assert (run["scheduler"], answer["num_steps"]) == ("heun", 39)


def test_use_stands_instead_of_the_run_files_plugins(model: str) -> None:
    plugins = planned(model, "--use", "./my_loss.py:Prepared")["plugins"]
    assert isinstance(plugins, list)
    assert [p["name"] for p in plugins] == ["Prepared"]


def test_each_key_of_a_run_is_an_option_with_its_own_help() -> None:
    options = {p.name: p for p in main.get_command(None, "generate").params}  # type: ignore[arg-type, union-attr]
    for key, field in KEYS.items():
        if key not in ("prompt", "height", "width"):
            told = options[key].help  # type: ignore[attr-defined]
            assert told.lower().startswith(str(field.description).lower())
    text = " ".join(call("generate", "--help").stdout.split())
    assert "Sampling steps. [default: the model's]" in text
    assert "run as one batch. [default: 1]" in text
    assert "--on-error raise|skip|disable" in text


def test_an_option_takes_what_a_run_file_takes_and_text_keeps_its_quotes(model: str) -> None:
    answer = planned(
        model,
        *("--scheduler", "{name='euler', use_karras_sigmas=true}", "--guidance-scale", "3"),
        *("--negative-prompt", "'red' = 3", "--size", "48x32", "--num-images", "2"),
    )
    run = answer["run"]
    assert isinstance(run, dict)
    assert run["scheduler"] == {"name": "euler", "use_karras_sigmas": True}
    assert (run["guidance_scale"], run["negative_prompt"]) == (3, "'red' = 3")
    assert (run["width"], run["height"], run["num_images"]) == (48, 32, 2)


# ---- warnings ----


@pytest.mark.filterwarnings("default::pilotfish.GuideWarning")
def test_an_idle_guide_is_one_line_on_stderr_and_a_remark_for_programs(model: str) -> None:
    done = generate(model, "--use", "./my_loss.py:Cheap:start=0.9", "--json")
    remark = "'Cheap' never gave a loss: no step lies in its window, or it was None"
    assert done.stderr.splitlines().count(f"warning: {remark}") == 1
    assert ".py" not in done.stderr.partition(" ...\n")[2]  # what it loads is told before
    assert json.loads(done.stdout)["remarks"] == [remark]


@pytest.mark.filterwarnings("default:the prompt is")
def test_a_prompt_that_is_too_long_is_told_on_one_line(model: str) -> None:
    done = call("generate", "a red cat " * 40, "--model", model, "--steps", "1")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "the prompt is 120 tokens long" in line and ".py" not in done.stderr


def test_what_leaks_out_of_a_mask_is_told(model: str) -> None:
    use = ("--use", "./my_loss.py:Warmth:mask=[0,0,1,0.5]", "--use", "./my_loss.py:Cheap")
    answer = json.loads(generate(model, *use, "--json").stdout)["guides"]
    assert 0 < answer["Warmth"]["outside"] < 1 and answer["Cheap"]["outside"] is None
    assert (
        f"{answer['Warmth']['outside']:.1%} of the moves at its steps"
        in generate(model, *use).stdout
    )


# ---- the user's own mistakes ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--use ./my_loss.py:Warmht", "Did you mean 'Warmth'?"),
        ("--use ./my_loss.py:Warmth:scal=2", "Did you mean 'scale'?"),
        ("--use ./my_loss.py:Warmth:target=2", "target must be less than or equal to 1; got '2'"),
        ("--use ./nothing.py", "no plugin file nothing.py"),
        ("--preset deepdive", "Did you mean 'deep-dive'? Available: balanced, clip-guided"),
        ("--scheduler eular", "Did you mean 'euler'? Available: "),
        ("--dtype float", "Available: bfloat16, float16, float32"),
        ("--device gpu", "no device 'gpu' here; expected cpu, cuda"),
        ("--steps 0", "steps must be a whole number >= 1"),
        ("--guidance-scale nan", "guidance_scale must be a finite number"),
        ("--run nothing.toml", "cannot read the run file nothing.toml"),
        ("-s step=3", "no key called 'step'. Did you mean 'steps'?"),
        ("-s steps", "a change is KEY=VALUE, such as steps=20; got 'steps'"),
        ("-s rhoo=2", "no key called 'rhoo'. Did you mean 'rho'?"),
        ("--preset tfg -s rho=-2", "preset 'tfg': rho must be greater than or equal to 0; got"),
        ("-s steps=many", "steps must be a whole number >= 1; got 'many'"),
        ("--steps many", "steps must be a whole number >= 1; got 'many'"),
        ("--size 512", "size must be WIDTHxHEIGHT, such as 512x512; got '512'"),
        ("--size 0x512", "width must be a whole number >= 1; got 0"),
        ("--checkpointing maybe", "checkpointing must be 'auto', 'on' or 'off'; got 'maybe'"),
        ("-s num_inference_steps=3", "no key called 'num_inference_steps'; here it is steps"),
        ("--run theirs.toml", "theirs.toml: no key called 'cfg_scale'; here it is guidance_scale"),
        ("-s plugins.scale=3", "a change is plugins.NAME.SETTING=VALUE; got"),
        ("--use ./my_loss.py:Warmth -s plugins.warm.scale=3", "Did you mean 'Warmth'?"),
        ("--model ./nothing", "no model folder ./nothing"),
        (
            "--run theirs.json",
            "theirs.json is not valid TOML: Invalid statement (at line 1, column",
        ),
        ("--run theirs.json", "It looks like JSON; TOML has lines such as: steps = 20"),
        ("--use ./my_loss.py", "my_loss.py has 5 plugin classes: name one, my_loss.py:Warmth or"),
        ("--decoder tny", "decoder must be vae, linear, tiny (the tiny_vae/ of the model's"),
        ("--decoder tiny", "tiny_vae, which does not exist. Name an AutoencoderTiny"),
        ("--decoder tiny:./nothing", "decoder 'tiny:./nothing': no such folder"),
    ],
)
def test_a_mistake_gives_one_line_that_helps(model: str, arguments: str, words: str) -> None:
    own = () if "--model" in arguments else ("--model", model)
    Path("theirs.toml").write_text("cfg_scale = 3")
    Path("theirs.json").write_text('{"steps": 3}')
    done = call("generate", "--dry-run", *own, *arguments.split())
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_wrong_plugin_name_suggests_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, blue="nowhere:Blue", clip="nowhere:Clip")
    for command in (["generate", "--use", "bleu:scale=2"], ["plugins", "show", "bleu"]):
        done = call(*command)
        assert done.exit_code == 1
        assert "Did you mean 'blue'? Available: blue, clip" in done.stderr


def test_an_ending_that_no_picture_has_is_found_before_the_run() -> None:
    done = call("generate", "--model", "./nothing", "--out", "cat.txt")
    assert "cannot write cat.txt: end its name in .png, .jpg or .webp" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("genrate", "Did you mean 'generate'? Available: "),
        ("plugins shwo", "Did you mean 'show'? Available: list, show"),
        ("generate --stpes 3", "--steps"),
        ("generate --cfg-scale 3", "no option --cfg-scale; it is --guidance-scale"),
        ("generate --num_inference_steps=3", "no option --num_inference_steps; it is --steps"),
        ("generate --width 512", "no option --width; it is --size"),
        ("generate --plugin blue", "no option --plugin; it is --use"),
    ],
)
def test_wrong_usage_has_exit_code_two_and_a_hint(arguments: str, words: str) -> None:
    done = call(*arguments.split())
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize("where", ["--debug generate", "generate --debug"])
def test_debug_shows_the_traceback(where: str) -> None:
    done = call(*where.split(), "--steps", "0")
    assert isinstance(done.exception, ValueError)  # not turned into a line: Python prints it


def test_ctrl_c_has_exit_code_130(model: str) -> None:
    done = generate(model, "--use", "./my_loss.py:Interrupted")
    assert done.exit_code == 130
    assert done.stderr.endswith("interrupted\n")


# ---- --dry-run ----


def test_a_dry_run_explains_the_stack_in_order_and_loads_no_weights(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    uses = ["Cheap:start=0.5", "Warmth:every=5,gradient=latents", "Prepared", "Cheap:scale=0"]
    done = call(
        *("generate", "a cat", "--model", model, "--dry-run", "--scheduler", "lms"),
        *(part for use in uses for part in ("--use", f"./my_loss.py:{use}")),
    )
    assert done.exit_code == 0, done.output
    assert not Path("out.png").exists()
    positions = [done.stdout.index(f"{i}. ") for i in range(1, 5)]
    first, second, third, fourth = (
        done.stdout[a:b] for a, b in zip(positions, [*positions[1:], None], strict=True)
    )
    assert "1. Cheap" in first and "25 of 50 steps, 25 to 49" in first
    assert "2. Warmth" in second and "10 of 50 steps, 0 to 45" in second
    assert "settings  every=5, gradient='latents'" in second
    assert "hooks     setup, loss_guidance" in third
    assert "4. Cheap#2" in fourth and "never: its scale is 0" in fourth


def test_a_dry_run_knows_the_steps_that_the_models_folder_asks_for(model: str) -> None:
    folder = Path(shutil.copytree(model, "own"))
    (folder / "pilotfish.toml").write_text("steps = 10\nguidance_scale = 4\nheight = 48\n")
    use = ("--use", "./my_loss.py:Cheap:every=5", "-s", "guidance_scale=0")
    answer = json.loads(
        call("generate", "--model", str(folder), "--dry-run", "--json", *use).stdout
    )
    run, (guide,) = answer["run"], answer["plugins"]
    assert (run["steps"], run["guidance_scale"], run["height"], run["width"]) == (10, 0, 48, None)
    assert guide["acts"] == "2 of 10 steps, 0 to 5"


def test_a_dry_run_of_a_model_elsewhere_tells_what_is_known_and_asks_nobody() -> None:
    arguments = ("generate", "--model", "some/model", "--use", "./my_loss.py:Cheap", "--dry-run")
    text = call(*arguments).stdout
    assert "steps           the model's\n" in text and "acts      as its settings say\n" in text
    assert "Did you mean 'euler'?" in call(*arguments, "--scheduler", "eular").stderr


def test_a_dry_run_refuses_a_family_that_nobody_takes(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_entry_points", lambda group: ())
    done = generate(model, "--dry-run")
    assert "is a StableDiffusionPipeline, and no model family here takes that" in done.stderr


def test_a_dry_run_takes_the_models_own_scheduler_where_its_folder_is_here(model: str) -> None:
    answer = json.loads(generate(model, "--dry-run", "--json").stdout)
    assert (answer["run"]["scheduler"], answer["num_steps"]) == ("ddim", 3)


def test_one_knob_of_a_preset_can_be_changed(model: str) -> None:
    preset = planned(model, "--preset", "tfg", "-s", "rho=0.5", "-s", "preset.recurrence=2")["run"]
    assert isinstance(preset, dict)
    assert preset["preset"] == {"base": "tfg", "rho": 0.5, "recurrence": 2}


def test_a_cheaper_decoder_is_told_of_before_and_after_the_run(model: str) -> None:
    arguments = ("--use", "./my_loss.py:Warmth", "--decoder", "linear")
    assert "decoder         linear" in generate(model, *arguments, "--dry-run").stdout
    done = generate(model, *arguments, "--save-run", "run.toml")
    assert "(3 steps); " in done.stdout and " by the VAE" in done.stdout
    assert tomllib.loads(Path("run.toml").read_text())["decoder"] == "linear"
    again = json.loads(generate(model, "--run", "run.toml", "-s", "decoder=vae", "--json").stdout)
    assert again["guides"]["Warmth"]["final_loss"] is None
    assert again["run"]["decoder"] == "vae"


def test_the_progress_bar_shows_each_guides_latest_loss() -> None:
    trace = Trace(
        [Record(0, 1.0, "blue", (0.5, 0.7)), Record(0, 1.0, "clip", (0.9,)),
         Record(1, 0.9, "blue", (0.1, 0.3)), Record(1, 0.9, "clip", error="torn")]
    )  # fmt: skip
    assert latest_losses(trace) == "blue 0.2, clip 0.9"


# ---- plugins ----


def test_plugins_list_marks_what_is_broken_and_imports_nothing(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "explosive.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder))
    install(monkeypatch, fine="explosive:A", gone="no_such_module.inner:B", two="explosive:C",
            two_="explosive:D")  # fmt: skip
    done = call("plugins", "list")
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "fine" in lines and "broken" not in lines["fine"]
    assert "broken: there is no module 'no_such_module'" in lines["gone"]
    assert "broken: the name is claimed by unknown too" in lines["two"]


def test_plugins_list_says_what_to_do_where_there_are_none() -> None:
    assert "--use ./my_loss.py:Class" in call("plugins", "list").stdout


def test_plugins_show_tells_summary_hooks_settings_and_a_block_that_works(model: str) -> None:
    text = call("plugins", "show", "./my_loss.py:Warmth").stdout
    assert "Pull the picture towards warm colours: more red than blue.\n" in text
    assert "loss_guidance  Collect" in text
    rows = [line.split() for line in text.splitlines()]
    own, shared = rows.index(["settings"]), rows.index(["settings", "of", "every", "guide"])
    assert rows[own + 1] == ["target", "a", "number", "from", "0", "to", "1", "(default", "0.5)"]
    assert rows[shared + 1][:3] == ["scale", "a", "number,"]
    tables = text[text.index("[[plugins]]") :]
    (table,) = tomllib.loads(tables)["plugins"]
    assert table == {"use": "./my_loss.py:Warmth", "scale": 1.0}
    assert len(Stack([table])) == 1


class Demanding(Guide):
    """Asks for much."""

    class Settings(Guide.Settings):
        text: str = Setting(min_length=1, description="what", examples=["it's a watercolor, wet"])
        colors: list[str] = Setting(description="which")
        weights: dict[str, float] = Setting(default_factory=dict, description="how much")

    def loss_guidance(self, step: object) -> None: ...


def test_the_pasted_block_has_what_must_be_given() -> None:
    settings = listing.example_settings(Demanding)
    assert settings == {"text": "it's a watercolor, wet", "colors": ["..."], "scale": 1.0}
    block = listing.paste_block("demanding", Demanding)
    (table,) = tomllib.loads(block[block.index("[[plugins]]") :])["plugins"]
    assert table == {"use": "demanding", **settings}


def test_the_pasted_command_survives_the_shell() -> None:
    import shlex

    lines = listing.paste_block("demanding", Demanding).splitlines()
    line = next(line for line in lines if "--use" in line)
    use, settings = registry.parse_use(shlex.split(line)[-1])
    assert (use, Demanding(**settings).settings) == (
        "demanding",
        Demanding(text="it's a watercolor, wet", colors=["..."]).settings,
    )


def test_the_table_tells_what_settings_take_in_plain_words() -> None:
    rows = {row[0]: row[1:3] for row in listing.setting_rows(Demanding)}
    assert rows["text"] == ("a text; not empty", "must be given")
    assert rows["weights"] == ("a table of texts, each with a number", "default empty")
    assert rows["gradient"] == ("x0, latents or none", "optional")
    assert rows["every"] == ("a whole number, 1 or more", "default 1")


def test_a_bare_class_with_hookimpl_can_be_shown() -> None:
    class Bare:
        @hookimpl
        def after_step(self, step: object) -> None: ...

    assert listing.setting_rows(Bare)[1:] == []
    assert listing.example_settings(Bare) == {}


# ---- commands of installed packages ----

COMMANDS = """
import click
from pilotfish import InputError

@click.group()
def greet():
    "Says hello."

@greet.command()
@click.argument("name")
def world(name):
    "To somebody."
    if name == "nobody":
        raise InputError("nobody cannot be greeted")
    click.echo(f"hello {name}")
"""


def install_commands(monkeypatch: pytest.MonkeyPatch, folder: Path, **targets: str) -> None:
    (folder / "greetings.py").write_text(COMMANDS)
    (folder / "explosive_command.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder))
    install(monkeypatch, registry.COMMAND_GROUP, **targets)


def test_an_installed_command_runs_with_its_arguments_and_its_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    install_commands(monkeypatch, folder, greet="greetings:greet")
    assert call("greet", "world", "you").stdout == "hello you\n"
    assert "To somebody." in call("greet", "--help").stdout
    wrong = call("greet", "world", "nobody")
    assert (wrong.exit_code, wrong.stderr) == (1, "error: nobody cannot be greeted\n")


def test_help_lists_installed_commands_and_imports_none(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    targets = {"loud": "explosive_command:a", "gone": "no_such_module:a"}
    install_commands(monkeypatch, folder, **targets, two="greetings:greet", two_="greetings:greet")
    done = call("--help")
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "loud" in lines and "generate" in lines
    assert "broken: there is no module 'no_such_module'" in lines["gone"]
    assert "broken: the name is claimed by unknown too" in lines["two"]


def test_a_broken_command_says_so_and_hurts_no_other(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    install_commands(monkeypatch, folder, loud="explosive_command:a", greet="greetings:greet")
    loud = call("loud", "now")
    assert loud.exit_code == 1
    assert "command 'loud' (unknown unknown) does not import: RuntimeError: imported" in loud.stderr
    assert call("greet", "world", "you").exit_code == 0
    doctor = call("doctor")
    assert doctor.exit_code == 1 and doctor.stdout.endswith("1 broken: see above.\n")


def test_no_package_can_take_the_place_of_an_own_command(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    install_commands(monkeypatch, folder, doctor="explosive_command:a")
    rows = [line.split()[0] for line in call("--help").stdout.splitlines() if line]
    assert rows.count("doctor") == 1
    assert "versions, devices" in call("doctor", "--help").stdout


@pytest.mark.parametrize("command", ["grid", "grid --help", "view tokens cat"])
def test_a_command_of_a_package_that_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    install(monkeypatch)
    done = call(*command.split())
    name = command.split()[0]
    sentence = f"the command '{name}' comes with pilotfish-view: pip install pilotfish-view"
    assert (done.exit_code, done.stderr) == (1, f"error: {sentence}\n")
    assert f"\n  {name} " not in call("--help").stdout


def test_a_command_that_is_hidden_says_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTFISH_PLUGINS", "blue")
    assert "PILOTFISH_PLUGINS=blue hides what it does not name" in call("grid").stderr


def test_a_film_without_its_package_says_what_to_install_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pilotfish_view", None)
    done = call("generate", "a cat", "--model", "./nothing", "--film", "cat.gif")
    sentence = "the option '--film' comes with pilotfish-view: pip install pilotfish-view"
    assert done.exit_code == 1
    assert done.stderr == f"loading ./nothing ...\nerror: {sentence}\n"


def test_a_mistyped_command_is_told_the_installed_ones_too(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    install_commands(monkeypatch, folder, greet="greetings:greet")
    assert "Did you mean 'greet'?" in call("gret").stderr
    monkeypatch.setenv("PILOTFISH_PLUGINS", "none")
    assert "greet" not in call("--help").stdout


def test_a_package_adds_a_command_to_a_group(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    install_commands(monkeypatch, folder, **{"plugins.greet": "greetings:greet"})
    assert call("plugins", "greet", "world", "you").stdout == "hello you\n"
    assert call("plugins", "greet", "--debug", "world", "you").exit_code == 0
    wrong = call("plugins", "greet", "world", "nobody")
    assert (wrong.exit_code, wrong.stderr) == (1, "error: nobody cannot be greeted\n")
    rows = [line.split()[0] for line in call("plugins", "--help").stdout.splitlines() if line]
    assert rows[-3:] == ["greet", "list", "show"]
    assert "greet" not in call("--help").stdout


def test_no_package_can_take_the_place_of_a_group_s_own_command(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    install_commands(monkeypatch, folder, **{"plugins.list": "explosive_command:a"})
    assert "none of them is imported" in call("plugins", "list", "--help").stdout


@pytest.mark.parametrize("path", PACKAGES)
def test_a_command_of_a_missing_package_names_the_package(
    monkeypatch: pytest.MonkeyPatch, folder: Path, path: str
) -> None:
    install_commands(monkeypatch, folder)
    done = call(*path.split("."), "warmth")
    name, package = path.replace(".", " "), PACKAGES[path]
    assert done.stderr == (
        f"error: the command {name!r} comes with {package}: pip install {package}\n"
    )
    assert done.exit_code == 1


# ---- doctor ----


def test_doctor_imports_each_plugin_and_survives_the_broken_ones(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "quits.py").write_text("raise SystemExit(3)")
    (folder / "lacks.py").write_text("import no_such_module")
    (folder / "whole.py").write_text(MY_LOSS)
    monkeypatch.syspath_prepend(str(folder))
    install(monkeypatch, a="quits:A", b="lacks:B", c="whole:Warmth", d="whole:Setting")
    done = call("doctor")
    assert done.exit_code == 1
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "BROKEN: SystemExit: 3" in lines["a"]
    assert "BROKEN: ModuleNotFoundError: No module named 'no_such_module'" in lines["b"]
    assert "BROKEN" not in lines["c"]
    assert "BROKEN" in lines["d"]
    assert done.stdout.endswith("3 broken: see above.\n")


def test_doctor_is_content_with_a_healthy_installation() -> None:
    done = call("doctor")
    assert done.exit_code == 0, done.output
    for name in ("python", "pilotfish", "torch", "diffusers", "transformers", "pluggy", "cpu"):
        assert f"  {name} " in done.stdout
    assert done.stdout.endswith("All is well.\n")


def test_doctor_lists_the_model_families_and_finds_a_broken_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families = call("doctor").stdout.partition("model families\n")[2]
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "Flux2KleinPipeline"):
        assert f"  {name} " in families
    install(monkeypatch, registry.FAMILY_GROUP, OtherPipeline="no_such_module:Other")
    done = call("doctor")
    assert done.exit_code == 1 and "there is no module 'no_such_module'" in done.stdout


def test_doctor_finds_a_model_whose_folder_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("gone", "pilotfish.testing:WORDS", registry.MODEL_GROUP)
    monkeypatch.setattr(registry, "_entry_points", only(entry))
    done = call("doctor")
    assert done.exit_code == 1
    assert "BROKEN" in done.stdout


def test_every_command_and_option_has_help() -> None:
    def walk(command: click.Command) -> list[click.Command]:
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        return [command, *(c for sub in inner for c in walk(sub))]

    for command in walk(main):
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, parameter.name  # type: ignore[attr-defined]
