"""Tests of the data loading: every kind of picture, bad files, the cache, the torchvision and the drawn sets."""

import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import load_images
from judge import load_labels

ROOT = Path(common.__file__).parent
RED, WHITE = (255, 0, 0), (255, 255, 255)


def python(code: str, **options) -> subprocess.CompletedProcess:
    """Runs Python code beside common.py in its own process."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                          capture_output=True, **options)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
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


def test_a_killed_write_leaves_the_file_and_is_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("old")
    code = f"""if True:
        import common, os
        with common.atomic_write({str(tmp_path / "a.pt")!r}) as out:
            out.write(bytes(1_000_000))
            os._exit(9)"""
    assert python(code).returncode == 9 and (tmp_path / "a.pt").read_text() == "old"
    with common.atomic_write(tmp_path / "a.pt") as out:
        out.write(b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("name, write", [
    ("a.pt", "with common.atomic_write(path) as file: torch.save(torch.zeros(99_999), file)"),
    ("a.u8", "with common.atomic_write(path) as file: file.write(bytes(999_999))"),
    ("a.png", "common.save_grid(noise, path)"),
    ("00000.png", "common.save_pngs(noise, os.path.dirname(path))"),
    ("a.gif", "common.save_gif([common.Image.fromarray(noise[0].permute(1, 2, 0).numpy())], path)"),
    ("b.png", "common.save_panels([common.Image.fromarray(noise[0, 0].numpy())], ['a'], path)"),
])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, name: str, write: str) -> None:
    """A limit on the size of a file stands in for the full disk."""
    (tmp_path / name).write_text("old")
    code = f"""if True:
        import common, os, resource, torch
        path, noise = {str(tmp_path / name)!r}, torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
        try:
            {write}
        except OSError as error:
            print(error)"""
    result = python(code)
    assert result.stdout == f"cannot write {str(tmp_path / name)!r}: OSError: File too large\n", result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "line\nbreak.png").mkdir()
    for name, reason in (("file/a.png", "FileExistsError"), ("line\nbreak.png", "IsADirectoryError")):
        with pytest.raises(OSError) as error:
            common.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / name)
        assert str(error.value).startswith(f"cannot write {str(tmp_path / name)!r}: {reason}")
    assert len(list(tmp_path.iterdir())) == 2


def pixel(folder: Path, root: Path, channels: int | None = None, size: int = 8) -> list[int]:
    """The middle pixel of the only picture in a folder."""
    images = load_images(str(folder), size, channels, str(root))
    assert images.shape in [(1, c, size, size) for c in ([channels] if channels else [1, 3])]
    assert images.dtype == torch.uint8
    values = images[0, :, size // 2, size // 2].tolist()
    return values if channels else values * (3 // len(values))


def kept(root: Path) -> set[Path]:
    """The files of the cache."""
    return {path for path in (root / "cache").iterdir() if path.name != ".lock"}


def photos(folder: Path, count: int = 6) -> Path:
    """A folder with distinct noise PNGs, some in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / ("sub" if i % 2 else "") / f"{i}.png")
    return folder


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """The bytes of a grey PNG with any header and data."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 255, *RED])
    image.info["transparency"] = 1
    return image


def deep(value: float, white: float, kind: type = np.float32) -> Image.Image:
    """A picture of one value with one pixel of another."""
    values = np.full((9, 9), value, kind)
    values[0, 0] = white
    return Image.fromarray(values)


@pytest.mark.parametrize("name, image, expected", [
    ("a.jpg", Image.new("RGB", (9, 9), RED), RED),
    ("a.JPEG", Image.new("L", (9, 9), 77), (77, 77, 77)),
    ("a.PNG", Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
    ("a.bmp", Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
    ("a.webp", Image.new("RGB", (9, 9), RED), RED),
    ("a.gif", Image.new("RGB", (9, 9), RED), RED),
    ("a.tif", Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
    ("a.TIFF", Image.new("CMYK", (9, 9), (0, 255, 255, 0)), RED),
    ("cmyk.jpg", Image.new("CMYK", (9, 9), (0, 255, 255, 0)), RED),
    ("bits.png", Image.new("1", (9, 9), 1), WHITE),
    ("palette.png", Image.new("RGB", (9, 9), RED).convert("P"), RED),
    ("palette_transparent.png", palette_with_transparency(), WHITE),
    ("rgba.png", Image.new("RGBA", (9, 9), (255, 0, 0, 128)), (255, 127, 127)),
    ("rgba.webp", Image.new("RGBA", (9, 9), (9, 9, 9, 0)), WHITE),
    ("la.png", Image.new("LA", (9, 9), (0, 128)), (127, 127, 127)),
    ("16.png", deep(32768, 65535, np.uint16), (128, 128, 128)),
    ("16.tif", deep(32768, 65535, np.uint16), (128, 128, 128)),
    ("12bits.png", deep(2048, 4095, np.uint16), (128, 128, 128)),
    ("16dark.png", deep(257, 65535, np.uint16), (1, 1, 1)),
    ("16black.png", deep(0, 0, np.uint16), (0, 0, 0)),
    ("32.tif", deep(32768, 65535, np.int32), (128, 128, 128)),
    ("32negative.tif", deep(-5, -5, np.int32), (0, 0, 0)),
    ("float1.tif", deep(0.5, 1.0), (128, 128, 128)),
    ("float255.tif", deep(64, 255), (64, 64, 64)),
    ("float_big.tif", deep(1e6, 2e6), (128, 128, 128)),
    ("float_signed.tif", deep(-1, 1), (0, 0, 0)),
    ("nan.tif", deep(0.5, np.nan), WHITE),
    ("infinite.tif", deep(0.5, np.inf), WHITE),
    ("float.pfm", deep(0.5, 1.0), (128, 128, 128)),
    ("a.jp2", Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
    ("a.ppm", Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
    ("a.avif", Image.new("RGB", (9, 9), RED), RED),
], ids=lambda value: value if isinstance(value, str) else "")
def test_kinds(tmp_path: Path, name: str, image: Image.Image, expected: tuple[int, int, int]) -> None:
    if not name.lower().endswith(common.SUFFIXES):
        pytest.skip("this Pillow does not read it")
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert pixel(tmp_path / "in", tmp_path) == pytest.approx(expected, abs=3 if "jp" in name.lower() else 1)
    grey = np.dot(expected, (0.299, 0.587, 0.114))
    assert pixel(tmp_path / "in", tmp_path, 1) == pytest.approx([grey], abs=2)


def load_deep(tmp_path: Path, **pictures: tuple) -> list[int]:
    """The middles of pictures of one folder, each given as for `deep`."""
    (tmp_path / "in").mkdir(parents=True)
    for name, values in pictures.items():
        deep(*values).save(tmp_path / "in" / f"{name}.tif")
    return load_images(str(tmp_path / "in"), 8, None, str(tmp_path))[:, 0, 4, 4].tolist()


def test_grey_levels_of_a_folder_share_one_scale(tmp_path: Path, capsys) -> None:
    """A maximum of 1.01 in one file and of 1 in another makes no difference between them, nor 240 and 260."""
    levels = load_deep(tmp_path / "float", a=(0.5, 1.0), b=(0.5, 1.01), c=(0.505, 0.0), d=(0.505, np.nan))
    assert levels == [126, 126, 128, 128] or levels == [126, 126, 127, 127]
    assert "grey levels above 8 bits: 0 to 1.01 scaled to 0 to 255" in capsys.readouterr().err
    assert load_deep(tmp_path / "signed", a=(0, 0.5), b=(0, -1), c=(0.5, 1)) == [128, 128, 191]
    assert ": -1 to 1 scaled to 0 to 255" in capsys.readouterr().err
    assert load_deep(tmp_path / "int", a=(120, 240, np.int32), b=(120, 260, np.int32)) == [118, 118]
    assert load_deep(tmp_path / "twelve", a=(100, 4095, np.uint16), b=(2048, 0, np.uint16)) == [6, 128]
    told = capsys.readouterr().err
    assert ": 0 to 4095 scaled" in told
    load_images(str(tmp_path / "twelve" / "in"), 8, None, str(tmp_path / "twelve"))
    assert "from cache, 0 skipped, grey levels above 8 bits: 0 to 4095 scaled to 0 to 255" in capsys.readouterr().err
    (tmp_path / "twelve" / "in" / "eight.png").write_bytes((photos(tmp_path / "eight") / "0.png").read_bytes())
    images = load_images(str(tmp_path / "twelve" / "in"), 8, 1, str(tmp_path / "twelve"))
    assert images[:2, 0, 4, 4].tolist() == [6, 128] and torch.equal(  # pictures of 8 bits stay as they are
        images[2:], load_images(str(tmp_path / "eight"), 8, 1, str(tmp_path / "eight"))[:1])


def test_nearly_constant_pictures_are_counted(tmp_path: Path, capsys) -> None:
    folder = photos(tmp_path / "in")
    Image.new("RGB", (9, 9), RED).save(folder / "red.png")
    Image.fromarray(np.arange(100, 108, dtype=np.uint8).reshape(2, 4)).save(folder / "grey.png")
    for how in ("decoded in 0 s", "from cache"):
        assert len(load_images(str(folder), 8, None, str(tmp_path))) == 8
        assert f"8 pictures {how}, 0 skipped, 2 nearly constant\n" in capsys.readouterr().err


def test_files_that_are_not_read_are_counted(tmp_path: Path, capsys) -> None:
    folder = photos(tmp_path / "in")
    (folder / "0.png").rename(folder / "0.PnG")
    for name in ("a.HEIC", "b.heic", "sub/c.heic", "README", "d.json", "e.eps", "f.tga", "g.h\n\N{FISH}"):
        (folder / name).write_text("")
    remark = r", 8 files not read \(3 \.heic(, 1 (unnamed|\.json|\.eps|\.tga|\.h\\n\\U000)){4}\)"
    for how in ("decoded in 0 s", "from cache"):
        assert len(load_images(str(folder), 8, None, str(tmp_path))) == 6
        assert re.search(f"6 pictures {how}, 0 skipped{remark}\n", (told := capsys.readouterr().err)), told
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "a.HEIC").write_text("")
    with pytest.raises(ValueError, match=r"no usable picture in .*0 skipped, 1 files not read \(1 .heic\)"):
        load_images(str(folder), 8, None, str(tmp_path))


@pytest.mark.parametrize("modes, channels", [
    ("L 1 LA I;16 I F", 1), ("L RGB", 3), ("L P", 3), ("L LAB", 3), ("RGB", 3)])
def test_a_folder_of_grey_pictures_has_one_channel(tmp_path: Path, capsys, modes: str, channels: int) -> None:
    """What counts is how pictures are stored: grey pixels in a file with three channels do not make it grey."""
    (tmp_path / "in").mkdir()
    for mode in modes.split():
        image = Image.new("L", (9, 9), 100).convert("I" if mode == "I;16" else "L")
        image.convert(mode).save(tmp_path / "in" / f"{mode[-2:]}.tif")
    (tmp_path / "in" / "broken.png").write_bytes(png(9, 9, b"no zlib"))
    images = load_images(str(tmp_path / "in"), 8, None, str(tmp_path)).clone()
    assert images.shape == (len(modes.split()), channels, 8, 8)
    same = load_images(str(tmp_path / "in"), 8, channels, str(tmp_path))  # the same cache serves
    assert torch.equal(same, images) and "from cache" in capsys.readouterr().err
    other = load_images(str(tmp_path / "in"), 8, 4 - channels, str(tmp_path))
    assert other.shape[1] == 4 - channels and (other.float() - images.float()).abs().max() <= 1
    assert load_images(str(tmp_path / "in"), 8, None, str(tmp_path)).shape[1] == channels


def test_first_frame(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (9, 9), colour) for colour in (RED, WHITE)]
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "in", tmp_path) == pytest.approx(RED)


@pytest.mark.parametrize("orientation, corner", [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 1), (7, 3), (8, 2)])
def test_exif(tmp_path: Path, orientation: int, corner: int) -> None:
    """The red corner of the stored picture ends where the orientation says (corners in reading order)."""
    (tmp_path / "in").mkdir()
    image = Image.new("RGB", (32, 32), "black")
    image.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    red = load_images(str(tmp_path / "in"), 8, None, str(tmp_path))[0, 0]
    assert [int(red[y, x] > 128) for y in (1, 6) for x in (1, 6)] == [int(i == corner) for i in range(4)]


@pytest.mark.parametrize("turned", [False, True])
def test_crop_is_central_and_antialiased(tmp_path: Path, turned: bool) -> None:
    """Of a long picture the middle remains, and lines finer than a pixel become grey."""
    (tmp_path / "in").mkdir()
    values = np.zeros((64, 192), np.uint8)
    values[:, 64:128:2], values[:, 128:] = 255, 255  # black, then fine lines, then white
    Image.fromarray(values.T if turned else values).save(tmp_path / "in" / "a.png")
    image = load_images(str(tmp_path / "in"), 8, 1, str(tmp_path))[0, 0].float()
    inner = image[2:-2] if turned else image[:, 2:-2]
    assert image.shape == (8, 8) and (inner - 127.5).abs().max() < 3


def test_draft_keeps_quality(tmp_path: Path, monkeypatch) -> None:
    """A large JPEG is decoded at twice the size only, yet looks as it does when decoded in full."""
    (tmp_path / "in").mkdir()
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8))
    small.resize((512, 512), Image.Resampling.BICUBIC).save(tmp_path / "in" / "a.jpg", quality=95)
    with Image.open(tmp_path / "in" / "a.jpg") as full:
        full = np.asarray(full.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    sizes, transpose = [], common.ImageOps.exif_transpose
    monkeypatch.setattr(common.ImageOps, "exif_transpose", lambda i, **k: (sizes.append(i.size), transpose(i, **k)))
    image = load_images(str(tmp_path / "in"), 64, None, str(tmp_path))[0].permute(1, 2, 0).numpy()
    assert sizes == [(128, 128)] and np.abs(image - full).mean() < 3


def test_upscale_and_slivers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, size in enumerate([(1, 1), (1, 500), (500, 1), (3, 2)]):
        Image.new("RGB", size, RED).save(tmp_path / "in" / f"{i}.png")
    images = load_images(str(tmp_path / "in"), 16, None, str(tmp_path))
    assert len(images) == 4 and (images[:, 0] == 255).all() and (images[:, 1:] == 0).all()


def add_bad_files(folder: Path) -> int:
    """Forty bad files of every kind among the good ones; also odd folders and names that are no fault."""
    whole = (folder / "0.png").read_bytes()
    jpeg = folder / "whole.jpg"
    Image.open(folder / "0.png").save(jpeg)
    for i in range(10):
        (folder / f"cut{i}.png").write_bytes(whole[:20 + 60 * i])
        (folder / f"cut{i}.jpg").write_bytes(jpeg.read_bytes()[:20 + 60 * i])
    jpeg.unlink()
    for i, suffix in enumerate((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")):
        (folder / f"text{i}{suffix}").write_text("no picture\n" * 99)
    (folder / "empty.jpg").touch()
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, zlib.compress(bytes(1_000_000))))
    (folder / "big.png").write_bytes(png(12_000, 12_000, zlib.compress(bytes(1_000_000))))
    (folder / "broken.png").write_bytes(whole[:40] + b"\0\0\0\0" + whole[44:])
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.png")
    (folder / "line\nbreak\r.jpg").write_bytes(b"GIF89a")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.jpg")).write_bytes(b"\xff\xd8\xff")
    (folder / ("-\N{FISH}" + "x" * 200 + ".tif")).write_bytes(b"II*\0\xff\xff\xff\xff")
    (folder / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (folder / "around").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(folder.parent / folder.name / "sub")
    (folder / "notes.txt").write_text("not a picture by its name, so only counted")
    return 40


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, mixed = photos(tmp_path / "good", 20), photos(tmp_path / "mixed", 20)
    for folder in (good, mixed):
        (folder / "dir.jpg").mkdir()
        odd = os.fsdecode(b"\xff.png")
        for name in ("dir.jpg/\N{FISH}.png", "-dash.png", "new\nline.png", odd, "y" * 240 + ".png"):
            shutil.copy(folder / "0.png", folder / name)
    bad = add_bad_files(mixed)
    expected = load_images(str(good), 16, None, str(tmp_path / "a"))
    capsys.readouterr()
    start = time.monotonic()
    images = load_images(str(mixed), 16, None, str(tmp_path / "b"))
    assert time.monotonic() - start < 5  # the bomb and the pipe hold nothing up
    assert len(images) == 25 and torch.equal(images, expected)
    first = capsys.readouterr().err
    assert first.isascii() and "Traceback" not in first and str(mixed) not in first
    assert first.count("skipped '") == 10 and f"and {bad - 10} more, listed in" in first
    assert f"25 pictures decoded in 0 s, {bad} skipped, 1 files not read (1 .txt)\n" in first
    notes = json.loads(next((tmp_path / "b" / "cache").glob("*.json")).read_text())
    assert len(notes["checksums"]) == 25 and len(notes["skipped"]) == bad
    reasons = dict(notes["skipped"])
    assert "exceeds limit" in reasons["bomb.png"] and "too many" in reasons["big.png"]
    assert "broken link" in reasons["pipe.png"] and "cannot identify image" in reasons["postscript.jpg"]
    assert list(reasons) == sorted(reasons)  # in order of the path, as the pictures are
    assert torch.equal(load_images(str(mixed), 16, None, str(tmp_path / "b")), expected)
    assert capsys.readouterr().err.strip() == f"mixed: 25 pictures from cache, {bad} skipped, 1 files not read (1 .txt)"


def test_bomb_takes_little_memory(tmp_path: Path) -> None:
    photos(tmp_path / "in", 1)
    for i in range(4):
        (tmp_path / "in" / f"bomb{i}.png").write_bytes(png(30_000, 30_000, zlib.compress(bytes(9_000_000))))
        (tmp_path / "in" / f"big{i}.png").write_bytes(png(13_000, 13_000, zlib.compress(bytes(9_000_000))))
    code = ("import resource, common; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            f"before = peak(); common.load_images({str(tmp_path / 'in')!r}, 16, None, {str(tmp_path)!r});"
            "print(peak() - before)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100_000 and "Warning" not in result.stderr  # kB


def test_links_between_folders_are_followed_once(tmp_path: Path) -> None:
    photos(tmp_path / "elsewhere", 4)
    folder = photos(tmp_path / "in", 2)
    for name in ("a", "b"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert len(load_images(str(folder), 8, None, str(tmp_path))) == 6


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: (folder / "a.jpg").write_text("text")])
def test_no_usable_picture(tmp_path: Path, prepare) -> None:
    (tmp_path / "in").mkdir()
    prepare(tmp_path / "in")
    with pytest.raises(ValueError, match=r"no usable picture in .*/in.*JPEG") as error:
        load_images(str(tmp_path / "in"), 8, None, str(tmp_path))
    assert "\n" not in str(error.value) and not kept(tmp_path)


def test_cache_is_reused_and_kept_out_of_the_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    folder, root = photos(tmp_path / "in"), tmp_path / "root"
    before = sorted(tmp_path.glob("in/**/*"))
    images = load_images(str(folder), 16, None, str(root)).clone()
    files = {path: path.stat().st_mtime_ns for path in kept(root)}
    assert sorted(path.suffix for path in files) == [".json", ".u8"]
    monkeypatch.setattr(common, "to_array", None)  # nothing is decoded
    again = load_images(str(folder), 16, None, str(root))
    assert torch.equal(again, images) and {path: path.stat().st_mtime_ns for path in files} == files
    assert sorted(tmp_path.glob("in/**/*")) == before
    assert "6 pictures from cache, 0 skipped" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="makes a sparse file of twice the memory")
def test_a_cache_larger_than_memory_opens(tmp_path: Path) -> None:
    load_images(str(photos(tmp_path / "in")), 256, None, str(tmp_path))
    file = next((tmp_path / "cache").glob("*.u8"))
    count = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 256 * 256)
    os.truncate(file, count * 3 * 256 * 256)
    notes = json.loads(file.with_suffix(".json").read_text())
    sums = notes["checksums"] + [zlib.crc32(bytes(3 * 256 * 256))] * (count - 6)
    file.with_suffix(".json").write_text(json.dumps(notes | {"checksums": sums}))
    images = load_images(str(tmp_path / "in"), 256, None, str(tmp_path))
    assert len(images) == count and images[[0, -1]].shape == (2, 3, 256, 256)
    images[-1] = 7
    assert images[-1].min() == 7 and load_images(str(tmp_path / "in"), 256, None, str(tmp_path))[-1].max() == 0


@pytest.mark.filterwarnings("error")
def test_writing_into_the_pictures_changes_only_memory(tmp_path: Path) -> None:
    images = load_images(str(photos(tmp_path / "in")), 16, None, str(tmp_path))
    before = images.clone()
    images.fill_(7)
    assert torch.equal(load_images(str(tmp_path / "in"), 16, None, str(tmp_path)), before)


def test_a_cache_that_cannot_be_mapped(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise OSError("Cannot allocate memory")
    monkeypatch.setattr(common.mmap, "mmap", refuse)
    with pytest.raises(OSError, match="cannot read .*u8' back, or not map it into memory"):
        load_images(str(photos(tmp_path / "in")), 16, None, str(tmp_path))


def change_time(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def grow(path: Path) -> None:
    """A new length at the old time."""
    time_was = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(0, time_was))


@pytest.mark.parametrize("change, count", [
    (lambda folder: shutil.copy(folder / "0.png", folder / "sub" / "new.png"), 7),
    (lambda folder: (folder / "2.png").unlink(), 5),
    (lambda folder: (folder / "2.png").rename(folder / "zz.png"), 6),
    (lambda folder: change_time(folder / "2.png"), 6),
    (lambda folder: grow(folder / "2.png"), 6),
    (lambda folder: (folder / "2.png").write_bytes(b""), 5),
], ids=["added", "removed", "renamed", "touched", "grown", "emptied"])
def test_a_changed_folder_is_noticed(tmp_path: Path, change, count: int) -> None:
    folder = photos(tmp_path / "in")
    load_images(str(folder), 16, None, str(tmp_path))
    old = kept(tmp_path)
    change(folder)
    images = load_images(str(folder), 16, None, str(tmp_path))
    new = kept(tmp_path)
    assert len(images) == count and len(new) == 2 and not new & old  # the stale file is gone
    assert torch.equal(images, load_images(str(folder), 16, None, str(tmp_path / "other")))


def test_size_and_channels_have_their_own_cache(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in")
    for size, channels in ((16, 3), (16, 1), (8, 3)):
        assert load_images(str(folder), size, channels, str(tmp_path)).shape == (6, channels, size, size)
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 3


def test_cache_version(tmp_path: Path, monkeypatch) -> None:
    folder = photos(tmp_path / "in")
    load_images(str(folder), 16, None, str(tmp_path))
    old = kept(tmp_path)
    monkeypatch.setattr(common, "CACHE_VERSION", 99)
    load_images(str(folder), 16, None, str(tmp_path))
    assert not old & kept(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda u8, notes: u8.write_bytes(u8.read_bytes()[:-1]),
    lambda u8, notes: u8.write_bytes(u8.read_bytes() + b"0"),
    lambda u8, notes: u8.unlink(),
    lambda u8, notes: notes.unlink(),
    lambda u8, notes: notes.write_text("{"),
    lambda u8, notes: notes.write_text("[]"),
    lambda u8, notes: notes.write_text("{}"),
], ids=["short", "long", "no data", "no notes", "cut notes", "wrong notes", "empty notes"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage) -> None:
    folder = photos(tmp_path / "in")
    images = load_images(str(folder), 16, None, str(tmp_path)).clone()
    damage(*(next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("u8", "json")))
    assert torch.equal(load_images(str(folder), 16, None, str(tmp_path)), images)
    assert [path.stat().st_size for path in (tmp_path / "cache").glob("*.u8")] == [images.numel()]
    assert len(kept(tmp_path)) == 2


def overwrite(file: Path, place: int, content: bytes) -> None:
    with open(file, "rb+") as out:
        out.seek(place)
        out.write(content)


@pytest.mark.parametrize("damage", [
    lambda u8, notes: overwrite(u8, 3000, bytes([u8.read_bytes()[3000] ^ 1])),
    lambda u8, notes: overwrite(u8, 500, bytes(3000)),
    lambda u8, notes: overwrite(u8, u8.stat().st_size - 1, bytes([u8.read_bytes()[-1] ^ 128])),
], ids=["flipped", "zeroed", "last"])
def test_a_cache_with_other_content_is_made_again(tmp_path: Path, capsys, damage) -> None:
    folder = photos(tmp_path / "in")
    images = load_images(str(folder), 16, None, str(tmp_path)).clone()
    damage(*(next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("u8", "json")))
    capsys.readouterr()
    assert torch.equal(load_images(str(folder), 16, None, str(tmp_path)), images)
    assert "6 pictures decoded" in capsys.readouterr().err


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    folder = photos(tmp_path / "in", 300)  # more than one portion
    whole, calls = common.to_array, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 280:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(common, "to_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(str(folder), 8, None, str(tmp_path))
    assert not kept(tmp_path)
    monkeypatch.setattr(common, "to_array", whole)
    assert len(load_images(str(folder), 8, None, str(tmp_path))) == 300


def test_what_a_killed_build_left_is_no_cache_and_goes(tmp_path: Path) -> None:
    """A later build removes it, be it of another folder."""
    folder, other = photos(tmp_path / "in", 300), photos(tmp_path / "other")
    code = ("import os, common; whole = common.to_array; calls = [];\n"
            "def killed(*a):\n    calls.append(1)\n    if len(calls) == 280: os._exit(9)\n    return whole(*a)\n"
            f"common.to_array = killed; common.load_images({str(folder)!r}, 8, None, {str(tmp_path)!r})")
    assert python(code).returncode == 9 and [".tmp" in path.name for path in kept(tmp_path)] == [True]
    assert len(load_images(str(folder), 8, None, str(tmp_path))) == 300 and len(kept(tmp_path)) == 2
    assert python(code.replace("8, None", "16, None")).returncode == 9 and len(kept(tmp_path)) == 3
    load_images(str(other), 8, None, str(tmp_path))
    assert len(kept(tmp_path)) == 4 and not any(".tmp" in path.name for path in kept(tmp_path))


def load_sum(folder: str, root: str) -> int:
    return int(load_images(folder, 16, None, root).long().sum())


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_of_many_processes_one_builds_the_cache(tmp_path: Path, capfd) -> None:
    folder = photos(tmp_path / "in", 300)
    with multiprocessing.get_context("fork").Pool(8) as pool:
        sums = pool.starmap(load_sum, [(str(folder), str(tmp_path))] * 8, chunksize=1)
    told = capfd.readouterr().err
    assert told.count("300 pictures decoded") == 1 and told.count("300 pictures from cache") == 7
    assert set(sums) == {load_sum(str(folder), str(tmp_path / "other"))} and len(kept(tmp_path)) == 2


def test_without_locks_each_process_builds_its_cache(tmp_path: Path, monkeypatch) -> None:
    folder = photos(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert len(load_images(str(folder), 16, None, str(tmp_path))) == 6 and len(kept(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_a_process_that_waits_says_so(tmp_path: Path, monkeypatch, capfd) -> None:
    """A download and a build wait for the lock; a set in the cache does not."""
    class Set:
        data, targets = torch.zeros(5, 28, 28, dtype=torch.uint8), torch.arange(5)

    def download_only(root: str, download: bool) -> type:
        if not download:
            raise RuntimeError("not there")
        return Set

    fake(monkeypatch, "MNIST", download_only)
    load_images(str(photos(tmp_path / "made")), 8, None, str(tmp_path))
    photos(tmp_path / "in")
    code = f"""if True:
        import common, time
        with common.file_lock({str(tmp_path / "cache/.lock")!r}, wait=True):
            print(flush=True)
            time.sleep(5)"""
    for name, waits in ((str(tmp_path / "in"), True), ("mnist", True), (str(tmp_path / "made"), False)):
        holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        holder.stdout.readline()
        start = time.monotonic()
        load_images(name, 8, None, str(tmp_path))
        assert (time.monotonic() - start > 4) == waits
        assert capfd.readouterr().err.count("waiting for another process") == waits
        holder.communicate()


def test_root_that_is_a_file(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory: .*file") as error:
        load_images(str(folder), 8, None, str(tmp_path / "file"))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_permissions(capsys) -> None:
    """A root that cannot be written, a picture and a subfolder that cannot be read; as another user when root."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to other users
    try:
        folder, root, other = photos(place / "in"), place / "root", place / "other"
        root.mkdir(), other.mkdir(), other.chmod(0o777)
        (folder / "2.png").chmod(0), (folder / "sub").chmod(0), root.chmod(0o555), place.chmod(0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(OSError, match="Permission denied: .*root"):
            load_images(str(folder), 8, None, str(root))
        capsys.readouterr()
        assert len(load_images(str(folder), 8, None, str(other))) == 2
        told = capsys.readouterr().err
        assert "skipped '2.png': PermissionError: Permission denied\n" in told and "skipped 'sub': " in told
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (folder / "sub").chmod(0o755)
        shutil.rmtree(place)


def test_progress(tmp_path: Path, monkeypatch, capsys) -> None:
    """On a terminal one line is rewritten; elsewhere a short job says only its result."""
    folder = photos(tmp_path / "in", 300)
    load_images(str(folder), 8, None, str(tmp_path))
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(time, "monotonic", iter(range(99)).__next__)
    load_images(str(folder), 16, None, str(tmp_path))
    told = capsys.readouterr().err
    assert "in: looked at 256 of 300 \r" in told and "in: decoded 256 of 300 \r" in told and told.count("\n") == 1


@pytest.mark.parametrize("arguments", [("digits", 0), ("digits", 8.0), ("digits", -8), ("digits", 8, 2)])
def test_wrong_arguments(tmp_path: Path, arguments: tuple) -> None:
    with pytest.raises(ValueError, match="image_size must be a positive int.*channels 1 or 3"):
        load_images(*arguments, root=str(tmp_path))


@pytest.mark.parametrize("source", ["no\nsuch", "", "\0"])
def test_unknown_source(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=r"digits, faces, fish, stacked.*celeba or .*JPEG") as error:
        load_images(source, 8, None, str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["d.zip", "x.npy", "one.jpg"])
def test_a_file_is_not_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ValueError, match=f"{name}' is a file: give a folder") as error:
        load_images(str(tmp_path / name), 8, None, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_with_the_name_of_a_data_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "DRAWN_COUNT", 9)
    photos(tmp_path / "faces")
    with pytest.raises(ValueError, match=r"'faces' is a dataset and also a folder here: give \./faces .* or rename"):
        load_images("faces", 8)
    assert len(load_images("./faces", 8)) == len(load_images(str(tmp_path / "faces"), 8)) == 6
    (tmp_path / "faces").rename(tmp_path / "portraits")
    assert len(load_images("faces", 8)) == 9


