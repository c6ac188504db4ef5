"""What is read from embedding files, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from pilotfish_textual_inversion import read, write
from pilotfish_textual_inversion.files import LARGEST
from safetensors.torch import save_file

from pilotfish import InputError

BIRB = Path(__file__).parent / "data" / "learned_embeds.bin"
INK = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))
WIDE = torch.randn(3, 20, generator=torch.Generator().manual_seed(8))


def saved(path, content):
    """A file by torch or by safetensors, as its name says."""
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


def only(words):
    """The word and the vectors of a file that holds one, for one encoder."""
    ((word, parts),) = words.items()
    ((encoder, vectors),) = parts.items()
    assert encoder == "text_encoder"
    return word, vectors


# ---- layouts ----


def test_the_concepts_librarys_own_file_is_read():
    word, vectors = only(read(BIRB))
    assert word == "<birb-style>"
    assert vectors.shape == (1, 768) and vectors.dtype == torch.float32
    raw = torch.load(BIRB, weights_only=True)["<birb-style>"]
    assert torch.equal(vectors[0], raw)


def automatic1111(values):
    """As AUTOMATIC1111 writes it."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(values)},
        "name": "ink",
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.bin", {"<ink>": INK}, "<ink>"),
        ("a.safetensors", {"<ink>": INK}, "<ink>"),
        ("a.pt", automatic1111(INK), "ink"),
        ("own.pt", {"string_to_param": {"*": INK}}, "own"),
        ("raw.pt", INK, "raw"),
        ("raw.bin", torch.nn.Parameter(INK), "raw"),
        ("unnamed.safetensors", {"emb_params": INK}, "unnamed"),
        ("unnamed.pt", {"clip_l": INK}, "unnamed"),
    ],
)
def test_every_layout_gives_its_word_and_its_vectors(tmp_path, name, content, word):
    found, vectors = only(read(saved(tmp_path / name, content)))
    assert found == word
    assert torch.equal(vectors, INK) and not vectors.requires_grad


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_pair_for_sdxl_is_told_apart_by_encoder(tmp_path, suffix):
    words = read(saved(tmp_path / f"ink.{suffix}", {"clip_g": WIDE, "clip_l": INK}))
    assert words.keys() == {"ink"}
    assert torch.equal(words["ink"]["text_encoder"], INK)
    assert torch.equal(words["ink"]["text_encoder_2"], WIDE)


def test_a_file_may_hold_several_words(tmp_path):
    path = saved(tmp_path / "two.safetensors", {"<a>": INK[0].clone(), "<b>": INK[1:].clone()})
    words = read(path)
    assert {word: len(parts["text_encoder"]) for word, parts in words.items()} == {
        "<a>": 1,
        "<b>": 2,
    }
    with pytest.raises(InputError, match=r"two\.safetensors holds 2 words \(<a>, <b>\)"):
        read(path, token="<c>")


def test_token_renames_the_word(tmp_path):
    assert only(read(saved(tmp_path / "a.pt", automatic1111(INK)), token="<x>"))[0] == "<x>"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_become_float32(tmp_path, dtype):
    _, vectors = only(read(saved(tmp_path / "a.pt", {"<ink>": INK.to(dtype)})))
    torch.testing.assert_close(vectors, INK.to(dtype).float(), rtol=0, atol=0)


