"""Datasets, folders of other people's pictures, the cache, batches, augmentation and the drawings of `common.py`."""

import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import common
import numpy as np
import PIL
import pytest
import torch
from common import load_images
from judge import load_labels
from PIL import Image, PngImagePlugin

RED, WHITE = (255, 0, 0), (255, 255, 255)


def load(folder: Path, size: int = 8, channels: int | None = None) -> torch.Tensor:
    """The pictures of a folder, decoded anew."""
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
    """Make a folder with one picture."""
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    return folder


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, colour: int = 0, bits: int = 8) -> bytes:
    """The bytes of a PNG with any header and pixel data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def kept(root: Path) -> set[Path]:
    """The files of the cache."""
    return set((root / "cache").iterdir())


# ---- kinds of pictures ----------------------------------------------------------------------------------------------


def deep(value: float, white: float, kind: type = np.float32) -> Image.Image:
    """A picture of one value with one pixel of another."""
    values = np.full((9, 9), value, kind)
    values[0, 0] = white
    return Image.fromarray(values)


PALETTE = Image.new("RGB", (9, 9), RED).quantize(2)
CLEAR_PALETTE = PALETTE.copy()
CLEAR_PALETTE.info["transparency"] = 0
COLOUR, CMYK = (10, 20, 30), Image.new("CMYK", (9, 9), (0, 255, 255, 0))
KINDS = {"a.JPEG": (Image.new("L", (9, 9), 77), (77,) * 3), "cmyk.jpg": (CMYK, RED), "a.TIFF": (CMYK, RED),
         "bits.png": (Image.new("1", (9, 9), 1), WHITE), "p.png": (PALETTE, RED), "clear.png": (CLEAR_PALETTE, WHITE),
         "rgba.png": (Image.new("RGBA", (9, 9), (255, 0, 0, 128)), (255, 127, 127)),
         "rgba.webp": (Image.new("RGBA", (9, 9), (9, 9, 9, 0)), WHITE),
         "la.png": (Image.new("LA", (9, 9), (0, 128)), (127,) * 3),
         "16.png": (deep(32768, 65535, np.uint16), (128,) * 3), "12.png": (deep(2048, 4095, np.uint16), (128,) * 3),
         "16black.png": (deep(0, 0, np.uint16), (0,) * 3), "32.tif": (deep(32768, 65535, np.int32), (128,) * 3),
         "negative.tif": (deep(-5, -5, np.int32), (0,) * 3), "float.tif": (deep(0.5, 1.0), (128,) * 3),
         "big.tif": (deep(1e6, 2e6), (128,) * 3), "signed.tif": (deep(-1, 1), (0,) * 3), "float.pfm": (
             deep(0.5, 1.0), (128,) * 3), "nan.tif": (deep(0.5, np.nan), WHITE), "inf.tif": (deep(0.5, np.inf), WHITE)}
KINDS |= {f"a.{suffix}": (Image.new("RGB", (9, 9), COLOUR), COLOUR) for suffix in "PNG bmp jp2 ppm avif".split()}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(tmp_path, name):
    if not name.lower().endswith(common.SUFFIXES):
        pytest.skip("this Pillow does not read it")
    image, expected = KINDS[name]
    folder = one(tmp_path / "in", name, image)
    images = load(folder)
    assert images.dtype == torch.uint8 and images.shape == (1, 1 if len(set(expected)) == 1 else 3, 8, 8)
    assert load(folder, channels=3)[0, :, 4, 4].tolist() == pytest.approx(expected, abs=3)
    grey = np.dot(expected, (0.299, 0.587, 0.114))
    assert load(folder, channels=1)[0, :, 4, 4].tolist() == pytest.approx([grey], abs=2)


def load_deep(tmp_path, **pictures) -> list[int]:
    """The middles of pictures of one folder, each given as for `deep`."""
    for name, values in pictures.items():
        one(tmp_path, f"{name}.tif", deep(*values))
    return load(tmp_path)[:, 0, 4, 4].tolist()


def test_grey_levels_of_a_folder_share_one_scale(tmp_path, capsys):
    """A maximum of 1.01 in one file and of 1 in another makes no difference between them, nor do 240 and 260."""
    levels = load_deep(tmp_path / "float", a=(0.5, 1.0), b=(0.5, 1.01), c=(0.505, 0.0), d=(0.505, np.nan))
    assert levels in ([126, 126, 128, 128], [126, 126, 127, 127])
    assert "grey levels above 8 bits: 0 to 1.01 scaled to 0 to 255" in capsys.readouterr().err
    assert load_deep(tmp_path / "signed", a=(0, 0.5), b=(0, -1), c=(0.5, 1)) == [128, 128, 191]
    assert ": -1 to 1 scaled to 0 to 255" in capsys.readouterr().err
    assert load_deep(tmp_path / "int", a=(120, 240, np.int32), b=(120, 260, np.int32)) == [118, 118]
    assert load_deep(tmp_path / "twelve", a=(100, 4095, np.uint16), b=(2048, 0, np.uint16)) == [6, 128]
    one(tmp_path / "twelve", "eight.png", noise(0))
    images = load(tmp_path / "twelve", channels=1)
    assert images[:2, 0, 4, 4].tolist() == [6, 128]
    assert torch.equal(images[2:], load(one(tmp_path / "eight", "eight.png", noise(0)), channels=1))  # unchanged


@pytest.mark.parametrize("colour, samples", [(2, 3), (4, 2), (6, 4)])
def test_flat_and_nearly_black_pictures_are_told(tmp_path, capsys, colour, samples):
    """12 bits in 16 of RGB, grey with alpha, or RGBA: Pillow keeps the high byte."""
    values = np.random.default_rng(0).integers(0, 4096, (9, 9, samples)).astype(">u2")
    if colour != 2:
        values[..., -1] = 65535
    folder = one(tmp_path / "in", "red.png", Image.new("RGB", (9, 9), RED))
    (folder / "a.png").write_bytes(png(9, 9, b"".join(b"\0" + row.tobytes() for row in values), colour, 16))
    for how in "decoded in 0 s", "from cache":
        load_images(str(one(folder, "b.png", noise(1)) if how[0] == "d" else folder), 8, None, str(tmp_path))
        assert f"3 pictures {how}, 0 skipped, 1 nearly constant, 1 nearly black" in capsys.readouterr().err


@pytest.mark.parametrize("name, mode", [("a.jpg", "RGB"), ("a.webp", "RGB"), ("a.png", "P"), ("a.gif", "P"),
                                        ("a.png", "RGBA"), ("a.tif", "CMYK"), ("a.png", "LA")])
def test_a_set_of_grey_pixels_has_one_channel(tmp_path, name, mode):
    grey = noise(0, (40, 40)).resize((64, 64))
    folder = one(tmp_path / "in", name, grey.quantize(64) if mode == "P" else grey.convert("RGB").convert(mode))
    noise(1, (9, 9)).save(folder / "b.png")
    images = load(folder)
    assert images.shape == (2, 1, 8, 8) and (images.int() - load(folder, channels=1).int()).abs().max() <= 2
    Image.merge("RGB", (grey, grey, grey.point(lambda value: value // 2))).save(folder / "c.png")
    assert load(folder).shape == (3, 3, 8, 8)


# ---- metadata -------------------------------------------------------------------------------------------------------


def red_corner() -> Image.Image:
    image = Image.new("RGB", (32, 32), "black")
    image.paste(RED, (0, 0, 16, 16))
    return image


def corners(folder: Path) -> list[int]:
    """Which corners are red, in reading order."""
    return [int(load(folder)[0, 0, y, x] > 128) for y in (1, 6) for x in (1, 6)]


@pytest.mark.parametrize("orientation, corner", [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 1), (7, 3), (8, 2)])
def test_pictures_are_turned(tmp_path, orientation, corner):
    for suffix in "jpg", "png", "webp", "tif":
        exif = Image.Exif()
        exif[0x0112] = orientation
        folder = one(tmp_path / suffix, f"a.{suffix}", red_corner(), exif=exif)
        assert corners(folder) == [i == corner for i in range(4)]


@pytest.mark.parametrize("entry", [
    (0x829A, 5, 1, 0), (0x829A, 12, 1, 0), (0x0103, 5, 1, 26), (0x010F, 2, 2**30, 9), (0x8769, 4, 1, 2**31),
    (0x9C9B, 77, 3, 4)], ids=["1/0", "double", "compression", "long text", "far IFD", "unknown type"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_odd_tags_do_not_matter(tmp_path, entry, suffix):
    """EXIF with the orientation 6 and one odd entry (tag, type, count, value or offset)."""
    entries = sorted([(0x0112, 3, 1, 6), entry])
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(struct.pack("<HHII", *item) for item in entries)
    exif += struct.pack("<IiI", 0, -1, 0) + struct.pack("<d", float("nan"))
    assert corners(one(tmp_path / "in", f"a.{suffix}", red_corner(), exif=exif)) == [0, 1, 0, 0]


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    for exif in b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no TIFF header":
        for suffix in "jpg", "png", "webp":
            assert corners(one(tmp_path / suffix, f"a.{suffix}", red_corner(), exif=exif)) == [1, 0, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 77
    assert corners(one(tmp_path / "odd", "a.jpg", red_corner(), exif=exif)) == [1, 0, 0, 0]


def test_much_text_in_a_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("plain", "x" * 3_000_000)
    info.add_text("packed", "x" * 3_000_000, zip=True)
    for i in range(24):
        info.add_itxt(f"many{i}", "x" * 3_000_000, zip=True)
    folder = one(tmp_path / "in", "a.png", red_corner(), pnginfo=info)
    red_corner().save(folder / "b.png", icc_profile=bytes(3_000_000))
    images = load(folder)
    assert len(images) == 2 and torch.equal(images[0], images[1])


def profile(space: bytes, gamma: float, **colours: tuple) -> bytes:
    """An ICC profile: a gamma and, for RGB, the primaries in XYZ."""
    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def point(values: tuple) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv" + struct.pack(">IIH2x", 0, 1, round(gamma * 256))
    names = [b"kTRC"] if space == b"GRAY" else [b"rTRC", b"gTRC", b"bTRC"]
    tags = {b"wtpt": point((0.9642, 1, 0.8249))} | {name: curve for name in names}
    tags |= {name.encode(): point(values) for name, values in colours.items()}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(body), b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    return head + bytes(128 - len(head) - 60) + number(0.9642) + number(1) + number(0.8249) + bytes(48) + table + body


P3 = dict(rXYZ=(0.5151, 0.2412, -0.0011), gXYZ=(0.2920, 0.6922, 0.0419), bXYZ=(0.1571, 0.0666, 0.7841))
SRGB = dict(rXYZ=(0.4361, 0.2225, 0.0139), gXYZ=(0.3851, 0.7169, 0.0971), bXYZ=(0.1431, 0.0606, 0.7141))
PLAIN = Image.new("RGB", (32, 32), (190, 120, 60))


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.png", "P"), ("a.png", "RGBA"), ("a.tif", "RGB")])
def test_colour_profiles(tmp_path, name, mode):
    """A wide gamut, and linear light in the colours of sRGB: a matrix, then the curve of sRGB."""
    image = PLAIN.quantize(2) if mode == "P" else PLAIN.convert(mode)
    for gamma, primaries in ((1.8, P3), (1.0, SRGB)):
        linear = (np.array([190, 120, 60]) / 255) ** gamma @ np.array(list(primaries.values()))
        linear = (linear @ np.linalg.inv(np.array(list(SRGB.values())))).clip(0.01, 1)
        folder = one(tmp_path / "in", name, image, icc_profile=profile(b"RGB ", gamma, **primaries))
        want = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
        assert load(folder)[0, :, 4, 4].tolist() == pytest.approx(want, abs=3) != [190, 120, 60]


def test_profiles_of_grey_of_alpha_and_of_no_use(tmp_path, monkeypatch):
    linear, wide = profile(b"GRAY", 1.0), profile(b"RGB ", 1.8, **P3)
    for name, image in (("a", Image.new("L", (9, 9), 55)), ("b", Image.new("LA", (9, 9), (55, 255))),
                        ("c", Image.fromarray(np.full((9, 9), 55 * 257, np.uint16)))):
        folder = one(tmp_path / name, "a.png", image, icc_profile=linear)
        deep(65535, 0, np.uint16).save(folder / "z.png")
        images = load(folder)
        assert images.shape[1] == 1 and images[0, 0, 4, 4].item() == pytest.approx(128, abs=2)
    clear = Image.new("RGBA", (9, 9), (190, 120, 60, 0))
    assert load(one(tmp_path / "clear", "a.png", clear, icc_profile=wide)).min() == 255
    for name, useless in ("grey", linear), ("damaged", wide[:200]), ("none", b"x"), ("no ImageCms", wide):
        if name == "no ImageCms":
            monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
            monkeypatch.delattr(PIL, "ImageCms", raising=False)
        assert load(one(tmp_path / name, "a.png", PLAIN, icc_profile=useless))[0, :, 4, 4].tolist() == [190, 120, 60]


# ---- sizes and bad files --------------------------------------------------------------------------------------------


def test_crops_slivers_and_first_frames(tmp_path):
    """Of a long picture the middle remains, and lines finer than a pixel become grey."""
    values = np.zeros((64, 192), np.uint8)
    values[:, 64:128:2], values[:, 128:] = 255, 255  # black, then fine lines, then white
    for turned in False, True:
        image = load(one(tmp_path / "in", "a.png", Image.fromarray(values.T if turned else values)))[0, 0].float()
        assert ((image[2:-2] if turned else image[:, 2:-2]) - 127.5).abs().max() < 3
    for i, size in enumerate([(1, 1), (1, 500), (500, 1), (3, 2)]):
        one(tmp_path / "red", f"{i}.png", Image.new("RGB", size, RED))
    one(tmp_path / "red", "a.gif", Image.new("RGB", (9, 9), RED), save_all=True, append_images=[noise(0)])
    images = load(tmp_path / "red", 16)
    assert len(images) == 5 and (images[:, 0] == 255).all() and (images[:, 1:] == 0).all()


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, monkeypatch):
    large = noise(0, (70, 70, 3)).resize((512, 512), Image.Resampling.BICUBIC)
    folder = one(tmp_path / "in", "a.jpg", large, quality=95)
    with Image.open(folder / "a.jpg") as full:
        full = np.asarray(full.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    monkeypatch.setattr(common, "MAX_PIXELS", 128 * 128)  # so it must be decoded at a quarter of its size
    assert np.abs(load(folder, 64)[0].permute(1, 2, 0).numpy() - full).mean() < 3
    with pytest.raises(ValueError, match="no usable picture"):
        load(one(tmp_path / "png", "a.png", large), 64)
    assert Image.MAX_IMAGE_PIXELS * 2 > 16320 * 12240  # the largest picture of a telephone


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory in /proc")
def test_bombs_take_little_memory(tmp_path):
    folder = photos(tmp_path / "in", 1)
    for i in range(4):
        (folder / f"bomb{i}.png").write_bytes(png(30_000, 30_000, bytes(9_000_000)))
        (folder / f"big{i}.png").write_bytes(png(13_000, 13_000, bytes(9_000_000)))
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    peaks = []
    for _ in range(2):
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]))
        assert len(load(folder)) == 1
    assert peaks[1] - peaks[0] < 100_000


def add_bad_files(folder: Path) -> int:
    """Add bad files of every kind, and links between folders that are no fault."""
    whole = (folder / "0.png").read_bytes()
    Image.open(folder / "0.png").save(folder / "whole.jpg")
    for i in range(5):
        (folder / f"cut{i}.png").write_bytes(whole[:20 + 120 * i])
        (folder / f"cut{i}.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:20 + 120 * i])
    (folder / "whole.jpg").unlink()
    for i, suffix in enumerate((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")):
        (folder / f"text{i}{suffix}").write_text("no picture\n" * 99)
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, bytes(1_000_000)))
    (folder / "big.png").write_bytes(png(12_000, 12_000, bytes(1_000_000)))
    (folder / "broken.png").write_bytes(whole[:40] + b"\0\0\0\0" + whole[44:])
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.jpg")).write_bytes(b"\xff\xd8\xff")
    (folder / ("-\N{FISH}" + "x" * 200 + ".tif")).write_bytes(b"II*\0\xff\xff\xff\xff")
    (folder / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (folder / "around").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(folder.parent / folder.name / "sub")
    return 27


@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes and odd names")
def test_bad_files(tmp_path, capsys):
    good, mixed = photos(tmp_path / "good", 20), photos(tmp_path / "mixed", 20)
    for folder in (good, mixed):
        (folder / "dir.jpg").mkdir()
        for name in ("dir.jpg/\N{FISH}.png", "-dash.png", "a\nb.png", os.fsdecode(b"\xff.png"), "y" * 240 + ".png"):
            shutil.copy(folder / "0.png", folder / name)
    bad, expected, start = add_bad_files(mixed), load(good, 16), time.monotonic()
    for name in ("a.HEIC", "b.heic", "sub/c.heic", "README", "d.json", "e.eps", "f.tga", "g.h\n\N{FISH}"):
        (mixed / name).write_text("")
    capsys.readouterr()
    images = load_images(str(mixed), 16, None, str(tmp_path / "b"))
    assert time.monotonic() - start < 5  # the bomb and the pipe hold nothing up
    assert len(images) == 25 and torch.equal(images, expected)
    told = capsys.readouterr().err
    assert "Traceback" not in told and str(mixed) not in told and told.count("\n") == 12
    assert told.count("skipped '") == 10 and f"and {bad - 10} more, listed in" in told
    remark = r", 8 files not read \(3 \.heic(, 1 (unnamed|\.json|\.eps|\.tga|\.h\\n\\U000)){4}\)"
    assert re.search(f"mixed: 25 pictures decoded in 0 s, {bad} skipped{remark}\n", told)
    reasons = dict(json.loads(next((tmp_path / "b/cache").glob("*.json")).read_text())["skipped"])
    assert "exceeds limit" in reasons["bomb.png"] and "too many" in reasons["big.png"]
    assert "broken link" in reasons["pipe.png"] and "cannot identify image" in reasons["postscript.jpg"]
    assert len(reasons) == bad and list(reasons) == sorted(reasons)  # in the order of the paths, as the pictures are
    assert torch.equal(load_images(str(mixed), 16, None, str(tmp_path / "b"), quiet=False), expected)
    assert re.fullmatch(f"mixed: 25 pictures from cache, {bad} skipped{remark}\n", capsys.readouterr().err)
    for root in "b", "c":
        load_images(str(mixed), 16, None, str(tmp_path / root), quiet=True)
    assert capsys.readouterr() == ("", "")


def test_hidden_and_system_files_are_left_out(tmp_path, capsys):
    folder = photos(tmp_path / "in")
    names = (".ipynb_checkpoints", ".Trash-1000/files", "@eaDir/0.png", "__MACOSX", "$Recycle.Bin/S-1-5", "lost+found",
             "System Volume Information", "sub/.thumbnails/normal", "env/lib/site-packages/matplotlib")
    for name in names:
        (folder / name).mkdir(parents=True)
        shutil.copy(folder / "0.png", folder / name / "x.png")
    for name in (".hidden.png", "._0.png", "sub/.DS_Store"):
        shutil.copy(folder / "0.png", folder / name)
    assert len(load(folder)) == 6 and "0 skipped, left out: 12 hidden or system\n" in capsys.readouterr().err
    (tmp_path / ".mine").mkdir()
    assert len(load(photos(tmp_path / ".mine/in"))) == 6  # a hidden folder that is asked for is read


def test_a_run_does_not_train_on_its_own_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photos(tmp_path / "in"))
    before = load_images(".", 8).clone()
    for run, files in {"runs/began-001": ("checkpoint.pt", "curves.png", "samples/000100.png", "sample-001/00000.png"),
                       "sub/killed-early": ("samples/real.png", "samples/000100.png"),
                       "data/celeba": ("1.png",)}.items():
        for name in files:
            Path(run, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy("0.png", Path(run, name))
    capsys.readouterr()
    assert torch.equal(load_images(".", 8), before)
    told = capsys.readouterr().err
    assert "6 pictures from cache, 0 skipped, left out: " in told and "2 run" in told and "1 data root" in told
    assert len(load_images("runs/began-001/sample-001", 8)) == len(load_images("data/celeba", 8)) == 1  # as asked for
    with pytest.raises(ValueError, match="killed-early' holds a run"):
        load_images("sub/killed-early", 8)


@pytest.mark.parametrize("stream", [None, "closed", "ascii", []])
def test_messages_need_no_stderr(tmp_path, monkeypatch, stream):
    """It may be missing, closed, an object that can only write, or unable to encode a name."""
    folder, log = photos(tmp_path / "\u4e2d\u6587"), open(tmp_path / "log", "w", encoding="ascii")
    if stream == "closed":
        log.close()
    writer = SimpleNamespace(write=stream.append) if stream == [] else stream and log
    monkeypatch.setattr(sys, "stderr", writer)
    assert len(load(folder)) == 6
    if stream in ("ascii", []):
        told = (tmp_path / "log").read_text() if stream else "".join(stream)
        assert told.startswith(r"\u4e2d\u6587: 6 pictures decoded")


def test_progress_is_one_line_on_a_terminal(tmp_path, monkeypatch, capsys):
    folder = photos(tmp_path / "in", 300)
    load(folder)
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(folder)
    told = capsys.readouterr().err
    assert "in: looked at 256 of 300 \r" in told and "in: decoded 256 of 300 \r" in told and told.count("\n") == 1


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_cache_is_reused_and_kept_out_of_the_folder(tmp_path, monkeypatch, capsys):
    folder, root = photos(tmp_path / "in"), tmp_path / "root"
    before = sorted(tmp_path.glob("in/**/*"))
    images = load_images(str(folder), 16, None, str(root)).clone()
    assert sorted(path.suffix for path in kept(root)) == [".json", ".u8"]
    monkeypatch.setattr(common, "to_array", None)  # nothing is decoded
    assert torch.equal(load_images(str(folder), 16, 0, str(root)), images)
    assert sorted(tmp_path.glob("in/**/*")) == before
    assert "6 pictures from cache, 0 skipped" in capsys.readouterr().err
    for size, channels, version in (16, 1, 98), (8, None, 98), (16, None, 99):
        monkeypatch.setattr(common, "CACHE_VERSION", version)
        with pytest.raises(ValueError, match="no usable picture.*6 skipped"):  # because to_array is needed
            load_images(str(folder), size, channels, str(root), quiet=True)


@pytest.mark.skipif(sys.platform != "linux", reason="makes a sparse file of twice the memory")
def test_a_cache_larger_than_memory_opens_and_is_never_written(tmp_path):
    load_images(str(photos(tmp_path / "in")), 256, None, str(tmp_path))
    file = next((tmp_path / "cache").glob("*.u8"))
    count = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 256 * 256)
    os.truncate(file, count * 3 * 256 * 256)
    notes = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps(notes | {"count": count}))
    images = load_images(str(tmp_path / "in"), 256, None, str(tmp_path))
    assert len(images) == count and images[[0, -1]].shape == (2, 3, 256, 256)
    images[-1] = 7
    assert images[-1].min() == 7 and load_images(str(tmp_path / "in"), 256, None, str(tmp_path))[-1].max() == 0


def grow(path: Path) -> None:
    """A new length at the old time."""
    time_was = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(0, time_was))


@pytest.mark.parametrize("change, count", [
    (lambda folder: shutil.copy(folder / "0.png", folder / "sub" / "new.png"), 7),
    (lambda folder: (folder / "2.png").unlink(), 5),
    (lambda folder: (folder / "2.png").rename(folder / "zz.png"), 6),
    (lambda folder: os.utime(folder / "2.png", ns=(0, 1)), 6),
    (lambda folder: grow(folder / "2.png"), 6),
], ids=["added", "removed", "renamed", "touched", "grown"])
def test_a_changed_folder_is_noticed(tmp_path, change, count):
    """The stale cache goes after an hour, because another process may still be reading it."""
    folder = photos(tmp_path / "in")
    load_images(str(folder), 16, None, str(tmp_path))
    old = kept(tmp_path)
    (tmp_path / "cache/killed.1-1.tmp").touch()
    change(folder)
    assert torch.equal(load_images(str(folder), 16, None, str(tmp_path)), load(folder, 16))
    new = kept(tmp_path) - old
    assert len(new) == 3 and old < kept(tmp_path)
    for path in kept(tmp_path):
        os.utime(path, (0, time.time() - 3601))
    shutil.copy(folder / "0.png", folder / "another.png")
    assert len(load_images(str(folder), 16, None, str(tmp_path))) == count + 1
    assert len(kept(tmp_path)) == 2 and not (old | new) & kept(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda u8, notes: u8.write_bytes(u8.read_bytes()[:-1]),
    lambda u8, notes: u8.write_bytes(u8.read_bytes() + b"0"),
    lambda u8, notes: u8.unlink(),
    lambda u8, notes: notes.unlink(),
    lambda u8, notes: notes.write_text("{"),
    lambda u8, notes: notes.write_text("[]"),
], ids=["short", "long", "no data", "no notes", "cut notes", "wrong notes"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    folder = photos(tmp_path / "in")
    images = load_images(str(folder), 16, None, str(tmp_path)).clone()
    damage(*(next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("u8", "json")))
    assert torch.equal(load_images(str(folder), 16, None, str(tmp_path)), images)
    assert [path.stat().st_size for path in (tmp_path / "cache").glob("*.u8")] == [images.numel()]


def test_a_build_that_was_killed_is_no_cache(tmp_path, monkeypatch):
    folder, whole, calls = photos(tmp_path / "in", 300), common.to_array, []  # more than one portion

    def to_array(*arguments):
        calls.append(1)
        if len(calls) == 280:
            os._exit(9)
        return whole(*arguments)

    monkeypatch.setattr(common, "to_array", to_array)
    arguments = str(folder), 8, None, str(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=load_images, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9 and len(kept(tmp_path)) == 1
    monkeypatch.setattr(common, "to_array", whole)
    assert len(load_images(*arguments)) == 300


def load_sum(folder: str, root: str) -> int:
    return int(load_images(folder, 16, None, root).long().sum())


def test_many_processes_may_decode_at_once(tmp_path):
    folder = photos(tmp_path / "in", 300)
    with multiprocessing.get_context("fork").Pool(6) as pool:
        sums = pool.starmap(load_sum, [(str(folder), str(tmp_path))] * 12, chunksize=1)
    assert set(sums) == {int(load(folder, 16).long().sum())} and len(kept(tmp_path)) == 2


# ---- sources --------------------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path):
    for arguments in ("digits", 0), ("digits", 8.0), ("digits", -8), ("digits", 8, 2):
        with pytest.raises(ValueError, match="image_size must be a positive int.*channels 1 or 3"):
            load_images(*arguments, root=str(tmp_path))
    for source in "no\nsuch", "", "\0":
        with pytest.raises(ValueError, match=r"digits, faces, fish, stacked.*celeba or .*JPEG") as error:
            load_images(source, 8, None, str(tmp_path))
        assert "\n" not in str(error.value)
    (tmp_path / "d.zip").touch()
    with pytest.raises(ValueError, match="d.zip' is a file: give a folder"):
        load_images(str(tmp_path / "d.zip"), 8, None, str(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_text("text")
    (tmp_path / "in/a.HEIC").write_text("")
    with pytest.raises(ValueError, match=r"no usable picture in .*1 skipped, 1 files not read \(1 .heic\).*JPEG"):
        load_images(str(tmp_path / "in"), 8, None, str(tmp_path))
    assert not kept(tmp_path)
    with pytest.raises(OSError, match="Not a directory|FileExistsError") as error:
        load_images(str(photos(tmp_path / "good")), 8, None, str(tmp_path / "d.zip"))
    assert "\n" not in str(error.value)


def test_a_folder_with_the_name_of_a_dataset_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    photos(tmp_path / "faces")
    with pytest.raises(ValueError, match=r"'faces' is a dataset and also a folder here: give \./faces .* or rename"):
        load_images("faces", 8)
    assert len(load_images("./faces", 8)) == len(load_images("~/faces", 8, None, "~/root")) == 6
    assert len(kept(tmp_path / "root")) == 2


@pytest.mark.skipif("GAN_TEST_DATA" not in os.environ, reason="GAN_TEST_DATA is not set to a folder with MNIST/raw")
def test_mnist():
    root = os.environ["GAN_TEST_DATA"]
    images, labels = load_images("mnist", 32, None, root), load_labels("mnist", root)
    assert images.shape[1:] == (1, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert len(images) == len(labels) >= 5000 and set(labels.tolist()) == set(range(10))
    from torchvision.datasets import MNIST
    assert torch.equal(images[:, 0, 2:-2, 2:-2], MNIST(root).data)  # padded, not resized
    assert images[:, 0].long().sum() == MNIST(root).data.long().sum()
    assert torch.equal(load_images("mnist", 32, 3, root)[:, 1:2], images)


def pretend(monkeypatch, name: str, make) -> None:
    import torchvision.datasets
    monkeypatch.setattr(torchvision.datasets, name, make)


def test_other_torchvision_sets(tmp_path, monkeypatch):
    """Of CelebA, the training pictures alone, and of them the central 108 x 108."""
    folder, image = tmp_path / "celeba/img_align_celeba", Image.new("RGB", (178, 218), "black")
    folder.mkdir(parents=True)
    image.paste(RED, (35, 55, 35 + 108, 55 + 108))
    for i in range(3):
        image.save(folder / f"{i}.jpg", quality=95)
    red = np.full((5, 32, 32, 3), RED, np.uint8)
    found = SimpleNamespace(data=red, targets=[3, 1, 4, 1, 5], filename=["0.jpg", "2.jpg"])
    pretend(monkeypatch, "CIFAR10", lambda root, download: found)
    pretend(monkeypatch, "CelebA", lambda root, download: found)
    assert load_images("cifar10", 64, None, str(tmp_path)).shape == (5, 3, 64, 64)
    assert load_images("cifar10", 16, 1, str(tmp_path))[0, :, 5, 5].tolist() == [76]
    assert load_labels("cifar10", str(tmp_path)).tolist() == found.targets
    images = load_images("celeba", 32, None, str(tmp_path))
    assert images.shape == (2, 3, 32, 32) and images[:, 0].min() > 200

    def fail(root: str, download: bool):
        raise RuntimeError("quota\nof 'the day' is used up" + "!" * 999 if download else "not there")
    for source, name in common.TORCHVISION.items():
        pretend(monkeypatch, name, fail)
        with pytest.raises(OSError, match=f"^{source} failed.*'the day' is used up.*--data-root") as error:
            load_images(source, 32, None, str(tmp_path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("source", ["stacked", "stacked-mnist"])
def test_stacked_digits(tmp_path, monkeypatch, source):
    found = SimpleNamespace(data=torch.randint(256, (60, 28, 28), dtype=torch.uint8), targets=torch.arange(60) % 10)
    pretend(monkeypatch, "MNIST", lambda root, download: found)
    monkeypatch.setattr(common, "DRAWN_COUNT", 60)
    digits = load_images(common.STACKED[source], 32, 1, str(tmp_path))[:, 0]
    classes = load_labels(common.STACKED[source], str(tmp_path))
    images, labels = load_images(source, 32, None, str(tmp_path)), load_labels(source, str(tmp_path))
    assert images.shape == (25_600, 3, 32, 32) and images.dtype == torch.uint8
    number = {digit.numpy().tobytes(): label.item() for digit, label in zip(digits, classes)}
    for image, label in zip(images[::500], labels[::500].tolist()):
        assert [number[channel.numpy().tobytes()] for channel in image] == [label // 100, label // 10 % 10, label % 10]
    assert labels.unique().numel() == len(classes.unique()) ** 3
    with pytest.raises(ValueError, match=f"{source}' has 3 channels"):
        load_images(source, 32, 1, str(tmp_path))


# ---- drawings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, channels", [("digits", 1), ("faces", 3), ("fish", 3)])
def test_drawn_sets(tmp_path, monkeypatch, source, channels):
    assert common.DRAWN_COUNT == 6_000
    monkeypatch.setattr(common, "DRAWN_COUNT", 300)
    images, labels = load_images(source, 32, None, str(tmp_path)), load_labels(source, str(tmp_path))
    assert images.shape == (300, channels, 32, 32) and labels.shape == (300,) and labels.dtype == torch.int64
    assert len({image.numpy().tobytes() for image in images}) == 300
    counts = Counter(labels.tolist())
    assert len(counts) == (10 if source == "digits" else 8) and min(counts.values()) > 300 / len(counts) / 2
    image, label = common.DRAWN[source][0](random.Random("0-7"), 32)
    assert np.array_equal(np.asarray(image), images[7].permute(1, 2, 0).numpy().squeeze()) and labels[7] == label
    assert load_images(source, 32, 4 - channels, str(tmp_path)).shape == (300, 4 - channels, 32, 32)
    monkeypatch.setattr(common, "DRAWING_VERSION", 99)
    monkeypatch.setattr(common, "DRAWN", {source: (lambda rng, size: (Image.new("L", (size, size)), 0), 1)})
    assert load_images(source, 32, 1, str(tmp_path)).max() == 0  # drawn anew
    spread = images.float().std(0)  # no part of a scene is constant (of digits: no part of the middle)
    assert (spread[:, 10:22, 12:20] if source == "digits" else spread).min() > 8


MEANS = {  # of 4 x 4 parts of two pictures; if a drawing changes on purpose, raise DRAWING_VERSION
    "digits": [0, 44, 20, 0, 0, 105, 37, 0, 0, 45, 75, 0, 0, 24, 37, 0,
              0, 30, 47, 0, 1, 116, 120, 0, 1, 119, 104, 0, 0, 35, 20, 0],
    "faces": [153, 108, 118, 173, 131, 128, 155, 149, 150, 155, 154, 160, 126, 125, 121, 140,
             139, 140, 145, 149, 132, 122, 127, 142, 126, 121, 129, 136, 130, 135, 144, 136],
    "fish": [118, 133, 144, 149, 130, 129, 123, 124, 113, 142, 137, 93, 56, 97, 65, 75,
            159, 154, 151, 149, 130, 142, 136, 121, 105, 141, 133, 96, 69, 79, 69, 66],
}


@pytest.mark.parametrize("source", common.DRAWN)
def test_drawings_are_what_they_were_and_show_one_scene_at_every_size(source):
    draw, parts = common.DRAWN[source][0], []
    for seed in "0-0", "0-5":
        small, large = draw(random.Random(seed), 32)[0], draw(random.Random(seed), 128)[0]
        parts += np.asarray(small.convert("L").reduce(8)).ravel().tolist()
        assert np.abs(np.asarray(large.reduce(4), float) - np.asarray(small)).mean() < 8
    assert parts == pytest.approx(MEANS[source], abs=2)  # another FreeType or libm may round otherwise


# ---- batches --------------------------------------------------------------------------------------------------------


def test_normalise_and_reference_images():
    assert common.normalise(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)).flatten().tolist() == (
        pytest.approx([-1, -0.6, 1]))
    images = torch.arange(1000)[:, None, None, None].expand(-1, 3, 2, 2)

    def chosen(images: torch.Tensor, count: int) -> list[int]:
        found = common.reference_images(images, count)
        assert found.dtype == torch.float32 and found.shape[1:] == (3, 2, 2)
        return ((found[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()

    assert chosen(images, 4) == [0, 333, 666, 999] and chosen(images, 1) == [0] and chosen(images, 2) == [0, 999]
    for count in (999, 1000, 1001, 5000):
        assert len(set(chosen(images, count))) == min(count, 1000)
    assert chosen(images[:3], 256) == [0, 1, 2] and chosen(images % 2, 4) == [0, 1]
    assert len(chosen(images[:1].expand(9, -1, -1, -1), 4)) == 1


@pytest.mark.parametrize("resident", [True, False])
def test_batches(resident):
    images, cpu = torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8), torch.device("cpu")
    batches = common.Batches(images, 500, cpu, per_step=2, resident=resident)
    batches.refill()
    first, second = batches(0), batches(1)
    assert first.shape == (500, 3, 4, 5) and first.is_contiguous(memory_format=torch.channels_last)
    known = {common.normalise(image[None]).flatten().numpy().tobytes() for image in images}
    assert {image.flatten().numpy().tobytes() for image in first.contiguous()} == known  # with replacement, all of them
    assert not torch.equal(first, second) and torch.equal(batches(0), first) != resident
    batches.refill()
    assert not torch.equal(batches(0), first)
    torch.manual_seed(3)
    batches.refill()
    again = batches()
    torch.manual_seed(3)
    batches.refill()
    assert torch.equal(batches(), again)  # drawn by the global generator


def test_half_of_a_batch_is_flipped():
    image = torch.arange(4, dtype=torch.uint8).expand(1, 1, 4, 4)
    batch = common.Batches(image, 2000, torch.device("cpu"), hflip=True)()
    turned = (batch[:, 0, 0, 0] > batch[:, 0, 0, 3])
    assert 900 < turned.sum() < 1100 and torch.equal(batch[turned][:1], common.normalise(image).flip(3))


# ---- augment --------------------------------------------------------------------------------------------------------

NONE = dict(rotation=0, shift=(0, 0), shear=0, zoom=(1, 1), brightness=(1, 1), gain=0)
SIZE, COUNT = 17, 2000


def ramps(count: int = COUNT) -> torch.Tensor:
    """Two channels that hold x and y, from -0.5 to 0.5: so a picture says where each of its pixels came from."""
    y, x = torch.meshgrid(*[(torch.arange(SIZE) * 2 + 1 - SIZE) / SIZE] * 2, indexing="ij")
    return torch.stack([x, y])[None].expand(count, -1, -1, -1) / 2


def maps(**ranges) -> torch.Tensor:
    """The [COUNT, 2, 3] maps of the result's places to the picture's, as the pixels near the middle show them."""
    torch.manual_seed(0)
    near = slice(SIZE // 2 - 2, SIZE // 2 + 3)
    there = 2 * common.augment(ramps(), **NONE | ranges)[:, :, near, near].flatten(2)
    x, y = 2 * ramps(1)[0, :, near, near].flatten(1)
    return (torch.linalg.pinv(torch.stack([x, y, torch.ones_like(x)], dim=1)) @ there.mT).mT


def fills(values: torch.Tensor, low: float, high: float) -> bool:
    """Whether the values lie between the two, and come close to both."""
    near = 0.01 * (high - low)
    return low - 1e-4 <= values.min() < low + near and high - near < values.max() <= high + 1e-4


def test_augment_keeps_its_geometric_ranges():
    m = maps(rotation=25)
    turn = torch.atan2(m[:, 0, 1], m[:, 0, 0])
    want = torch.stack([turn.cos(), turn.sin(), turn * 0, -turn.sin(), turn.cos(), turn * 0], dim=1).view(-1, 2, 3)
    assert fills(turn.rad2deg(), -25, 25) and torch.allclose(m, want, atol=1e-4)
    m = maps(shift=(0.05, 0.1))  # of a frame 2 wide and 2 high
    assert fills(m[:, 0, 2], -0.1, 0.1) and fills(m[:, 1, 2], -0.2, 0.2)
    assert torch.allclose(m[:, :, :2], torch.eye(2).expand(COUNT, 2, 2), atol=1e-4)
    assert abs(torch.corrcoef(m[:, :, 2].T)[0, 1]) < 0.1  # drawn apart
    m = maps(shear=10)
    assert fills(m[:, 0, 1].atan().rad2deg(), -10, 10)
    m[:, 0, 1] = 0
    assert torch.allclose(m, torch.eye(2, 3).expand(COUNT, 2, 3), atol=1e-4)
    m = maps(zoom=(0.95, 1.2))
    assert fills(1 / m[:, 0, 0], 0.95, 1.2) and torch.allclose(m[:, 0, 0], m[:, 1, 1], atol=1e-4)
    assert m[:, [0, 1, 0, 1], [1, 0, 2, 2]].abs().max() < 1e-4
    edge = common.augment(ramps(200)[:, :1] + 0.5, **NONE | dict(shift=(0.5, 0)))[:, 0, SIZE // 2, -1]
    assert edge.min() > 0.4  # what was beyond the edge is mirrored, not black


def test_augment_keeps_its_ranges_of_light():
    dark = torch.full((COUNT, 3, 4, 4), -0.5)
    light = (common.augment(dark, **NONE | dict(brightness=(0.8, 1.4))) + 1) / 0.5
    assert fills(light, 0.8, 1.4) and torch.allclose(light, light[:, :1, :1, :1].expand_as(light), atol=1e-5)
    gain = (common.augment(dark, **NONE | dict(gain=0.4)) + 1) / 0.5
    assert torch.allclose(gain, gain[:, :, :1, :1].expand_as(gain), atol=1e-5)  # the same all over a channel
    gain = gain[:, :, 0, 0]
    assert 0.6 <= gain.min() < 0.62 and 1.38 < gain.max() <= 1.4
    assert (gain - 1).abs().lt(0.2).float().mean().item() == pytest.approx(0.75, abs=0.02)  # a triangle's
    assert (torch.corrcoef(gain.T) - torch.eye(3)).abs().max() < 0.1  # and drawn apart for each channel


def test_augment_changes_each_image_by_itself():
    images = (torch.rand(6, 3, 16, 16) * 2 - 1).to(memory_format=torch.channels_last)
    assert torch.allclose(common.augment(images, **NONE), images, atol=1e-5)
    results = []
    for batch in (images, torch.cat([images[:1], images[1:].flip(0)])):
        torch.manual_seed(3)
        results.append(common.augment(batch))
    before, after = results
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert before.shape == images.shape and before.is_contiguous(memory_format=torch.channels_last)
    same = common.augment(images[:1].expand(6, -1, -1, -1))
    assert all(not torch.allclose(same[i], same[j], atol=1e-2) for i in range(6) for j in range(i))
    assert common.augment(torch.ones(64, 1, 8, 8)).max() == 1  # light and tint overflow here
