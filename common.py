"""Data, pictures and run files of the four scripts: images in, batches, pictures out, two measures, checkpoints."""

import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Write a file completely or not at all: `with atomic_write("a.pt") as file: torch.save(state, file)`.

    `file` is a hidden temporary file beside `path` with the same suffix. When the block ends, it is synced to the disk
    (unless `sync` is off) and renamed to `path`. When anything fails, `path` stays as it was and the temporary file is
    removed; a failed write is an OSError of one line that names `path`. Only one process may write a path at a time.
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
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the reason, such as a full disk, behind a RuntimeError
        reason = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        raise OSError(f"cannot write {ascii(str(path))}: {_reason(reason)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def file_lock(path: str | Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a file. Where another process has it: wait, or else OSError. No lock where files have none."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with suppress(ImportError):  # on Windows
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise OSError(f"another process is using {str(folder)!r}") from None
                print(f"waiting for another process that is using {ascii(str(folder))}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # on some network drives
                pass
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, in one short ASCII line without the path."""
    text = getattr(error, "strerror", None) or str(error).partition(" file '")[0]
    return ascii(f"{type(error).__name__}: {text}")[1:-1][:160]


# ---- drawings --------------------------------------------------------------------------------------------------------

# Procedurally generated datasets. Pictures are drawn two or three times too large, in coordinates from -1 to 1, and
# then shrunk, so that they show the same scene at every size. Shapes are arrays of complex numbers x + iy: a product
# turns and zooms a shape, a sum shifts it.
Colour = tuple[int, int, int]
WHITE, BLACK, GOLD, PINK = (255, 252, 246), (14, 10, 16), (255, 206, 50), (240, 90, 110)
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
        end, flare = u(0.4, 0.6) + 0.55 * (style == "long"), out + u(0, 0.12)
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
    canvas.fill(_arch(mouth, reach * 0.82, upper, smile + gape * 0.7), WHITE, 255 * (gape > 0.015))

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
    canvas.fill(_arch(0.05 + shift * 1j, 0.55 - 0.03j, stripe, stripe / 2), _TINTS[mark], 160 * (stripe > 0))
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

DRAWN = {"digits": (draw_digit, 1), "faces": (draw_face, 3), "fish": (draw_fish, 3)}  # with their own channels
DRAWN_COUNT, DRAWN_SEED, DRAWING_VERSION = 6_000, 0, 1  # raise the version when a drawing changes
STACKED = {"stacked": "digits", "stacked-mnist": "mnist"}  # and the sets whose digits are stacked
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}
NAMES = [*DRAWN, *STACKED, *TORCHVISION]
FILE_TYPES = Image.registered_extensions()  # {".jpg": "JPEG", ...} of the installed Pillow
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
           if name in FILE_TYPES.values()]
SUFFIXES = tuple(suffix for suffix in FILE_TYPES if FILE_TYPES[suffix] in FORMATS)
ACCEPTED = f"{', '.join(NAMES)} or a folder with pictures ({' '.join(FORMATS)})"
CELEBA_BOX = (35, 55, 143, 163)  # the central 108 x 108 of 178 x 218, as in DCGAN and shekkizh/EBGAN.tensorflow
MAX_PIXELS = 64_000_000  # a picture takes up to 8 bytes a pixel while it is decoded
# MAP_NORESERVE (0x4000), because Linux would else refuse to map a file larger than the memory
COPY_ON_WRITE = {"access": mmap.ACCESS_COPY} if sys.platform != "linux" else {"flags": mmap.MAP_PRIVATE | 0x4000}
CACHE_VERSION = 2  # raise it when to_array or the cache changes


def load_images(source: str, image_size: int, channels: int | None = None, root: str = "data") -> Tensor:
    """All pictures of `source` in a fixed order: uint8 [N, channels, image_size, image_size], 0 to 255.

    source: a procedurally generated set (digits, faces, fish), three digits as red, green and blue (stacked,
        stacked-mnist), a torchvision training set (mnist, fashion, cifar10, celeba; kept in `root`) or a folder, read
        with its subfolders. Generated sets, CelebA and folders are decoded once, by one process at a time, into
        `root`/cache and memory-mapped copy-on-write, so they may exceed the memory. Bad pictures are reported.
    channels: 1 (luminance), 3, or None for what the set has itself; a folder has 1 if all its files are greyscale.
    Greyscale files with more than 8 bits share one scale: white is the greatest value in any file of the folder, black
    is 0, or the least value if it is negative.
    Raises ValueError for a wrong argument or a folder without a usable picture, and OSError for a failed download or
    a `root` that cannot be written; each with a message of one line.
    """
    if type(image_size) is not int or image_size < 1 or channels not in (None, 1, 3):
        raise ValueError(f"image_size must be a positive int, not {image_size!r}; channels 1 or 3, not {channels!r}")
    source, root = os.path.expanduser(source), os.path.expanduser(root)
    if source in NAMES and os.path.isdir(source) and os.path.abspath(root) != os.getcwd():
        raise ValueError(f"{source!r} is a dataset and also a folder here: give ./{source} to use the folder, or "
                         "rename the folder to use the dataset")
    if source in DRAWN:
        draw, own = DRAWN[source]
        return _cached(source, [DRAWN_SEED, DRAWING_VERSION], range(DRAWN_COUNT), image_size, channels or own, root,
                       lambda index: draw(random.Random(f"{DRAWN_SEED}-{index}"), image_size)[0])
    if source in STACKED:
        if channels == 1:
            raise ValueError(f"{source!r} has 3 channels")
        digits = load_images(STACKED[source], image_size, 1, root)
        return digits[_stacked(len(digits))].squeeze(2)
    if source == "celeba":
        names, folder = list(_torchvision(source, root).filename), os.path.join(root, "celeba", "img_align_celeba")
        return _cached(source, names, names, image_size, channels or 3, root,
                       lambda name: Image.open(os.path.join(folder, name), formats=FORMATS).crop(CELEBA_BOX))
    if source in TORCHVISION:
        data = torch.as_tensor(_torchvision(source, root).data)  # [N, 28, 28] or [N, 32, 32, 3]
        from torchvision.transforms import functional  # here, because torchvision doubles the start-up time
        images = data.permute(0, 3, 1, 2) if data.ndim == 4 else functional.pad(data[:, None], [2])
        images = functional.rgb_to_grayscale(images) if channels == 1 else images
        parts = images.split(1000)  # because resizing takes more memory than its result
        images = torch.cat([functional.resize(part, [image_size] * 2, antialias=True) for part in parts])
        return images.expand(-1, channels or -1, -1, -1).contiguous()
    if os.path.isdir(source):
        return _read_folder(source, image_size, channels, root)
    if os.path.isfile(source):
        raise ValueError(f"{source!r} is a file: give a folder of pictures, and unpack an archive first")
    raise ValueError(f"no such data: {source!r}; give {ACCEPTED}")


def _stacked(count: int) -> Tensor:
    """Which of `count` digits are the red, green and blue of 25,600 stacked pictures."""
    return torch.randint(count, (25_600, 3), generator=torch.Generator().manual_seed(0))


def spread(images: Tensor, count: int) -> Tensor:
    """At most `count` of the images [N, ...], spread evenly over the set and in order, without exact duplicates."""
    count = min(count, len(images))
    chosen = images[torch.arange(count) * (len(images) - 1) // max(1, count - 1)]
    return torch.stack(list({image.cpu().numpy().tobytes(): image for image in chosen}.values()))


def to_array(image: Image.Image, image_size: int, channels: int, levels: tuple = (0, 255)) -> np.ndarray:
    """A picture of any mode and shape as uint8 [channels, image_size, image_size]; ValueError above MAX_PIXELS.

    EXIF orientation is applied, the central square is resized (bicubic, antialiased) and composited on white.
    levels: the values of black and white in greyscale with more than 8 bits.
    """
    image.draft(None, (2 * image_size, 2 * image_size))  # a large JPEG need not be decoded much larger than this
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # scaled here, because Pillow's own conversion clips at 255
        black, white = levels
        grey = np.nan_to_num(np.asarray(image, np.float32), nan=black).clip(black, white) - black
        image = Image.fromarray((grey * (255 / (white - black or 1))).round().astype(np.uint8))
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = ImageOps.fit(image, (image_size, image_size))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return np.ascontiguousarray(np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1))


def _levels(image: Image.Image) -> tuple[int, float, float]:
    """A picture's channels and, of greyscale with more than 8 bits, its least and greatest value or 0."""
    channels = 1 if Image.getmodebase(image.mode) == "L" else 3
    if image.mode[0] not in "IF" or image.width * image.height > MAX_PIXELS:
        return channels, 0.0, 0.0
    values = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    return channels, float(values.min(initial=0)), float(values.max(initial=0))


def _torchvision(source: str, root: str) -> torch.utils.data.Dataset:
    """The training split of a torchvision set, downloaded into `root` if it is not there. Raises OSError."""
    try:
        from torchvision import datasets
        data = getattr(datasets, TORCHVISION[source])
        with suppress(RuntimeError):  # not there
            return data(root, download=False)
        with file_lock(Path(root, "cache", ".lock"), wait=True):
            return data(root, download=True)
    except Exception as error:  # no network, a quota, a broken archive, a missing package...
        hint = "--data-root names the folder that holds it; for other pictures, --data FOLDER"
        raise OSError(f"{source} failed ({_reason(error)}); {hint}") from error


def _read_folder(folder: str, image_size: int, channels: int | None, root: str) -> Tensor:
    """The pictures below `folder`, sorted by path. See `load_images`."""
    def read(name: str) -> Image.Image:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise OSError("broken link, closed folder or not a file")
        return Image.open(path, formats=FORMATS)

    found, unread, seen, start = [], Counter(), set(), len(os.path.join(folder, ""))
    walk = os.walk(folder, followlinks=True, onerror=lambda error: found.append([error.filename[start:]]))
    for where, folders, files in walk:
        folders.sort()  # so that of two ways to one folder always the same is taken
        if (real := os.path.realpath(where)) in seen:  # a link to a folder that was read already, or is being read
            folders.clear()
            continue
        seen.add(real)
        for path in [os.path.join(where, name) for name in files]:
            if path.lower().endswith(SUFFIXES):
                stamp = [os.path.getsize(path), os.stat(path).st_mtime_ns] if os.path.exists(path) else []
                found.append([path[start:], *stamp])
            else:
                unread[ascii(Path(path).suffix.lower())[1:-1][:9] or "unnamed"] += 1
    found.sort()
    most = ", ".join(f"{count:,} {suffix}" for suffix, count in unread.most_common(5))
    remark = f", {unread.total():,} files not read ({most})" if unread else ""
    names = [name for name, *_ in found]
    return _cached(os.path.abspath(folder), found, names, image_size, channels, root, read, True, remark)


def _cached(name: str, content: list, items: Sequence, image_size: int, channels: int | None, root: str,
            read: Callable, survey: bool = False, remark: str = "") -> Tensor:
    """The pictures read(item) of all items as uint8 [N, C, H, W], mapped from a file in `root`/cache, made if need be.

    The name of the file holds a digest of `content`: when that changes, a new file replaces the old one. A .json with
    checksums, skipped (pairs of item and reason), own (channels of the set itself) and a remark on the set is written
    last; a file without it, or with other checksums, does not count. The argument `remark` is on the folder as it is.
    survey: look at all pictures beforehand, for the channels (unless given) and for the scale of grey levels.
    """
    keys = name, [CACHE_VERSION, len(items), content]
    place, state = (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] for key in keys)
    shown, folder = ascii(os.path.basename(name))[1:-1], Path(root, "cache")
    stem = f"{re.sub('[^A-Za-z0-9]+', '-', shown)[:40]}-{place}-{image_size}x"

    def mapped(how: str) -> Tensor | None:
        for number in [channels] if channels else [1, 3]:
            file = folder / f"{stem}{number}-{state}.u8"
            with suppress(Exception), open(file, "rb") as opened:  # not there, or damaged
                notes = json.loads(file.with_suffix(".json").read_text())
                images = torch.frombuffer(mmap.mmap(opened.fileno(), 0, **COPY_ON_WRITE), dtype=torch.uint8)
                images = images.view(len(notes["checksums"]), number, image_size, image_size)
                every, sums = 1 + images.nbytes // 2**31, []  # above 2 GB not all are checked, to start fast
                for index in range(0, len(images), every):  # read, which is faster than through the map
                    opened.seek(index * images[0].nbytes)
                    sums.append(zlib.crc32(opened.read(images[0].nbytes)))
                if sums == notes["checksums"][::every] and number == (channels or notes["own"]):
                    told = f"{how}, {len(notes['skipped']):,} skipped{notes['remark']}{remark}"
                    print(f"{shown}: {len(images):,} pictures {told}", file=sys.stderr)
                    return images
        return None

    def each(task: Callable, told: str) -> Iterator[tuple]:
        def attempt(item: int | str) -> tuple:
            try:
                with read(item) as image:
                    return task(image), None
            except Exception as error:  # Pillow raises nearly every kind, MemoryError and struct.error among them
                return None, [item, _reason(error)]

        last, every, end = time.monotonic(), *((0.1, "\r") if sys.stderr.isatty() else (10, "\n"))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(items), 256):  # in portions, because pool.map queues all that it is given
                if (now := time.monotonic()) - last > every:
                    last = now
                    print(f"{shown}: {told} {first:,} of {len(items):,} ", end=end, file=sys.stderr)
                yield from pool.map(attempt, items[first:first + 256])

    if (images := mapped("from cache")) is not None:
        return images
    with file_lock(folder / ".lock", wait=True), warnings.catch_warnings(action="ignore"):  # Pillow's, on odd metadata
        if (images := mapped("from cache")) is not None:  # made by another process meanwhile
            return images
        began, own, levels, told = time.monotonic(), channels or 3, (0, 0), ""
        if survey and (looks := [look for look, _ in each(_levels, "looked at") if look]):
            kinds, lows, highs = zip(*looks)
            own, levels = max(kinds), (min(lows), max(highs))
            if any(levels):
                told = f", grey levels above 8 bits: {levels[0]:g} to {levels[1]:g} scaled to 0 to 255"
        number, skipped, checksums, flat = channels or own, [], [], 0
        file = folder / f"{stem}{number}-{state}.u8"
        with atomic_write(file) as out:
            for array, failure in each(lambda image: to_array(image, image_size, number, levels), "decoded"):
                if failure:
                    skipped.append(failure)
                    continue
                out.write(array)
                checksums.append(zlib.crc32(array))
                flat += int(np.ptp(array, axis=(1, 2)).max() < 8)
            for item, reason in skipped[:10]:
                print(f"skipped {ascii(item)}: {reason}", file=sys.stderr)
            if not checksums:
                raise ValueError(f"no usable picture in {name!r} ({len(skipped):,} skipped{remark}); give {ACCEPTED}")
        if len(skipped) > 10:
            print(f"and {len(skipped) - 10:,} more, listed in {file.with_suffix('.json')}", file=sys.stderr)
        told += f", {flat:,} nearly constant" if flat else ""
        with atomic_write(file.with_suffix(".json")) as out:
            out.write(json.dumps(dict(checksums=checksums, skipped=skipped, own=own, remark=told)).encode())
        for old in [*folder.glob(f"{stem}{number}-*"), *folder.glob("*.tmp*")]:
            if old.stem != file.stem:  # outdated, or left by a process that was killed
                with suppress(OSError):
                    old.unlink()
        if (images := mapped(f"decoded in {time.monotonic() - began:.0f} s")) is None:
            raise OSError(f"cannot read {ascii(str(file))} back, or not map it into memory")
        return images


