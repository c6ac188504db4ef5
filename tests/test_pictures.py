"""Picture files, read in one place for the core and all plugins."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL import __version__ as pillow

from pilotfish import SettingsError, area_weights, pixels, read_picture
from pilotfish.runs.pictures import read_mask, read_region

# gradio, which pilotfish-studio needs, keeps Pillow below 13.
NEWER = pytest.mark.skipif(
    int(pillow.split(".")[0]) < 13, reason=f"Pillow {pillow} cannot open such a TIFF; 13 can"
)


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


# ---- modes and depths: what the file holds is worked out here, by arithmetic ----

GREYS = np.array([[0, 1, 100], [128, 254, 255]], np.uint8)
COLOURS = np.array([[[250, 10, 30], [0, 128, 255]], [[12, 200, 99], [255, 255, 0]]], np.uint8)
OPACITY = np.array([[255, 128], [3, 0]], np.uint8)
DEEP = np.array([[0, 1, 128, 129], [257, 32_895, 65_534, 65_535]], np.uint16)


def png(values, color_type, depth, *chunks, interlaced=False):
    """A PNG file of values (H, W, channels) or packed rows (H, bytes), made by hand."""
    height, width = values.shape[:2]
    rows = values.astype(">u2" if depth == 16 else "u1")
    if rows.ndim == 2 and depth < 8:
        width *= 8 // depth
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts
    )


def tiff(values, bits, photometric, order="<", more=()):
    """A TIFF file of values (H, W, channels), or of packed bytes with `more` saying their size."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u{2 if bits == 16 else 1}").tobytes()
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric]}
    tags |= {273: [0], 277: [channels], 278: [height], 279: [len(data)], **dict(more)}
    start, values_at = 14 + 12 * len(tags), b""
    room = sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = [start + room]
    body = b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            values_at, packed = (
                values_at + packed,
                struct.pack(order + "I", start + len(values_at)),
            )
        body += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", len(tags)) + body + bytes(4) + values_at + data


def written(path, data):
    path.write_bytes(data)
    return path


def over(colours, opacity, ground):
    share = opacity.astype(float) / 255
    share = share[..., None] if colours.ndim == 3 else share
    return colours * share + ground * (1 - share)


