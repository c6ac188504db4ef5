"""The page on security: every test that it names exists, and what no other test holds."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import pilotfish
from pilotfish import ModelError
from pilotfish.cli.trust import offline
from pilotfish.testing import random_pipeline

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
CODE = "import os\nos.mkdir({!r})\nclass Evil:\n    pass\n"


class Harm:
    """A pickle that makes a folder where it is loaded by Python's own loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(folder, trace, part, name):
    next((folder / part).glob("*.safetensors")).unlink()
    torch.save({"a": Harm(trace)}, folder / part / name)


def part_of_code(folder, trace):
    (folder / "vae" / "evil.py").write_text(CODE.format(str(trace)))
    change(folder, vae=["evil", "Evil"])


def pipeline_of_code(folder, trace):
    (folder / "evil.py").write_text(CODE.format(str(trace)))
    change(folder, _class_name=["evil", "Evil"])


def change(folder, **values):
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda *to: pickled(*to, "vae", "diffusion_pytorch_model.bin"),
            "the vae cannot be read",
        ),
        (
            lambda *to: pickled(*to, "text_encoder", "pytorch_model.bin"),
            "the text_encoder cannot be read",
        ),
        (part_of_code, "custom code"),
        (pipeline_of_code, "no model family here takes that"),
    ],
    ids=["weights of diffusers", "weights of transformers", "a part", "the pipeline"],
)
def test_code_in_a_models_folder_is_not_run(spoil, words, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    random_pipeline().save_pretrained(folder)
    spoil(folder, trace)
    with pytest.raises(ModelError, match=words):
        pilotfish.load(folder)
    assert not trace.exists()


def test_a_run_of_a_model_that_is_here_asks_the_network_for_nothing(tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    with offline("the run"):  # which warns of what was asked for, and warnings are errors
        result = pilotfish.load(tmp_path)("a cat", plugins=["blue"], steps=2)
        result.save(tmp_path / "cat.png")


def test_every_test_that_the_page_names_is_there():
    here = "plugins/pilotfish-textual-inversion/tests/test_files.py"
    found, file = 0, None
    for file_, test in re.findall(r"`(?:(\S*test_\w+\.py)|(test_\w+))`", PAGE):
        if file_:
            file = ROOT / ("" if "/" in file_ else "tests") / file_
            continue
        found += 1
        places = [file, ROOT / here]
        assert any(f"def {test}(" in place.read_text() for place in places if place), test
    assert found > 20
