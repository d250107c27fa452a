"""Data and image helpers for the four scripts: datasets and folders, batches, pictures, charts and two measures."""

import csv
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Write a file completely or not at all: `with atomic_write("a.png") as file: image.save(file)`.

    `file` is a hidden temporary file beside `path`. When the block ends, the file is synced (if `sync` is on) and
    renamed. If anything fails, `path` stays as it was. Only one process may write a path at a time. Raises an OSError
    that names the path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # PyTorch hides the reason, such as a full disk, behind a RuntimeError
        reason = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        raise OSError(f"cannot write {str(path)!r}: {_reason(reason)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file or folder. Windows refuses while another program has it open, so keep trying for a second."""
    for _ in range(20):
        with suppress(PermissionError):
            return os.replace(temporary, path)
        time.sleep(0.05)
    os.replace(temporary, path)


def _reason(error: BaseException) -> str:
    """Say in one short ASCII line what went wrong, without the path."""
    text = getattr(error, "strerror", None) or str(error).partition(" file '")[0]
    return ascii(f"{type(error).__name__}: {text}")[1:-1][:160]


def _print_to_stderr(text: str, end: str = "\n") -> None:
    """Print to stderr, unless it is broken. Progress lines (end="\\r") appear only on a terminal."""
    with suppress(Exception):
        if end == "\n" or sys.stderr.isatty():
            print(text, end=end, file=sys.stderr, flush=True)


def next_folder(stem: str | Path) -> Path:
    """Make the first of the folders stem-001, stem-002, ... that does not exist yet, and return it. Raises OSError."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for count in itertools.count(1):
        folder = Path(f"{stem}-{count:03d}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def newest_folder(pattern: str, file: str) -> Path:
    """Of the folders that match a pattern, return the one whose `file` is newest. Raises FileNotFoundError."""
    found = max(Path().glob(f"{pattern}/{file}"), key=os.path.getmtime, default=None)
    if found is None:
        raise FileNotFoundError(f"there is no {pattern}/{file} in {os.getcwd()!r}")
    return found.parent


def attempt(write: Callable, *arguments: object) -> None:
    """Call write(*arguments), and only warn if it fails, because a picture must not stop a run."""
    try:
        write(*arguments)
    except Exception as error:
        _print_to_stderr(f"warning: {' '.join(str(error).split()) or _reason(error)}")


# ---- drawings --------------------------------------------------------------------------------------------------------

# Procedurally generated datasets. Pictures are drawn two or three times too large, in coordinates from -1 to 1, and
# then shrunk, so that they show the same scene at every size. Shapes are arrays of complex numbers x + iy: a product
# turns and zooms a shape, a sum shifts it.
Colour = tuple[int, int, int]
WHITE, BLACK, GOLD, PINK = (255, 252, 246), (14, 10, 16), (255, 206, 50), (240, 90, 110)
# A circle, a chord from -1 to 1 and back, parabolas above its first half and below its second, and Catmull-Rom weights
_CIRCLE = np.exp(2j * np.pi * np.arange(20) / 20)
_CHORD = np.r_[np.linspace(-1, 1, 11), np.linspace(1, -1, 11)] + 0j
_ABOVE, _BELOW = 1j * (_CHORD**2 - 1) * (np.arange(22) < 11), 1j * (1 - _CHORD**2) * (np.arange(22) > 10)
_SPLINE = np.array([(-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
                    for t in np.arange(6) / 6]) / 2 + 0j


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    """The colour a share t of the way from a to b."""
    return int(a[0] + (b[0] - a[0]) * t), int(a[1] + (b[1] - a[1]) * t), int(a[2] + (b[2] - a[2]) * t)


def _hue(hue: float, saturation: float, value: float) -> Colour:
    """A colour from a smooth colour wheel (0 red, 1/3 green, 2/3 blue)."""
    full = 255 * value
    waves = tuple(full * (0.5 + 0.5 * math.cos(2 * math.pi * (hue - k / 3))) for k in range(3))
    return _mix((full, full, full), waves, saturation)


def _gradient(size: tuple[int, int], corners: list[Colour]) -> Image.Image:
    """A picture that blends four corner colours (top left, top right, bottom left, bottom right)."""
    tiny = Image.frombytes("RGB", (2, 2), bytes(channel for corner in corners for channel in corner))
    return tiny.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _ellipse(centre: complex, x: float, y: float) -> np.ndarray:
    """An ellipse with the half axes x and y."""
    return centre + x * _CIRCLE.real + 1j * y * _CIRCLE.imag


def _arch(centre: complex, half: complex, above: float, below: float) -> np.ndarray:
    """The shape between two parabolas over one chord, centre ± half: an eye, a brow, a lip, a stripe or a weed."""
    return centre + half * _CHORD + half / abs(half) * (above * _ABOVE + below * _BELOW)


def _smooth(points: list[complex]) -> np.ndarray:
    """A smooth closed curve (Catmull-Rom) through the points."""
    p = points[-1:] + points + points[:2]
    return (_SPLINE @ np.array([p[:-3], p[1:-2], p[2:-1], p[3:]])).T.ravel()


def _both(right: list[complex]) -> list[complex]:
    """The points and, in reverse, their mirror images on the left."""
    return right + [-p.conjugate() for p in reversed(right)]


class _Canvas:
    """A picture drawn too large; `turn` (a complex number: rotation and zoom) and `shift` move all that is drawn."""

    def __init__(self, size: int, corners: list[Colour]) -> None:
        self.factor = 3 if size < 64 else 2
        self.half, self.turn, self.shift = size * self.factor / 2, 1, 0
        self.image = _gradient((size * self.factor, size * self.factor), corners)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def pixels(self, shape: np.ndarray) -> np.ndarray:
        """The corners of a shape in pixels."""
        return shape * (self.turn * self.half) + ((self.shift + 1 + 1j) * self.half - 0.5 - 0.5j)

    def fill(self, shape: np.ndarray, colour: Colour, alpha: int = 255) -> None:
        """Fill a shape with a colour."""
        self.draw.polygon(self.pixels(shape).view(float).tolist(), (*colour, alpha))

    def shade(self, shape: np.ndarray, corners: list[Colour]) -> None:
        """Fill a shape with a gradient across its bounding box."""
        points = self.pixels(shape)
        x, y = math.floor(points.real.min()), math.floor(points.imag.min())
        mask = Image.new("L", (int(points.real.max()) - x + 2, int(points.imag.max()) - y + 2))
        ImageDraw.Draw(mask).polygon((points - complex(x, y)).view(float).tolist(), 255)
        self.image.paste(_gradient(mask.size, corners), (x, y), mask)


@functools.cache
def _glyph(digit: int) -> Image.Image:
    """A blurred digit, 70 % of its frame high; its level sets are the digit in thinner and in bolder strokes."""
    glyph, font = Image.new("L", (192, 192)), ImageFont.load_default(178)
    ImageDraw.Draw(glyph).text((96, 96), str(digit), 255, font, "mm", stroke_width=3, stroke_fill=255)
    left, top, right, bottom = glyph.getbbox()
    glyph = ImageChops.offset(glyph, 96 - (left + right) // 2, 96 - (top + bottom) // 2)
    return glyph.filter(ImageFilter.GaussianBlur(4))


def draw_digit(rng: random.Random, size: int) -> tuple[Image.Image, int]:
    """A light digit on black, framed as in MNIST: slanted, stretched, bent and in strokes of any width."""
    digit, u, factor = rng.randrange(10), rng.uniform, 3 if size < 64 else 2
    turn, shear, wide, tall = u(-0.2, 0.2), u(-0.25, 0.25), u(75, 112), u(86, 104)
    centre, level, ink = complex(96 + u(-8, 8), 96 + u(-6, 6)), u(70, 170), u(0.75, 1)
    corner, edge = {}, [round(size * factor * k / 3) for k in range(4)]
    for x, y in np.ndindex(4, 4):  # the corners of a mesh; their jitter bends the strokes
        right, down = x / 1.5 - 1, y / 1.5 - 1
        z = centre + complex(wide * (right + shear * down), tall * down) * complex(math.cos(turn), math.sin(turn))
        corner[x, y] = (z.real + u(-6, 6), z.imag + u(-6, 6))
    mesh = [((edge[x], edge[y], edge[x + 1], edge[y + 1]),
             corner[x, y] + corner[x, y + 1] + corner[x + 1, y + 1] + corner[x + 1, y]) for x, y in np.ndindex(3, 3)]
    image = _glyph(digit).transform((edge[3], edge[3]), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return image.point([int(ink * min(255, max(0, (v - level) * 6))) for v in range(256)]).reduce(factor), digit


SKIN = [(92, 60, 46), (138, 92, 66), (192, 138, 102), (228, 180, 144), (252, 224, 206)]
HAIR = [(26, 22, 26), (60, 40, 32), (116, 72, 40), (184, 86, 36), (214, 164, 90), (240, 216, 160), (196, 194, 194)]
IRIS = [(60, 36, 20), (116, 74, 36), (88, 120, 56), (60, 124, 168), (128, 146, 160)]
STYLES = {  # where the hair ends beside the face, then the heights of the hairline from one side to the other
    "bald": (0, ()), "short": (-0.05, (-0.22, -0.38, -0.42, -0.38, -0.22)),
    "parted": (-0.08, (-0.1, -0.22, -0.36, -0.5, -0.3)), "bob": (0.36, (-0.12, -0.2, -0.22, -0.2, -0.12)),
    "long": (0.5, (-0.02, -0.28, -0.52, -0.28, -0.02)), "curly": (-0.04, (-0.2, -0.34, -0.36, -0.34, -0.2)),
    "bun": (-0.06, (-0.26, -0.44, -0.5, -0.44, -0.26)), "spiky": (-0.1, (-0.26, -0.3, -0.44, -0.3, -0.26))}


def draw_face(rng: random.Random, size: int) -> tuple[Image.Image, int]:
    """A portrait, aligned as in CelebA (the eyes always near one height); the label is the hair style."""
    label, u, r = rng.randrange(len(STYLES)), rng.uniform, rng.random
    style, (low, hairline) = list(STYLES.items())[label]
    skin, hair, iris = (_mix(*rng.sample(colours, 2), r() / 2) for colours in (SKIN, HAIR, IRIS))
    cloth, back = _hue(r(), u(0.1, 0.9), u(0.3, 1)), _hue(r(), u(0, 0.7), u(0.5, 1))
    shadow, lips = _mix(skin, (60, 10, 30), 0.4), _mix(skin, _hue(u(-0.06, 0.03), u(0.5, 1), u(0.6, 0.9)), u(0.3, 0.8))
    light, yaw, tilt, zoom = u(-1, 1), u(-0.3, 0.3), u(-0.09, 0.09), u(0.9, 1.02)
    wide, jaw, chin, long, volume = u(0.46, 0.53), u(0.33, 0.44), u(0.13, 0.23), u(0.66, 0.76), u(0.04, 0.1)
    out, top = wide + volume, -0.68 - volume

    def lit(colour: Colour, depth: float = 0.36) -> list[Colour]:
        """Corner colours of a surface that is lit from above and from one side."""
        sides = [_mix(_mix(colour, WHITE, 0.14), (36, 12, 26), depth * max(0, s)) for s in (light, -light)]
        return sides + [_mix(side, (30, 12, 26), 0.2) for side in sides]

    def at(x: float, y: float) -> complex:
        """A point on the front of the head, which is round and turns by the angle yaw."""
        return complex(0.62 * math.sin(math.asin(x / 0.62) + yaw), y)

    # Hair behind the head
    canvas, upright = _Canvas(size, lit(back, 0.3)), zoom * complex(math.cos(tilt), math.sin(tilt))
    canvas.turn, canvas.shift = upright, complex(u(-0.05, 0.05), u(-0.06, 0.02))
    if style in ("bob", "long"):
        end, flare = u(0.4, 0.6) + (0.55 if style == "long" else 0), out + u(0, 0.12)
        canvas.shade(_smooth(_both([0.25 + top * 1j, out - 0.2j, flare + 0.03 + (end - 0.4) * 1j,
                                    flare + (end - 0.08) * 1j, flare - 0.15 + end * 1j])), lit(_mix(hair, BLACK, 0.3)))
    elif style == "curly":
        angle = np.arange(96) * np.pi / 48
        canvas.shade((wide + u(0.12, 0.32) + 0.035 * np.cos(angle * 16)) * np.exp(1j * angle) - 0.22j, lit(hair))
    elif style == "bun":
        canvas.shade(_ellipse(complex(-yaw * 0.6, top - 0.1), u(0.18, 0.26), u(0.16, 0.22)), lit(hair))

    # Shoulders, neckline, neck and the shadow of the chin; ears, perhaps with rings; head; beard
    canvas.turn, neck, collar, drop, ring = zoom, u(0.22, 0.3), u(0.06, 0.17), u(0.82, 1.02), rng.choice((0, 0, 0, 255))
    canvas.shade(_smooth(_both([neck + 0.7j, 0.6 + u(0.78, 0.9) * 1j, 0.98 + 1.15j, 0.9 + 1.6j])), lit(cloth))
    for trim, tint in ((0.06, _mix(cloth, rng.choice((WHITE, BLACK)), u(0, 0.6))), (0, _mix(skin, shadow, 0.25))):
        canvas.shade(_smooth(_both([neck + 0.3j, neck + trim + 0.72j, collar + (drop + trim) * 1j])), lit(tint))
    canvas.fill(_arch(0.5j + yaw * 0.2, neck + 0.02, 0.1, 0.34), (40, 10, 20), 70)
    canvas.turn = upright
    for side in (-wide, wide):
        canvas.fill(_ellipse(side - yaw * 0.14 + 0.06j, 0.08, 0.15), _mix(skin, shadow, 0.5))
        canvas.fill(_ellipse(side * 1.04 - yaw * 0.14 + 0.24j, 0.035, 0.05), GOLD, ring)
    head = _both([0.2 - 0.68j, 0.41 - 0.5j, wide - 0.16j, wide - 0.02 + 0.12j, jaw + 0.42j, chin + (long - 0.04) * 1j])
    canvas.shade(_smooth([p + 0.16 * yaw * max(0, p.imag + 0.2) for p in head]), lit(skin))
    if r() < 0.35 and style not in ("bob", "long", "bun"):
        beard = _both([0.18 + 0.31j, 0.36 + 0.26j, 0.47 + 0.08j, jaw + 0.45j, chin + long * 1j])
        canvas.fill(_smooth([at(p.real, p.imag) for p in beard]), _mix(hair, shadow, 0.2), int(u(70, 255)))

    # On either side: cheek, eye socket, white, iris and pupil cut to the white, glint, lid, brow
    gaze, eye, spread = complex(u(-0.04, 0.04), u(-0.01, 0.01)), u(0.115, 0.145), u(0.225, 0.255)
    gap, slant, lift, bend, thick = u(0.05, 0.09), u(-0.18, 0.1), u(0.15, 0.21), u(0.02, 0.08), u(0.02, 0.05)
    for side in (-1, 1):
        centre, half = at(side * spread, 0), eye * (1 - 0.5 * max(0, side * yaw)) * complex(1, side * slant)
        canvas.fill(_ellipse(at(side * 0.27, 0.25), 0.14, 0.1), (230, 70, 80), 32)
        canvas.fill(_arch(centre - 0.02j, half * 1.1, gap + 0.05, gap), shadow, 120)
        canvas.fill(_arch(centre, half, gap, gap * 0.8), WHITE)
        for radius, colour in ((0.075, iris), (0.037, BLACK)):
            ball = _ellipse(gaze, radius, radius)
            edge = gap * (1 - (ball.real / eye) ** 2)
            canvas.fill(centre + ball.real + 1j * np.clip(ball.imag, -edge, 0.8 * edge), colour)
        canvas.fill(_ellipse(centre + gaze - 0.02 - 0.025j, 0.017, 0.017), WHITE)
        canvas.fill(_arch(centre, half * 1.1, gap + 0.035, -gap), _mix(shadow, BLACK, 0.75))
        canvas.fill(_arch(centre - lift * 1j, half * 1.15, bend + thick, -bend), _mix(hair, BLACK, 0.5))

    # Nose: its dark side, tip and nostrils; mouth: lips, the gap between them, teeth
    nose, wing, dark = at(0, 0.24) + yaw * 0.12, u(0.07, 0.11), math.copysign(1, -light)
    canvas.fill(np.array([at(0.04 * dark, -0.04), nose + dark * wing, nose + 0.02j, nose - 0.06j]), shadow, 90)
    canvas.fill(_arch(nose, wing, -0.01, 0.05), shadow, 230)
    canvas.fill(_ellipse(nose - 0.05j - dark * 0.02, 0.03, 0.05), WHITE, 50)
    smile, gape, full, reach = u(-0.03, 0.1), max(0, u(-0.1, 0.1)), u(0.03, 0.06), u(0.15, 0.23)
    mouth, upper = at(0, 0.44) - smile * 0.6j, -smile - full * 0.2
    canvas.fill(_arch(mouth, reach, full - smile, smile + gape + full * 1.3), lips)
    canvas.fill(_arch(mouth, reach * 0.92, upper, smile + gape + full * 0.4), (76, 18, 30))
    canvas.fill(_arch(mouth, reach * 0.82, upper, smile + gape * 0.7), WHITE, 255 if gape > 0.015 else 0)

    if hairline:  # hair in front of the head, and its sheen
        crown = _both([out + low * 1j, out - 0.3j, 0.36 + (top + 0.1) * 1j, 0.12 + top * 1j])
        xs, lower, side = (-0.4, -0.24, u(-0.1, 0.1), 0.24, 0.4), u(-0.05, 0.06), wide - 0.05 + (low - 0.02) * 1j
        front = [at(x, y + lower) for x, y in zip(xs, hairline[:: rng.choice((1, -1))])]
        hairs = _smooth(crown + [-side.conjugate()] + front + [side])
        if style == "spiky":
            hairs = hairs * (1 + 0.14 * (np.arange(len(hairs)) % 4 == 0) * (hairs.imag < -0.3))
        canvas.shade(hairs, lit(hair, 0.5))
        canvas.fill(_arch(complex(0.2 * light, top + 0.18), 0.24 * complex(1, 0.4 * light), 0.07, -0.02), WHITE, 36)
    if r() < 0.25:  # glasses: two tinted lenses, each with a rim between two ellipses, and the bridge
        frame, tint, across, down = _hue(r(), u(0, 0.8), u(0.1, 0.5)), int(u(0, 90)), u(0.16, 0.19), u(0.12, 0.16)
        for lens in (at(-spread, 0.02), at(spread, 0.02)):
            outer, inner = _ellipse(lens, across, down), _ellipse(lens, across - 0.035, down - 0.035)
            canvas.fill(inner, frame, tint)
            canvas.fill(np.concatenate([outer, outer[:1], inner[:1], inner[::-1]]), frame)
        canvas.fill(_arch(at(0, 0), 0.07, 0.04, 0), frame)
    return canvas.image.reduce(canvas.factor), label


# The columns, in hundredths: height of the back at five places from head to tail, and of the belly relative to it;
# tail: height, tips, notch, size of its lower half; dorsal and anal fin: front, tip, height, rear; ranges of hue,
# saturation and value; widths of stripe, bill and spines. Then how many bands, spots and gill slits; two of _TINTS.
_SPECIES = """
clownfish 18 32 37 28 14 100  24 76 84 100  -40 10 52 42    0 30 50 42   3 13 85 100 80 100   0  0 0  3  0 1  0 1
angelfish 18 40 52 40 14 100  28 84 74 100  -30 62 95 45  -30 62 95 45  10 22 30  90 80 100   0  0 0  4  0 1  1 0
shark     14 23 26 19  9  88  50 88 68  60  -22 10 58 16  -30  2 50 -5  52 66 10  45 50  75   0  0 0  0  0 4  1 1
trout     16 27 31 24 12  93  32 86 72 100  -18  8 50 16   10 36 42 34  12 30 30  75 65  95   7  0 0  0 14 1  3 0
puffer    28 46 50 36 12 120  17 74 78 100   10 42 52 42   15 42 56 42   8 19 50  95 75 100   0  0 8  0 18 1  1 2
goldfish  21 38 42 30 12 105  58 92 66 110  -30 10 68 34    0 36 64 34  -2 12 80 100 80 100   0  0 0  0  0 1  1 0
tang      20 40 44 36 12  98  36 88 70 100  -62 34 58 46  -40 34 58 46  58 74 75 100 75 100  15  0 0  0  0 1  1 2
sailfish  10 20 23 17  8  95  56 84 60 100  -55 -2 84 42    5 30 40 30  55 72 50  90 50  80   3 25 0  0  0 1  0 0
"""
SPECIES = {name: [int(word) for word in words] for name, *words in map(str.split, _SPECIES.strip().splitlines())}
_TINTS = WHITE, BLACK, GOLD, PINK  # of the marks and, mixed with the body's colour, of the fins
_SCALES = np.array([p for x in np.arange(-0.5, 0.5, 0.12) for p in (x - 0.3 - 0.6j, x + 0.3 + 0.6j, x - 0.26 - 0.6j)])


def draw_fish(rng: random.Random, size: int) -> tuple[Image.Image, int]:
    """A fish under water, seen from one side; the label is its species."""
    label, u, r = rng.randrange(len(SPECIES)), rng.uniform, rng.random
    *numbers, bands, spots, gills, mark, second = list(SPECIES.values())[label]
    v = [number / 100 for number in numbers]
    (share, high, tips, notch, low), dorsal, anal, (stripe, bill, spine) = v[5:10], v[10:14], v[14:18], v[24:]
    hue, bright, sun, lean = u(0.46, 0.64), u(0.6, 1), u(0.05, 0.45), u(-0.6, 0.6)
    water, deep = _hue(hue, u(0.4, 0.8), bright), _hue(hue + 0.04, 0.85, bright / 2)
    weed = _hue(u(0.22, 0.45), 0.7, u(0.3, 0.7))
    canvas = _Canvas(size, [_mix(water, WHITE, sun), _mix(water, WHITE, 0.5 - sun), deep, deep])
    for _ in range(rng.randrange(2, 5)):  # beams of light, weeds, bubbles
        x, width, radius, bubble = u(-1, 1), u(0.1, 0.3), u(0.025, 0.07), complex(u(-0.95, 0.95), u(-0.95, 0.8))
        canvas.fill(np.array([x - 1.1j, x + width - 1.1j, x + width * 2 + lean + 1.1j, x + lean + 1.1j]), WHITE, 24)
        canvas.fill(_arch(u(-1, 1) + 1j, u(0.3, 0.9) * complex(u(-0.3, 0.3), -1), u(-0.1, 0.25), 0.06), weed, 170)
        canvas.fill(_ellipse(bubble, radius, radius), WHITE, 60)
        canvas.fill(_ellipse(bubble - radius * (0.3 + 0.3j), radius * 0.4, radius * 0.4), WHITE, 140)

    # Tail and fins with their rays; the body will hide their roots
    tilt, tall, fins = u(-0.16, 0.16), u(0.88, 1.1), u(0.85, 1.1)
    canvas.turn = u(0.9, 1.04) * complex(math.cos(tilt), math.sin(tilt))
    canvas.shift = complex(u(-0.05, 0.05), u(-0.07, 0.07))
    colour = _hue(u(*v[18:20]), u(*v[20:22]), u(*v[22:24]))
    pale, dark = _mix(colour, WHITE, u(0.5, 0.85)), _mix(colour, (10, 8, 40), u(0.4, 0.65))
    fin = _mix(colour, _TINTS[second], u(0.2, 0.8))
    edge = ((0.42, 0.08), (0.62, 0.75 * high), (tips, high), ((tips + notch) / 2, 0.5 * high))
    upper, lower = ([complex(x, y * s * fins) for x, y in edge] for s in (-1, low))
    shapes = [[*upper, notch + 0j, *reversed(lower)]]
    for sign, (front, tip, rise, rear) in ((-1j, dorsal), (1j, anal)):
        rise *= sign * fins * tall
        shapes.append([front, 0.6 * front + 0.4 * tip + 0.8 * rise, tip + rise, 0.4 * tip + 0.6 * (rear + rise), rear])
    for points in shapes:
        canvas.shade(_smooth(points), [fin, _mix(fin, pale, 0.5), _mix(fin, dark, 0.4), fin])
        root = 0.05 * (points[0] + points[-1])
        rays = [(10 * root, 0.9 * a + root, 0.8 * a + 0.1 * b + root) for a, b in zip(points[1:-1], points[2:-1])]
        canvas.fill(np.ravel(rays) + 0j, dark, 100)

    # Bill and spines, then the body, paler below, with its marks, which are cut to its outline
    back = [complex(x, -y * tall) for x, y in zip((-0.66, -0.38, -0.06, 0.24, 0.46), v)]
    belly = [complex(p.real, -p.imag * share) for p in reversed(back)]
    body = _smooth([-0.78 + 0.02j, *back, 0.56 - 0.05j, 0.56 + 0.05j, *belly])
    canvas.fill(np.array([-0.7 - 0.06j, -0.78 - bill + 0.02j, -0.7 + 0.06j]), dark)
    canvas.fill(body * (1 + spine * (np.arange(len(body)) % 2) * (abs(body.real) < 0.5)), pale)
    before, outside = canvas.image.copy(), Image.new("L", canvas.image.size, 255)
    ImageDraw.Draw(outside).polygon(canvas.pixels(body).view(float).tolist(), 0)
    canvas.shade(body, [_mix(colour, dark, 0.4), _mix(colour, dark, 0.4), pale, pale])
    canvas.fill(_SCALES, dark, 45)
    canvas.fill(_SCALES.conj(), dark, 45)
    shift, width = u(-0.06, 0.06), u(0.05, 0.09)
    for k in range(bands):
        centre = -0.38 + shift + 1.2 * k / bands
        canvas.fill(_arch(centre, 0.7j, width + 0.025, width / 2 + 0.025), BLACK)
        canvas.fill(_arch(centre, 0.7j, width, width / 2), _TINTS[mark])
    canvas.fill(_arch(0.05 + shift * 1j, 0.55 - 0.03j, stripe, stripe / 2), _TINTS[mark], 160 if stripe > 0 else 0)
    for _ in range(spots):
        radius = u(0.02, 0.055)
        canvas.fill(_ellipse(complex(u(-0.45, 0.5), u(-0.4, 0.1)), radius, radius), dark, 210)
    for k in range(gills):
        canvas.fill(_arch(-0.42 + 0.06 * k + 0.02j, 1.2 * back[0].imag * 1j, 0.05, -0.02), dark, 150)
    canvas.image.paste(before, mask=outside)

    # Eye, mouth and the fin on the side
    eye, look = u(0.065, 0.09), complex(-0.57, 0.35 * back[0].imag)
    canvas.fill(_ellipse(look, eye, eye), WHITE)
    canvas.fill(_ellipse(look, eye * 0.68, eye * 0.68), BLACK)
    canvas.fill(_ellipse(look - eye * (0.25 + 0.25j), eye * 0.25, eye * 0.25), WHITE)
    canvas.fill(_arch(-0.74 + 0.08j, 0.08 + 0.02j, 0, 0.035), _mix(dark, BLACK, 0.5))
    canvas.fill(_arch(-0.12 + 0.12j, 0.16 * complex(1, u(0.1, 0.9)), 0.05, 0.08 * fins), _mix(fin, dark, 0.3), 220)
    picture = canvas.image.reduce(canvas.factor)
    return (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if r() < 0.5 else picture), label


# ---- datasets and folders -------------------------------------------------------------------------------------------

DRAWN = {"digits": (draw_digit, 1), "faces": (draw_face, 3), "fish": (draw_fish, 3)}  # name: (draw function, channels)
DRAWN_COUNT, DRAWN_SEED = 6_000, 0
STACKED = {"stacked": "digits", "stacked-mnist": "mnist"}  # name: the set its digits come from
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}
NAMES = [*DRAWN, *STACKED, *TORCHVISION]
FILE_TYPES = Image.registered_extensions()  # {".jpg": "JPEG", ...} of the installed Pillow
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
           if name in FILE_TYPES.values()]
SUFFIXES = tuple(suffix for suffix in FILE_TYPES if FILE_TYPES[suffix] in FORMATS)
ACCEPTED = f"{', '.join(NAMES)} or a folder with pictures ({' '.join(FORMATS)})"
CELEBA_BOX = (35, 55, 143, 163)  # the central 108 x 108 of 178 x 218, as in DCGAN and shekkizh/EBGAN.tensorflow
SYSTEM_NAMES = ("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information",
                "lost+found", "lost.dir", "__macosx", "network trash folder", "site-packages", "node_modules")


def load_images(source: str, image_size: int, channels: int | None = None, root: str = "data",
                quiet: bool = False) -> Tensor:
    """Load all pictures of `source` in a fixed order: uint8 [N, C, image_size, image_size], 0 to 255.

    source: a generated set (digits, faces, fish), three digits as red, green and blue (stacked, stacked-mnist), a
        torchvision training set (mnist, fashion, cifar10, celeba; kept in `root`), or a folder with its subfolders.
        Hidden and system folders, folders that hold a run, and `root` are left out.
    channels: 1 (luminance) or 3. None or 0 means 1 if every pixel is grey, and 3 otherwise. Greyscale of more than
        8 bits is scaled with one range for the whole folder: white is the largest value, and black is 0, or the
        smallest value if that is negative.
    quiet: print nothing. Otherwise lines on stderr count the pictures and name those that cannot be read.

    Generated sets, CelebA and folders are decoded once into root/cache and memory-mapped, so they may be larger than
    the memory. Writing to the tensor does not change the cache. Raises ValueError (a wrong argument, no usable picture)
    or OSError (a download fails, `root` cannot be written).
    """
    channels = channels or 0
    if type(image_size) is not int or image_size < 1 or channels not in (0, 1, 3):
        raise ValueError(f"image_size must be a positive int, not {image_size!r}; channels 1 or 3, not {channels!r}")
    source, root = os.path.expanduser(source), os.path.expanduser(root)
    if source in NAMES and os.path.isdir(source) and os.path.abspath(root) != os.getcwd():
        raise ValueError(f"{source!r} is a dataset and also a folder here: give ./{source} to use the folder, or "
                         "rename the folder to use the dataset")
    if source in STACKED:
        if channels == 1:
            raise ValueError(f"{source!r} is always in colour")
        digits = load_images(STACKED[source], image_size, 1, root, quiet)
        return digits[_stacked(len(digits))].squeeze(2)
    if source in DRAWN:
        draw, drawn_channels = DRAWN[source]
        pictures = _PictureSet(source, [f"{DRAWN_SEED}-{index}" for index in range(DRAWN_COUNT)],
                               lambda seed: draw(random.Random(seed), image_size)[0],
                               channels or drawn_channels)
    elif source == "celeba":
        names, folder = list(_torchvision(source, root).filename), os.path.join(root, "celeba", "img_align_celeba")
        pictures = _PictureSet(source, names, lambda name: _open_picture(folder, name).crop(CELEBA_BOX), channels or 3)
    elif source in TORCHVISION:
        data = torch.as_tensor(_torchvision(source, root).data)  # [N, 28, 28] or [N, 32, 32, 3]
        from torchvision.transforms import functional  # here, because torchvision doubles the start-up time
        images = data.permute(0, 3, 1, 2) if data.ndim == 4 else functional.pad(data[:, None], [2])
        images = functional.rgb_to_grayscale(images) if channels == 1 else images
        parts = images.split(1000)  # because resizing takes more memory than its result
        images = torch.cat([functional.resize(part, [image_size] * 2, antialias=True) for part in parts])
        return images.expand(-1, channels or -1, -1, -1).contiguous()
    elif os.path.isdir(source):
        found, remark = _find_pictures(source, root)
        name, open_file = os.path.abspath(source), functools.partial(_open_picture, source)
        pictures = _PictureSet(name, found, open_file, channels, remark)
    else:
        raise ValueError(f"no such dataset or folder: {source!r}; give {ACCEPTED}")
    return _load_through_cache(pictures, image_size, root, quiet)


def _stacked(count: int) -> Tensor:
    """Choose the red, green and blue digits of 25,600 stacked pictures from `count` digits: int64 [25600, 3]."""
    return torch.randint(count, (25_600, 3), generator=torch.Generator().manual_seed(0))


def _torchvision(source: str, root: str) -> torch.utils.data.Dataset:
    """Open the training split of a torchvision set, and download it if it is not in `root`. Raises OSError."""
    try:
        from torchvision import datasets
        data = getattr(datasets, TORCHVISION[source])
        with suppress(RuntimeError):  # not there
            return data(root, download=False)
        return data(root, download=True)
    except Exception as error:  # no network, a quota, a broken archive, a missing package...
        hint = "--data-root names the folder that holds it; for other pictures, --data FOLDER"
        raise OSError(f"{source} failed ({_reason(error)}); {hint}") from error


def _find_pictures(folder: str, root: str) -> tuple[dict[str, list], str]:
    """Find the pictures in and below `folder`: {name: [bytes, time]}, sorted, and a remark on what is left out."""
    if os.path.exists(os.path.join(folder, "samples", "real.png")):
        raise ValueError(f"{folder!r} holds a run, and its samples are not data; move the pictures to another folder")
    found, unread, left_out, seen, start = {}, Counter(), Counter(), set(), len(os.path.join(folder, ""))
    # A folder that cannot be listed counts as a picture that cannot be read, so that it is named
    walk = os.walk(folder, followlinks=True, onerror=lambda error: found.update({error.filename[start:]: []}))
    for where, folders, files in walk:
        folders.sort()  # so that a folder with two paths is always reached by the same path
        real = os.path.realpath(where)
        reason = _reason_to_leave_out(where, root) if where != folder else ""
        if reason:
            left_out[reason] += 1
        if reason or real in seen:  # a link can lead to a folder that has been read, or to one above it
            folders.clear()
            continue
        seen.add(real)
        for path in [os.path.join(where, name) for name in files]:
            if reason := _reason_to_leave_out(path):
                left_out[reason] += 1
            elif path.lower().endswith(SUFFIXES):
                try:
                    status = os.stat(path)
                    found[path[start:]] = [status.st_size, status.st_mtime_ns]
                except OSError:  # a broken link, or deleted meanwhile: it will be skipped and named
                    found[path[start:]] = []
            else:
                unread[ascii(Path(path).suffix.lower())[1:-1][:9] or "unnamed"] += 1
    most = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.most_common(5))
    remark = f", {unread.total():,} files not read ({most})" if unread else ""
    if left_out:
        remark += f", left out: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}"
    return dict(sorted(found.items())), remark


def _reason_to_leave_out(path: str, root: str | None = None) -> str:
    """Say why a file, or a folder if `root` is given, does not count as data. Return "" if it does."""
    name = os.path.basename(path).lower()
    if name.startswith(".") or name in SYSTEM_NAMES:
        return "hidden or system"
    if root and os.path.realpath(path) == os.path.realpath(root):
        return "data root"
    if root and any(os.path.exists(os.path.join(path, sign)) for sign in ("checkpoint.pt", "samples/real.png")):
        return "run"
    return ""


# ---- decoding and its cache ------------------------------------------------------------------------------------------

MAX_PIXELS = 64_000_000  # decoding takes 4 to 24 bytes a pixel
# Pillow refuses only above twice this, so that draft() can still shrink a large JPEG
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28  # bytes of text and profile in a PNG
# EXIF orientation: the Image.Transpose that undoes it. ImageOps.exif_transpose fails on odd entries elsewhere in EXIF
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
CACHE_VERSION = 4  # raise it when a drawing, to_array or the cache changes
# MAP_NORESERVE (0x4000), because Linux would otherwise refuse to map a file larger than the memory
COPY_ON_WRITE = {"access": mmap.ACCESS_COPY} if sys.platform != "linux" else {"flags": mmap.MAP_PRIVATE | 0x4000}


def _open_picture(folder: str, name: str) -> Image.Image:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):  # opening a pipe would wait forever
        raise OSError("broken link, closed folder or not a file")
    return Image.open(path, formats=FORMATS)


def to_array(image: Image.Image, image_size: int, channels: int, levels: tuple = (0, 255)) -> np.ndarray:
    """Convert a picture of any mode and shape to uint8 [channels, image_size, image_size].

    The picture is converted from its colour profile to sRGB, its central square is resized (bicubic, antialiased) and
    turned as EXIF says, and white is put behind transparent parts. `levels` are the values of black and white in
    greyscale of more than 8 bits. Raises ValueError above MAX_PIXELS.
    """
    image.draft(None, (2 * image_size, 2 * image_size))  # let libjpeg decode a large JPEG at a reduced size
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    image.load()
    orientation, profile = 1, image.info.get("icc_profile")
    with suppress(Exception):  # where EXIF cannot be read, the picture is upright
        orientation = image.getexif().get(0x0112)
    if image.mode[0] in "IF":  # scaled here, because Pillow's own conversion clips at 255
        black, white = levels
        grey = np.nan_to_num(np.asarray(image, np.float32), nan=black).clip(black, white) - black
        image = Image.fromarray((grey * (255 / (white - black or 1))).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    image = ImageOps.fit(_to_srgb(image, profile), (image_size, image_size))
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    return np.ascontiguousarray(np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert a picture (L, LA, RGB, RGBA, CMYK) from its colour profile to sRGB, or leave it as it is."""
    if profile:
        with suppress(Exception):  # a damaged profile, one for another mode, or a Pillow without ImageCms
            from PIL import ImageCms
            embedded, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            opaque = image.convert(image.mode.removesuffix("A"))
            colour = ImageCms.profileToProfile(opaque, embedded, srgb, outputMode="RGB")
            if image.mode in ("LA", "RGBA"):
                colour.putalpha(image.getchannel("A"))
            return colour
    return image


def _range_of_levels(image: Image.Image) -> tuple[float, float]:
    """Return the range of values, with 0 included, of greyscale of more than 8 bits. Other pictures give (0, 0)."""
    if image.mode[0] not in "IF" or image.width * image.height > MAX_PIXELS:
        return 0.0, 0.0
    values = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    return float(values.min(initial=0)), float(values.max(initial=0))


class _PictureSet(NamedTuple):
    """Pictures to decode."""

    name: str  # a dataset, or the path of a folder
    items: Collection[str]  # the pictures' names; in a dict, a value changes when its file does
    open: Callable[[str], Image.Image]  # opens or draws the picture of a name
    channels: int  # 1 or 3, or 0 for 1 if all pixels are grey
    remark: str = ""  # ends the summary line


def _load_through_cache(pictures: _PictureSet, size: int, root: str, quiet: bool) -> Tensor:
    """Map a set into memory: uint8 [N, C, H, W]. Decode it first, unless its folder in root/cache is there."""
    def report(text: str, end: str = "\n") -> None:
        if not quiet:
            _print_to_stderr(f"{repr(os.path.basename(pictures.name))[1:-1]}: {text}", end)

    shape, started, how = (pictures.channels or 3, size, size), time.monotonic(), "from cache"
    name = re.sub("[^A-Za-z0-9]+", "-", os.path.basename(pictures.name))[:40]
    keys = pictures.name, [CACHE_VERSION, pictures.items]
    name_hash, content_hash = (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] for key in keys)
    family = f"{name}-{name_hash}-{size}x{pictures.channels or 'any'}-"
    entry = Path(root, "cache", family + content_hash)  # a folder
    if entry.exists() and not _is_whole(entry, shape):
        shutil.rmtree(entry, ignore_errors=True)
    if not entry.exists():
        # Several processes may do this at once, so each writes its own folder and renames it at the end
        unfinished = entry.with_name(f"{entry.name}.{os.getpid()}-{time.time_ns()}.tmp")
        try:
            notes = _decode(pictures, shape, unfinished / "pixels.u8", report)
            if len(notes["skipped"]) > 10:
                report(f"and {len(notes['skipped']) - 10:,} more, listed in {entry / 'notes.json'}")
            with atomic_write(unfinished / "notes.json") as file:
                file.write(json.dumps(notes).encode())
            with suppress(OSError):  # another process has finished first
                _replace(unfinished, entry)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        how = f"decoded in {time.monotonic() - started:.0f} s"
        _remove_old(family, entry)
    notes = json.loads((entry / "notes.json").read_text())
    with open(entry / "pixels.u8", "rb") as file:
        images = torch.frombuffer(mmap.mmap(file.fileno(), 0, **COPY_ON_WRITE), dtype=torch.uint8).view(-1, *shape)
    report(f"{len(images):,} pictures {how}, {notes['remark']}{pictures.remark}")
    return images[:, :1] if notes["grey"] else images


