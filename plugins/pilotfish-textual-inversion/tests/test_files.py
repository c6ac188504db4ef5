"""What is read from embedding files, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import threading
import time
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from pilotfish_textual_inversion import read, write
from pilotfish_textual_inversion.files import LARGEST, MOST_VECTORS, MOST_WORDS
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


def textual_inversion(values, **others):
    """As the original repository and InvokeAI's trainer write it."""
    param = torch.nn.Parameter(values)
    return {
        "string_to_token": {"*": torch.tensor(265), **dict.fromkeys(others, torch.tensor(42))},
        "string_to_param": torch.nn.ParameterDict({"*": param, **others}),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [automatic1111, textual_inversion, lambda v: {"ink": v}])
def test_both_formats_of_torch_are_read_in_every_precision(tmp_path, layout, dtype, zipped):
    path = tmp_path / "ink.pt"
    torch.save(layout(INK.to(dtype)), path, _use_new_zipfile_serialization=zipped)
    word, vectors = only(read(path))
    assert word == "ink" and torch.equal(vectors, INK.to(dtype).float())


def test_the_original_repositorys_file_has_its_own_name_for_a_star(tmp_path):
    path = saved(tmp_path / "embeddings_gs-5000.pt", textual_inversion(INK, sks=INK[:1]))
    words = read(path)
    assert words.keys() == {"embeddings_gs-5000", "sks"}
    assert torch.equal(words["sks"]["text_encoder"], INK[:1])


def test_a_parameter_dict_of_torch_before_1_12_is_read(tmp_path):
    content = textual_inversion(INK)
    del vars(content["string_to_param"])["_keys"]  # it had none; its own methods need it
    assert torch.equal(only(read(saved(tmp_path / "a.pt", content)))[1], INK)


def test_a_file_that_was_saved_on_cuda_is_read_on_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        saved(tmp_path / "ink.pt", automatic1111(INK))
    assert torch.equal(only(read(tmp_path / "ink.pt"))[1], INK)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"<ink>": INK, "step": 500, "name": "mine", "loss": 0.25, "vae": None}, "<ink>"),
        ({"emb_params": INK, "name": "mine", "step": torch.tensor(500)}, "mine"),
        ({"string_to_param": {"*": INK}, "name": "", "hash": "0af3"}, "file"),
    ],
)
def test_numbers_and_text_beside_the_vectors_are_passed_over(tmp_path, content, word):
    found, vectors = only(read(saved(tmp_path / "file.pt", content)))
    assert found == word and torch.equal(vectors, INK)


def test_a_pair_with_a_name_and_steps_has_that_name(tmp_path):
    content = {"clip_l": INK, "clip_g": WIDE, "name": "mine", "step": 500}
    assert read(saved(tmp_path / "a.pt", content)).keys() == {"mine"}


def test_an_ending_in_capitals_is_the_same_ending(tmp_path):
    save_file({"<ink>": INK}, tmp_path / "A.SafeTensors")
    assert torch.equal(only(read(tmp_path / "A.SafeTensors"))[1], INK)


def test_what_torch_may_load_elsewhere_is_as_before(tmp_path):
    own = set(torch.serialization.get_safe_globals())
    path = saved(tmp_path / "a.pt", textual_inversion(INK))
    read(path)
    assert set(torch.serialization.get_safe_globals()) == own
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        assert torch.equal(only(read(path))[1], INK)
        assert torch.nn.ParameterDict in torch.serialization.get_safe_globals()