def assert_shows(path, expected, atol=0.51):
    """That a file is read as `expected` (H, W) or (H, W, 3), in 255ths."""
    shown = np.asarray(read(path), float)
    if expected.ndim == 2:
        expected = np.repeat(np.asarray(expected, float)[..., None], 3, axis=2)
    np.testing.assert_allclose(shown, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_black_and_white_of_one_bit_and_grey_of_eight_stay(tmp_path, ending):
    assert_shows(saved(Image.fromarray(GREYS), tmp_path / f"grey.{ending}"), GREYS, 0)
    bits = Image.fromarray(np.where(GREYS > 127, 255, 0).astype("uint8")).convert("1")
    assert_shows(saved(bits, tmp_path / f"bits.{ending}"), np.where(GREYS > 127, 255, 0), 0)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_and_colours_with_opacity_lie_over_white_and_masks_over_black(tmp_path, ending):
    for colours, grey in ((COLOURS, COLOURS @ [0.299, 0.587, 0.114]), (COLOURS[..., 0],) * 2):
        picture = Image.fromarray(colours)
        picture.putalpha(Image.fromarray(OPACITY))
        path = saved(picture, tmp_path / f"{picture.mode}.{ending}")
        assert_shows(path, over(colours, OPACITY, 255), 1)
        mask = np.asarray(read(path, mode="L"), float)
        np.testing.assert_allclose(mask, over(grey, OPACITY, 0), atol=1.5)
        exact = read_mask(path, "a mask")[0, 0].numpy() * 255
        np.testing.assert_allclose(exact, over(grey, OPACITY, 0), atol=1e-3)


@NEWER
@pytest.mark.parametrize("order", "<>")
def test_opacity_that_is_already_in_the_colours_counts_once(tmp_path, order):
    opacity = np.array([[255, 128], [3, 200]], np.uint8)
    for colours in (COLOURS, COLOURS[..., 0]):
        inside = np.round(over(colours, opacity, 0)).astype("uint8").reshape(2, 2, -1)
        layers = np.concatenate([inside, opacity[..., None]], axis=2)
        grey = layers.shape[2] == 2
        # 338 says what the last channel is: 1 is opacity that the colours hold already.
        data = tiff(layers, 8, 1 if grey else 2, order, {338: [1]})
        path = written(tmp_path / "held.tif", data)
        # What is nearly clear is divided by its opacity and comes back.
        assert_shows(path, over(colours, opacity, 255), 1.5)


def test_palettes_show_their_colours_and_their_opacity(tmp_path):
    places = np.array([[0, 1], [2, 3]], np.uint8)
    picture = Image.fromarray(places).convert("L")
    picture = Image.frombytes("P", (2, 2), places.tobytes())
    picture.putpalette(COLOURS.tobytes())
    expected = over(COLOURS, OPACITY, 255)
    for ending in ("png", "gif", "bmp", "tif"):
        assert_shows(saved(picture, tmp_path / f"few.{ending}"), COLOURS, 0)
    path = saved(picture, tmp_path / "some.png", transparency=OPACITY.tobytes())
    assert_shows(path, expected, 1)
    path = saved(picture, tmp_path / "one.gif", transparency=2)
    alone = np.array([[255, 255], [0, 255]])
    assert_shows(path, over(COLOURS, alone, 255), 0)
    both = Image.merge("LA", (Image.fromarray(places), Image.fromarray(OPACITY)))
    with_alpha = picture.convert("PA")
    with_alpha.putalpha(Image.fromarray(OPACITY))
    assert both.mode == "LA" and with_alpha.mode == "PA"
    assert_shows(saved(with_alpha, tmp_path / "pa.tif"), expected, 1)


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_ink_is_shown_as_light(tmp_path, ending):
    inks = np.zeros((16, 16, 4), np.uint8) + np.array([40, 200, 0, 60], np.uint8)
    path = saved(
        Image.fromarray(inks, "CMYK"),
        tmp_path / f"ink.{ending}",
        **({"quality": 100} if ending == "jpg" else {}),
    )
    light = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    assert_shows(path, light, 2 if ending == "jpg" else 1)


@NEWER
def test_luma_and_chroma_are_shown_as_colours(tmp_path):
    y, cb, cr = 120.0, 90.0, 200.0
    flat = np.zeros((4, 4, 3), np.uint8) + np.array([y, cb, cr], np.uint8)
    path = saved(Image.fromarray(flat, "YCbCr"), tmp_path / "video.tif")
    rgb = [
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    ]
    assert_shows(path, np.broadcast_to(np.clip(rgb, 0, 255), (4, 4, 3)), 1)


def test_lab_is_shown_as_colours(tmp_path):
    lightness, a, b = 60.0, 30.0, -40.0  # CIE 1976, under D50
    stored = np.broadcast_to([round(lightness * 2.55), int(a), int(b) % 256], (4, 4, 3))
    path = written(tmp_path / "lab.tif", tiff(stored, 8, 8))  # 8: a and b are signed
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    # From D50 by Bradford's matrix, then IEC 61966-2-1: http://www.brucelindbloom.com.
    linear = (
        np.array(
            [
                [3.1338561, -1.6168667, -0.4906146],
                [-0.9787684, 1.9161415, 0.0334540],
                [0.0719453, -0.2289914, 1.4052427],
            ]
        )
        @ xyz
    )
    srgb = np.where(linear > 0.0031308, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055, 12.92 * linear)
    assert_shows(path, np.broadcast_to(255 * np.clip(srgb, 0, 1), (4, 4, 3)), 2)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_of_16_bits_is_shown_in_8_and_a_mask_keeps_all_of_it(tmp_path, mode, ending):
    data = DEEP.astype("<u2" if mode == "I;16" else ">u2").tobytes()
    path = saved(Image.frombytes(mode, (4, 2), data), tmp_path / f"deep.{ending}")
    assert_shows(path, DEEP / 257)
    mask = read_mask(path, "a mask")[0, 0].numpy()
    np.testing.assert_allclose(mask, DEEP / 65_535, rtol=1e-6)


@pytest.mark.parametrize("order", "<>")
def test_both_orders_of_bytes_are_read(tmp_path, order):
    assert_shows(written(tmp_path / "a.tif", tiff(DEEP[..., None], 16, 1, order)), DEEP / 257)
    deep = np.random.default_rng(0).integers(0, 65_536, (5, 6, 3))
    assert_shows(written(tmp_path / "b.tif", tiff(deep, 16, 2, order)), deep / 257, 1)


def test_where_white_is_zero_that_is_white_at_every_depth(tmp_path):
    for values, bits, most in ((DEEP, 16, 65_535), (GREYS, 8, 255)):
        path = written(tmp_path / f"{bits}.tif", tiff(values[..., None], bits, 0))
        assert_shows(path, 255 - values / (most / 255))


def test_grey_of_12_bits_is_shown_in_8(tmp_path):
    twelve = np.array([[0, 1, 16, 2048], [4094, 4095, 100, 3000]])
    one, two = twelve[:, ::2], twelve[:, 1::2]
    packed = np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], axis=-1).reshape(2, 6, 1)
    path = written(tmp_path / "c.tif", tiff(packed, 8, 1, more={256: [4], 258: [12]}))
    assert_shows(path, twelve / 4095 * 255)