# ---- batches --------------------------------------------------------------------------------------------------------


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to floats in [-1, 1], laid out channels last, as convolutions are fastest."""
    return images.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


class Batches:
    """Random batches [batch_size / world, C, H, W] of a uint8 dataset [N, C, H, W], normalised, on `device`.

    The dataset is copied to the device if it takes at most half of the free memory, and indexed there. Otherwise the
    host fills a buffer on the device at `refill`, to be called before every step. So a step that takes a batch by
    `batches()` (or `batches(i)` for i < `per_step`) is pure device work and can be captured in a CUDA graph. Pictures
    are drawn with replacement. All ranks draw the same global batch and take their own share of it.
    hflip: random horizontal flip, p = 0.5.
    """

    def __init__(self, images: Tensor, batch_size: int, device: torch.device, hflip: bool = False, rank: int = 0,
                 world: int = 1, per_step: int = 1, resident: bool | None = None):
        if resident is None:
            resident = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        self.batch_size, self.device, self.hflip, self.rank, self.world = batch_size, device, hflip, rank, world
        self.images = images.to(device) if resident else images
        shape = (per_step, batch_size // world, *images.shape[1:])
        self.buffer = () if resident else torch.empty(shape, dtype=torch.uint8, device=device)

    def _indices(self) -> Tensor:
        """This rank's share of the random indices of a batch."""
        numbers = torch.randint(len(self.images), (self.batch_size,), device=self.images.device)
        return numbers.chunk(self.world)[self.rank]

    def refill(self) -> None:
        """Copy the next batches into the buffer, if there is one."""
        for slot in self.buffer:
            batch = self.images[self._indices()]
            slot.copy_(batch.pin_memory() if self.device.type == "cuda" else batch, non_blocking=True)

    def __call__(self, number: int = 0) -> Tensor:
        batch = self.buffer[number] if len(self.buffer) else self.images[self._indices()]
        if self.hflip:
            flipped = torch.rand(self.batch_size, device=self.device).chunk(self.world)[self.rank] < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
        return normalise(batch)