def test_files_of_parameter_dicts_are_read_by_threads_at_once(tmp_path):
    path, faults = saved(tmp_path / "a.pt", textual_inversion(INK)), []

    def often():
        try:
            for _ in range(50):
                read(path)
        except InputError as error:
            faults.append(error)

    threads = [threading.Thread(target=often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


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
    with pytest.raises(InputError, match=r"two\.safetensors holds 2 words \('<a>', '<b>'\)"):
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
        ("a.pt", {"<a>": torch.eye(4).to_sparse()}, r"asks for torch\._utils\._rebuild_sparse"),
        ("a.pt", {"string_to_param": {"*": "x"}, "name": "ink"}, "'ink' is 'x'; expected a dense"),
        ("a.pt", {}, r"a\.pt has an unknown layout \(dict\); known: {token: tensor}"),
        ("a.pt", [INK], r"unknown layout \(list\); known"),
        ("a.pt", {"step": 4, "w": [INK]}, r"unknown layout \('step', 'w'\)"),
        ("a.pt", {"up": INK, "down": WIDE}, "unknown layout"),
        ("a.pt", {"my style": INK}, "names its word 'my style'; give one without spaces as token"),
        ("a.pt", {"": INK}, "names its word ''"),
        ("a.pt", {7: INK}, "names its word 7; give one without spaces as token"),
        (
            "a.pt",
            {"*": INK, "emb_params": INK},
            r"holds 2 tensors .* for 1 words; expected one for",
        ),
    ],
)
def test_what_is_no_embedding_is_refused_by_name_and_fact(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as refusal:
        read(saved(tmp_path / name, content))
    assert str(tmp_path / name) in str(refusal.value)


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no embedding file .*none\.pt; expected \.safetensors"):
        read(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"no embedding file x{200}\.\.\.; expected"):
        read("x" * 5000)
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


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refusal_gives_no_advice_to_switch_safety_off(tmp_path, zipped):
    content = [{"<a>": Harm(tmp_path / "trace")}, {"<a>": Random(1)}, {"<a>": slice(1)}]
    for number, value in enumerate(content):
        path = tmp_path / f"{number}.pt"
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError) as refusal:
            read(path)
        assert not any(w in str(refusal.value) for w in ("weights_only", "trust", "safe_globals"))


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


# ---- bombs: small files that cost much ----


def pickled(path, operations):
    """A file as torch.save zips it, around these operations of a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + operations + b".")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", bytes(16))


def text(value):
    value = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(value)) + value


def number(value):
    value = pickle.encode_long(value)
    return b"\x8a" + bytes([len(value)]) + value


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def floats(numel, shape, stride, offset=0):
    """A tensor that claims a storage, a shape, strides and an offset; the file has 16 bytes."""
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
    sizes = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, stride)]
    hooks = name("collections", "OrderedDict") + b")R"
    values = storage + number(numel) + b"tQ" + number(offset) + b"".join(sizes) + b"\x89" + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + values + b"tR"


def doubled_tuple(times):
    """A tuple that holds the last one twice, and so on, as a key: 2^times parts to hash."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(times))
    return b"}" + text("lol") + b"q\x00" + pairs + b"K\x01s"


def doubled_list(times):
    inner = "x"
    for _ in range(times):
        inner = [inner, inner]
    return inner


def again_and_again(callable_name, items):
    """A container made anew from the same large one, until the operations run out."""
    calls = b"h\x02h\x01\x85R" * 800
    return b"](" + items + b"q\x01" + name(*callable_name) + b"q\x02" + calls + b"e"


NUMBERS = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(2000)) + b"e"
NAMED = b"}(" + b"".join(text(f"k{i}") + b"K\x01" for i in range(900)) + b"u"
PARAMETER_DICT = ("torch.nn.modules.container", "ParameterDict")
BOMBS = {
    "tuples, 2^40 deep": (doubled_tuple(40), "repeats a tuple"),
    "tuples, 2000 deep": (b"})" + b"\x85" * 2000 + b"K\x01s", "unknown layout"),
    "lists, 2000 deep": (
        b"}" + text("string_to_param") + b"]" * 2000 + b"a" * 1999 + b"s",
        "unknown layout",
    ),
    "sets again": (again_and_again(("builtins", "set"), NUMBERS), "unknown layout"),
    "dicts again": (again_and_again(PARAMETER_DICT, NAMED), "damaged"),
    "bytearray": (
        b"}" + name("builtins", "bytearray") + number(2**34) + b"\x85R" + b"K\x01s",
        "asks",
    ),
    "long name": (name("a" * 10**6, "b"), "it asks for aaa"),
    "endless": (b"]" + b"Na" * 10**6, "more than 6000 operations"),
    "memo": (b"}r\xff\xff\xff\x7f", "unknown layout"),
    "storage 2^60": (b"}" + text("*") + floats(2**60, [2**60], [1]) + b"s", "damaged"),
    "storage 2^12": (b"}" + text("*") + floats(2**12, [2**12], [1]) + b"s", "damaged"),
    "shape 2^60": (b"}" + text("*") + floats(4, [2**60], [0]) + b"s", "claims shape"),
    "shape 2^120": (b"}" + text("*") + floats(4, [2**60, 2**60], [0, 0]) + b"s", "damaged"),
    "offset 2^60": (b"}" + text("*") + floats(4, [4], [1], 2**60) + b"s", "damaged"),
    "half a character": (b"}" + text("a\udc80") + floats(4, [4], [1]) + b"s", "'a\\\\udc80'; give"),
    "long word": (b"}" + text("a" * 10**6) + floats(4, [4], [1]) + b"s", "200 characters at most"),
}


