"""What networks that judge pictures are shown: the whole picture, and random squares of it."""

import pytest
import torch
from torch.nn.functional import interpolate

from pilotfish import at_least_float32, cutouts
from pilotfish.guidance.cutouts import squares


def random_images(batch=1, height=40, width=48):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 32), (13, 90), (40, 48), (7, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_resizing_equals_antialiased_interpolate(kernel, size, dtype):
    images = random_images(2).to(dtype)
    expected = interpolate(images, size, mode=kernel, antialias=True)
    (ours,) = cutouts(images, size, 0, [], smallest=1, kernel=kernel).unbind(1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_cutouts_equal_interpolate_of_the_cut_piece(kernel):
    image = random_images()
    views = cutouts(image, (32, 24), 5, generators(3), smallest=0.5, kernel=kernel)[0]
    windows = squares(40, 48, 5, generators(3)[0], 0.5).int().tolist()
    for view, (top, left, height, width) in zip(views[1:], windows, strict=True):
        piece = image[..., top : top + height, left : left + width]
        expected = interpolate(piece, (32, 24), mode=kernel, antialias=True)
        torch.testing.assert_close(view, expected[0], atol=1e-5, rtol=0)


def test_squares_lie_inside_and_reach_from_half_to_the_whole_and_to_every_border():
    top, left, height, width = squares(40, 48, 20_000, generators(0)[0], 0.5).unbind(1)
    assert (height == width).all()
    assert (height.min(), height.max()) == (21, 40)
    assert (top.min(), (top + height).max()) == (0, 40)
    assert (left.min(), (left + width).max()) == (0, 48)


def test_cutouts_come_again_with_the_seed_and_do_not_depend_on_neighbours():
    images = random_images(3)
    views = cutouts(images, (32, 32), 4, generators(5, 6, 7), smallest=0.5, kernel="bicubic")
    again = cutouts(images, (32, 32), 4, generators(5, 6, 7), smallest=0.5, kernel="bicubic")
    single = cutouts(images[1:2], (32, 32), 4, generators(6), smallest=0.5, kernel="bicubic")
    torch.testing.assert_close(again, views, rtol=0, atol=0)
    torch.testing.assert_close(single[0], views[1])
    other = cutouts(images, (32, 32), 4, generators(8, 6, 7), smallest=0.5, kernel="bicubic")
    assert not torch.allclose(other[0], views[0])
    torch.testing.assert_close(other[1:], views[1:])


def test_without_cutouts_nothing_is_drawn():
    (generator,) = generators(0)
    before = generator.get_state()
    cutouts(random_images(), (32, 32), 0, [generator], smallest=0.5)
    assert torch.equal(generator.get_state(), before)


def test_nothing_is_clamped():
    image = random_images()
    views = cutouts(image * 9 - 4, (32, 32), 3, generators(0), smallest=0.5, kernel="bicubic")
    torch.testing.assert_close(
        views, cutouts(image, (32, 32), 3, generators(0), smallest=0.5, kernel="bicubic") * 9 - 4
    )


@pytest.mark.parametrize("count", [0, 3])
def test_gradient_of_the_views_is_the_derivative(count):
    image = random_images(2, 6, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: cutouts(x, (5, 4), count, generators(0, 1), smallest=0.5, kernel="bicubic"), image
    )


def test_a_picture_of_the_right_size_is_shown_as_it_is():
    images = random_images(2).float()
    shown = cutouts(images, (40, 48), 0, [], smallest=1)[:, 0]
    torch.testing.assert_close(shown, images, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_only_half_precision_is_widened(dtype, wide):
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == wide