def _is_whole(entry: Path, shape: tuple[int, int, int]) -> bool:
    """Check that a cache entry has its notes, and as many pixels as they say."""
    with suppress(Exception):
        notes = json.loads((entry / "notes.json").read_text())
        return (entry / "pixels.u8").stat().st_size == notes["count"] * math.prod(shape)
    return False


def _remove_old(family: str, entry: Path) -> None:
    """Remove outdated entries of a set, and what killed processes left, unless they were written in the last hour."""
    for old in [*entry.parent.glob(f"{family}*"), *entry.parent.glob("*.tmp")]:
        with suppress(OSError):
            written = max(path.stat().st_mtime for path in [old, *old.iterdir()])
            if old != entry and time.time() - written > 3600:  # by then no process is writing or opening it
                shutil.rmtree(old)


def _decode(pictures: _PictureSet, shape: tuple[int, int, int], path: Path, report: Callable) -> dict:
    """Decode all pictures into a file of pixels, and return notes on them."""
    count, dark, skipped, grey, black, white = 0, 0, {}, not pictures.channels, 0.0, 0.0
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd metadata
        if pictures.name not in NAMES:
            for low, high in _visit_all(pictures, _range_of_levels, {}, report):
                black, white = min(black, low), max(white, high)
        with atomic_write(path) as file:
            convert = functools.partial(to_array, image_size=shape[1], channels=shape[0], levels=(black, white))
            for array in _visit_all(pictures, convert, skipped, report):
                file.write(array)
                count += 1
                # JPEG and colour conversion leave small differences
                grey = grey and bool(np.ptp(array, axis=0).max() <= 3)
                if array.max() < 64:
                    dark += 1
    for name, reason in list(skipped.items())[:10]:
        report(f"skipped {name!r}: {reason}")
    remark = f"{len(skipped):,} skipped"
    if not count:
        raise ValueError(f"no usable picture in {pictures.name!r} ({remark}{pictures.remark}); give {ACCEPTED}")
    if black < white:
        remark += f", grey levels above 8 bits: {black:g} to {white:g} scaled to 0 to 255"
    if dark:
        remark += f", {dark:,} nearly black (no value above 63), as when 12 bits are stored in 16"
    return dict(count=count, grey=grey, remark=remark, skipped=skipped)


