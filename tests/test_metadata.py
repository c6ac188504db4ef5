"""Pictures that hold their run."""

import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pilotfish import Guide, GuideWarning, InputError, Run
from pilotfish.runs.metadata import KEY, Picture, read_run
from pilotfish.runs.pictures import save_picture


def png(path, *texts, size=(8, 8), pixels=b""):
    """A PNG put together by hand: (kind, content) chunks between header and pixels."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *texts, (b"IDAT", pixels), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        check = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
    Path(path).write_bytes(data)
    return path


def itxt(text, compressed=False):
    value = text.encode()
    head = KEY.encode() + b"\0" + bytes([compressed, 0]) + b"\0\0"
    return b"iTXt", head + (zlib.compress(value, 9) if compressed else value)


RUN = Run(prompt="a 'red' cat, \"été\"\n日本 🦊", seed=3, plugins=[])


def finished(size=(9, 7), run=RUN):
    """A picture as a run gives it."""
    return Picture.of(Image.effect_noise(size, 40).convert("RGB"), run)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_holds_its_run_word_for_word_and_its_pixels_stay(tmp_path, ending):
    picture = finished((16, 8))
    save_picture(picture, path := tmp_path / f"cat.{ending}")
    picture.save(other := tmp_path / "other", ending.replace("jpg", "jpeg"))
    assert read_run(path) == read_run(other) == RUN.to_toml()
    picture.copy().save(bare := tmp_path / f"bare.{ending}")
    with Image.open(path) as again, Image.open(bare) as without:
        assert again.tobytes() == without.tobytes()
        assert ending != "png" or again.tobytes() == picture.tobytes()
    with pytest.raises(InputError, match="holds no run"):
        read_run(bare)


def test_the_exif_of_a_jpeg_is_read_by_its_standard(tmp_path):
    """Tag 0x9286: eight bytes that name the code, then the text in it."""
    finished().save(tmp_path / "cat.jpg")
    data = (tmp_path / "cat.jpg").read_bytes()
    assert "pilotfish\n".encode("utf-16-be") in data.partition(b"UNICODE\0")[2]


def test_a_format_that_cannot_hold_a_run_says_so(tmp_path):
    with pytest.warns(GuideWarning, match="the file holds no run: of all formats only PNG, JPEG"):
        finished().save(tmp_path / "cat.bmp")
    long = Run(prompt="x" * 40_000)
    with pytest.warns(GuideWarning, match="and a JPEG holds 65527; save a PNG or a WebP"):
        finished(run=long).save(tmp_path / "cat.jpg")
    finished(run=long).save(tmp_path / "cat.webp")
    assert read_run(tmp_path / "cat.webp") == long.to_toml()


def test_another_programs_comment_is_no_run(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 20".encode("utf-16-be")
    for ending in ("jpg", "webp"):
        Image.new("RGB", (5, 5)).save(path := tmp_path / f"cat.{ending}", exif=exif)
        with pytest.raises(InputError, match="holds no run: only a PNG, JPEG or WebP"):
            read_run(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_run_is_read_from_a_png_of_any_mode(tmp_path, mode):
    info = PngInfo()
    info.add_text(KEY, "steps = 3")
    Image.new(mode, (5, 5)).save(tmp_path / "cat.png", pnginfo=info)
    assert read_run(tmp_path / "cat.png") == "steps = 3"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: png(p, itxt("steps = 3"), size=(20_000, 20_000)), "exceeds limit|megapixels"),
        (lambda p: png(p, itxt("steps = 3"), size=(10_000, 10_000)), "has 100 megapixels"),
        (lambda p: png(p, itxt("x" * 2_000_000, compressed=True)), "too large|holds a run of"),
        (lambda p: png(p, itxt("x" * 1_700_000)), "holds a run of 1700000 characters"),
        (lambda p: png(p, (b"iTXt", KEY.encode() + b"\0\0")), "holds no run"),
        (lambda p: png(p, (b"tEXt", b"other\0steps = 3")), "holds no run"),
        (lambda p: p.write_bytes(b""), "expected a PNG, JPEG or WebP"),
        (
            lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
            "expected a PNG, JPEG or WebP",
        ),
        (lambda p: p.write_text("steps = 3"), "expected a PNG, JPEG or WebP"),
        (lambda p: p.mkdir(), "cannot read"),
        (lambda p: None, "cannot read"),
    ],
)
def test_a_file_that_is_too_much_or_too_little_is_refused_in_no_time(tmp_path, make, words):
    path, begin = tmp_path / "cat.png", time.process_time()
    make(path)
    with pytest.raises(InputError, match=words):
        read_run(path)
    assert time.process_time() - begin < 0.5


def test_a_picture_cut_off_in_its_pixels_still_holds_its_run(tmp_path):
    whole = save_picture(finished((64, 64)), tmp_path / "cat.png").read_bytes()
    (tmp_path / "cat.png").write_bytes(whole[: len(whole) // 2])
    assert read_run(tmp_path / "cat.png") == RUN.to_toml()


def test_deeply_nested_text_is_refused():
    with pytest.raises(InputError, match="not valid TOML"):
        Run.parse("steps = " + "[" * 100_000)


def test_a_seed_that_no_generator_takes_is_refused():
    assert Run(seed=2**64 - 2, num_images=2).seed
    with pytest.raises(InputError, match="seed must be below 2"):
        Run(seed=2**64 - 1, num_images=2)


def test_a_result_saves_every_picture_with_its_run(sampler, tmp_path):
    result = sampler("a cat", steps=1, seed=5, num_images=2)
    files = result.save(tmp_path / "new" / "cat.png")
    assert [file.name for file in files] == ["cat-1.png", "cat-2.png"]
    assert {read_run(file) for file in files} == {result.run.to_toml()}
    for file, picture in zip(files, result.images, strict=True):
        with Image.open(file) as again:
            assert again.tobytes() == picture.tobytes()


def test_a_run_that_no_file_can_hold_is_saved_as_pixels(sampler, tmp_path):
    class Local(Guide):
        def loss_guidance(self, step):
            return step.x0.mean(dim=(1, 2, 3))

    result = sampler("a cat", plugins=[Local()], steps=1)
    with pytest.warns(GuideWarning, match="the file holds no run: plugin 'Local' was defined in"):
        (file,) = result.save(tmp_path / "cat.png")
    with pytest.raises(InputError, match="holds no run"):
        read_run(file)
