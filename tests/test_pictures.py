"""What `common.py` writes (files, grids, GIFs, charts, tables) and its two measures."""

import csv
import math
import multiprocessing
import os
import sys
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from PIL import Image

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB")).astype(int)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new folder" / "a.txt"
    with common.atomic_write(file) as out:
        out.write(b"old")
        assert not file.exists() and Path(out.name).parent == file.parent and out.name.endswith(".txt")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), common.atomic_write(file) as out:
            out.write(b"new")
            raise error
        assert file.read_bytes() == b"old" and list(file.parent.iterdir()) == [file]
    with common.atomic_write(str(file), sync=False) as out:
        out.write(b"new")
    assert file.read_bytes() == b"new" and list(file.parent.iterdir()) == [file]


def test_numbered_folders_and_warnings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no runs/a-\*/x.pt in"):
        common.newest_folder("runs/a-*", "x.pt")
    for age, folder in enumerate([common.next_folder("runs/a") for _ in range(3)]):
        (folder / f"{'y' if age == 0 else 'x'}.pt").touch()
        os.utime(next(folder.iterdir()), (0, 100 - age))
    assert sorted(os.listdir("runs")) == ["a-001", "a-002", "a-003"]
    assert common.newest_folder("runs/a-*", "x.pt") == Path("runs/a-002")
    common.attempt(common.save_table, [{"step": 1}], tmp_path / "t.csv")
    common.attempt(common.save_table, [{"step": 1}], tmp_path / "t.csv/t.csv")
    common.attempt(common.save_gif, [], tmp_path / "a.gif")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("warning: cannot write") and "at least one frame" in told[1]


def in_child(act, *arguments) -> int:
    """Call a function in a forked process and return its exit status."""
    process = multiprocessing.get_context("fork").Process(target=act, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def killed_while_writing(path: Path) -> None:
    with common.atomic_write(path) as out:
        out.write(bytes(1_000_000))
        os._exit(9)


def test_a_killed_write_leaves_the_file_and_is_made_up_for(tmp_path):
    (tmp_path / "a.pt").write_text("old")
    assert in_child(killed_while_writing, tmp_path / "a.pt") == 9 and (tmp_path / "a.pt").read_text() == "old"
    with common.atomic_write(tmp_path / "a.pt") as out:
        out.write(b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


NOISE = torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8)
ROWS = [{"step": step, "a": math.sin(step)} for step in range(2000)]


def write_checkpoint(path: Path) -> None:
    with common.atomic_write(path) as file:
        torch.save(NOISE, file)


WRITERS = {
    "a.pt": write_checkpoint, "a.png": lambda path: common.save_grid(NOISE, path),
    "00000.png": lambda path: common.save_pngs(NOISE, path.parent), "a.csv": lambda path: common.save_table(ROWS, path),
    "a.gif": lambda path: common.save_gif([Image.fromarray(NOISE[0].permute(1, 2, 0).numpy())], path),
    "b.png": lambda path: common.save_panels([Image.fromarray(NOISE[0, 0].numpy())], ["a"], path),
    "c.png": lambda path: common.save_chart(ROWS, path, [("a",)] * 4)}


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, name):
    """A limit on the size of a file stands in for the full disk."""
    def act():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
        with pytest.raises(OSError) as error:
            WRITERS[name](tmp_path / name)
        assert str(error.value) == f"cannot write {str(tmp_path / name)!r}: OSError: File too large"

    (tmp_path / name).write_text("old")
    assert in_child(act) == 0 and [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "line\nbreak.png").mkdir()
    for name, reason in (("file/a.png", "FileExistsError"), ("line\nbreak.png", "IsADirectoryError")):
        with pytest.raises(OSError) as error:
            common.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / name)
        assert str(error.value).startswith(f"cannot write {str(tmp_path / name)!r}: {reason}")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("refusals", [3, 99])
def test_a_file_that_is_open_in_windows_is_tried_again_for_a_second(tmp_path, monkeypatch, refusals):
    replace, calls, waited = os.replace, [], []

    def refuse(*arguments):
        calls.append(arguments)
        if len(calls) <= refusals:
            raise PermissionError(13, "The process cannot access the file")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(common.time, "sleep", waited.append)
    if refusals == 3:
        common.save_table(ROWS, tmp_path / "a.csv")
    else:
        with pytest.raises(OSError, match="cannot write .*a.csv': PermissionError: The process cannot"):
            common.save_table(ROWS, tmp_path / "a.csv")
    assert sum(waited) == pytest.approx(0.15 if refusals == 3 else 1) and len(os.listdir(tmp_path)) == (refusals == 3)


# ---- grids, PNGs, GIFs ----------------------------------------------------------------------------------------------