def _visit_all(pictures: _PictureSet, task: Callable, skipped: dict[str, str], report: Callable) -> Iterator:
    """Yield task(picture) for every picture in order. Where that fails, add {name: reason} to `skipped` instead."""
    def visit(name: str) -> object:
        try:
            with pictures.open(name) as image:
                return task(image)
        except MemoryError:
            raise
        except Exception as error:  # damaged files raise almost anything
            return error

    names = list(pictures.items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(names), 256):  # in portions, because pool.map queues all that it is given
            report(f"picture {first:,} of {len(names):,} ", end="\r")
            portion = names[first:first + 256]
            for name, result in zip(portion, pool.map(visit, portion)):
                if isinstance(result, Exception):
                    skipped[name] = _reason(result)
                else:
                    yield result


# ---- batches --------------------------------------------------------------------------------------------------------


def normalise(images: Tensor) -> Tensor:
    """Scale uint8 [N, C, H, W] to floats in [-1, 1], in the channels-last layout, which makes convolutions fast."""
    return images.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def reference_images(images: Tensor, count: int) -> Tensor:
    """Choose at most `count` distinct images of uint8 [N, C, H, W], evenly spread and in order, and normalise them."""
    count = min(count, len(images))
    chosen = images[torch.arange(count) * (len(images) - 1) // max(1, count - 1)]
    distinct = {image.cpu().numpy().tobytes(): image for image in chosen}  # a dict keeps one of equal images
    return normalise(torch.stack(list(distinct.values())))


class Batches:
    """Random batches [batch_size, C, H, W] of a uint8 dataset [N, C, H, W], normalised, on `device`.

    Call `refill` before every step. Then `batches()`, or `batches(i)` for i < `per_step`, works inside a CUDA graph.
    Pictures are drawn with replacement. With `hflip`, each is flipped with probability 0.5. A `resident` dataset stays
    on the device, by default if it takes at most half of the free memory, and every call draws a new batch. Otherwise
    `refill` copies the next batches, and `batches(i)` returns the same pictures until then.
    """

    def __init__(self, images: Tensor, batch_size: int, device: torch.device, hflip: bool = False, per_step: int = 1,
                 resident: bool | None = None):
        if resident is None:
            resident = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        self.batch_size, self.device, self.hflip = batch_size, device, hflip
        self.images = images.to(device) if resident else images
        self.buffer = None
        if not resident:
            self.buffer = torch.empty((per_step, batch_size, *images.shape[1:]), dtype=torch.uint8, device=device)

    def _draw(self) -> Tensor:
        return self.images[torch.randint(len(self.images), (self.batch_size,), device=self.images.device)]

    def refill(self) -> None:
        """Copy the next batches to the device, unless the whole dataset is there."""
        if self.buffer is None:
            return
        for slot in self.buffer:
            batch = self._draw()
            slot.copy_(batch.pin_memory() if self.device.type == "cuda" else batch, non_blocking=True)

    def __call__(self, number: int = 0) -> Tensor:
        batch = self._draw() if self.buffer is None else self.buffer[number]
        if self.hflip:
            flipped = torch.rand(self.batch_size, device=self.device) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
        return normalise(batch)


def augment(images: Tensor, *, rotation: float = 25, shift: tuple = (0.05, 0.1), shear: float = 10,
            zoom: tuple = (0.95, 1.2), brightness: tuple = (0.8, 1.4), gain: float = 0.4) -> Tensor:
    """Rotate, shift, shear, zoom, brighten and tint each of the images [N, C, H, W] in [-1, 1] by random amounts.

    rotation, shear: up to this many degrees either way. shift: up to these fractions of width and height either way.
    zoom: the range of the factor of size. brightness: one factor for all channels, drawn from this range. gain: one
    factor for each channel, from a triangular distribution on [1 - gain, 1 + gain]. Black counts as 0 and stays black.
    Pixels are resampled once, bilinearly. Beyond its edges the picture is mirrored.
    """
    chance = torch.rand(len(images), 6 + 2 * images.shape[1], device=images.device)
    turn, lean, size, light, right, down = chance[:, :6].unbind(dim=1)
    turn, lean = ((2 * u - 1) * math.radians(most) for u, most in ((turn, rotation), (lean, shear)))
    size, light = (low + (high - low) * u for u, (low, high) in ((size, zoom), (light, brightness)))
    cos, sin, slope = turn.cos() / size, turn.sin() / size, lean.tan()
    across, along = ((4 * u - 2) * most for u, most in zip((right, down), shift))  # the frame is 2 wide and 2 high
    # The affine map from a pixel of the result to its source; both frames go from -1 to 1
    rows = [cos, sin + slope * cos, across, -sin, cos - slope * sin, along]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), images.shape, align_corners=False)
    moved = torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    tint = 1 + gain * (chance[:, 6:].unflatten(1, (2, -1)).sum(dim=1) - 1)
    lit = ((moved + 1) * (light[:, None] * tint)[:, :, None, None] - 1).clamp(-1, 1)
    return lit.contiguous(memory_format=torch.channels_last)