def augment(images: Tensor, rank: int = 0, world: int = 1, *, rotation: float = 25, shift: tuple = (0.05, 0.1),
            shear: float = 10, zoom: tuple = (0.95, 1.2), brightness: tuple = (0.8, 1.4), gain: float = 0.4) -> Tensor:
    """Rotate, shift, shear, zoom, brighten and tint each of the images [N, C, H, W] in [-1, 1] by random amounts.

    rotation, shear: at most so many degrees either way; shift: at most these fractions of width and height either way.
    zoom: range of the factor of size. brightness: range of the factor of all channels. gain: each channel has its own
    factor, from a triangular distribution on [1 - gain, 1 + gain]. These factors act on values from 0 (black) to 1.
    Pixels are resampled once, bilinearly; beyond the edge the picture is reflected. The random numbers are those of a
    batch of N * world images, of which `rank` takes its share.
    """
    chance = torch.rand(len(images) * world, 6 + 2 * images.shape[1], device=images.device).chunk(world)[rank]
    turn, lean, size, light, right, down = chance[:, :6].unbind(dim=1)
    turn, lean = ((2 * u - 1) * math.radians(most) for u, most in ((turn, rotation), (lean, shear)))
    size, light = (low + (high - low) * u for u, (low, high) in ((size, zoom), (light, brightness)))
    cos, sin, slope = turn.cos() / size, turn.sin() / size, lean.tan()
    across, along = ((4 * u - 2) * most for u, most in zip((right, down), shift))  # the frame is 2 wide and 2 high
    # Where in the picture, from -1 to 1, each pixel of the result is taken from
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
    """Turn floats in [-1, 1] into uint8 in [0, 255], rounded and clamped; uint8 passes through unchanged."""
    if images.dtype == torch.uint8:
        return images
    return images.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, zoom: int | None = None) -> None:
    """Write images [N, C, H, W] (C is 1 or 3, values as for `to_bytes`) as one PNG, row by row with white gaps.

    The grid is about square unless `columns` is given; images [R, N, C, H, W] make R rows. Each pixel becomes zoom x
    zoom of them: by default the most, up to 4, that keep a row within 1024. Raises ValueError if there is no image.
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
    """Write images [N, C, H, W] (as for `save_grid`) as folder/00000.png and so on, numbered from `first`.

    Real images for an FID tool: `python -c "import common; common.save_pngs(common.load_images('faces', 32), 'real')"`
    """
    arrays = to_bytes(images).cpu().permute(0, 2, 3, 1).squeeze(3).numpy()  # [N, H, W] of one channel

    def save(i: int) -> None:
        with atomic_write(Path(folder, f"{first + i:05d}.png"), sync=False) as file:
            Image.fromarray(arrays[i]).save(file, compress_level=1)

    with ThreadPoolExecutor() as pool:  # Pillow compresses outside the interpreter lock
        list(pool.map(save, range(len(arrays))))  # list() raises what a thread raised


def save_gif(frames: list, path: str | Path, ms: int = 120, hold: int = 1500, limit: int = 60) -> None:
    """Write frames (paths of pictures, or PIL images) as an endless GIF; ValueError if there is none.

    Paths that cannot be read are skipped. Each frame shows for `ms` milliseconds and the last for `hold`. All take the
    size of the last, reduced by a whole factor to about 512 pixels. At most `limit` are taken, from first to last.
    """
    kept = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(limit, len(frames)))]
    images = []
    for frame in kept:
        with suppress(OSError, SyntaxError):  # what Pillow raises for damaged files
            images.append((frame if isinstance(frame, Image.Image) else Image.open(frame)).convert("RGB"))
    if not images:
        raise ValueError("a GIF needs at least one frame")
    size = images[-1].size
    factor = max(1, round(max(size) / 512))
    # Each frame has its own palette, as colours drift in training; dithering would flicker and swell the file.
    images = [image.resize(size).reduce(factor).quantize(256, dither=Image.Dither.NONE) for image in images]
    durations = [ms] * (len(images) - 1) + [hold]
    with atomic_write(path) as file:
        images[0].save(file, save_all=True, append_images=images[1:], duration=durations, loop=0)


def density_picture(points: Tensor, extent: float, size: int = 200, blur: float = 0.02) -> Image.Image:
    """Draw the density of points [N, 2] over [-extent, extent]^2, y upwards, as a picture of size x size pixels.

    A histogram smoothed by a Gaussian of standard deviation blur * extent. Colour follows the square root of density,
    so that stray points show, and is darkest at the peak of each picture. Points outside are left out.
    """
    x, y = points.detach().float().cpu().numpy().T
    counts = np.histogram2d(y, x, size, [(-extent, extent)] * 2)[0][::-1]  # leaves NaN out, too
    place = np.arange(size) * (2 / size / blur)
    kernel = np.exp((place[:, None] - place) ** 2 / -2)
    density = kernel @ counts @ kernel
    level = np.sqrt(density / max(density.max(), 1e-9))
    channels = [np.interp(level, np.linspace(0, 1, len(BLUES)), channel) for channel in zip(*BLUES)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def save_panels(panels: list[Image.Image], titles: list[str], path: str | Path) -> None:
    """Write pictures of one size side by side, each under its title; ValueError unless there is a title for each."""
    (width, height), gap, head = panels[0].size, 8, 38
    strip = Image.new("RGB", (len(panels) * (width + gap) + gap, head + height + gap), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(24)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = gap + i * (width + gap)
        strip.paste(panel, (left, head))
        draw.text((left + width / 2, head / 2), title, "#333333", font, "mm")
    with atomic_write(path) as file:
        strip.save(file)


def save_chart(csv_path: str | Path, path: str | Path, panels: list[tuple[str, ...]]) -> None:
    """Draw columns of a CSV file against its column "step": a panel for each tuple of at most 6 names.

    There are two panels to a row. Positive values that span more than two decades have a logarithmic axis. Empty and
    non-finite cells are skipped: the line joins the values on either side. ValueError if a column is missing.
    """
    with open(csv_path, newline="") as file:
        reader = csv.DictReader(file)
        rows, missing = list(reader), {"step", *sum(panels, ())} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{csv_path} has no column {', '.join(sorted(missing))}")
    size = 1680 * min(2, len(panels)), 1000 * math.ceil(len(panels) / 2)
    chart = Image.new("RGB", size, "white")  # four times too large, because Pillow does not smooth lines itself
    for i, names in enumerate(panels):
        lines = {}
        for name in names:
            points = np.array([(float(row["step"]), float(row[name] or "nan")) for row in rows]).reshape(-1, 2)
            lines[name] = points[np.isfinite(points[:, 1])]
        _draw_panel(ImageDraw.Draw(chart), i % 2 * 1680 + 248, i // 2 * 1000 + 168, lines)
    with atomic_write(path) as file:
        chart.reduce(4).save(file)


def _draw_panel(draw: ImageDraw.ImageDraw, left: int, top: int, lines: dict[str, np.ndarray]) -> None:
    """Draw a panel of `save_chart`: grid and labels, lines of points [N, 2], and a legend as its title."""
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


def _ticks(low: float, high: float, least: float) -> list[float]:
    """Two to six round values from low to high, with steps of at least `least` between them."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    unit = max(least, next(m * unit for m in (1, 2, 5, 10) if m * unit * 5 >= (high - low) * 0.999))
    return [k * unit for k in range(math.ceil(low / unit - 1e-6), math.floor(high / unit + 1e-6) + 1)]