def test_to_bytes_rounds_and_clamps():
    values = torch.tensor([-9.0, -1.0, -1 + 0.9 / 127.5, 0.0, 0.004, 1.0, 9.0])
    assert common.to_bytes(values).tolist() == [0, 0, 1, 128, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_bytes((every / 127.5 - 1).requires_grad_()), every)
    assert common.to_bytes(every) is every


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_pixel_exact(tmp_path, channels):
    images = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    common.save_grid(images / 127.5 - 1, tmp_path / "g.png", columns=3, zoom=2)
    want = np.full((2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3), 255)
    for i, image in enumerate(images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()):
        top, left = 2 + i // 3 * 10, 2 + i % 3 * 14
        want[top:top + 8, left:left + 12] = image.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(pixels(tmp_path / "g.png"), want)
    common.save_grid(images.view(1, 5, channels, 4, 6).expand(2, -1, -1, -1, -1), tmp_path / "rows.png", zoom=1)
    assert pixels(tmp_path / "rows.png").shape[:2] == (2 * (4 + 2) + 2, 5 * (6 + 2) + 2)
    for bad in (torch.zeros(0, 3, 8, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match="images"):
            common.save_grid(bad, tmp_path / "g.png")


@pytest.mark.parametrize("n, size, zoom", [(64, 32, 4), (16, 64, 4), (256, 32, 2), (64, 128, 1), (4, 300, 1)])
def test_grid_default_zoom_and_columns(tmp_path, n, size, zoom):
    common.save_grid(torch.zeros(n, 1, size, size, dtype=torch.uint8), tmp_path / "g.png")
    side = math.isqrt(n) * (size * zoom + 2) + 2
    assert Image.open(tmp_path / "g.png").size == (side, side)


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_round_trip(tmp_path, channels):
    images = torch.randint(0, 256, (12, channels, 5, 7), dtype=torch.uint8)
    common.save_pngs(images[:2] / 127.5 - 1, tmp_path / "a")
    common.save_pngs(images[2:], tmp_path / "a", first=2)
    files = sorted((tmp_path / "a").iterdir())
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


def test_gif(tmp_path):
    frames = [Image.new("RGB", (10 if i else 20, 8), (i * 20, 0, 0)) for i in range(5)]
    frames[1].save(tmp_path / "1.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    paths = [tmp_path / "1.png", str(tmp_path / "damaged.png"), tmp_path / "missing.png"]
    common.save_gif([frames[0], *paths, *frames[2:]], tmp_path / "a.gif", 50, 700)
    assert read_gif(tmp_path / "a.gif") == ([0, 20, 40, 60, 80], [50] * 4 + [700], (10, 8), 0)
    with pytest.raises(ValueError, match="frame"):
        common.save_gif([], tmp_path / "b.gif")
    common.save_gif([Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(200)], tmp_path / "a.gif")
    levels = read_gif(tmp_path / "a.gif")[0]
    assert len(levels) == 60 and levels[0] == 0 and levels[-1] == 199 and set(np.diff(levels)) == {3, 4}
    common.save_gif([Image.new("RGB", (1042, 1042))], tmp_path / "b.gif")
    assert Image.open(tmp_path / "b.gif").size == (521, 521)


def test_density(tmp_path):
    points = torch.tensor([[1.0, 0.5]]).repeat(500, 1) + 0.02 * torch.randn(500, 2)
    stray = torch.tensor([[-1.0, -1.0], [99.0, 0.0], [-2.1, 0.0], [float("nan"), 0.0]])
    picture = np.array(common.density_picture(torch.cat([points, stray]), extent=2.0, size=100))
    dark = -picture.astype(int).sum(2)
    row, column = np.unravel_index(dark.argmax(), dark.shape)
    assert abs(column - 75) <= 2 and abs(row - 37) <= 2  # x = 1 is 3/4 across, y = 0.5 is 3/8 down
    assert tuple(picture[row, column]) == common.BLUES[-1] and tuple(picture[5, 5]) == common.BLUES[0]
    assert dark[74, 25] > dark[5, 5]  # the stray point shows
    assert (picture[:, -9:] == common.BLUES[0]).all()  # points beyond an edge do not come back at the other
    assert (np.array(common.density_picture(torch.zeros(0, 2), 1.0)) == common.BLUES[0]).all()
    row = np.array(common.density_picture(torch.tensor([[-0.5, 0.0]] * 400 + [[0.5, 0.0]] * 100), 1.0, size=100))[49]
    assert (row[25] == common.BLUES[4]).all() and (row[75] == common.BLUES[2]).all()  # sqrt(1/4) is half the scale
    row = np.array(common.density_picture(torch.tensor([[0.001, 0.001]]), 1.0, size=100, blur=0.1))[49]
    level = math.exp(-(5**2) / (2 * 5**2) / 2)  # 5 pixels are one standard deviation away; square root of density
    assert row[55, 0] == row[45, 0] == round(np.interp(level, np.linspace(0, 1, 5), [c[0] for c in common.BLUES]))


def test_panels_side_by_side(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    common.save_panels([Image.new("RGB", (50, 40), c) for c in colours], ["a", "b", ""], tmp_path / "p.png")
    got = pixels(tmp_path / "p.png")
    assert got.shape == (38 + 40 + 8, 3 * 58 + 8, 3)
    for i, colour in enumerate(colours):
        assert (got[38:78, 8 + 58 * i:58 + 58 * i] == colour).all()
        assert (got[:38, 8 + 58 * i:58 + 58 * i] < 128).any() == (i < 2)
    with pytest.raises(ValueError):
        common.save_panels([Image.new("RGB", (5, 5))] * 2, ["a"], tmp_path / "p.png")


# ---- tables and charts ----------------------------------------------------------------------------------------------

LEFT, TOP, RIGHT, BOTTOM = 62, 34 + 8, 420 - 30, 250 - 42 - 8  # where the extreme values lie in a panel


def test_table(tmp_path):
    rows = [{"step": 1_000_000, "L(x, y)": 0.1234567, "c": math.nan}, {"step": 2, "L(x, y)": -math.inf, "c": 1e-9}]
    common.save_table(rows, tmp_path / "a/m.csv")
    assert (tmp_path / "a/m.csv").read_bytes() == b'step,"L(x, y)",c\n1000000,0.123457,\n2,,1e-09\n'
    with open(tmp_path / "a/m.csv", newline="") as file:
        assert list(csv.DictReader(file))[1] == {"step": "2", "L(x, y)": "", "c": "1e-09"}


def near(picture: np.ndarray, x: float, y: float, colour=BLUE, within: int = 3) -> bool:
    """Whether a pixel of the colour is within a few of (x, y)."""
    x, y = round(x), round(y)
    patch = picture[max(0, y - within):y + within + 1, max(0, x - within):x + within + 1]
    return bool((np.abs(patch - colour).sum(axis=-1) < 60).any())


def chart(tmp_path, points, panels=(("a",),)) -> np.ndarray:
    """Draw points (step, a, b, c)."""
    common.save_chart([dict(zip(("step", *"abc"), point)) for point in points], tmp_path / "m.png", panels)
    return pixels(tmp_path / "m.png")


def test_chart_puts_a_line_where_its_values_are(tmp_path):
    up = chart(tmp_path, [(i, 2 * i - 30) for i in range(101)])
    assert up.shape == (250, 420, 3)
    for f in (0, 0.25, 0.5, 0.75, 1):
        assert near(up, LEFT + f * (RIGHT - LEFT), BOTTOM + f * (TOP - BOTTOM))
    assert not near(up, RIGHT, BOTTOM) and not near(up, LEFT + 9, TOP)
    late = chart(tmp_path, [(50, 0), (100, 1)])  # the horizontal axis starts at 0
    assert near(late, (LEFT + RIGHT) / 2, BOTTOM) and not near(late, LEFT + 30, BOTTOM)


def test_chart_lays_out_panels_and_colours(tmp_path):
    got = chart(tmp_path, [(i, i, -i, 5) for i in range(10)], [("a",), ("b",), ("c", "a")])
    assert got.shape == (500, 840, 3) and (got[250:, 420:] == 255).all()
    assert near(got, RIGHT, TOP) and near(got, 420 + RIGHT, BOTTOM) and near(got, RIGHT, 250 + TOP, ORANGE)
    got = chart(tmp_path, [(0, math.nan, 1), (10, math.nan, 2)], [("a", "b")])  # a legend even without values
    assert near(got, LEFT + 8, 17, BLUE) and near(got, RIGHT, TOP, ORANGE) and not near(got, RIGHT, TOP, BLUE)
    with pytest.raises(ValueError, match="no b, zz"):
        chart(tmp_path, [(0, 1)], [("a", "zz"), ("b",)])


def test_chart_log_axis(tmp_path):
    middle = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert near(chart(tmp_path, [(i, 10 ** (i / 25)) for i in range(101)]), *middle)  # four decades: log of itself
    assert not near(chart(tmp_path, [(i, 10 ** (i / 100)) for i in range(101)]), *middle)  # one decade
    zero = chart(tmp_path, [(i, 10 ** (i / 25) - 1) for i in range(101)])  # zero has no logarithm
    assert near(zero, RIGHT - 82, BOTTOM - 16)


def test_chart_of_no_row_one_row_constants_and_gaps(tmp_path):
    assert near(chart(tmp_path, []), LEFT + 8, 17)  # the legend
    for value in (0, 7, -3, 1e-9, 1e30):
        chart(tmp_path, [(0, value)])
        flat = chart(tmp_path, [(5, value), (10, value)])
        assert near(flat, RIGHT - 5, (TOP + BOTTOM) / 2) and not near(flat, RIGHT - 5, TOP)
    got = chart(tmp_path, [(0, 0), (1, math.nan), (3, math.inf), (4, -math.inf), (8, 8)])
    assert near(got, LEFT, BOTTOM) and near(got, RIGHT, TOP)
    assert near(got, (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2)  # joined across the gap


@pytest.mark.parametrize("low, high, log, want", [
    (0, 100_000, False, [0, 20_000, 40_000, 60_000, 80_000, 100_000]), (-0.35, 0.3, False, [-0.2, 0, 0.2]),
    (0.0, 0.3, False, [0, 0.1, 0.2, 0.3]), (-1.7, 0.31, True, [-1, 0]), (-9, 3, True, [-5, 0])])
def test_ticks_are_round(low, high, log, want):
    assert common._ticks(low, high, 1 if log else 0) == pytest.approx(want)


# ---- measures -------------------------------------------------------------------------------------------------------


def area_between(a, b) -> float:
    """W1 of two lists as the area between their distribution functions."""
    cuts = sorted([*a, *b])
    below = lambda side, cut: sum(v <= cut for v in side) / len(side)  # noqa: E731
    return sum((right - left) * abs(below(a, left) - below(b, left)) for left, right in zip(cuts, cuts[1:]))


@pytest.mark.parametrize("n, m", [(7, 7), (5, 8), (9, 6), (1, 11)])
def test_sliced_wasserstein_against_a_loop(n, m):
    x, y = torch.randn(n, 1, 2, 2), torch.randn(m, 1, 2, 2) * 2 + 0.5
    directions = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    directions /= directions.norm(dim=0)
    pairs = zip((x.flatten(1) @ directions).T.tolist(), (y.flatten(1) @ directions).T.tolist())
    want, state = np.mean([area_between(a, b) for a, b in pairs]), torch.get_rng_state()
    assert common.sliced_wasserstein(x, y, projections=20, seed=3) == pytest.approx(want, rel=1e-5)
    assert common.sliced_wasserstein(y, x, projections=20, seed=3) == pytest.approx(want, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state()) and isinstance(common.sliced_wasserstein(x, y), float)


def test_sliced_wasserstein_closed_forms():
    line = torch.tensor([[0.0], [1.0], [5.0]])
    assert common.sliced_wasserstein(line, line + 2.5) == pytest.approx(2.5)  # in one dimension t is 1 or -1
    assert common.sliced_wasserstein(line, line[[2, 0, 1, 1, 0, 2]]) == pytest.approx(0, abs=1e-6)
    x, v = torch.randn(50, 2), torch.tensor([3.0, 4.0])
    assert common.sliced_wasserstein(x, x + v, projections=20_000) == pytest.approx(5 * 2 / math.pi, rel=0.02)
    x = torch.rand(40, 3, 8, 8) - 0.5
    want = 0.3 * math.sqrt(2 / math.pi)  # about 0.8 of the shift of a pixel
    assert common.sliced_wasserstein(x, x + 0.3, projections=4000) == pytest.approx(want, rel=0.05)


def test_diversity_against_a_double_loop():
    def mean_distance(x):
        return np.mean([(a - b).norm().item() for i, a in enumerate(x) for b in x[:i]])

    x, y = torch.randn(6, 3, 4, 4), 2 * torch.randn(9, 3, 4, 4)
    assert common.diversity_ratio(x, y) == pytest.approx(mean_distance(x) / mean_distance(y), rel=1e-5)
    assert common.diversity_ratio(x[:1].repeat(6, 1, 1, 1), y) == 0  # collapse
    for sample, data in [(y, x[:1].repeat(6, 1, 1, 1)), (y, y[:1]), (y[:1], y), (x[:1], x[:1])]:
        assert math.isnan(common.diversity_ratio(sample, data))  # nothing to compare
    assert common.compare(9 * x, y) == dict(swd=common.sliced_wasserstein((9 * x).clamp(-1, 1), y),
                                            diversity=common.diversity_ratio((9 * x).clamp(-1, 1), y))


@pytest.mark.parametrize("measure", [common.sliced_wasserstein, common.diversity_ratio])
def test_measures_read_bytes_and_refuse_misfits(measure):
    x, y = (torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8) for _ in range(2))
    floats = measure(x / 127.5 - 1, (y / 127.5 - 1).requires_grad_())
    assert measure(x, y) == pytest.approx(floats, rel=1e-5) == measure(x / 127.5 - 1, y)
    for a, b in [(x[:0], y), (x, y[:0]), (x, y[:, :1]), (x, y.flatten(1))]:
        with pytest.raises(ValueError, match="one shape"):
            measure(a, b)
