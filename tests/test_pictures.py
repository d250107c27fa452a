"""Tests of the picture helpers and sample measures."""

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common as p

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB")).astype(int)


# --- bytes, grids, files -----------------------------------------------------------------------------------------


def test_to_bytes_rounds_and_clamps():
    values = torch.tensor([-9.0, -1.0, -1 + 0.9 / 127.5, 0.0, 0.004, 1.0, 9.0])
    assert p.to_bytes(values).tolist() == [0, 0, 1, 128, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(p.to_bytes(every / 127.5 - 1), every)
    assert torch.equal(p.to_bytes((every / 127.5 - 1).requires_grad_()), every)
    assert p.to_bytes(every) is every


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_pixel_exact(tmp_path, channels):
    images = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    p.save_grid(images / 127.5 - 1, tmp_path / "g.png", columns=3, zoom=2)
    got = pixels(tmp_path / "g.png")
    want = np.full((2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3), 255)
    for i, image in enumerate(images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()):
        top, left = 2 + i // 3 * 10, 2 + i % 3 * 14
        want[top : top + 8, left : left + 12] = image.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("n, size, shape", [(64, 32, 4), (16, 64, 4), (256, 32, 2), (64, 128, 1), (4, 300, 1)])
def test_grid_default_zoom_and_columns(tmp_path, n, size, shape):
    p.save_grid(torch.zeros(n, 1, size, size, dtype=torch.uint8), tmp_path / "g.png")
    side = math.isqrt(n) * (size * shape + 2) + 2
    assert Image.open(tmp_path / "g.png").size == (side, side)


def test_grid_refuses_no_images(tmp_path):
    for bad in (torch.zeros(0, 3, 8, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match="images"):
            p.save_grid(bad, tmp_path / "g.png")


def test_strip_has_a_row_per_walk(tmp_path):
    rows = torch.arange(6, dtype=torch.uint8).mul(40).reshape(2, 3, 1, 1, 1).expand(2, 3, 1, 64, 64)
    p.save_grid(rows, tmp_path / "s.png")
    got, cell = pixels(tmp_path / "s.png"), 4 * 64 + 2
    assert got.shape[:2] == (2 * cell + 2, 3 * cell + 2)
    assert [got[cell // 2 + r * cell, cell // 2 + c * cell, 0] for r in (0, 1) for c in (0, 1, 2)] == [
        0, 40, 80, 120, 160, 200
    ]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_round_trip(tmp_path, channels):
    images = torch.randint(0, 256, (12, channels, 5, 7), dtype=torch.uint8)
    p.save_pngs(images[:2] / 127.5 - 1, tmp_path / "a" / "b")
    p.save_pngs(images[2:], tmp_path / "a" / "b", first=2)
    files = sorted((tmp_path / "a" / "b").iterdir())
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(12)]
    assert {Image.open(f).mode for f in files} == {"L" if channels == 1 else "RGB"}
    read = np.stack([np.array(Image.open(f)).reshape(5, 7, channels) for f in files])
    assert np.array_equal(read, images.permute(0, 2, 3, 1).numpy())


def read_gif(path) -> tuple[list[int], list[int], tuple[int, int], int]:
    gif, levels, times = Image.open(path), [], []
    for i in range(gif.n_frames):
        gif.seek(i)
        levels.append(gif.convert("RGB").getpixel((3, 3))[0])
        times.append(gif.info["duration"])
    return levels, times, gif.size, gif.info["loop"]


def test_gif_frames_and_durations(tmp_path):
    frames = [Image.new("RGB", (10 if i else 20, 8), (i * 20, 0, 0)) for i in range(5)]
    frames[1].save(tmp_path / "1.png")
    frames[2].save(tmp_path / "2.png")
    p.save_gif([frames[0], tmp_path / "1.png", str(tmp_path / "2.png"), *frames[3:]], tmp_path / "a.gif", 50, 700)
    assert read_gif(tmp_path / "a.gif") == ([0, 20, 40, 60, 80], [50] * 4 + [700], (10, 8), 0)
    p.save_gif(frames[:1], tmp_path / "one.gif")
    assert Image.open(tmp_path / "one.gif").n_frames == 1
    with pytest.raises(ValueError, match="frame"):
        p.save_gif([], tmp_path / "b.gif")


def test_gif_thins_and_shrinks(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(200)]
    p.save_gif(frames, tmp_path / "a.gif")
    levels = read_gif(tmp_path / "a.gif")[0]
    assert len(levels) == 60 and levels[0] == 0 and levels[-1] == 199 and set(np.diff(levels)) == {3, 4}
    p.save_gif([Image.new("RGB", (1042, 1042))], tmp_path / "b.gif")
    assert Image.open(tmp_path / "b.gif").size == (521, 521)


# --- densities ---------------------------------------------------------------------------------------------------


def test_density_peaks_where_the_points_are():
    points = torch.tensor([[1.0, 0.5]]).repeat(500, 1) + 0.02 * torch.randn(500, 2)
    stray = torch.tensor([[-1.0, -1.0], [99.0, 0.0], [-2.1, 0.0], [float("nan"), 0.0]])
    picture = p.density_picture(torch.cat([points, stray]), extent=2.0, size=100)
    assert picture.size == (100, 100) and picture.mode == "RGB"
    dark = -np.array(picture).astype(int).sum(2)
    row, column = np.unravel_index(dark.argmax(), dark.shape)
    assert abs(column - 75) <= 2 and abs(row - 37) <= 2  # x = 1 is 3/4 across, y = 0.5 is 3/8 down
    assert tuple(np.array(picture)[row, column]) == p.BLUES[-1]
    pale = np.array(picture)[5, 5]
    assert tuple(pale) == p.BLUES[0] and dark[74, 25] > dark[5, 5]  # the stray point shows
    assert (np.array(picture)[:, -9:] == p.BLUES[0]).all()  # points beyond an edge do not come back at the other
    flat = np.array(p.density_picture(torch.zeros(0, 2), 1.0))
    assert (flat == p.BLUES[0]).all()


def test_density_follows_the_square_root():
    points = torch.tensor([[-0.5, 0.0]] * 400 + [[0.5, 0.0]] * 100)
    row = np.array(p.density_picture(points, 1.0, size=100))[49]
    assert (row[25] == p.BLUES[4]).all() and (row[75] == p.BLUES[2]).all()  # sqrt(1/4) is half the scale


def test_density_blur_is_gaussian():
    row = np.array(p.density_picture(torch.tensor([[0.001, 0.001]]), 1.0, size=100, blur=0.1))[49]
    level = math.exp(-(5**2) / (2 * 5**2) / 2)  # 5 pixels are one standard deviation away; square root of density
    want = np.interp(level, np.linspace(0, 1, 5), [colour[0] for colour in p.BLUES])
    assert row[50].tolist() == list(p.BLUES[4]) and row[55, 0] == row[45, 0] == round(want)


def test_panels_side_by_side(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    p.save_panels([Image.new("RGB", (50, 40), c) for c in colours], ["a", "b", ""], tmp_path / "p.png")
    got = pixels(tmp_path / "p.png")
    assert got.shape == (38 + 40 + 8, 3 * 58 + 8, 3)
    for i, colour in enumerate(colours):
        assert (got[38:78, 8 + 58 * i : 58 + 58 * i] == colour).all()
    heads = [(got[:38, 8 + 58 * i : 58 + 58 * i] < 128).any() for i in range(3)]
    assert heads == [True, True, False]
    for titles in (["a"], []):
        with pytest.raises(ValueError):
            p.save_panels([Image.new("RGB", (5, 5))] * 2, titles, tmp_path / "p.png")


# --- charts ------------------------------------------------------------------------------------------------------

LEFT, TOP, RIGHT, BOTTOM = 62, 34 + 8, 420 - 30, 250 - 42 - 8  # where least and greatest values lie in a panel


def write(path, header: str, rows) -> None:
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))


def near(picture: np.ndarray, x: float, y: float, colour=BLUE, within: int = 3) -> bool:
    """Whether a pixel of the colour is within a few of (x, y)."""
    x, y = round(x), round(y)
    patch = picture[max(0, y - within) : y + within + 1, max(0, x - within) : x + within + 1]
    return bool((np.abs(patch - colour).sum(axis=-1) < 60).any())


def chart(tmp_path, header: str, rows, panels) -> np.ndarray:
    write(tmp_path / "m.csv", header, rows)
    p.save_chart(tmp_path / "m.csv", tmp_path / "m.png", panels)
    return pixels(tmp_path / "m.png")


def test_chart_puts_a_line_where_its_values_are(tmp_path):
    up = chart(tmp_path, "step,a", [(i, 2 * i - 30) for i in range(101)], [("a",)])
    assert up.shape == (250, 420, 3)
    for f in (0, 0.25, 0.5, 0.75, 1):
        assert near(up, LEFT + f * (RIGHT - LEFT), BOTTOM + f * (TOP - BOTTOM))
    assert not near(up, RIGHT, BOTTOM) and not near(up, LEFT + 9, TOP)
    down = chart(tmp_path, "step,a", [(i, -2 * i) for i in range(101)], [("a",)])
    assert near(down, LEFT, TOP) and near(down, RIGHT, BOTTOM) and not near(down, RIGHT, TOP)
    # the horizontal axis starts at 0, so a line from 50 to 100 fills its right half
    late = chart(tmp_path, "step,a", [(50, 0), (100, 1)], [("a",)])
    assert near(late, (LEFT + RIGHT) / 2, BOTTOM) and not near(late, LEFT + 30, BOTTOM)


def test_chart_colours_match_the_legend_even_where_a_column_is_empty(tmp_path):
    got = chart(tmp_path, "step,a,b", [(0, "", 1), (10, "nan", 2)], [("a", "b")])
    assert near(got, LEFT + 8, 17, BLUE) and near(got, RIGHT, TOP, ORANGE) and not near(got, RIGHT, TOP, BLUE)


def test_chart_lays_out_panels_two_to_a_row(tmp_path):
    rows = [(i, i, -i, 5) for i in range(10)]
    got = chart(tmp_path, "step,a,b,c", rows, [("a",), ("b",), ("c", "a")])
    assert got.shape == (500, 840, 3)
    assert near(got, RIGHT, TOP) and near(got, 420 + RIGHT, BOTTOM) and near(got, RIGHT, 250 + TOP, ORANGE)
    assert (got[250:, 420:] == 255).all()


def test_chart_log_axis(tmp_path):
    rows = [(i, 10 ** (i / 25)) for i in range(101)]  # four decades: log of itself
    middle = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert near(chart(tmp_path, "step,a", rows, [("a",)]), *middle)
    rows = [(i, 10 ** (i / 100)) for i in range(101)]  # one decade
    assert not near(chart(tmp_path, "step,a", rows, [("a",)]), *middle)
    rows = [(i, 10 ** (i / 25) - 1) for i in range(101)]  # zero has no logarithm
    assert near(chart(tmp_path, "step,a", rows, [("a",)]), RIGHT - 82, BOTTOM - 16)


def test_chart_of_no_row_one_row_and_constants(tmp_path):
    empty = chart(tmp_path, "step,a", [], [("a",)])
    assert near(empty, LEFT + 8, 17)  # the legend
    for value in (0, 7, -3, 1e-9, 1e30):
        middle = (TOP + BOTTOM) / 2
        chart(tmp_path, "step,a", [(0, value)], [("a",)])
        flat = chart(tmp_path, "step,a", [(5, value), (10, value)], [("a",)])
        assert near(flat, RIGHT - 5, middle) and not near(flat, RIGHT - 5, TOP)


def test_chart_skips_cells_without_a_finite_number(tmp_path):
    rows = [(0, 0, 1), (1, "nan", 1), (2, "", ""), (3, "inf", 1), (4, "-inf", 1), (8, 8, 1)]
    got = chart(tmp_path, "step,a,b", rows + [(9,)], [("a",), ("b",)])  # the last row is torn
    assert near(got, LEFT, BOTTOM) and near(got, LEFT + 8 / 8 * (RIGHT - LEFT), TOP)
    assert near(got, (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2)  # joined across the gap


def test_chart_names_missing_columns(tmp_path):
    with pytest.raises(ValueError, match="no column b, zz"):
        chart(tmp_path, "step,a", [(0, 1)], [("a", "zz"), ("b",)])
    with pytest.raises(ValueError, match="step"):
        chart(tmp_path, "a", [(1,)], [("a",)])
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(ValueError, match="nothing.csv has no column a, step"):
        p.save_chart(tmp_path / "nothing.csv", tmp_path / "m.png", [("a",)])


def test_chart_of_many_rows_is_fast(tmp_path):
    values = np.random.default_rng(0).normal(size=20_000)
    write(tmp_path / "m.csv", "step,a", enumerate(values))
    start = time.process_time()
    p.save_chart(tmp_path / "m.csv", tmp_path / "m.png", [("a",)])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("low, high, log, want", [
    (0, 100_000, False, [0, 20_000, 40_000, 60_000, 80_000, 100_000]),
    (-0.35, 0.3, False, [-0.2, 0, 0.2]),
    (0.0, 0.3, False, [0, 0.1, 0.2, 0.3]),
    (-4, 0, True, [-4, -3, -2, -1, 0]),
    (-1.7, 0.31, True, [-1, 0]),
    (-9, 3, True, [-5, 0]),
])
def test_ticks_are_round(low, high, log, want):
    assert p._ticks(low, high, 1 if log else 0) == pytest.approx(want)


# --- measures ----------------------------------------------------------------------------------------------------


def brute_w1(a, b) -> float:
    """W1 of two lists as the area between their distribution functions."""
    cuts = sorted([*a, *b])
    below = lambda side, cut: sum(v <= cut for v in side) / len(side)  # noqa: E731
    return sum((right - left) * abs(below(a, left) - below(b, left)) for left, right in zip(cuts, cuts[1:]))


@pytest.mark.parametrize("n, m", [(7, 7), (5, 8), (9, 6), (2, 11)])
def test_sliced_wasserstein_against_brute_force(n, m):
    x, y = torch.randn(n, 1, 2, 2), torch.randn(m, 1, 2, 2) * 2 + 0.5
    directions = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    directions /= directions.norm(dim=0)
    pairs = zip((x.flatten(1) @ directions).T.tolist(), (y.flatten(1) @ directions).T.tolist())
    want = np.mean([brute_w1(a, b) for a, b in pairs])
    assert p.sliced_wasserstein(x, y, projections=20, seed=3) == pytest.approx(want, rel=1e-5)
    assert p.sliced_wasserstein(y, x, projections=20, seed=3) == pytest.approx(want, rel=1e-5)


def test_sliced_wasserstein_closed_forms():
    line = torch.tensor([[0.0], [1.0], [5.0]])
    assert p.sliced_wasserstein(line, line + 2.5) == pytest.approx(2.5)  # in one dimension t is 1 or -1
    assert p.sliced_wasserstein(line, line[[2, 0, 1, 1, 0, 2]]) == pytest.approx(0, abs=1e-6)  # equal, repeated
    x, v = torch.randn(50, 2), torch.tensor([3.0, 4.0])
    assert p.sliced_wasserstein(x, x + v, projections=20_000) == pytest.approx(5 * 2 / math.pi, rel=0.02)  # E|v.t|
    x = torch.rand(40, 3, 8, 8) - 0.5
    want = 0.3 * math.sqrt(192) * math.sqrt(2 / math.pi / 192)  # about 0.8 of the shift of a pixel
    assert p.sliced_wasserstein(x, x + 0.3, projections=4000) == pytest.approx(want, rel=0.05)


def test_sliced_wasserstein_is_repeatable_and_leaves_the_global_generator():
    x, y = torch.randn(30, 5), torch.randn(40, 5)
    state = torch.get_rng_state()
    first = p.sliced_wasserstein(x, y)
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(7)
    assert p.sliced_wasserstein(x, y) == first != p.sliced_wasserstein(x, y, seed=1)
    assert isinstance(first, float)


def test_diversity_against_a_double_loop():
    def spread(x):
        return np.mean([(a - b).norm().item() for i, a in enumerate(x) for b in x[:i]])

    x, y = torch.randn(6, 3, 4, 4), 2 * torch.randn(9, 3, 4, 4)
    assert p.diversity_ratio(x, y) == pytest.approx(spread(x) / spread(y), rel=1e-5)
    assert p.diversity_ratio(y, y) == pytest.approx(1)
    assert p.diversity_ratio(x[:1].repeat(6, 1, 1, 1), y) == 0  # collapse
    for sample, data in [(y, x[:1].repeat(6, 1, 1, 1)), (y, y[:1]), (y[:1], y), (x[:1], x[:1])]:
        assert math.isnan(p.diversity_ratio(sample, data))  # nothing to compare


def test_sliced_wasserstein_of_one_picture():
    x, y = torch.randn(1, 3, 4, 4), torch.randn(9, 3, 4, 4)
    assert p.sliced_wasserstein(x, x) == 0
    assert p.sliced_wasserstein(x, x.repeat(9, 1, 1, 1)) == pytest.approx(0, abs=1e-6)
    assert p.sliced_wasserstein(x, y) == pytest.approx(p.sliced_wasserstein(x.repeat(9, 1, 1, 1), y), rel=1e-5)


@pytest.mark.parametrize("measure", [p.sliced_wasserstein, p.diversity_ratio])
def test_measures_read_bytes_and_refuse_misfits(measure):
    x, y = (torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8) for _ in range(2))
    floats = measure(x / 127.5 - 1, (y / 127.5 - 1).requires_grad_())
    assert measure(x, y) == pytest.approx(floats, rel=1e-5) == measure(x / 127.5 - 1, y)
    for a, b in [(x[:0], y), (x, y[:0]), (x, y[:, :1]), (x, y.flatten(1))]:
        with pytest.raises(ValueError, match="one shape"):
            measure(a, b)