def _rows(samples: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float [N, D] and [M, D] on the device of `samples`, uint8 read as [-1, 1]; ValueError if unusable."""
    if min(len(samples), len(data)) < 1 or samples.shape[1:] != data.shape[1:]:
        raise ValueError(f"need samples and data of one shape, got {tuple(samples.shape)}, {tuple(data.shape)}")
    sides = (side.detach().to(samples.device).reshape(len(side), -1) for side in (samples, data))
    return tuple(side.float() / 127.5 - 1 if side.dtype == torch.uint8 else side.float() for side in sides)


def sliced_wasserstein(samples: Tensor, data: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-1 distance between samples [N, ...] and data [M, ...] of one shape; 0 for equal sets.

    SW = mean over unit directions t of W1(t.x, t.y), where in one dimension W1 = integral over q in [0, 1] of
    |quantile_x(q) - quantile_y(q)|, exact for any N and M (Rabin et al. 2011; Bonneel et al. 2015). Not scaled by the
    dimension D: a shift by v gives about 0.8 |v| / sqrt(D), so for images it is in units of a pixel value on [-1, 1],
    whatever their size. The directions depend on `seed` alone. Raises ValueError unless N, M > 0 and shapes match.
    """
    x, y = _rows(samples, data)
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(seed)).to(x)
    directions /= directions.norm(dim=0)
    x, y = (x @ directions).sort(dim=0).values, (y @ directions).sort(dim=0).values
    n, m = len(x), len(y)
    # Quantile functions jump at i/N and j/M and are flat in between: sum over those pieces, in whole units of 1/(N M).
    jumps = torch.cat([torch.arange(n + 1) * m, torch.arange(m) * n]).unique().to(x.device)
    gaps = (x[jumps[:-1] // m] - y[jumps[:-1] // n]).abs().mean(dim=1)
    return (gaps @ jumps.diff().to(x) / (n * m)).item()


@torch.no_grad()
def compare(samples: Tensor, data: Tensor) -> dict[str, float]:
    """Both measures of samples against data [N, ...], the two clamped to [-1, 1], as pictures show them."""
    samples = samples.clamp(-1, 1)
    return dict(swd=sliced_wasserstein(samples, data), diversity=diversity_ratio(samples, data))


def diversity_ratio(samples: Tensor, data: Tensor) -> float:
    """Mean Euclidean distance over pairs of samples [N, ...], divided by that over pairs of data [M, ...].

    0 if all samples are one image (mode collapse), 1 if they are as varied as the data, NaN if there is one sample or
    the data do not differ. The cost grows with N^2: a few hundred of each suffice. Raises ValueError unless N, M > 0
    and shapes match.
    """
    x, y = _rows(samples, data)
    varied = torch.pdist(y).mean().item()
    return torch.pdist(x).mean().item() / varied if varied > 0 else math.nan


# ---- runs -----------------------------------------------------------------------------------------------------------

USES = ("checkpoint", "resume", "sample", "interpolate", "embed")  # flags that are not settings of a run
MAY_CHANGE = ("steps", "data", "data_root", "device", "graph", "log_every", "sample_every", "save_every", "keep", "out")
PLACES = ("out", "data_root")  # settings that a checkpoint does not decide: a foreign one could name any folder


class Parser(argparse.ArgumentParser):
    """A parser with the flags of every run: of its data, by default `data` (`more` names other data), and the rest."""

    def __init__(self, script: str, description: str, data: str, more: str = "", sizes: tuple = (16, 32, 64, 128),
                 precision: str | None = "fp32"):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.script, switch = script, argparse.BooleanOptionalAction
        add = self.add_argument_group("data").add_argument
        add("--data", default=data, help=more + ", ".join([*NAMES, "or a folder of pictures"]))
        add("--data-root", default="data", help="folder for downloads and the picture cache")
        add("--image-size", type=int, choices=sizes, default=32, help="height and width in pixels")
        add("--channels", type=int, choices=(1, 3), help="1 for grey, 3 for RGB; default: what the data have")
        add("--hflip", action=switch, default=False, help="random horizontal flip, p = 0.5")
        if precision:
            add("--precision", choices=("auto", "fp32", "bf16"), default=precision,
                help="number format of the networks; auto: bf16 where the hardware supports it")
        add = self.add_argument_group("run").add_argument
        add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of weights, batches and noise")
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
        add("--graph", action=switch, default=True, help="on a GPU, replay the training step as a CUDA graph")
        add("--log-every", type=number(int, 1), default=100, help="steps between rows of metrics.csv")
        add("--sample-every", type=number(int, 1), default=100, help="steps between sample pictures")
        add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
        add("--keep", action=switch, default=False, help="keep a numbered copy of every checkpoint")
        add("--out", help=f"folder to write to; default: the next free one, e.g. runs/{script}-001")
        add("--init-from", metavar="FILE", help="begin a new run with the networks of this checkpoint")
        add("--checkpoint", metavar="FILE", help="for --resume, --sample, ...; default: the newest run's")
        self.use = self.add_mutually_exclusive_group().add_argument
        self.use("--resume", action="store_true", help="continue the newest run, or that of --out or --checkpoint")
        self.use("--sample", type=number(int, 1), metavar="N", help="skip training and write N samples")

    def settings(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The checked command line; with --resume the run's saved settings, of which only MAY_CHANGE can differ."""
        args = self.parse_args(argv)
        if not args.resume:
            return args
        path, saved = args.checkpoint, self.load_checkpoint(args.checkpoint)["config"]
        kept = {name: value for name, value in saved.items() if name not in PLACES}
        args = self.parse_args(argv, argparse.Namespace(**kept))
        args.checkpoint, args.out = path, os.path.dirname(path) or "."
        for name, value in saved.items():
            new = getattr(args, name)
            if name == "steps" and new < value or name not in MAY_CHANGE and new != value:
                self.error(f"argument --{name.replace('_', '-')}: the run has {value} and cannot continue with {new}")
        return args

    def parse_args(self, argv: Sequence[str] | None, namespace: object = None) -> argparse.Namespace:
        """The flags, checked for contradictions, with the checkpoint that they use. Raises ValueError, OSError."""
        args = super().parse_args(argv, namespace)
        for name, value in vars(args).items():
            if value == "":
                self.error(f"argument --{name.replace('_', '-')}: must not be empty")
        used = any(getattr(args, name, None) for name in USES[1:])
        if args.checkpoint and not used:
            self.error("argument --checkpoint: only allowed with --resume, --sample or another use of a checkpoint")
        if args.init_from and used and not args.resume:
            self.error("argument --init-from: begins a new run; --checkpoint names the one to use")
        if args.resume and args.checkpoint and args.out:
            self.error("argument --out: a run resumes in the folder of its --checkpoint")
        if args.resume and args.out:
            args.checkpoint = os.path.join(args.out, "checkpoint.pt")
        elif args.out and os.path.lexists(args.out):
            if not os.path.isdir(args.out) or any(name[0] != "." for name in os.listdir(args.out)):
                self.error(f"argument --out: {args.out} is not empty; name a new folder, or --resume the run in it")
        if used and not args.checkpoint:
            pattern = f"runs/{self.script}-*/checkpoint.pt"
            newest = max(Path().glob(pattern), key=os.path.getmtime, default=None)
            if newest is None:
                raise FileNotFoundError(f"no {pattern} in {os.getcwd()!r}; name a file by --checkpoint")
            args.checkpoint = str(newest)
        return args

    def load_checkpoint(self, path: str | Path) -> dict:
        """A checkpoint of this script, on the CPU, its settings checked. No code in it is run. OSError, ValueError."""
        if not os.path.isfile(path):  # to open a pipe would be to wait for ever
            raise FileNotFoundError(f"no checkpoint {str(path)!r}")
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"{damaged} has a wrong checksum")
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content.keys() != {"script", "config", "state"} or not isinstance(content["state"], dict):
                raise ValueError("it is not of a run")
            if content["script"] != self.script:
                raise ValueError(f"it is one of {content['script']}.py")
            self._check_saved(content["config"])
        except Exception as error:  # whatever a damaged file makes them raise, OSError among it
            raise ValueError(f"{str(path)!r} is not a checkpoint of {self.script}.py ({_reason(error)})") from error
        return content

    def _check_saved(self, config: dict) -> None:
        """Raises an exception unless these are all the settings of a run, of types and values that the flags accept."""
        known = vars(self.parse_args([])).keys() - USES
        if config.keys() != known:
            raise ValueError("settings are missing or not known")
        for name in sorted(known - {*PLACES}):
            flag, value = name.replace("_", "-"), config[name]
            if name == "init_from" and value is None:  # a run has decided all others
                continue
            if isinstance(value, bool):
                words = [f"--{flag}" if value else f"--no-{flag}"]
            else:
                words = [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]
            accepted = getattr(self.parse_args(words), name)
            if type(accepted) is not type(value) or accepted != value:
                raise ValueError(f"{name} is {type(value).__name__}")

    def format_help(self) -> str:
        """With the defaults that there are."""
        return re.sub(r"\s+\(default:\s+None\)", "", super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raises ValueError, where argparse would print its usage and exit."""
        raise ValueError(message)


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: an int or a float from low to high."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} from {low:g} to {high:g}")

    return parse


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, and so faster than in fp32."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def next_folder(stem: str | Path) -> Path:
    """Make the first of stem-001, stem-002, ... that is not there yet."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for count in itertools.count(1):
        with suppress(FileExistsError):
            folder = Path(f"{stem}-{count:03d}")
            folder.mkdir()
            return folder


@contextmanager
def stop_requests(at_once: bool = False) -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP in the list it yields, to be looked at after each step; the first is answered.

    With `at_once` they raise KeyboardInterrupt instead. Nothing is collected in a thread: Python allows no handlers.
    """
    requests, former, kinds = [], {}, [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        kinds.append(signal.SIGHUP)

    def note(kind: int, _: object) -> None:
        if at_once:
            raise KeyboardInterrupt
        if not requests:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping after this step\n")
        requests.append(kind)

    with suppress(ValueError):  # in a thread
        former = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield requests
    finally:
        for kind, handler in former.items():
            signal.signal(kind, handler)


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Exit with one line where the body fails for a reason that a user can cause or meet, or is interrupted."""
    try:
        with stop_requests(at_once=True):
            yield
    except KeyboardInterrupt as stop:
        sys.exit(f"{script}.py: {str(stop) or 'interrupted'}")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{script}.py: error: {error}".replace("\n", " "))
    except (MemoryError, RuntimeError) as error:
        if "closed by peer" in str(error) or "reset by peer" in str(error):
            sys.exit(f"{script}.py: error: another rank has ended")
        signs = "out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED", "Storage size calculation overflowed"
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        sys.exit(f"{script}.py: error: out of memory; lower --batch-size, --image-size or the width of the networks")


@contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Turn an error into a warning: what is only looked at never stops a run."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what}: {_reason(error)}", file=sys.stderr, flush=True)


def adam(parameters: list[torch.nn.Parameter], lr: float | Tensor, betas: Sequence[float]) -> torch.optim.Adam:
    """Adam whose moments exist from the start, so that all checkpoints hold the same tensors."""
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr, tuple(betas), fused=True, capturable=device.type == "cuda")
    for p in parameters:
        step = torch.zeros((), device=device, dtype=torch.float32)
        optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


def tensors(item: object, name: str) -> dict[str, Tensor]:
    """All tensors of nested dicts, by their paths, which begin with `name`. Raises ValueError for anything else."""
    if isinstance(item, Tensor):
        return {name: item}
    if not isinstance(item, dict):
        raise ValueError(f"{name} is {type(item).__name__}, not a tensor")
    return {path: leaf for key, part in item.items() for path, leaf in tensors(part, f"{name}.{key}").items()}


def random_state() -> Tensor:
    """The state of the random number generators of the CPU and, in the last 16 bytes, of the GPU: uint8."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.zeros(16, dtype=torch.uint8)
    return torch.cat([torch.get_rng_state(), gpu])


@torch.no_grad()
def fill(state: dict, saved: dict, path: str | Path) -> None:
    """Copy tensors of a checkpoint into those of `state`, in place: all, or none and a ValueError.

    Both are nested dicts, of which `saved` may have more at the top. The keys, shapes and dtypes must be the same,
    numbers finite, integers positive or 0. A tensor "rng" goes to the random number generators too. `path` is the
    checkpoint's, for messages.
    """
    saved = {name: saved[name] for name in state if name in saved}
    own, found = tensors(state, str(path)), tensors(saved, str(path))
    if other := own.keys() ^ found.keys():
        raise ValueError(f"{min(other)} is missing or not known")
    for name, tensor in own.items():
        new = found[name]
        if (new.shape, new.dtype, new.layout, new.is_cpu) != (tensor.shape, tensor.dtype, torch.strided, True):
            expected = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} is {new.dtype} {list(new.shape)}; accepted here is {expected}")
        if not (new.isfinite().all() and (new.is_floating_point() or (new >= 0).all())):
            raise ValueError(f"{name} has impossible values")
    if "rng" in state:
        try:
            torch.set_rng_state(saved["rng"][:-16].clone())
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(saved["rng"][-16:].clone())
        except RuntimeError as error:
            raise ValueError(f"{path}.rng is not the state of a random number generator") from error
    for name, tensor in own.items():
        tensor.copy_(found[name])


def collapse(rows: Sequence[dict[str, float]]) -> str | None:
    """The sign of a collapse in the rows of metrics.csv, the newest last, and what may help; or None."""
    *past, row = rows
    if row.get("diversity", 1) < 0.3 and (row["step"] >= 300 or any(r["diversity"] > 0.5 for r in past)):
        return "the samples are becoming one image; begin again with a lower --lr, --init-from an earlier checkpoint"
    if big := [name for name, value in row.items() if name != "step" and abs(value) > 1e6]:
        return f"{big[0]} explodes; begin again with a lower --lr, --init-from an earlier checkpoint"
    return None


class Record:
    """What a run leaves in its folder: checkpoints, config.json, metrics.csv, pictures; and its line on the screen.

    `state` belongs in the run's checkpoints: the step, the sums of the metrics since the step of the last row, the
    random numbers, and how many images there are with a checksum of 256 of them. While a record is open, no other
    process can write to the folder. With `writes` off, as on other ranks than 0, it only counts. Raises OSError.
    """

    def __init__(self, script: str, settings: dict, metrics: Sequence[str], device: torch.device,
                 images: Tensor, writes: bool = True):
        self.script, self.metrics, self.writes, self.lock = script, metrics, writes, ExitStack()
        self.config = {name: value for name, value in settings.items() if name not in USES}
        self.images = torch.tensor([len(images), zlib.crc32(spread(images, 256).numpy().tobytes())])
        self.state = {"step": torch.tensor(0), "logged": torch.tensor(0), "rng": random_state(),
                      "totals": torch.zeros(len(metrics), device=device), "images": self.images.clone()}
        self.rows, self.warning, self.earlier = deque(maxlen=200), None, None

    def __enter__(self) -> "Record":
        if not self.state["logged"] <= self.state["step"] <= self.config["steps"]:
            raise ValueError(f"the checkpoint is of step {self.state['step']} of {self.config['steps']}")
        self.first, self.began, self.told = int(self.state["step"]), time.monotonic(), time.monotonic()
        if self.writes:
            self.config["out"] = self.config["out"] or str(next_folder(f"runs/{self.script}"))
            self.lock.enter_context(file_lock(Path(self.config["out"], ".lock"), wait=False))
            for leftover in Path(self.config["out"]).glob(".*.tmp.*"):  # of a process that was killed
                leftover.unlink()
            print(f"{self.script}: {self.config['out']}, step {self.first} to {self.config['steps']}", flush=True)
            if not torch.equal(self.images, self.state["images"]):
                self.warn(f"the data have changed: {self.images[0]:,} pictures now, {self.state['images'][0]:,} before")
        self.folder = Path(self.config["out"] or "")
        self.state["images"].copy_(self.images)
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes and sys.stdout.isatty():
            print()  # ends the line that was kept up to date
        self.lock.close()

    def add(self, step: int, values: Tensor) -> None:
        """Count a step and its metrics, and keep the line on a terminal up to date."""
        self.state["step"].fill_(step)
        self.state["totals"] += values
        if self.writes and sys.stdout.isatty() and time.monotonic() - self.told > 0.5:
            self._tell()

    def row(self, watched: dict[str, float]) -> None:
        """Add a row to metrics.csv: means since the last row, and what is `watched`, where NaN makes an empty cell.

        Raises FloatingPointError unless the means are finite.
        """
        means = self._tell()
        self._refuse([f"{name} {value:g}" for name, value in means.items() if not math.isfinite(value)])
        step, values = int(self.state["step"]), means | watched
        if self.earlier is None:
            lines, self.earlier = self._earlier_rows(",".join(["step", *values, "seconds"]) + "\n")
            with atomic_write(self.folder / "metrics.csv") as file:
                file.write("".join(lines).encode())
        cells = [f"{value:.6g}" if math.isfinite(value) else "" for value in values.values()]
        with open(self.folder / "metrics.csv", "a") as file:
            print(step, *cells, f"{self.earlier + time.monotonic() - self.began:.1f}", sep=",", file=file)
        self.state["totals"].zero_()
        self.state["logged"].fill_(step)
        self.rows.append({"step": step} | values)

    def _earlier_rows(self, header: str) -> tuple[list[str], float]:
        """The lines of metrics.csv up to the first step, and their seconds. A table that is not ours is set aside."""
        table = self.folder / "metrics.csv"
        with only_warn(f"{table} is now metrics-unreadable.csv"):
            found, *rows = table.read_text("utf-8-sig").splitlines(True) if table.exists() else [header]
            if found != header:
                raise ValueError("it has other columns")
            whole = [row for row in rows if row[-1] == "\n" and row.count(",") == header.count(",")]
            kept = [row for row in whole if int(row.partition(",")[0]) <= self.first]
            return [header, *kept], float(kept[-1].rpartition(",")[2]) if kept else 0.0
        os.replace(table, table.with_name("metrics-unreadable.csv"))
        return [header], 0.0

    def _tell(self) -> dict[str, float]:
        """Print the step, the pace, the time left and the means of the metrics since the last row; return the means."""
        step, steps, self.told = int(self.state["step"]), self.config["steps"], time.monotonic()
        means = dict(zip(self.metrics, (self.state["totals"] / (step - self.state["logged"])).tolist()))
        pace = (step - self.first) / (self.told - self.began)
        line = "  ".join([f"{step}/{steps}", f"{pace:.1f} steps/s", f"{(steps - step) / pace:.0f} s left",
                          *(f"{name} {value:.4g}" for name, value in means.items())])
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:width]:<{width}}"
        with suppress(OSError):  # the terminal, or the program that reads, may be gone
            print(line, end="" if sys.stdout.isatty() else "\n", flush=True)
        return means

    def warn(self, message: str | None) -> None:
        """Print a warning, once until it changes."""
        if message and message != self.warning:
            print(f"{self.script}: warning: {message}", file=sys.stderr, flush=True)
        self.warning = message

    def save(self, state: dict) -> None:
        """Write checkpoint.pt, with "keep" also a numbered copy. FloatingPointError unless all of it is finite."""
        self.state["rng"].copy_(random_state())
        self._refuse([name for name, tensor in tensors(state, "state").items() if not tensor.isfinite().all()])
        step = int(self.state["step"])
        names = [f"checkpoint-{step:06d}.pt", "checkpoint.pt"] if self.config["keep"] else ["checkpoint.pt"]
        for name in names if step else reversed(names):  # so a kill in between loses neither the run nor a copy
            with atomic_write(self.folder / name) as file:
                torch.save({"script": self.script, "config": self.config, "state": state}, file)
        with atomic_write(self.folder / "config.json") as file:
            file.write(json.dumps(self.config, indent=1).encode())

    def _refuse(self, bad: list[str]) -> None:
        """FloatingPointError, with what to try, if there is anything bad."""
        if bad:
            raise FloatingPointError(
                f"step {int(self.state['step'])}: not finite: {', '.join(bad[:5])}; the last good checkpoint is "
                f"{self.folder / 'checkpoint.pt'}: continue from it with --init-from and a lower --lr")

    def show(self, pictures: dict[str, Tensor | Image.Image], real: Tensor | Image.Image,
             panels: list[tuple[str, ...]]) -> None:
        """Write NAME/STEP.png for each of `pictures`; first samples/real.png, later curves.png, last training.gif."""
        step = int(self.state["step"])
        files = {f"{name}/{step:06d}.png": picture for name, picture in pictures.items()}
        with only_warn(f"pictures of step {step}"):
            for name, picture in (files if step else files | {"samples/real.png": real}).items():
                if isinstance(picture, Tensor):
                    save_grid(picture, self.folder / name, columns=16 if "reconstructions" in name else 8)
                else:
                    with atomic_write(self.folder / name) as file:
                        picture.save(file)
            if step:
                save_chart(self.folder / "metrics.csv", self.folder / "curves.png", panels)
            if step == self.config["steps"]:
                save_gif(self.frames(), self.folder / "training.gif")

    def frames(self) -> list[Path]:
        """The sample pictures so far, in the order of their steps."""
        found = {int(path.stem): path for path in self.folder.glob("samples/*.png") if path.stem.isdecimal()}
        return [found[step] for step in sorted(found) if step <= self.state["step"]]