# ---- pictures and measures -------------------------------------------------------------------------------------------

BLUES = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))  # ColorBrewer, light to dark
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, safe for the colour-blind


def to_bytes(images: Tensor) -> Tensor:
    """Scale floats in [-1, 1] to uint8 in [0, 255], rounded and clamped. Return uint8 unchanged."""
    if images.dtype == torch.uint8:
        return images
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, zoom: int | None = None) -> None:
    """Write images [N, C, H, W] (C is 1 or 3, values as for `to_bytes`) to one PNG, row by row with white gaps.

    The grid is about square unless `columns` is given. Images [R, N, C, H, W] make R rows. Pixels are enlarged by
    `zoom`, by default by up to 4 as long as a row fits into 1024 pixels. Raises OSError, and ValueError for no image.
    """
    from torchvision.utils import make_grid  # here, because importing torchvision doubles the start-up time

    if images.ndim == 5:
        images, columns = images.flatten(0, 1), images.shape[1]
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"a grid needs images [N, C, H, W] with N > 0, got {tuple(images.shape)}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    zoom = zoom or max(1, min(4, 1024 // (columns * images.shape[-1])))
    pixels = to_bytes(images).cpu().repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = Image.fromarray(make_grid(pixels, nrow=columns, pad_value=255).permute(1, 2, 0).numpy())
    with atomic_write(path) as file:
        grid.save(file)