def test_what_is_written_is_read_again(tmp_path):
    path = write(tmp_path / "new" / "ink.safetensors", "<ink>", INK.requires_grad_(False))
    word, vectors = only(read(path))
    assert word == "<ink>" and torch.equal(vectors, INK)
    assert [p.name for p in path.parent.iterdir()] == ["ink.safetensors"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "ink.safetensors", "<ink>", INK)

    def half(content, part):
        Path(part).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("pilotfish_textual_inversion.files.save_file", half)
    with pytest.raises(InputError, match=r"cannot write .*ink\.safetensors: No space left"):
        write(path, "<ink>", 2 * INK)
    assert torch.equal(only(read(path))[1], INK)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match=r"ink\.bin: end its name in \.safetensors"):
        write(tmp_path / "ink.bin", "<ink>", INK)


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", {"<a>": torch.full((2, 4), float("nan"))}, "'<a>' holds 8 values that are not f"),
        (
            "a.pt",
            {"<a>": torch.full((4,), 1e300, dtype=torch.float64)},
            "'<a>' holds 4 values that are not f",
        ),
        ("a.pt", {"<a>": torch.ones(2, 4, dtype=torch.int64)}, r"'<a>' holds torch\.int64; expect"),
        ("a.pt", {"<a>": torch.ones(1, 2, 4)}, r"'<a>' has shape \(1, 2, 4\); expected \(D,\) or"),
        ("a.pt", {"<a>": torch.ones(0, 4)}, r"'<a>' has shape \(0, 4\)"),
        ("a.pt", {"<a>": torch.tensor(1.0)}, r"'<a>' has shape \(\)"),
        ("a.pt", {"<a>": torch.ones(1, 1).expand(2**40, 2**20)}, r"claims shape \(1099511627776, "),
        ("a.pt", {"<a>": torch.eye(4).to_sparse()}, r"'<a>' is a torch\.sparse_coo tensor; exp"),
        ("a.pt", {"string_to_param": {"*": "x"}, "name": "ink"}, "'ink' is 'x'; expected a dense"),
        ("a.pt", {}, r"a\.pt has an unknown layout \(\[\]\); known: {token: tensor}"),
        ("a.pt", [INK], "unknown layout .'list'.; known"),
        ("a.pt", {"step": 4, "w": INK}, r"unknown layout \(\['step', 'w'\]\)"),
        ("a.pt", {"up": INK, "down": WIDE}, "unknown layout"),
        ("a.pt", {"my style": INK}, "names its word 'my style'; give one without spaces as token"),
        ("a.pt", {"": INK}, "names its word ''"),
    ],
)
def test_what_is_no_embedding_is_refused_by_name_and_fact(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as refusal:
        read(saved(tmp_path / name, content))
    assert str(tmp_path / name) in str(refusal.value)


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no embedding file .*none\.pt; expected \.safetensors"):
        read(tmp_path / "none.pt")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.png ends in '\.png'; expected \.safetensors"):
        read(tmp_path / "a.png")


class Harm:
    """A pickle that runs a command where it is loaded by Python's own loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path, suffix):
    trace, path = tmp_path / "trace", tmp_path / f"a{suffix}"
    torch.save({"<a>": Harm(trace)}, path)
    with pytest.raises(InputError, match=r"it asks for (posix|nt)\.mkdir; a file of tensors may"):
        read(path)
    path.write_bytes(pickle.dumps(Harm(trace), protocol=2))
    with pytest.raises(InputError, match=r"a\.\w+ is no learned embedding"):
        read(path)
    assert not trace.exists()


def safetensors(header, data=b""):
    """The bytes of a file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(safetensors({"<a>": entry([4], 0, 16)}, bytes(8)), id="truncated"),
        pytest.param(struct.pack("<Q", 2**40) + b"{}", id="huge header"),
        pytest.param(safetensors(b"{not json"), id="no header"),
        pytest.param(
            safetensors({"<a>": entry([4], 0, 16), "<b>": entry([4], 8, 24)}, bytes(24)),
            id="overlap",
        ),
        pytest.param(
            safetensors({"<a>": entry([4], 0, 16), "<b>": entry([4], 20, 36)}, bytes(36)),
            id="hole",
        ),
        pytest.param(safetensors({"<a>": entry([4], 0, 16)}, bytes(24)), id="trailing bytes"),
        pytest.param(safetensors({"<a>": entry([2**60], 0, 16)}, bytes(16)), id="shape 2^60"),
        pytest.param(safetensors({"<a>": entry([2**40, 2**40], 0, 0)}), id="shape 2^80"),
        pytest.param(safetensors({}), id="no tensors"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"a\.safetensors (is no learned embedding|has an unknown)"
    ):
        read(path)


def test_a_file_of_a_models_size_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(InputError, match="it is 17 MB large; they are below 1 MB"):
        read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(LARGEST + 1))
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="it is 17 MB large"):
        read(path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files to damage, by name."""
    folder = tmp_path_factory.mktemp("originals")
    torch.save({"<ink>": INK}, folder / "old.bin", _use_new_zipfile_serialization=False)
    saved(folder / "ink.pt", automatic1111(INK))
    saved(folder / "ink.safetensors", {"<ink>": INK})
    return {path.name: path.read_bytes() for path in (*folder.iterdir(), BIRB)}


@pytest.mark.parametrize("name", ["old.bin", "ink.pt", "ink.safetensors", BIRB.name])
def test_damaged_files_are_read_or_refused_never_a_crash(name, originals, tmp_path):
    random, path = Random(name), tmp_path / name
    for _ in range(500):
        content = bytearray(originals[name])
        for _ in range(random.randint(1, 4)):
            content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(content[: random.choice([None, random.randrange(len(content))])])
        try:
            words = read(path)
        except InputError as refusal:
            assert name in str(refusal)
        else:
            assert all(v.isfinite().all() for parts in words.values() for v in parts.values())
