"""Datasets, folders of other people's pictures, the cache, batches, augmentation and the drawings of `common.py`."""

import json
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from common import load_images
from conftest import forked
from PIL import Image, ImageCms, PngImagePlugin

RED, WHITE = (255, 0, 0), (255, 255, 255)
P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def load(folder: Path, size: int = 8, channels: int | None = None) -> torch.Tensor:
    """Load a folder with an empty cache."""
    return load_images(str(folder), size, channels, tempfile.mkdtemp(dir=folder.parent, prefix=".root"))


def noise(seed: int, size: tuple = (20, 30, 3)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def photos(folder: Path, count: int = 6) -> Path:
    """Make a folder with distinct noise PNGs, some in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        noise(i).save(folder / ("sub" if i % 2 else "") / f"{i}.png")
    return folder


def one(folder: Path, name: str, image: Image.Image, **options) -> Path:
    """Save a picture into a folder, which need not exist."""
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    return folder


def png(width: int, height: int, data: bytes, colour: int = 0, bits: int = 8) -> bytes:
    """Return the bytes of a PNG with any header and pixel data."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def deep(value: float, white: float, kind: type = np.float32) -> Image.Image:
    """Make a greyscale picture of one value with one pixel of another."""
    values = np.full((9, 9), value, kind)
    values[0, 0] = white
    return Image.fromarray(values)


PALETTE = Image.new("RGB", (9, 9), RED).quantize(2)
CLEAR_PALETTE = PALETTE.copy()
CLEAR_PALETTE.info["transparency"] = 0
KINDS = {"grey.JPEG": (Image.new("L", (9, 9), 77), (77,) * 3), "bits.png": (Image.new("1", (9, 9), 1), WHITE),
         "cmyk.jpg": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), RED), "clear.png": (CLEAR_PALETTE, WHITE),
         "palette.gif": (PALETTE, RED), "rgba.png": (Image.new("RGBA", (9, 9), (255, 0, 0, 128)), (255, 127, 127)),
         "la.png": (Image.new("LA", (9, 9), (0, 128)), (127,) * 3), "colour.jp2": (Image.new("RGB", (9, 9), RED), RED),
         "16.png": (deep(32768, 65535, np.uint16), (128,) * 3), "32.tif": (deep(2048, 4095, np.int32), (128,) * 3),
         "float.pfm": (deep(0.5, 1.0), (128,) * 3), "nan.tif": (deep(0.5, np.nan), WHITE)}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_pictures(tmp_path, name):
    image, expected = KINDS[name]
    folder = one(tmp_path / "in", name, image)
    images = load(folder)
    assert images.dtype == torch.uint8 and images.shape == (1, 1 if len(set(expected)) == 1 else 3, 8, 8)
    assert load(folder, channels=3)[0, :, 4, 4].tolist() == pytest.approx(expected, abs=3)
    grey = np.dot(expected, (0.299, 0.587, 0.114))
    assert load(folder, channels=1)[0, :, 4, 4].tolist() == pytest.approx([grey], abs=2)


def test_grey_of_more_than_8_bits_has_one_scale_for_a_folder(tmp_path, capsys):
    """Of 16 bits in colour Pillow keeps the high byte, so 12 bits there are nearly black."""
    one(tmp_path / "12", "a.tif", deep(100, 4095, np.uint16))
    one(tmp_path / "12", "b.tif", deep(2048, 0, np.uint16))
    one(tmp_path / "12", "c.png", Image.new("L", (9, 9), 77))
    (tmp_path / "12/d.png").write_bytes(png(9, 9, (b"\0" + b"\x0f\xff" * 27) * 9, 2, 16))
    assert load(tmp_path / "12")[:, 0, 4, 4].tolist() == [6, 128, 77, 15]
    assert "skipped, grey levels above 8 bits: 0 to 4095 scaled to 0 to 255, 1 nearly black" in capsys.readouterr().err
    for name, values in {"a": (0, 0.5), "b": (0, -1), "c": (0.5, 1)}.items():
        one(tmp_path / "signed", f"{name}.tif", deep(*values))
    assert load(tmp_path / "signed")[:, 0, 4, 4].tolist() == [128, 128, 191]