def test_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    photos(tmp_path / "in")
    assert len(load_images("~/in", 8, None, "~/root")) == 6 and len(kept(tmp_path / "root")) == 2


def test_pictures_as_the_network_sees_them(tmp_path: Path) -> None:
    """The line that the docstring of save_pngs gives."""
    for channels in (1, 3):
        images = load_images(str(photos(tmp_path / f"in{channels}")), 8, channels, str(tmp_path))
        common.save_pngs(images, tmp_path / f"real{channels}")
        files = sorted((tmp_path / f"real{channels}").iterdir())
        again = [np.asarray(Image.open(file)).reshape(8, 8, channels).transpose(2, 0, 1) for file in files]
        assert [file.name for file in files[:2]] == ["00000.png", "00001.png"] and np.array_equal(again, images)


def test_spread_takes_distinct_pictures_of_the_whole_set() -> None:
    images = torch.arange(1000)[:, None, None, None].expand(-1, 3, 2, 2)
    assert common.spread(images, 4)[:, 0, 0, 0].tolist() == [0, 333, 666, 999]
    assert common.spread(images, 1)[:, 0, 0, 0].tolist() == [0]
    assert common.spread(images, 2)[:, 0, 0, 0].tolist() == [0, 999]
    for count in (999, 1000, 1001, 5000):
        assert common.spread(images, count)[:, 0, 0, 0].unique().numel() == min(count, 1000)
    assert torch.equal(common.spread(images[:3], 256), images[:3])
    assert common.spread(images % 2, 4)[:, 0, 0, 0].tolist() == [0, 1]
    assert len(common.spread(images[:1].expand(9, -1, -1, -1), 4)) == 1
    assert torch.equal(common.spread(images[:300], 256), images[torch.linspace(0, 299, 256).long()])