def save_pngs(images: Tensor, folder: str | Path, first: int = 0) -> None:
    """Write images [N, C, H, W] (as for `save_grid`) to folder/00000.png and so on from `first`. Raises OSError.

    To export real images for an FID tool:
    `python -c "import common; common.save_pngs(common.load_images('faces', 32), 'real')"`
    """
    arrays = to_bytes(images).cpu().permute(0, 2, 3, 1).squeeze(3).numpy()  # [N, H, W] of one channel

    def save(i: int) -> None:
        with atomic_write(Path(folder, f"{first + i:05d}.png"), sync=False) as file:
            Image.fromarray(arrays[i]).save(file, compress_level=1)

    with ThreadPoolExecutor() as pool:  # Pillow compresses outside the interpreter lock
        list(pool.map(save, range(len(arrays))))  # list() raises the error of a thread


def save_gif(frames: list, path: str | Path, ms: int = 120, hold: int = 1500, limit: int = 60) -> None:
    """Write frames (paths of pictures, or PIL images) to a looping GIF.

    Paths that cannot be read are skipped. Beyond `limit`, an evenly spaced subset is kept. Each frame lasts `ms`
    milliseconds, and the last one `hold`. All get the size of the last one, reduced by a whole factor to about 512
    pixels. Raises OSError, and ValueError without a frame.
    """
    kept = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(limit, len(frames)))]
    images = []
    for frame in kept:
        with suppress(OSError, SyntaxError):  # Pillow raises both for damaged files
            images.append((frame if isinstance(frame, Image.Image) else Image.open(frame)).convert("RGB"))
    if not images:
        raise ValueError("a GIF needs at least one frame")
    size = images[-1].size
    factor = max(1, round(max(size) / 512))
    # Each frame has its own palette, because colours drift during training. Dithering would flicker.
    images = [image.resize(size).reduce(factor).quantize(256, dither=Image.Dither.NONE) for image in images]
    durations = [ms] * (len(images) - 1) + [hold]
    with atomic_write(path) as file:
        images[0].save(file, save_all=True, append_images=images[1:], duration=durations, loop=0)


