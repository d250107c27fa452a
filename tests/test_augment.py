"""`common.augment`: identity without ranges, every range kept and used, each image its own draw, ranks in step."""

import math

import common
import pytest
import torch

NONE = dict(rotation=0, shift=(0, 0), shear=0, zoom=(1, 1), brightness=(1, 1), gain=0)
SIZE, COUNT = 17, 2000


def only(**ranges) -> dict:
    return NONE | ranges


def ramps(count: int = COUNT) -> torch.Tensor:
    """Two channels that hold x and y, from -0.5 to 0.5: so a picture says where each of its pixels came from."""
    y, x = torch.meshgrid(*[(torch.arange(SIZE) * 2 + 1 - SIZE) / SIZE] * 2, indexing="ij")
    return torch.stack([x, y])[None].expand(count, -1, -1, -1) / 2


def maps(**ranges) -> torch.Tensor:
    """The [COUNT, 2, 3] maps of the result's places to the picture's, as the pixels near the middle show them."""
    torch.manual_seed(0)
    near = slice(SIZE // 2 - 2, SIZE // 2 + 3)
    there = 2 * common.augment(ramps(), **only(**ranges))[:, :, near, near].flatten(2)
    x, y = 2 * ramps(1)[0, :, near, near].flatten(1)
    return (torch.linalg.pinv(torch.stack([x, y, torch.ones_like(x)], dim=1)) @ there.mT).mT


def fills(values: torch.Tensor, low: float, high: float) -> bool:
    """Whether the values lie between the two, and come close to both."""
    near = 0.01 * (high - low)
    return low - 1e-4 <= values.min() < low + near and high - near < values.max() <= high + 1e-4


def test_without_ranges_it_is_the_identity():
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert torch.allclose(common.augment(images, **NONE), images, atol=1e-5)


def test_rotation_is_one_and_fills_its_range():
    m = maps(rotation=25)
    turn = torch.atan2(m[:, 0, 1], m[:, 0, 0])
    assert fills(turn.rad2deg(), -25, 25)
    want = torch.stack([turn.cos(), turn.sin(), turn * 0, -turn.sin(), turn.cos(), turn * 0], dim=1).view(-1, 2, 3)
    assert torch.allclose(m, want, atol=1e-4)


def test_shifts_are_shares_of_width_and_height():
    m = maps(shift=(0.05, 0.1))
    assert fills(m[:, 0, 2], -0.1, 0.1) and fills(m[:, 1, 2], -0.2, 0.2)  # of a frame 2 wide and 2 high
    assert torch.allclose(m[:, :, :2], torch.eye(2).expand(COUNT, 2, 2), atol=1e-4)
    assert abs(torch.corrcoef(m[:, :, 2].T)[0, 1]) < 0.1  # drawn apart


def test_shear_moves_along_x_in_proportion_to_y():
    m = maps(shear=10)
    assert fills(m[:, 0, 1].atan().rad2deg(), -10, 10)
    m[:, 0, 1] = 0
    assert torch.allclose(m, torch.eye(2, 3).expand(COUNT, 2, 3), atol=1e-4)


def test_zoom_is_the_size_of_what_is_shown():
    m = maps(zoom=(0.95, 1.2))
    assert fills(1 / m[:, 0, 0], 0.95, 1.2) and torch.allclose(m[:, 0, 0], m[:, 1, 1], atol=1e-4)
    assert m[:, [0, 1, 0, 1], [1, 0, 2, 2]].abs().max() < 1e-4


def test_brightness_and_gain_are_factors_from_black():
    torch.manual_seed(0)
    light = (common.augment(torch.full((COUNT, 3, 4, 4), -0.5), **only(brightness=(0.8, 1.4))) + 1) / 0.5
    assert fills(light, 0.8, 1.4) and torch.allclose(light, light[:, :1, :1, :1].expand_as(light), atol=1e-5)
    gain = (common.augment(torch.full((COUNT, 3, 4, 4), -0.5), **only(gain=0.4)) + 1) / 0.5
    assert torch.allclose(gain, gain[:, :, :1, :1].expand_as(gain), atol=1e-5)  # the same all over a channel
    gain = gain[:, :, 0, 0]
    assert 0.6 <= gain.min() < 0.62 and 1.38 < gain.max() <= 1.4
    assert (gain - 1).abs().lt(0.2).float().mean().item() == pytest.approx(0.75, abs=0.02)  # a triangle's
    assert (torch.corrcoef(gain.T) - torch.eye(3)).abs().max() < 0.1  # and drawn apart for each channel


def test_the_ranges_unless_given_are_the_recipes():
    torch.manual_seed(0)
    given = dict(rotation=25, shift=(0.05, 0.1), shear=10, zoom=(0.95, 1.2), brightness=(0.8, 1.4), gain=0.4)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    torch.manual_seed(1)
    want = common.augment(images, **given)
    torch.manual_seed(1)
    assert torch.equal(common.augment(images), want)


def test_values_and_shapes_stay():
    for channels in (1, 3):
        images = (torch.rand(64, channels, 16, 16) * 2 - 1).to(memory_format=torch.channels_last)
        out = common.augment(images)
        assert out.shape == images.shape and out.is_contiguous(memory_format=torch.channels_last)
        assert out.min() >= -1 and out.max() <= 1
    assert common.augment(torch.ones(64, 3, 8, 8)).max() == 1  # light and tint overflow here


def test_each_image_has_its_own_draw_and_no_other_influence():
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    torch.manual_seed(3)
    before = common.augment(images)
    torch.manual_seed(3)
    after = common.augment(torch.cat([images[:1], images[1:].flip(0)]))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    same = common.augment(images[:1].expand(6, -1, -1, -1))
    assert all(not torch.allclose(same[i], same[j], atol=1e-2) for i in range(6) for j in range(i))


def test_ranks_take_their_shares_of_one_draw():
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    torch.manual_seed(4)
    whole = common.augment(images)
    for rank, share in enumerate(images.chunk(3)):
        torch.manual_seed(4)
        assert torch.allclose(common.augment(share, rank, 3), whole.chunk(3)[rank], atol=1e-6)


def test_what_was_beyond_the_edge_is_mirrored():
    torch.manual_seed(5)
    images = ramps(200)[:, :1] + 0.5  # from 0 at the left to 1 at the right
    out = common.augment(images, **only(shift=(0.5, 0)))
    right = out[:, 0, SIZE // 2, -1]
    assert math.isclose(out.max(), 1 - 0.5 / SIZE, abs_tol=1e-3) and right.min() > 0.4  # not black, which is -1
