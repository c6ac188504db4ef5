"""Picture files, read in one place for the core and all plugins."""

import numpy as np
import pytest
import torch
from PIL import Image

from pilotfish import SettingsError, pixels, read_picture


def saved(picture, path, **options):
    picture.save(path, **options)
    return path


def read(path, **options):
    return read_picture(path, "Plugin: image", **options)


def test_every_pixel_stays_where_no_size_or_the_pictures_own_is_asked_for(tmp_path):
    noise = Image.effect_noise((40, 24), 90).convert("RGB")
    path = saved(noise, tmp_path / "noise.png")
    assert read(path).tobytes() == noise.tobytes()
    assert read(path, size=(24, 40)).tobytes() == noise.tobytes()
    mask = noise.convert("L")
    assert read(saved(mask, tmp_path / "mask.png"), mode="L").tobytes() == mask.tobytes()


def test_pixels_are_channels_first_from_0_to_1():
    picture = Image.new("RGB", (3, 2), (255, 0, 51))
    picture.putpixel((2, 1), (0, 255, 0))
    values = pixels(picture)
    assert values.shape == (1, 3, 2, 3) and values.dtype == torch.float32
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor([1, 0, 0.2]))
    torch.testing.assert_close(values[0, :, 1, 2], torch.tensor([0.0, 1, 0]))
    assert pixels(picture.convert("L")).shape == (1, 1, 2, 3)


def test_of_a_picture_of_another_shape_the_middle_is_taken(tmp_path):
    wide = Image.new("RGB", (60, 20), "#0f0")
    wide.paste("#f00", (20, 0, 40, 20))
    middle = pixels(read(saved(wide, tmp_path / "wide.png"), size=(16, 16)))
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand_as(middle)
    # Pillow's filter reaches over the cut.
    torch.testing.assert_close(middle, red, atol=0.03, rtol=0)


def test_a_picture_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = saved(Image.new("RGB", (30, 10)), tmp_path / "turned.png", exif=exif)
    assert read(path).size == (10, 30)


@pytest.mark.parametrize(("mode", "ground"), [("RGB", (255, 255, 255)), ("L", 0)])
def test_what_is_transparent_is_white_in_a_picture_and_black_in_a_mask(tmp_path, mode, ground):
    picture = Image.new("RGBA", (4, 4), (90, 90, 90, 255))
    picture.putpixel((0, 0), (90, 90, 90, 0))
    flat = read(saved(picture, tmp_path / "cut.png"), mode=mode)
    assert flat.getpixel((0, 0)) == ground
    assert flat.getpixel((1, 1)) == (90 if mode == "L" else (90, 90, 90))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_read(tmp_path, mode):
    white = Image.new("RGB", (16, 16), "#ffffff").convert(mode)
    path = saved(white, tmp_path / f"white.{'jpg' if mode == 'CMYK' else 'png'}")
    assert pixels(read(path)).min() > 0.99


def test_a_picture_of_16_bits_is_read_in_8(tmp_path):
    values = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "deep.png")
    assert list(read(path, mode="L").get_flattened_data()) == [0, 1, 128, 255]


def test_a_palette_with_a_transparent_colour_is_read_without_a_warning(tmp_path):
    picture = Image.new("P", (4, 4))
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((1, 1), 1)
    path = saved(picture, tmp_path / "few.png", transparency=bytes([0, 255]))
    assert read(path).getpixel((0, 0)) == (255, 255, 255)
    assert read(path).getpixel((1, 1)) == (200, 0, 0)


def test_a_file_that_is_no_picture_or_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SettingsError, match=r"Plugin: image must be .*text\.png' \(Unidentified"):
        read(tmp_path / "text.png")
    with pytest.raises(SettingsError, match=r"got 'none\.png' \(FileNotFoundError"):
        read("none.png")
    with pytest.raises(SettingsError, match=r"icon\.ico' \(Unidentified"):
        read(saved(Image.new("L", (16, 16)), tmp_path / "icon.ico"))
    monkeypatch.setattr("pilotfish.runs.pictures.PIXELS", 99)
    with pytest.raises(SettingsError, match=r"\(10, 10\) pixels; at most 99 in all are read"):
        read(saved(Image.new("L", (10, 10)), tmp_path / "large.png"))