def test_a_set_that_is_there_is_only_read(tmp_path: Path, monkeypatch) -> None:
    class Set:
        data, targets = torch.zeros(5, 28, 28, dtype=torch.uint8), torch.arange(5)
    fake(monkeypatch, "MNIST", lambda root, download: Set)
    assert len(load_images("mnist", 32, None, str(tmp_path))) == 5 and not list(tmp_path.iterdir())


def test_torchvision_is_not_imported_at_the_start() -> None:
    code = "import common, sys; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.skipif("GAN_TEST_DATA" not in os.environ, reason="GAN_TEST_DATA is not set to a folder with MNIST/raw")
def test_mnist() -> None:
    root = os.environ["GAN_TEST_DATA"]
    images, labels = load_images("mnist", 32, None, root), load_labels("mnist", root)
    assert images.shape[1:] == (1, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert len(images) == len(labels) >= 5000 and set(labels.tolist()) == set(range(10))
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert images[..., border].max() == 0 and images[:, :, 2:-2, 2:-2].float().mean() > 25
    from torchvision.datasets import MNIST
    assert torch.equal(images[:, 0, 2:-2, 2:-2], MNIST(root).data)  # padded, not resized
    assert load_images("mnist", 64, 3, root).shape == (len(images), 3, 64, 64)
    assert torch.equal(load_images("mnist", 32, 3, root)[:, 1:2], images)


def fake(monkeypatch, name: str, make) -> None:
    import torchvision.datasets
    monkeypatch.setattr(torchvision.datasets, name, make)


def test_cifar10(tmp_path: Path, monkeypatch) -> None:
    class Set:
        data, targets = np.full((5, 32, 32, 3), RED, np.uint8), [3, 1, 4, 1, 5]
    fake(monkeypatch, "CIFAR10", lambda root, download: Set)
    images = load_images("cifar10", 32, None, str(tmp_path))
    assert images.shape == (5, 3, 32, 32) and images[0, :, 5, 5].tolist() == [255, 0, 0]
    assert load_images("cifar10", 64, None, str(tmp_path)).shape == (5, 3, 64, 64)
    assert load_images("cifar10", 16, 1, str(tmp_path))[0, :, 5, 5].tolist() == [76]
    labels = load_labels("cifar10", str(tmp_path))
    assert labels.tolist() == Set.targets and labels.dtype == torch.int64


def test_celeba(tmp_path: Path, monkeypatch) -> None:
    """The training pictures alone, and of them the central 108 x 108."""
    (folder := tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    image = Image.new("RGB", (178, 218), "black")
    image.paste(RED, (35, 55, 35 + 108, 55 + 108))
    for i in range(3):
        image.save(folder / f"{i}.jpg", quality=95)
    class Set:
        filename = ["0.jpg", "2.jpg"]
    fake(monkeypatch, "CelebA", lambda root, download: Set)
    images = load_images("celeba", 32, None, str(tmp_path))
    assert images.shape == (2, 3, 32, 32) and images[:, 0].min() > 200


@pytest.mark.parametrize("source, name", common.TORCHVISION.items())
def test_failed_download(tmp_path: Path, monkeypatch, source: str, name: str) -> None:
    def fail(root: str, download: bool):
        assert root == str(tmp_path)
        if not download:
            raise RuntimeError("not there")
        raise RuntimeError("quota\nof 'the day' is used up" + "!" * 999)
    fake(monkeypatch, name, fail)
    with pytest.raises(OSError, match=f"^{source} failed.*'the day' is used up.*--data-root .*--data FOLDER") as error:
        load_images(source, 32, None, str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("source, channels", [("digits", 1), ("faces", 3), ("fish", 3)])
def test_drawn(tmp_path: Path, monkeypatch, source: str, channels: int) -> None:
    assert common.DRAWN_COUNT == 6_000
    monkeypatch.setattr(common, "DRAWN_COUNT", 300)
    images, labels = load_images(source, 32, None, str(tmp_path)), load_labels(source, str(tmp_path))
    assert images.shape == (300, channels, 32, 32) and labels.shape == (300,) and labels.dtype == torch.int64
    assert len({bytes(image.numpy().tobytes()) for image in images}) == 300
    image, label = common.DRAWN[source][0](common.random.Random("0-7"), 32)
    assert np.array_equal(np.asarray(image), images[7].permute(1, 2, 0).numpy().squeeze()) and labels[7] == label
    assert torch.equal(load_images(source, 32, None, str(tmp_path / "again")), images)
    assert load_images(source, 32, 4 - channels, str(tmp_path)).shape == (300, 4 - channels, 32, 32)
    old = kept(tmp_path)
    monkeypatch.setattr(common, "DRAWING_VERSION", 99)
    load_images(source, 32, None, str(tmp_path))
    assert len(old) == len(kept(tmp_path)) == 4  # the stale one was replaced...
    assert len(old & kept(tmp_path)) == 2  # ...and the one with other channels kept


@pytest.mark.parametrize("source", ["stacked", "stacked-mnist"])
def test_stacked_digits(tmp_path: Path, monkeypatch, source: str) -> None:
    class Set:
        data = torch.randint(256, (60, 28, 28), dtype=torch.uint8)
        targets = torch.arange(60) % 10
    fake(monkeypatch, "MNIST", lambda root, download: Set)
    monkeypatch.setattr(common, "DRAWN_COUNT", 60)
    digits = load_images(common.STACKED[source], 32, 1, str(tmp_path))[:, 0]
    classes = load_labels(common.STACKED[source], str(tmp_path))
    images, labels = load_images(source, 32, None, str(tmp_path)), load_labels(source, str(tmp_path))
    assert images.shape == (25_600, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (25_600,) and labels.dtype == torch.int64
    number = {digit.numpy().tobytes(): label.item() for digit, label in zip(digits, classes)}
    for image, label in zip(images[::500], labels[::500].tolist()):
        assert [number[channel.numpy().tobytes()] for channel in image] == [label // 100, label // 10 % 10, label % 10]
    assert labels.unique().numel() == len(classes.unique()) ** 3
    assert torch.equal(load_images(source, 32, 3, str(tmp_path)), images)
    with pytest.raises(ValueError, match=f"{source}' has 3 channels"):
        load_images(source, 32, 1, str(tmp_path))