def density_picture(points: Tensor, extent: float, size: int = 200, blur: float = 0.02) -> Image.Image:
    """Draw the density of points [N, 2] over [-extent, extent]^2, with y upwards, in size x size pixels.

    The density is a histogram, smoothed by a Gaussian of standard deviation blur * extent. Colour follows its square
    root, so that stray points show, and is darkest at the peak. Points outside are left out.
    """
    x, y = points.detach().float().cpu().numpy().T
    counts = np.histogram2d(y, x, size, [(-extent, extent)] * 2)[0][::-1]  # drops NaN too
    place = np.arange(size) * (2 / size / blur)
    kernel = np.exp((place[:, None] - place) ** 2 / -2)
    density = kernel @ counts @ kernel
    level = np.sqrt(density / max(density.max(), 1e-9))
    channels = [np.interp(level, np.linspace(0, 1, len(BLUES)), channel) for channel in zip(*BLUES)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def save_panels(panels: list[Image.Image], titles: list[str], path: str | Path) -> None:
    """Write pictures of one size side by side. Raises OSError, and ValueError unless there is a title for each."""
    (width, height), gap, head = panels[0].size, 8, 38
    strip = Image.new("RGB", (len(panels) * (width + gap) + gap, head + height + gap), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(24)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = gap + i * (width + gap)
        strip.paste(panel, (left, head))
        draw.text((left + width / 2, head / 2), title, "#333333", font, "mm")
    with atomic_write(path) as file:
        strip.save(file)


def save_table(rows: list[dict], path: str | Path) -> None:
    """Write rows with the same keys to a CSV file. Values that are not finite become empty cells. Raises OSError."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    table.writeheader()
    for row in rows:
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        table.writerow({name: value if isinstance(value, int) else f"{value:.6g}" for name, value in finite.items()})
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def save_chart(rows: list[dict], path: str | Path, panels: list[tuple[str, ...]]) -> None:
    """Draw values of the rows against their "step", with a panel for each tuple of at most 6 names.

    Two panels share a row. Positive values that span more than two decades get a logarithmic axis. Values that are not
    finite are skipped, and the line joins their neighbours. Raises OSError, and ValueError if a name is missing.
    """
    if rows and (missing := {"step", *sum(panels, ())} - rows[0].keys()):
        raise ValueError(f"the rows have no {', '.join(sorted(missing))}")
    size = 1680 * min(2, len(panels)), 1000 * math.ceil(len(panels) / 2)
    chart = Image.new("RGB", size, "white")  # four times too large, because Pillow does not smooth lines itself
    for i, names in enumerate(panels):
        lines = {}
        for name in names:
            points = np.array([(row["step"], row[name]) for row in rows], float).reshape(-1, 2)
            lines[name] = points[np.isfinite(points[:, 1])]
        _draw_panel(ImageDraw.Draw(chart), i % 2 * 1680 + 248, i // 2 * 1000 + 168, lines)
    with atomic_write(path) as file:
        chart.reduce(4).save(file)


def _draw_panel(draw: ImageDraw.ImageDraw, left: int, top: int, lines: dict[str, np.ndarray]) -> None:
    """Draw a panel of `save_chart`: a grid with labels, the lines (points [N, 2]), and a legend above them."""
    right, bottom, font, place = left + 1312, top + 632, ImageFont.load_default(48), left
    points = np.concatenate([*lines.values()])
    last = points[:, 0].max(initial=1)
    low, high = (points[:, 1].min(), points[:, 1].max()) if len(points) else (0, 1)
    log = low > 0 and high > 100 * low
    if log:
        low, high = math.log10(low), math.log10(high)
    elif high - low <= 1e-6 * abs(high):
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    to_x, to_y = (right - left) / last, (top - bottom) / (high - low)
    for tick in _ticks(0, last, 1):
        x = left + tick * to_x
        draw.line((x, top - 32, x, bottom + 32), "#E8E8E8", 4)
        draw.text((x, bottom + 56), f"{tick:,.6g}", "#444444", font, "mt")
    for tick in _ticks(low, high, 1 if log else 0):
        y = bottom + (tick - low) * to_y
        draw.line((left, y, right, y), "#E8E8E8", 4)
        draw.text((left - 28, y), f"{10**tick if log else tick:,.6g}", "#444444", font, "rm")
    draw.text(((left + right) / 2, bottom + 188), "step", "#444444", font, "mb")
    for (name, points), colour in zip(lines.items(), LINES):
        x, y = points.T
        y = np.log10(y) if log else y
        if len(points):
            draw.line([*zip(left + x * to_x, bottom + (y - low) * to_y)], colour, 7, "curve")
        draw.line((place, top - 100, place + 64, top - 100), colour, 12)
        draw.text((place + 84, top - 100), name, "black", font, "lm")
        place += draw.textlength(name, font) + 152


def _ticks(low: float, high: float, smallest: float) -> list[float]:
    """Choose two to six round values from low to high, at least `smallest` apart."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    unit = max(smallest, next(m * unit for m in (1, 2, 5, 10) if m * unit * 5 >= (high - low) * 0.999))
    return [k * unit for k in range(math.ceil(low / unit - 1e-6), math.floor(high / unit + 1e-6) + 1)]


def _flatten(samples: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as floats [N, D] and [M, D], uint8 scaled to [-1, 1], on the CPU, since some devices lack `pdist`."""
    if min(len(samples), len(data)) < 1 or samples.shape[1:] != data.shape[1:]:
        raise ValueError(f"need samples and data of one shape, got {tuple(samples.shape)}, {tuple(data.shape)}")
    sides = (side.detach().cpu().reshape(len(side), -1) for side in (samples, data))
    return tuple(side.float() / 127.5 - 1 if side.dtype == torch.uint8 else side.float() for side in sides)


def sliced_wasserstein(samples: Tensor, data: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-1 distance between samples [N, ...] and data [M, ...] of one shape. Equal sets give 0.

    SW = mean over unit directions t of W1(t.x, t.y). In one dimension, W1 = integral over q in [0, 1] of
    |quantile_x(q) - quantile_y(q)|, which is exact for any N and M (Rabin et al. 2011; Bonneel et al. 2015). A shift by
    v gives about 0.8 |v| / sqrt(D) in D dimensions, so for images of any size the unit is a pixel value on [-1, 1].
    The directions depend on `seed` alone. Raises ValueError unless N, M > 0 and the shapes match.
    """
    x, y = _flatten(samples, data)
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(seed)).to(x)
    directions /= directions.norm(dim=0)
    x, y = (x @ directions).sort(dim=0).values, (y @ directions).sort(dim=0).values
    n, m = len(x), len(y)
    # Quantile functions jump at i/N and j/M and are flat in between: sum over those pieces, in whole units of 1/(N M).
    jumps = torch.cat([torch.arange(n + 1) * m, torch.arange(m) * n]).unique()
    gaps = (x[jumps[:-1] // m] - y[jumps[:-1] // n]).abs().mean(dim=1)
    return (gaps @ jumps.diff().to(x) / (n * m)).item()


def diversity_ratio(samples: Tensor, data: Tensor) -> float:
    """Mean Euclidean distance over pairs of samples [N, ...], divided by the mean over pairs of data [M, ...].

    It is 0 if all samples are one image (mode collapse), 1 if they are as varied as the data, and NaN for one sample or
    equal data. The cost grows with N^2; a few hundred suffice. Raises ValueError unless N, M > 0 and the shapes match.
    """
    x, y = _flatten(samples, data)
    varied = torch.pdist(y).mean().item()
    return torch.pdist(x).mean().item() / varied if varied > 0 else math.nan


@torch.no_grad()
def compare(samples: Tensor, data: Tensor) -> dict[str, float]:
    """Return both measures of samples against data. The samples are clamped to [-1, 1], as they are in pictures."""
    samples = samples.clamp(-1, 1)
    return dict(swd=sliced_wasserstein(samples, data), diversity=diversity_ratio(samples, data))