@pytest.mark.parametrize("opacity", [False, True])
def test_colours_of_16_bits_are_shown_in_8(tmp_path, opacity):
    deep = np.random.default_rng(0).integers(0, 65_536, (5, 6, 4))
    deep[..., 3] |= 0xFF00  # nearly opaque: Pillow keeps the upper byte
    values = deep if opacity else deep[..., :3]
    path = written(tmp_path / "deep.png", png(values, 6 if opacity else 2, 16))
    assert_shows(path, deep[..., :3] / 257, 1)


def test_grey_of_16_bits_with_opacity_is_shown_in_8(tmp_path):
    values = np.stack([DEEP, np.full_like(DEEP, 0x8080)], axis=-1)
    path = written(tmp_path / "deep.png", png(values, 4, 16))
    assert_shows(path, over(DEEP / 257, np.full(DEEP.shape, 128), 255), 1)


def test_one_transparent_colour_is_just_that_one_at_every_depth(tmp_path):
    def key(*values):
        return b"tRNS", struct.pack(f">{len(values)}H", *values)

    deep = np.array([[256, 257, 258], [65_535, 1, 0]])
    path = written(tmp_path / "grey.png", png(deep[..., None], 0, 16, key(257)))
    assert_shows(path, np.where(deep == 257, 255, deep / 257))
    colours = np.stack([deep, deep * 0 + 300, deep * 0], axis=-1)
    path = written(tmp_path / "colour.png", png(colours, 2, 16, key(257, 300, 0)))
    assert_shows(path, np.where((deep == 257)[..., None], 255, colours / 257), 1)
    path = written(tmp_path / "colour8.png", png(COLOURS, 2, 8, key(0, 128, 255)))
    assert_shows(path, np.where((COLOURS[..., :1] == 0), 255, COLOURS), 0)
    for depth, shades in ((1, 2), (2, 4), (4, 16), (8, 256)):
        per = 8 // depth
        grey = np.arange(16).reshape(2, 8) % shades
        packed = (grey.reshape(2, -1, per) << (depth * np.arange(per)[::-1])).sum(-1)
        for clear in (0, 1):
            path = written(tmp_path / "few.png", png(packed, 0, depth, key(clear)))
            assert_shows(path, np.where(grey == clear, 255, grey * (255 / (shades - 1))), 0)