@pytest.mark.parametrize("name, mode", [("a.jpg", "RGB"), ("a.webp", "RGB"), ("a.gif", "P"), ("a.tif", "CMYK")])
def test_a_set_of_grey_pixels_has_one_channel(tmp_path, name, mode):
    grey = noise(0, (40, 40)).resize((64, 64))
    folder = one(tmp_path / "in", name, grey.quantize(64) if mode == "P" else grey.convert("RGB").convert(mode))
    images = load(folder)
    assert images.shape == (1, 1, 8, 8) and (images.int() - load(folder, channels=1).int()).abs().max() <= 2
    Image.merge("RGB", (grey, grey, grey.point(lambda value: value // 2))).save(folder / "c.png")
    assert load(folder).shape == (2, 3, 8, 8)


def entries(root: Path) -> set[Path]:
    return set((root / "cache").iterdir())


def red_corner() -> Image.Image:
    image = Image.new("RGB", (32, 32), "black")
    image.paste(RED, (0, 0, 16, 16))
    return image


def corners(folder: Path) -> list[int]:
    """Say which corners are red, in reading order."""
    return [int(load(folder)[0, 0, y, x] > 128) for y in (1, 6) for x in (1, 6)]


@pytest.mark.parametrize("orientation, corner", [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 1), (7, 3), (8, 2)])
def test_pictures_are_turned(tmp_path, orientation, corner):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, orientation, 0)
    assert corners(one(tmp_path / "in", "a.jpg", red_corner(), exif=exif)) == [i == corner for i in range(4)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_odd_metadata_do_not_matter(tmp_path, suffix):
    """EXIF with the orientation 6 and an odd entry (tag, type, count, value or offset): -1/0, NaN, an unknown type."""
    for i, entry in enumerate([(0x829A, 5, 1, 0), (0x829A, 12, 1, 0), (0x9C9B, 77, 3, 4)]):
        entries = b"".join(struct.pack("<HHII", *item) for item in ((0x0112, 3, 1, 6), entry))
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries
        exif += struct.pack("<IiI", 0, -1, 0) + struct.pack("<d", float("nan"))
        assert corners(one(tmp_path / str(i), f"a.{suffix}", red_corner(), exif=exif)) == [0, 1, 0, 0]
    assert corners(one(tmp_path / "bad", f"a.{suffix}", red_corner(), exif=b"Exif\0\0no TIFF header")) == [1, 0, 0, 0]


def test_a_png_may_hold_much_text(tmp_path):
    info = PngImagePlugin.PngInfo()
    for i in range(26):
        info.add_itxt(f"many{i}", "x" * 3_000_000, zip=True)
    folder = one(tmp_path / "in", "a.png", red_corner(), pnginfo=info)
    one(folder, "b.png", red_corner(), icc_profile=bytes(3_000_000))
    assert len(load(folder)) == 2


def profile(*primaries: tuple) -> bytes:
    """Return sRGB's profile with other primaries (XYZ), as Display P3 has them."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries):
        start = struct.unpack(">I", data[data.index(name) + 4:][:4])[0] + 8
        data[start:start + 12] = struct.pack(">iii", *(round(value * 65536) for value in values))
    return bytes(data)


def test_colours_are_converted_from_their_profile(tmp_path):
    """Through linear light: a matrix from P3 to sRGB between two curves, which are those of sRGB."""
    colour = np.array([190, 120, 60])
    light = ((colour / 255 + 0.055) / 1.055) ** 2.4 @ np.array(P3) @ np.linalg.inv(np.array(SRGB))
    want = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    for mode in "RGB", "RGBA":
        plain = Image.new("RGB", (9, 9), tuple(colour.tolist())).convert(mode)
        folder = one(tmp_path / mode, "a.png", plain, icc_profile=profile(*P3))
        assert load(folder)[0, :, 4, 4].tolist() == pytest.approx(want, abs=2)
    damaged = one(tmp_path / "damaged", "a.png", plain, icc_profile=profile(*P3)[:200])
    assert load(damaged)[0, :, 4, 4].tolist() == colour.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="makes pipes, and reads the peak of memory in /proc")
def test_bad_files_are_skipped_counted_and_named(tmp_path, capsys):
    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    folder, bad = photos(tmp_path / "in", 20), tmp_path / "in" / "a"
    for name in "-dash.png", "a\nb.png", os.fsdecode(b"\xff.png"), "\N{FISH}" + "y" * 200 + ".png":
        shutil.copy(folder / "0.png", folder / name)
    expected = load(folder, 16)
    bad.mkdir()
    for i in range(6):
        (bad / f"cut{i}.png").write_bytes((folder / "0.png").read_bytes()[:20 + 120 * i])
    for name in "text.jpg", "text.webp", "b.HEIC", "c.heic", "README":
        (bad / name).write_text("no picture\n" * 99)
    (bad / "bomb.png").write_bytes(png(30_000, 30_000, bytes(9_000_000)))
    (bad / "big.png").write_bytes(png(13_000, 13_000, bytes(9_000_000)))
    (bad / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (bad / "broken.jpg").symlink_to(bad / "nowhere.jpg")
    (bad / "up").symlink_to(folder)  # no fault, and read only once
    os.mkfifo(bad / "pipe.png")
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    before = peak()
    capsys.readouterr()
    assert torch.equal(load_images(str(folder), 16, None, str(tmp_path)), expected) and peak() - before < 100_000
    output, summary = capsys.readouterr().err, "13 skipped, 3 files not read (2 .heic, 1 unnamed)\n"
    assert output.count("\n") == 12 and output.count("skipped '") == 10 and "and 3 more, listed in" in output
    assert output.endswith(summary)
    reasons = json.loads(next(tmp_path.glob("cache/*/notes.json")).read_text())["skipped"]
    assert "exceeds limit" in reasons["a/bomb.png"] and "too many" in reasons["a/big.png"]
    assert "broken link" in reasons["a/pipe.png"] and "cannot identify image" in reasons["a/postscript.jpg"]
    assert list(reasons) == sorted(reasons)
    with pytest.raises(ValueError, match=r"no usable picture in .*13 skipped, 3 files not read .*JPEG"):
        (bad / "up").unlink()
        load(bad)


def test_hidden_and_system_files_are_left_out(tmp_path, capsys):
    folder = photos(tmp_path / "in")
    for name in ".Trash-1000/files", "@eaDir/0.png", "__MACOSX", "$Recycle.Bin/S-1-5", "env/lib/site-packages/x":
        (folder / name).mkdir(parents=True)
        shutil.copy(folder / "0.png", folder / name / "x.png")
    for name in "._0.png", "sub/.DS_Store":
        shutil.copy(folder / "0.png", folder / name)
    assert len(load(folder)) == 6 and "0 skipped, left out: 7 hidden or system\n" in capsys.readouterr().err
    assert len(load(folder / ".Trash-1000")) == 1  # a hidden folder that is asked for is read
    (folder / "shown").symlink_to(folder / ".Trash-1000")
    assert len(load(folder)) == 7


def test_a_run_does_not_train_on_its_own_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photos(tmp_path / "in"))
    before = load_images(".", 8).clone()
    for name in "runs/a/checkpoint.pt", "runs/a/sample-001/0.png", "sub/killed/samples/real.png", "data/0.png":
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("0.png", name)
    capsys.readouterr()
    assert torch.equal(load_images(".", 8), before)
    assert re.search("6 pictures from cache, 0 skipped, left out: 1 data root, 2 run\n", capsys.readouterr().err)
    assert len(load_images("runs/a/sample-001", 8)) == 1  # as asked for
    with pytest.raises(ValueError, match="killed' holds a run"):
        load_images("sub/killed", 8)


def test_the_cache_is_used_until_a_setting_changes(tmp_path, monkeypatch):
    folder, root = photos(tmp_path / "in"), tmp_path / "root"
    images = load_images(str(folder), 16, None, str(root)).clone()
    monkeypatch.setattr(common, "to_array", lambda *arguments, **options: 1 / 0)
    assert torch.equal(load_images(str(folder), 16, 0, str(root)), images) and len(entries(root)) == 1
    for size, channels, version in (16, 1, 98), (8, None, 98), (16, None, 99):
        monkeypatch.setattr(common, "CACHE_VERSION", version)
        with pytest.raises(ValueError, match="no usable picture.*6 skipped"):
            load_images(str(folder), size, channels, str(root))


@pytest.mark.skipif(sys.platform != "linux", reason="makes a sparse file of twice the memory")
def test_a_cache_larger_than_memory_opens_and_is_never_written(tmp_path):
    arguments = str(photos(tmp_path / "in")), 256, 3, str(tmp_path)
    load_images(*arguments)
    entry, count = entries(tmp_path).pop(), 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 256**2)
    os.truncate(entry / "pixels.u8", count * 3 * 256**2)
    notes = json.loads((entry / "notes.json").read_text())
    (entry / "notes.json").write_text(json.dumps(notes | {"count": count}))
    images = load_images(*arguments)
    images[-1] = 7
    assert len(images) == count and images[-1].min() == 7 and load_images(*arguments)[-1].max() == 0


@pytest.mark.parametrize("change, count", [
    (lambda path: shutil.copy(path, path.with_name("new.png")), 7), (lambda path: path.unlink(), 5),
    (lambda path: path.rename(path.with_name("zz.png")), 6), (lambda path: os.utime(path, ns=(0, 1)), 6),
    (lambda path: shutil.copy(path.with_name("4.png"), path), 6),
], ids=["added", "removed", "renamed", "touched", "rewritten"])
def test_a_changed_folder_is_noticed(tmp_path, change, count):
    folder = photos(tmp_path / "in")
    load_images(str(folder), 16, None, str(tmp_path))
    change(folder / "2.png")
    images = load_images(str(folder), 16, None, str(tmp_path))
    assert len(images) == count and torch.equal(images, load(folder, 16))


def test_outdated_entries_and_leftovers_go_after_an_hour(tmp_path):
    """Until then another process may be using or writing them."""
    folder, cache = photos(tmp_path / "in"), tmp_path / "cache"
    for source in folder, photos(tmp_path / "other/in"):
        load_images(str(source), 16, None, str(tmp_path))
    for name in "killed.tmp", "growing.tmp":
        (cache / name).mkdir()
        (cache / name / "pixels.u8").touch()
    shutil.copy(folder / "0.png", folder / "8.png")
    load_images(str(folder), 16, None, str(tmp_path))
    assert len(entries(tmp_path)) == 5
    for path in [*cache.glob("*"), *cache.glob("*/*")]:
        if path != cache / "growing.tmp/pixels.u8":
            os.utime(path, (0, time.time() - 3601))
    shutil.copy(folder / "0.png", folder / "9.png")
    load_images(str(folder), 16, None, str(tmp_path))
    assert sorted(path.name.split("-")[0] for path in entries(tmp_path)) == ["growing.tmp", "in", "in"]


@pytest.mark.parametrize("damage", [
    lambda entry: os.truncate(entry / "pixels.u8", 3 * 16 * 16 * 5),
    lambda entry: os.truncate(entry / "pixels.u8", 3 * 16 * 16 * 7),
    lambda entry: (entry / "pixels.u8").unlink(),
    lambda entry: (entry / "notes.json").unlink(),
    lambda entry: (entry / "notes.json").write_text("{"),
], ids=["short", "long", "no pixels", "no notes", "cut notes"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    folder = photos(tmp_path / "in")
    images = load_images(str(folder), 16, None, str(tmp_path)).clone()
    entry = entries(tmp_path).pop()
    damage(entry)
    assert torch.equal(load_images(str(folder), 16, None, str(tmp_path)), images)
    assert entries(tmp_path) == {entry} and (entry / "pixels.u8").stat().st_size == images.numel()


def test_many_processes_may_decode_at_once(tmp_path):
    def sum_up(root: str = str(tmp_path)) -> int:
        return int(load_images(str(tmp_path / "in"), 16, None, root).long().sum())

    photos(tmp_path / "in", 300)
    codes = forked(*[lambda: sys.exit(sum_up() % 251)] * 6)
    assert set(codes) == {sum_up(str(tmp_path / "alone")) % 251}
    assert len(entries(tmp_path)) == 1


def test_wrong_arguments_are_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(photos(tmp_path / "faces").parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("d.zip").touch()
    for arguments, message in ((("digits", 0), "image_size must be a positive int"),
                               (("digits", 8, 2), "channels 1 or 3"),
                               (("d.zip", 8), "^no such dataset or folder: 'd.zip'; give digits, faces, .*JPEG"),
                               (("", 8), "^no such dataset or folder"), (("\0", 8), "^no such dataset or folder"),
                               (("stacked", 8, 1), "'stacked' is always in colour"),
                               (("faces", 8), r"'faces' is a dataset and also a folder here: give \./faces .* rename")):
        with pytest.raises(ValueError, match=message):
            load_images(*arguments)
    with pytest.raises(OSError, match="^cannot write .*(Not a directory|FileExistsError)"):
        load_images("./faces", 8, None, "d.zip")
    assert len(load_images("./faces", 8)) == len(load_images("~/faces", 8, None, "~/root")) == 6
    assert len(entries(tmp_path / "root")) == 1


def test_torchvision_sets(tmp_path, monkeypatch):
    """MNIST is padded to 32 x 32. Of CelebA's training pictures the central 108 x 108 are taken."""
    datasets, image = pytest.importorskip("torchvision.datasets"), Image.new("RGB", (178, 218), "black")
    image.paste(RED, (35, 55, 35 + 108, 55 + 108))
    (tmp_path / "celeba").mkdir()
    for name in "012":
        one(tmp_path / "celeba/img_align_celeba", f"{name}.jpg", image, quality=95)
    red, digits = np.full((5, 32, 32, 3), RED, np.uint8), torch.randint(256, (60, 28, 28), dtype=torch.uint8)
    for name, found in ("MNIST", digits), ("CIFAR10", red), ("CelebA", red):
        found = SimpleNamespace(data=found, filename=["0.jpg", "2.jpg"])
        monkeypatch.setattr(datasets, name, lambda root, download, found=found: found)
    assert torch.equal(load_images("mnist", 32, 3, str(tmp_path))[:, 1, 2:-2, 2:-2], digits)
    assert load_images("cifar10", 64, 1, str(tmp_path))[0, :, 5, 5].tolist() == [76]
    images = load_images("celeba", 32, None, str(tmp_path))
    assert images.shape == (2, 3, 32, 32) and images[:, 0].min() > 200

    def fail(root: str, download: bool):
        raise RuntimeError("the quota\nis used up" if download else "not there")
    monkeypatch.setattr(datasets, "MNIST", fail)
    with pytest.raises(OSError, match=r"^mnist failed.*the quota\\nis used up.*--data-root"):
        load_images("mnist", 32, None, str(tmp_path))


def test_stacked_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DRAWN_COUNT", 60)
    digits, images = (load_images(source, 32, None, str(tmp_path)) for source in ("digits", "stacked"))
    known = {digit.numpy().tobytes() for digit in digits}
    assert images.shape == (25_600, 3, 32, 32)
    assert all(channel.numpy().tobytes() in known for image in images[::500] for channel in image)


MEANS = {  # of 4 x 4 parts of a picture; if a drawing changes on purpose, raise CACHE_VERSION
    "digits": [0, 30, 47, 0, 1, 116, 120, 0, 1, 119, 104, 0, 0, 35, 20, 0],
    "faces": [139, 140, 145, 149, 132, 122, 127, 142, 126, 121, 129, 136, 130, 135, 144, 136],
    "fish": [159, 154, 151, 149, 130, 142, 136, 121, 105, 141, 133, 96, 69, 79, 69, 66]}


@pytest.mark.parametrize("source", MEANS)
def test_drawings_are_what_they_were_and_show_one_scene_at_every_size(tmp_path, monkeypatch, source):
    monkeypatch.setattr(common, "DRAWN_COUNT", 6)
    draw, channels = common.DRAWN[source]
    images = load_images(source, 32, None, str(tmp_path))
    (small, label), (large, same) = (draw(random.Random("0-5"), size) for size in (32, 128))
    assert images.shape == (6, channels, 32, 32) and label == same
    assert np.array_equal(np.asarray(small), images[5].permute(1, 2, 0).numpy().squeeze())
    assert np.abs(np.asarray(large.reduce(4), float) - np.asarray(small)).mean() < 8
    parts = np.asarray(small.convert("L").reduce(8)).ravel().tolist()
    assert parts == pytest.approx(MEANS[source], abs=2)  # another FreeType or libm may round otherwise


def test_normalise_and_reference_images():
    assert common.normalise(torch.tensor([[[[0]], [[51]], [[255]]]])).flatten().tolist() == pytest.approx([-1, -0.6, 1])
    images = torch.arange(1000)[:, None, None, None].expand(-1, 3, 2, 2)
    for source, count, want in ((images, 4, [0, 333, 666, 999]), (images, 1, [0]), (images, 5000, [*range(1000)]),
                                (images % 2, 4, [0, 1])):
        chosen = common.reference_images(source, count)[:, 0, 0, 0]
        assert ((chosen + 1) * 127.5).round().tolist() == want


@pytest.mark.parametrize("resident", [True, False])
def test_batches(resident):
    images = torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8)
    batches = common.Batches(images, 500, torch.device("cpu"), hflip=True, per_step=2, resident=resident)
    torch.manual_seed(3)
    batches.refill()
    first, second = batches(0), batches(1)
    assert first.shape == (500, 3, 4, 5) and first.is_contiguous(memory_format=torch.channels_last)
    known = [common.normalise(side[None]).contiguous() for image in images for side in (image, image.flip(2))]
    counts = [sum(torch.equal(image[None], side) for image in first.contiguous()) for side in known]
    assert min(counts) > 10 and sum(counts) == 500 and 200 < sum(counts[::2]) < 300  # half of them are flipped
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    batches.refill()
    assert torch.equal(batches(), first)  # drawn by the global generator
    batches.hflip = False
    assert torch.equal(batches(0), batches(0)) != resident


def test_augment_moves_pixels_as_the_textbook_does():
    """Two channels hold x and y, so the result says where each pixel came from: rotate, then shear, zoom and shift."""
    y, x = torch.meshgrid(*[(torch.arange(17) * 2 - 16) / 17] * 2, indexing="ij")
    place = torch.stack([x, y, torch.ones_like(x)]).view(3, 17, 17)[:, 6:11, 6:11].flatten(1)
    torch.manual_seed(0)
    ramps = torch.stack([x, y])[None].expand(2000, -1, -1, -1) / 2
    moved = 2 * common.augment(ramps, brightness=(1, 1), gain=0)[:, :, 6:11, 6:11].flatten(2)
    found = moved.double() @ torch.linalg.pinv(place.double())  # [2000, 2, 3]
    turn = torch.atan2(-found[:, 1, 0], found[:, 0, 0])
    size = 1 / found[:, :, 0].norm(dim=1)
    lean = torch.atan((found[:, 0, 0] * found[:, 0, 1] + found[:, 1, 0] * found[:, 1, 1]) * size**2)
    for values, low, high in ((turn.rad2deg(), -25, 25), (size, 0.95, 1.2), (lean.rad2deg(), -10, 10),
                              (found[:, 0, 2], -0.1, 0.1), (found[:, 1, 2], -0.2, 0.2)):
        near = 0.02 * (high - low)
        assert low - 1e-3 < values.min() < low + near and high - near < values.max() < high + 1e-3
    areas = torch.linalg.det(found[:, :, :2]) * size**2
    assert torch.allclose(areas, torch.ones_like(areas), atol=1e-3)  # neither mirrored nor stretched
    assert (torch.corrcoef(torch.stack([turn, size, lean, *found[:, :, 2].T])) - torch.eye(5)).abs().max() < 0.1


def test_augment_changes_light_and_mirrors_at_the_edges():
    still = dict(rotation=0, shift=(0, 0), shear=0, zoom=(1, 1), brightness=(1, 1), gain=0)
    dark = torch.full((2000, 3, 4, 4), -0.5)
    light = (common.augment(dark, **still | dict(brightness=(0.8, 1.4))) + 1) / 0.5
    assert 0.8 <= light.min() < 0.81 and 1.39 < light.max() <= 1.4 + 1e-5
    assert torch.allclose(light, light[:, :1, :1, :1].expand_as(light), atol=1e-5)
    gain = ((common.augment(dark, **still | dict(gain=0.4)) + 1) / 0.5)[:, :, 0, 0]
    assert 0.6 <= gain.min() < 0.62 and 1.38 < gain.max() <= 1.4
    assert (gain - 1).abs().lt(0.2).float().mean().item() == pytest.approx(0.75, abs=0.02)  # a triangle's
    assert (torch.corrcoef(gain.T) - torch.eye(3)).abs().max() < 0.1  # drawn apart for each channel
    shifted = common.augment(torch.linspace(0, 1, 16).expand(200, 1, 16, 16), **still | dict(shift=(0.5, 0)))
    assert shifted[:, 0, :, -1].min() > 0.4  # what was beyond the edge is mirrored, not black
