"""What `common.py` writes (files, grids, GIFs, charts, tables) and its two measures."""

import math
import os
import sys
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import forked
from PIL import Image

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB")).astype(int)


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
    output = capsys.readouterr().err
    assert output.startswith("warning: cannot write") and output.count("\n") == 1


NOISE = torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8)


def write_checkpoint(path: Path) -> None:
    with common.atomic_write(path) as file:
        torch.save(NOISE, file)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("name, write", [
    ("a.pt", write_checkpoint), ("a.png", lambda path: common.save_grid(NOISE, path)),
    ("00000.png", lambda path: common.save_pngs(NOISE, path.parent))])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, name, write):
    """A limit on the size of a file stands in for the full disk."""
    def act():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
        with pytest.raises(OSError) as error:
            write(tmp_path / name)
        assert str(error.value) == f"cannot write {str(tmp_path / name)!r}: OSError: File too large"

    (tmp_path / name).write_text("old")
    assert forked(act) == [0] and [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_file_that_is_open_in_windows_is_tried_again(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(13, "The process cannot access the file")] * 9

    def refuse(*arguments):
        if refusals:
            raise refusals.pop()
        replace(*arguments)

    monkeypatch.setattr(os, "replace", refuse)
    common.save_table([], tmp_path / "a.csv")
    assert os.listdir(tmp_path) == ["a.csv"]


def test_to_bytes_rounds_and_clamps():
    values = torch.tensor([-9.0, -1.0, -1 + 0.9 / 127.5, 0.0, 0.004, 1.0, 9.0])
    assert common.to_bytes(values).tolist() == [0, 0, 1, 128, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_bytes(every / 127.5 - 1), every) and common.to_bytes(every) is every


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
    common.save_grid(torch.zeros(16, 1, 64, 64, dtype=torch.uint8), tmp_path / "g.png")
    assert Image.open(tmp_path / "g.png").size == (4 * (64 * 4 + 2) + 2,) * 2  # square, and enlarged to about 1024
    with pytest.raises(ValueError, match="images"):
        common.save_grid(torch.zeros(0, 3, 8, 8), tmp_path / "g.png")


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


def test_gif(tmp_path):
    frames = [Image.new("RGB", (10 if i else 20, 8), (i, 0, 0)) for i in range(200)]
    frames[-1].save(tmp_path / "last.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "last.png").read_bytes()[:50])
    common.save_gif([*frames[:3], str(tmp_path / "damaged.png"), tmp_path / "last.png"], tmp_path / "a.gif", 50, 700)
    common.save_gif([*frames, Image.new("RGB", (1042, 1042))], tmp_path / "b.gif", limit=6)
    for name, want, durations, size in (("a.gif", [0, 1, 2, 199], [50] * 3 + [700], (10, 8)),
                                        ("b.gif", [0, 40, 80, 120, 160, 0], [120] * 5 + [1500], (521, 521))):
        gif = Image.open(tmp_path / name)
        assert gif.size == size and gif.info["loop"] == 0 and gif.n_frames == len(want)
        for i in range(gif.n_frames):
            gif.seek(i)
            assert (gif.convert("RGB").getpixel((3, 3))[0], gif.info["duration"]) == (want[i], durations[i])
    with pytest.raises(ValueError, match="frame"):
        common.save_gif([tmp_path / "missing.png"], tmp_path / "c.gif")


def test_density(tmp_path):
    points = torch.tensor([[1.0, 0.5]] * 400 + [[-1.0, 0.5]] * 100 + [[99.0, 0.0], [float("nan"), 0.0]])
    picture = np.array(common.density_picture(points, extent=2.0, size=100))
    assert (picture[37, 75] == common.BLUES[4]).all()  # x = 1 is 3/4 across, y = 0.5 is 3/8 down
    assert (picture[37, 25] == common.BLUES[2]).all()  # sqrt(1/4) is half the scale
    assert (picture[50:] == common.BLUES[0]).all() and (picture[:, -9:] == common.BLUES[0]).all()


def test_panels_side_by_side(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0)]
    common.save_panels([Image.new("RGB", (50, 40), colour) for colour in colours], ["a", ""], tmp_path / "p.png")
    got = pixels(tmp_path / "p.png")
    assert got.shape == (38 + 40 + 8, 2 * 58 + 8, 3) and (got[:38, 8:58] < 128).any() and (got[:38, 66:] == 255).all()
    assert (got[38:78, 8:58] == colours[0]).all() and (got[38:78, 66:116] == colours[1]).all()
    with pytest.raises(ValueError):
        common.save_panels([Image.new("RGB", (5, 5))] * 2, ["a"], tmp_path / "p.png")


LEFT, TOP, RIGHT, BOTTOM = 62, 34 + 8, 420 - 30, 250 - 42 - 8  # where the extreme values lie in a panel


def test_table(tmp_path):
    rows = [{"step": 1_000_000, "L(x, y)": 0.1234567, "c": math.nan}, {"step": 2, "L(x, y)": -math.inf, "c": 1e-9}]
    common.save_table(rows, tmp_path / "a/m.csv")
    assert (tmp_path / "a/m.csv").read_bytes() == b'step,"L(x, y)",c\n1000000,0.123457,\n2,,1e-09\n'


def near(picture: np.ndarray, x: float, y: float, colour=BLUE, within: int = 3) -> bool:
    """Whether a pixel of the colour is within a few of (x, y)."""
    x, y = round(x), round(y)
    patch = picture[max(0, y - within):y + within + 1, max(0, x - within):x + within + 1]
    return bool((np.abs(patch - colour).sum(axis=-1) < 60).any())


def chart(tmp_path, points, panels=(("a",),)) -> np.ndarray:
    """Draw points (step, a, b, c)."""
    common.save_chart([dict(zip(("step", *"abc"), point)) for point in points], tmp_path / "m.png", panels)
    return pixels(tmp_path / "m.png")


def test_chart_puts_lines_where_their_values_are(tmp_path):
    middle = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    up = chart(tmp_path, [(i, 2 * i - 30) for i in range(101)])
    assert near(up, LEFT, BOTTOM) and near(up, *middle) and near(up, RIGHT, TOP) and not near(up, RIGHT, BOTTOM)
    late = chart(tmp_path, [(50, 0), (100, 1)])  # the horizontal axis starts at 0
    assert near(late, middle[0], BOTTOM) and not near(late, LEFT + 30, BOTTOM)
    assert near(chart(tmp_path, [(i, 10 ** (i / 25)) for i in range(101)]), *middle)  # four decades: logarithmic
    assert not near(chart(tmp_path, [(i, 10 ** (i / 100)) for i in range(101)]), *middle)  # one decade: not
    gaps = chart(tmp_path, [(0, 0), (1, math.nan), (3, math.inf), (8, 8)])
    assert near(gaps, *middle) and near(gaps, RIGHT, TOP)  # joined across the gap
    got = chart(tmp_path, [(i, i, -i, math.nan) for i in range(10)], [("a",), ("b",), ("c", "a")])
    assert got.shape == (500, 840, 3) and (got[250:, 420:] == 255).all()
    assert near(got, RIGHT, TOP) and near(got, 420 + RIGHT, BOTTOM) and near(got, RIGHT, 250 + TOP, ORANGE)
    assert near(got, LEFT + 8, 250 + 17)  # a name without values is in the legend
    assert common._ticks(-0.35, 0.3, 0) == pytest.approx([-0.2, 0, 0.2]) and common._ticks(-1.7, 0.31, 1) == [-1, 0]
    assert near(chart(tmp_path, []), LEFT + 8, 17)
    for value in 0, -3, 1e-9, 1e30:  # one row, constants
        chart(tmp_path, [(0, value)])
        assert near(chart(tmp_path, [(5, value), (10, value)]), RIGHT - 5, middle[1])
    with pytest.raises(ValueError, match="no b, zz"):
        chart(tmp_path, [(0, 1)], [("a", "zz"), ("b",)])


def area_between(a, b) -> float:
    """W1 of two lists as the area between their distribution functions."""
    cuts, (a, b) = sorted([*a, *b]), (np.array(side) for side in (a, b))
    return sum((right - left) * abs((a <= left).mean() - (b <= left).mean()) for left, right in zip(cuts, cuts[1:]))


@pytest.mark.parametrize("n, m", [(7, 7), (9, 6), (1, 11)])
def test_sliced_wasserstein_against_a_loop(n, m):
    x, y = torch.randn(n, 1, 2, 2), torch.randn(m, 1, 2, 2) * 2 + 0.5
    directions = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    directions /= directions.norm(dim=0)
    pairs = zip((x.flatten(1) @ directions).T.tolist(), (y.flatten(1) @ directions).T.tolist())
    want, state = np.mean([area_between(a, b) for a, b in pairs]), torch.get_rng_state()
    assert common.sliced_wasserstein(x, y, projections=20, seed=3) == pytest.approx(want, rel=1e-5)
    assert common.sliced_wasserstein(y, x, projections=20, seed=3) == pytest.approx(want, rel=1e-5)
    assert torch.equal(state, torch.get_rng_state()) and isinstance(common.sliced_wasserstein(x, y), float)


def test_diversity_against_a_double_loop():
    def mean_distance(x):
        return np.mean([(a - b).norm().item() for i, a in enumerate(x) for b in x[:i]])

    x, y = torch.randn(6, 3, 4, 4), 2 * torch.randn(9, 3, 4, 4)
    assert common.diversity_ratio(x, y) == pytest.approx(mean_distance(x) / mean_distance(y), rel=1e-5)
    assert common.diversity_ratio(x[:1].repeat(6, 1, 1, 1), y) == 0  # collapse
    for sample, data in [(y, x[:1].repeat(6, 1, 1, 1)), (y, y[:1]), (y[:1], y)]:
        assert math.isnan(common.diversity_ratio(sample, data))  # nothing to compare
    clamped = (9 * x).clamp(-1, 1)
    assert common.compare(9 * x, y) == dict(swd=common.sliced_wasserstein(clamped, y),
                                            diversity=common.diversity_ratio(clamped, y))


@pytest.mark.parametrize("measure", [common.sliced_wasserstein, common.diversity_ratio])
def test_measures_read_bytes_and_refuse_misfits(measure):
    x, y = (torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8) for _ in range(2))
    assert measure(x, y) == pytest.approx(measure(x / 127.5 - 1, y / 127.5 - 1), rel=1e-5)
    for data in y[:0], y[:, :1]:
        with pytest.raises(ValueError, match="one shape"):
            measure(x, data)