def refused(path, message):
    """Refused with that, quickly, and in few words."""
    started = time.perf_counter()
    with pytest.raises(InputError, match=message) as refusal:
        read(path)
    assert time.perf_counter() - started < 2
    assert len(str(refusal.value)) < 500 + len(str(path))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_of_pickles_is_refused_quickly(tmp_path, bomb):
    operations, message = BOMBS[bomb]
    pickled(tmp_path / "a.pt", operations)
    refused(tmp_path / "a.pt", message)


def test_the_bombs_builder_can_write_a_file_that_is_read(tmp_path):
    pickled(tmp_path / "a.pt", b"}" + text("ink") + floats(4, [2, 2], [2, 1]) + b"s")
    word, vectors = only(read(tmp_path / "a.pt"))
    assert word == "ink" and torch.equal(vectors, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"string_to_param": {"*": doubled_list(24)}}, "'a' is list; expected a dense tensor"),
        ({"string_to_param": doubled_list(24)}, "unknown layout"),
        (doubled_list(24), "unknown layout .list."),
        ({f"w{i}": INK for i in range(10_000)}, "operations; a word takes some 50"),
        ({f"w{i}": INK for i in range(MOST_WORDS + 1)}, f"holds {MOST_WORDS + 1} tensors"),
        ({"<a>": torch.ones(MOST_VECTORS + 1, 4)}, f"holds {MOST_VECTORS + 1} vectors; expected"),
    ],
)
def test_more_than_an_embedding_holds_is_refused_quickly(tmp_path, content, message):
    refused(saved(tmp_path / "a.pt", content), message)


def test_as_many_words_and_vectors_as_are_allowed_are_read(tmp_path):
    words = {f"w{i}": torch.nn.Parameter(INK) for i in range(MOST_WORDS)}
    assert len(read(saved(tmp_path / "a.pt", {"string_to_param": torch.nn.ParameterDict(words)})))
    read(saved(tmp_path / "b.pt", {"<a>": torch.ones(MOST_VECTORS, 4)}))


def test_a_safetensors_file_of_many_words_is_refused_by_its_header(tmp_path):
    entries = {f"w{i}": entry([1], 4 * i, 4 * i + 4) for i in range(100_000)}
    (tmp_path / "a.safetensors").write_bytes(safetensors(entries, bytes(400_000)))
    refused(tmp_path / "a.safetensors", "it holds 100000 tensors; 64 words at most are read")


@pytest.mark.parametrize("claim", [2**30, 2**38, 2**60])
def test_an_old_file_that_claims_more_values_than_it_has_is_refused(tmp_path, claim):
    torch.save({"<a>": torch.ones(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    at = content.index(b"K\x04", content.index(b"cpu"))  # the storage's number of values
    (tmp_path / "a.pt").write_bytes(content[:at] + number(claim) + content[at + 2 :])
    refused(tmp_path / "a.pt", "damaged, or not written by torch.save")


def test_an_archive_with_two_files_of_one_name_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"<ink>": INK})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"other")
    refused(path, "two files of one name")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are UTF-8")
def test_a_file_whose_name_is_no_utf8_has_to_be_given_a_word(tmp_path):
    path = tmp_path / os.fsdecode(b"ink\xff.pt")
    torch.save(INK, tmp_path / "ink.pt")
    (tmp_path / "ink.pt").rename(path)
    with pytest.raises(InputError, match=r"names its word 'ink\\udcff'; give one of whole char"):
        read(path)
    assert torch.equal(only(read(path, token="<ink>"))[1], INK)
