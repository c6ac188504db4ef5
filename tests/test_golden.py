"""Golden runs: what each family and plugin made before, it makes again (`golden/make.py`)."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pilotfish import Run
from pilotfish.hooks.registry import installed

FOLDER = Path(__file__).parent / "golden"
RESULTS = json.loads((FOLDER / "results.json").read_text("utf-8"))
NONE = {  # whose package tests the results itself
    "aesthetic": "a network of its own, which is downloaded",
    "controlnet": "a network of its own, too large for a run file",
    "gate": "changes no latents",
    "hps": "a network of its own, which is downloaded",
    "image-reward": "a network of its own, which is downloaded",
    "ip-adapter": "a network of its own, too large for a run file",
    "perceptual": "a network of its own, which is downloaded",
    "pickscore": "a network of its own, which is downloaded",
}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("golden_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are cut in as many parts
    yield module
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:another picture. made with")  # by an older release
@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_golden_run_gives_what_it_gave(make, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # input files are in the runs
    content = Run.read(FOLDER / f"{name}.toml")
    found = make.told(make.sampler(name)(**_without_model(content)).latents)
    # Another processor or version sums in another order.
    assert make.close(found, RESULTS[name]), "a changed result: see golden/make.py"
    if found["machine"] == RESULTS[name]["machine"]:
        assert found["sha256"] == RESULTS[name]["sha256"], "a changed result: see golden/make.py"


def _without_model(content):
    return {key: value for key, value in content.items() if key not in ("model", "dtype")}


def test_every_plugin_and_family_has_a_golden_run(make):
    assert {*make.runs()} == {*RESULTS} == {path.stem for path in FOLDER.glob("*.toml")}
    plugins = {name for name in RESULTS if not name.startswith("family-")}
    assert plugins | NONE.keys() == {*installed()} and not plugins & NONE.keys()


def test_a_result_that_has_changed_is_not_written_without_a_word(make, tmp_path, monkeypatch):
    changed = {**RESULTS["blue"], "values": [v + 0.1 for v in RESULTS["blue"]["values"]]}
    (tmp_path / "results.json").write_text(json.dumps({"blue": changed}))
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text("### Changed results\n\n- blue is bluer.\n\n### Changed\n\n- More.\n")
    for name, place in {"RESULTS": "results.json", "FOLDER": ".", "CHANGELOG": changelog}.items():
        monkeypatch.setattr(make, name, tmp_path / place)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["make.py", "blue", *arguments])
        make.main()

    for arguments in ((), ("--changed", "More.")):
        with pytest.raises(SystemExit):
            call(*arguments)
        assert not (tmp_path / "blue.toml").exists()
    call("--changed", "blue is bluer.")
    assert json.loads((tmp_path / "results.json").read_text())["blue"] == {
        **RESULTS["blue"],
        **make.told(
            make.sampler("blue")(**_without_model(Run.read(tmp_path / "blue.toml"))).latents
        ),
    }