def test_floats_are_shown_where_they_say_that_they_go_from_0_to_1(tmp_path):
    values = np.array([[0, 0.25], [0.5, 1]], np.float32)
    path = saved(Image.fromarray(values), tmp_path / "float.tif")
    assert_shows(path, values * 255)
    assert read_mask(path, "a mask")[0, 0].tolist() == values.tolist()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 255]], np.float32), "values go from 0 to 255, and only from 0 to 1"),
        (np.array([[-0.5, 1]], np.float32), "values go from -0.5 to 1"),
        (np.array([[0, np.nan]], np.float32), "values go from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "values go from 0 to inf"),
        (np.array([[0, 255]], np.int32), "its integers do not say what is black and white"),
    ],
)
def test_numbers_of_unknown_range_are_refused_with_the_way_out(tmp_path, values, reason):
    path = saved(Image.fromarray(values), tmp_path / "raw.tif")
    with pytest.raises(SettingsError, match=f"{reason}.*save it with 8 or 16 bits a channel"):
        read(path)


# ---- profiles ----


def power_profile(gamma):
    """sRGB's colours with another curve: made from Pillow's own, whose curves are replaced."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", icc[128:132])[0]):
        name, start, _ = struct.unpack(">4sII", icc[132 + 12 * i : 144 + 12 * i])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            # A parametric curve of type 0: y = x to the power of gamma.
            icc[start : start + 16] = b"para" + bytes(8) + struct.pack(">I", round(gamma * 0x10000))
    return bytes(icc)


@pytest.mark.parametrize("gamma", [1, 1.8, 2.2])
def test_an_embedded_profile_is_applied_to_colours_and_not_to_opacity(tmp_path, gamma):
    encoded = np.where(
        (linear := (COLOURS / 255) ** gamma) > 0.0031308,
        1.055 * linear ** (1 / 2.4) - 0.055,
        12.92 * linear,
    )
    picture = Image.fromarray(COLOURS)
    path = saved(picture, tmp_path / "linear.png", icc_profile=power_profile(gamma))
    assert_shows(path, encoded * 255, 2)
    picture.putalpha(Image.fromarray(OPACITY))
    path = saved(picture, tmp_path / "clear.png", icc_profile=power_profile(gamma))
    assert_shows(path, over(encoded * 255, OPACITY, 255), 2)


@pytest.mark.parametrize(
    "icc",
    [
        b"no profile",
        b"",
        power_profile(1)[:300],
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ],
    ids=["nonsense", "empty", "cut off", "sRGB", "of other colours"],
)
def test_broken_profiles_and_that_of_srgb_change_nothing(tmp_path, icc):
    noise = Image.effect_noise((40, 24), 90).convert("RGB")
    path = saved(noise, tmp_path / "profile.png", icc_profile=icc)
    assert read(path).tobytes() == noise.tobytes()
    grey = saved(Image.fromarray(GREYS), tmp_path / "grey.png", icc_profile=icc)
    assert_shows(grey, GREYS, 0)


def profile(space, connection, tags):
    """An ICC profile of version 2 with these tags, made by hand (ICC.1:2001-04)."""
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    d50 = struct.pack(">3i", 63_190, 65_536, 54_061)
    head = struct.pack(">I4sI4s4s", start + len(body), b"lcms", 0x02100000, b"prtr", space)
    head += connection + bytes(12) + b"acsp" + bytes(28) + d50
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_a_grey_profile_is_applied_to_grey_at_every_depth(tmp_path):
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63_190, 65_536, 54_061)
    icc = profile(b"GRAY", b"XYZ ", {b"wtpt": white, b"kTRC": b"curv" + bytes(8)})
    for values, most in ((GREYS, 255), (DEEP, 65_535)):
        path = saved(Image.fromarray(values), tmp_path / "grey.png", icc_profile=icc)
        linear = np.round(values / most * 255) / 255
        encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
        assert_shows(path, encoded * 255, 2)
        mask = read_mask(path, "a mask")[0, 0].numpy()  # numbers, whatever they look like
        np.testing.assert_allclose(mask, values / most, rtol=1e-6)


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_ink_with_a_profile_is_shown_by_it(tmp_path, ending):
    # A table of 2 x 2 x 2 x 2 colours in Lab: cyan alone is L = 50, black alone 20, all else 80.
    lightness = np.full((2, 2, 2, 2), 204, np.uint8)
    lightness[0, 0, 0, 0], lightness[1, 0, 0, 0], lightness[0, 0, 0, 1] = 255, 127, 51
    lightness[1, 1, 1, 1] = 0  # so that no black point has to be compensated
    colours = np.stack([lightness, lightness * 0 + 128, lightness * 0 + 128], axis=-1)
    line = np.arange(256, dtype=np.uint8)
    matrix = struct.pack(">9i", 65_536, 0, 0, 0, 65_536, 0, 0, 0, 65_536)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + np.tile(line, 4).tobytes()
    lut += colours.tobytes() + np.tile(line, 3).tobytes()
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63_190, 65_536, 54_061)
    icc = profile(b"CMYK", b"Lab ", {b"wtpt": white, b"A2B0": lut})
    for ink, light in (((0,) * 4, 255), ((255, 0, 0, 0), 127), ((0, 0, 0, 255), 51)):
        picture = Image.new("CMYK", (16, 16), ink)
        path = saved(picture, tmp_path / f"ink.{ending}", icc_profile=icc, quality=100)
        y = ((light / 2.55 + 16) / 116) ** 3
        grey = 255 * (1.055 * y ** (1 / 2.4) - 0.055)
        assert_shows(path, np.full((16, 16), grey), 2)


# ---- masks ----


@pytest.mark.parametrize("value", [1, 255])
def test_one_lighter_pixel_in_a_large_black_mask_counts(tmp_path, value):
    picture = Image.new("L", (1000, 600))
    picture.putpixel((700, 100), value)
    path = saved(picture, tmp_path / "mask.png")
    weights = area_weights(path, (6, 10), what="Plugin: mask")
    expected = torch.zeros(1, 1, 6, 10)
    expected[..., 1, 7] = value / 255 / 100**2
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)
    region = read_region("a guide", path, 0.05)
    assert region.of((6, 10)).max() > 0 and region.area > 0


def test_a_mask_that_only_its_colour_opacity_or_depth_tells_from_black_counts(tmp_path):
    deep = np.zeros((8, 8), np.uint16)
    deep[0, 0] = 1
    saved(Image.fromarray(deep), tmp_path / "deep.png")
    blue = Image.new("RGB", (8, 8))
    blue.putpixel((0, 0), (0, 0, 1))
    saved(blue, tmp_path / "blue.png")
    faint = Image.new("LA", (8, 8))
    faint.putpixel((0, 0), (10, 3))
    saved(faint, tmp_path / "faint.png")
    for name, value in (("deep", 1 / 65_535), ("blue", 0.114 / 255), ("faint", 30 / 255**2)):
        weights = area_weights(tmp_path / f"{name}.png", (1, 1), what="a mask")
        assert weights.item() == pytest.approx(value / 64, rel=1e-4), name


def test_colours_too_dark_for_what_is_read_of_them_are_not_called_black(tmp_path):
    path = written(tmp_path / "dark.png", png(np.full((4, 4, 3), 200), 2, 16))
    with pytest.raises(SettingsError, match="upper 8 of its 16 bits .*; save it as grey"):
        read_mask(path, "a mask")


def test_only_a_black_mask_is_called_black(tmp_path):
    path = saved(Image.new("L", (8, 8)), tmp_path / "black.png")
    with pytest.raises(SettingsError, match="Plugin: mask must be white somewhere; .*all black"):
        area_weights(path, (4, 4), what="Plugin: mask")
    with pytest.raises(SettingsError, match="a guide: mask must be white somewhere"):
        read_region("a guide", path, 0.05)
    beside = Image.new("L", (30, 10))
    beside.putpixel((0, 0), 255)
    with pytest.raises(SettingsError, match=r"middle part .*\(30 x 10\) is white only beside"):
        area_weights(saved(beside, tmp_path / "beside.png"), (4, 4), what="Plugin: mask")


def test_a_mask_is_averaged_exactly_at_any_size_and_cut_like_a_picture(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (12, 20)).astype("uint8")
    path = saved(Image.fromarray(values), tmp_path / "mask.png")
    cut = np.repeat(np.repeat(values[:, 4:16], 5, axis=0), 5, axis=1) / 255  # (60, 60)
    for cells in (1, 4, 5, 12, 60):
        expected = cut.reshape(cells, 60 // cells, cells, 60 // cells).mean(axis=(1, 3))
        weights = area_weights(path, (cells, cells), what="a mask")[0, 0].numpy()
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    white = saved(Image.new("RGB", (7, 5), "white"), tmp_path / "white.png")
    assert (area_weights(white, (3, 11), what="a mask") == 1).all()


def test_a_box_counts_by_what_part_of_each_cell_it_covers():
    weights = area_weights((0.125, 0.25, 0.75, 0.3), (2, 4), what="a box")
    torch.testing.assert_close(weights[0, 0], torch.tensor([[0.05, 0.1, 0.1, 0], [0] * 4]))
    assert area_weights([0.5, 0, 0.5 + 1e-9, 1], (4, 4), what="a box").max() > 0


@pytest.mark.parametrize(
    "area",
    [
        (0, 0, 2, 1),
        [0.5, 0, 0.5, 1],
        (0, 1),
        None,
        3,
        [0, 0, float("nan"), 1],
        [-0.1, 0, 1, 1],
        [0, 0.5, 1, 0.5],
    ],
)
def test_what_is_no_area_is_refused(area):
    with pytest.raises(SettingsError, match=r"Plugin: mask must be a picture file, or \[left.*got"):
        area_weights(area, (4, 4), what="Plugin: mask")


# ---- files from anybody ----


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


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_a_file_that_ends_too_early_is_refused(tmp_path, kind):
    whole = saved(Image.effect_noise((64, 64), 90).convert("RGB"), tmp_path / f"whole.{kind}")
    data = whole.read_bytes()
    for part in (0, 10, len(data) // 2):
        with pytest.raises(SettingsError, match="Plugin: image must be a picture"):
            read(written(tmp_path / f"part.{kind}", data[:part]))


def test_bombs_and_pictures_without_pixels_are_refused(tmp_path):
    def claims(width, height, *chunks):
        head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        whole = png(np.zeros((1, 1, 1)), 0, 8, *chunks)
        crc = struct.pack(">I", zlib.crc32(b"IHDR" + head))
        return written(tmp_path / "claims.png", whole[:16] + head + crc + whole[33:])

    bomb = (b"zTXt", b"pilotfish\0\0" + zlib.compress(bytes(20_000_000)))
    for size in ((0, 1), (1, 0), (6000, 6000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(SettingsError):
            read(claims(*size))
    with pytest.raises(SettingsError, match="ecompressed"):
        read(written(tmp_path / "text.png", png(GREYS[..., None], 0, 8, bomb)))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#f00", "#0f0", "#00f")]
    for kind in ("gif", "png", "webp", "tif"):
        more = {"lossless": True} if kind == "webp" else {}
        path = saved(
            frames[0], tmp_path / f"film.{kind}", save_all=True, append_images=frames[1:], **more
        )
        assert read(path).getpixel((4, 4)) == (255, 0, 0), kind


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_is_undone_for_pictures_and_masks(tmp_path, kind, turn):
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :16], upright[:16, 32:] = 255, 100
    # What a camera stores so that EXIF's orientation (a row of letters F, turned) undoes it.
    undo = {
        1: lambda v: v,
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.T,
        6: lambda v: v.T[::-1],
        7: lambda v: v.T[::-1, ::-1],
        8: lambda v: v.T[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = Image.fromarray(np.ascontiguousarray(undo[turn](upright)))
    path = saved(stored, tmp_path / f"turned.{kind}", exif=exif, quality=95)
    assert_shows(path, upright, 6)
    mask = read_mask(path, "a mask")[0, 0].numpy() * 255
    np.testing.assert_allclose(mask, upright, atol=6)


def test_broken_exif_is_left_alone(tmp_path):
    path = saved(Image.fromarray(GREYS), tmp_path / "exif.png", exif=b"Exif\0\0broken")
    assert_shows(path, GREYS, 0)
