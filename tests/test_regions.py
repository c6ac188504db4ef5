"""A guide can act in a part of the picture: a box, or a mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from pilotfish import Guide, SettingsError
from pilotfish.guidance.regions import Region
from pilotfish.runs.pictures import read_region


class Dark(Guide):
    def loss_guidance(self, step):
        return step.x0.square().mean(dim=(1, 2, 3))


def moved(sampler, **settings):
    """By how much x0 moves in one step, (4, 4) pixels of 8."""
    run = {"steps": 1, "seed": 0, "scheduler": "ddim"}
    guided = next(sampler.stream("a cat", plugins=[Dark(**settings)], **run)).x0
    return (guided - next(sampler.stream("a cat", **run)).x0).abs().sum(dim=(0, 1))


def test_a_guide_moves_nothing_outside_its_box(sampler):
    move = moved(sampler, mask=(0, 0, 0.5, 1), soft_edge=0)
    width = move.shape[-1] // 2
    assert move[:, :width].min() > 0
    assert move[:, width:].max() < 1e-6 * move.max()  # rounding of x0 alone


def test_the_whole_picture_as_a_box_changes_nothing(latents_of):
    whole = latents_of(Dark(mask=(0, 0, 1, 1)))
    torch.testing.assert_close(whole, latents_of(Dark()), rtol=1e-5, atol=1e-5)


def test_inside_its_box_a_guide_pulls_as_strongly_as_on_the_whole_picture(sampler):
    def size(box):
        move = moved(sampler, mask=box, soft_edge=0)
        return float(move[move > 1e-6 * move.max()].square().mean().sqrt())

    assert size((0, 0, 1, 1)) == pytest.approx(size((0.25, 0.25, 0.75, 0.75)), rel=0.3)


def test_two_guides_in_two_halves_do_what_each_does_alone(sampler):
    run = {"steps": 1, "seed": 0, "scheduler": "ddim"}
    left, right = Dark(mask=(0, 0, 0.5, 1), soft_edge=0), Dark(mask=(0.5, 0, 1, 1), soft_edge=0)

    def x0(*plugins):
        return next(sampler.stream("a cat", plugins=plugins, **run)).x0

    half = x0().shape[-1] // 2
    both, one, other = x0(left, right), x0(left), x0(right)
    # Each of two guides on one leaf keeps its own size there.
    torch.testing.assert_close(both[..., :half], one[..., :half], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[..., half:], other[..., half:], rtol=1e-4, atol=1e-4)


def test_a_picture_is_a_mask_white_where_the_guide_acts(sampler, tmp_path):
    pixels = np.zeros((40, 60), np.uint8)
    pixels[:, :30] = 255
    Image.fromarray(pixels).save(tmp_path / "left.png")
    box = moved(sampler, mask=(0, 0, 0.5, 1), soft_edge=0)
    torch.testing.assert_close(moved(sampler, mask=tmp_path / "left.png", soft_edge=0), box)


def test_soft_edges_fade_over_the_edge_and_not_at_the_pictures_own_border():
    def profile(soft):
        return Region("a guide", (0, 0, 0.5, 1), soft).of((64, 64))[0, 0, 9]

    hard, soft = profile(0.0), profile(0.2)
    assert hard.unique().tolist() == [0, 1]
    assert soft[0] == 1 and soft[-1] == 0 and soft[31:33].mean() == pytest.approx(0.5)
    assert (soft.diff() <= 0).all()
    assert 6 < ((soft > 0.02) & (soft < 0.98)).sum() < 30


def gaussian(values, deviation):
    """A line (n,) blurred the slow way, to three deviations: its ends go on, in fine pieces."""
    fine = 50
    many = np.repeat(values, fine)
    reach = round(3 * deviation * fine)
    padded = np.pad(many, reach, mode="edge")
    bell = np.exp(-((np.arange(-reach, reach + 1) / fine / deviation) ** 2) / 2)
    return np.convolve(padded, bell / bell.sum(), mode="valid").reshape(-1, fine).mean(axis=1)


def test_a_soft_edge_is_a_gaussian_of_half_its_width_in_both_directions():
    values = np.random.default_rng(0).random((6, 9))
    rows = np.stack([gaussian(row, 0.9) for row in values])
    expected = np.stack([gaussian(column, 0.9) for column in rows.T]).T
    mask = torch.from_numpy(values)[None, None]
    region = Region("a guide", mask, 0.3)  # of the shorter side, 6 cells, in two deviations
    np.testing.assert_allclose(region.of((6, 9))[0, 0], expected, atol=1e-4)
    box = np.zeros((6, 9))
    box[2:4, 3:] = 1
    drawn = Region("a guide", torch.from_numpy(box)[None, None], 0.3).of((6, 9))
    torch.testing.assert_close(Region("a guide", (1 / 3, 1 / 3, 1, 2 / 3), 0.3).of((6, 9)), drawn)


def test_far_from_its_soft_edge_a_mask_is_exactly_0_and_1():
    line = Region("a guide", (0.0, 0.0, 0.5, 1.0), 0.1).of((100, 100))[0, 0, 0]
    assert (line[:35] == 1).all() and (line[65:] == 0).all()  # three deviations are 15 cells
    assert ((line[35:65] > 0) & (line[35:65] < 1)).all()


@pytest.mark.parametrize("soft", [0.0, 0.05, 0.5])
def test_a_mask_keeps_its_mean_at_every_size_and_white_stays_white(soft):
    mask = torch.rand(1, 1, 30, 20, generator=torch.Generator().manual_seed(0)).double()
    for size in ((30, 20), (15, 10), (7, 9), (64, 64), (1, 1)):
        assert (Region("a guide", torch.ones_like(mask), soft).of(size) == 1).all()
        if not soft:
            mean = Region("a guide", mask, soft).of(size).mean()
            assert float(mean) == pytest.approx(float(mask.mean()), rel=1e-6)


def test_a_box_narrower_than_a_cell_is_not_black():
    region = Region("a guide", (0.4, 0.4, 0.401, 0.401), 0.0)
    assert region.of((8, 8))[0, 0, 3, 3].item() == pytest.approx(0.008**2)
    assert (region.of((8, 8)) > 0).sum() == 1 and region.area > 0


def test_a_hard_edge_takes_whole_cells_covered_by_more_than_half():
    region = Region("a guide", (0.0, 0.0, 0.35, 1.0), 0.4, hard=True)
    assert region.of((4, 4))[0, 0, 0].tolist() == [1, 0, 0, 0]
    assert region.of((1, 20))[0, 0, 0].tolist() == [1] * 7 + [0] * 13
    assert region.area == pytest.approx(0.35, abs=0.01)
    thin = Region("plugin 'blue'", (0.0, 0.0, 0.1, 1.0), 0.0, hard=True)
    with pytest.raises(SettingsError, match=r"plugin 'blue': mask_edge='hard' .* 4 x 4 it covers"):
        thin.of((4, 4))
    with pytest.raises(SettingsError, match="of 512 x 512 it covers none"):
        Region("plugin 'blue'", (0.0, 0.0, 0.0005, 1.0), 0.0, hard=True)
    assert read_region("a guide", (0.0, 0.0, 0.35, 1.0), 0.4, "hard").of((1, 20)).sum() == 7


def test_a_box_can_be_written_on_the_command_line(sampler):
    table = sampler("a cat", plugins=["blue:mask=[0, 0, 0.5, 1]"], steps=1).run.plugins[0]
    assert list(table["mask"]) == [0, 0, 0.5, 1]


def test_a_mask_comes_back_from_a_run_file(sampler):
    guide = {"use": "blue", "mask": [0.0, 0.0, 0.5, 1.0]}
    run = sampler("a cat", plugins=[guide], steps=1, seed=0).run
    assert list(run.plugins[0]["mask"]) == guide["mask"]
    assert "mask = [" in run.to_toml()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((0, 0, 2, 1), r"Dark: mask must be a picture file, or \[left, top.*; got \(0, 0, 2, 1\)"),
        ([0, 1], "mask must be a picture file, or"),
        (
            (0.5, 0, 0.2, 1),
            r"Dark: mask must be .*0 <= left < right <= 1.*; got \(0.5, 0, 0.2, 1\)",
        ),
        ("none.png", "plugin 'Dark': mask must be a picture that Pillow can read; got 'none.png'"),
    ],
)
def test_a_wrong_mask_says_what_is_wrong(sampler, mask, message):
    with pytest.raises(SettingsError, match=message):
        sampler("a cat", plugins=[Dark(mask=mask)], steps=1)
