"""Golden runs: each family's and plugin's run file, with what came out of it.

    python tests/golden/make.py                            those that are not there yet
    python tests/golden/make.py blue --changed "LINE"      one whose result has changed

A result that has changed is written only with LINE, which must stand in CHANGELOG.md under
**Changed results**. `tests/test_golden.py` repeats all runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

import pilotfish
from pilotfish.testing import random_sampler
from pilotfish.testing.random_models import families

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
CHANGELOG = FOLDER.parents[1] / "CHANGELOG.md"
# Of values whose standard deviation is about 1: 100 times what another way to sum (no oneDNN, two
# threads) made of them, which stands for other processors and versions of torch.
TOLERANCE = 2e-3
VALUES = 32
MEASURED = {"use": "blue", "gradient": "none"}  # what a search looks for
IMAGE = {"image": "grey.png"}
# What plugins are told where their own defaults do nothing in two steps, or ask for something.
SETTINGS: dict[str, dict[str, Any]] = {
    "apg": {"threshold": 1.0},
    "blend": {"prompts": {"a fox": 0.5}},
    "cfg-interval": {"high": 5.0},
    "cfg-zero-star": {"zero_steps": 0},
    "classifier": {"label": "fox"},
    "clip": {"text": "a fox", "cutouts": 0},
    "clip-style": IMAGE,
    "concept": {"file": "ink.safetensors"},
    "edges": IMAGE,
    "img2img": {**IMAGE, "strength": 1},
    "inpaint": {**IMAGE, "mask": [0.25, 0.25, 1, 1]},
    "long-prompt": {"chunks": 2},
    "lora": {"file": "lora.safetensors"},
    "nag": {"negative_prompt": "an otter"},
    "palette": {"colors": ["#14213d", "#fca311"]},
    "reference": IMAGE,
    "regions": {"prompts": ["a red cat"], "areas": [[0, 0, 0.5, 1]]},
    "slg": {"stop": 1},
    "token-blend": {"word": "skunk", "mix": {"otter": 0.5}},
    "token-swap": {"word": "puppy", "by": "cat"},
    "weights": {"dialect": "compel"},
}
PLAIN = (  # the others, which say something by their defaults
    *("autoguidance", "blue", "cfg-norm", "cfg-plus-plus", "cfg-rescale", "fdg", "mambo"),
    *("optimize", "pag", "sag", "seg", "sharpness", "symmetry", "tcfg", "threshold"),
)
SEARCHES = ("best-of", "das", "feynman-kac", "svdd")
PROMPTS = {"concept": "a <ink> of a puppy", "weights": "a puppy and a skunk++"}
OPTIONS = {"steps": 2, "seed": 5, "height": 32, "width": 32, "embed_inputs": True}


def runs() -> dict[str, dict[str, Any]]:
    """What each golden run asks a sampler for, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({*SETTINGS, *SEARCHES, *PLAIN}):
        plugins = [{"use": name, **SETTINGS.get(name, {})}]
        more: dict[str, Any] = {}
        if name in SEARCHES:
            plugins = [MEASURED, {**plugins[0], "particles": 2}]
            more = {"scheduler": "euler-ancestral"}  # which parts candidates of one origin
        prompt = PROMPTS.get(name, "a puppy and a skunk")
        found[name] = {"prompt": prompt, "plugins": plugins, **OPTIONS, **more}
    for family in families():
        # Whose random network takes no more tokens.
        more = {"max_sequence_length": 60} if family == "z-image" else {}
        asked = {"prompt": "a red cat", "plugins": [{"use": "blue"}], **OPTIONS, **more}
        found[f"family-{family}"] = asked
    return found


@functools.cache
def sampler(name: str) -> pilotfish.Sampler:
    """The model of a golden run: the one that ships, or a random one of the family."""
    if name.startswith("family-"):
        return random_sampler(family=name.removeprefix("family-"))
    return pilotfish.load("emoji", device="cpu") if name == "emoji" else sampler("emoji")


def machine() -> str:
    """What must be the same for the same bits."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        libraries = (f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
        isa = torch.backends.cpu.get_cpu_capability()
        return ", ".join([platform.machine(), *names[:1], isa, *libraries])
    return ""


def told(latents: torch.Tensor) -> dict[str, Any]:
    """Of latents: their hash, and some values at even distances."""
    flat = latents.detach().float().flatten()
    return {
        "sha256": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
        "values": [round(v, 5) for v in flat[:: len(flat) // VALUES][:VALUES].tolist()],
        "machine": machine(),
    }


def close(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether the values are those, but for what another machine rounds otherwise."""
    one, other = torch.tensor(found["values"]), torch.tensor(expected["values"])
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE * max(1.0, other.std().item()))


def write_inputs(folder: Path) -> None:
    """The files that runs name: a picture, a learned word, a LoRA."""
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(folder / "grey.png")
    model = sampler("emoji").model
    width = model.text_encoders[0].width
    save_file({"<ink>": torch.linspace(-0.1, 0.1, width)}, folder / "ink.safetensors")
    lora = {}
    for name, layer in model.denoiser.named_modules():
        if "mid_block" in name and name.endswith("to_q"):
            wide, high = layer.in_features, layer.out_features
            lora[f"unet.{name}.lora_A.weight"] = torch.linspace(-1, 1, wide)[None]
            lora[f"unet.{name}.lora_B.weight"] = torch.linspace(-1, 1, high)[:, None]
    save_file(lora, folder / "lora.safetensors")


def made(name: str, asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A golden run: its file, and what came out."""
    result = sampler(name).stream(**asked).result()
    run = result.run
    if name.startswith("family-"):
        # Random numbers of another processor may differ in their last bits.
        unknown = run.made_with.model_copy(update={"weights": None})
        run = run.model_copy(update={"made_with": unknown})
    return run.to_toml(), told(result.latents)


def changed_results() -> str:
    """That part of the changelog, all of it that is not released."""
    part = CHANGELOG.read_text("utf-8").partition("### Changed results\n")[2]
    return part.partition("\n### ")[0]


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--changed", metavar="LINE", help="of the changelog, which tells of it")
    given = parser.parse_args()
    if given.changed is not None and given.changed not in changed_results():
        parser.error("CHANGELOG.md does not have that line under **Changed results**")
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as inputs, contextlib.chdir(inputs):
        write_inputs(Path(inputs))
        for name, asked in runs().items():
            if name not in (given.names or runs().keys() - results.keys()):
                continue
            text, found = made(name, asked)
            if name in results and not close(found, results[name]) and given.changed is None:
                parser.error(f"{name} gives another picture: say so in CHANGELOG.md, by --changed")
            results[name] = found
            (FOLDER / f"{name}.toml").write_text(text, encoding="utf-8")
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
            print(name)


if __name__ == "__main__":
    main()
