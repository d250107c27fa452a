"""Tests of the drawn data sets."""

import random
from collections import Counter

import numpy as np
import pytest

import common

SETS = {"digit": (common.draw_digit, "L", 10), "face": (common.draw_face, "RGB", 8),
        "fish": (common.draw_fish, "RGB", 8)}
cases = pytest.mark.parametrize("draw, mode, classes", SETS.values(), ids=SETS)


def pixels(draw, index, size):
    return np.asarray(draw(random.Random(f"0-{index}"), size)[0], dtype=float)


@cases
@pytest.mark.parametrize("size", (28, 32, 64, 128))
def test_size_mode_and_label(draw, mode, classes, size):
    for index in range(20):
        image, label = draw(random.Random(f"0-{index}"), size)
        assert image.size == (size, size) and image.mode == mode
        assert isinstance(label, int) and 0 <= label < classes


@cases
def test_deterministic(draw, mode, classes):
    for index in range(20):
        first, second = (draw(random.Random(f"3-{index}"), 32) for _ in range(2))
        assert first[0].tobytes() == second[0].tobytes() and first[1] == second[1]


@cases
def test_labels_are_about_uniform_and_do_not_depend_on_the_size(draw, mode, classes):
    labels = [draw(random.Random(f"0-{index}"), 16)[1] for index in range(1000)]
    counts = Counter(labels)
    assert len(counts) == classes
    assert 0.6 < min(counts.values()) * classes / 1000 and max(counts.values()) * classes / 1000 < 1.4
    assert labels[:20] == [draw(random.Random(f"0-{index}"), 64)[1] for index in range(20)]


@cases
def test_pictures_differ_and_are_not_blank(draw, mode, classes):
    flat = np.stack([pixels(draw, index, 32).ravel() for index in range(200)])
    distances = np.abs(flat[:, None, ::7] - flat[None, :, ::7]).mean(-1) + 255 * np.eye(200)
    assert distances.min() > 2
    assert flat.std(1).min() > 12


@cases
def test_same_scene_at_every_size(draw, mode, classes):
    for size in (32, 64):
        errors = []
        for index in range(40):
            large = draw(random.Random(f"0-{index}"), 128)[0].reduce(128 // size)
            errors.append(np.abs(pixels(draw, index, size) - np.asarray(large, dtype=float)).mean())
        assert np.mean(errors) < 4 and max(errors) < 8


@cases
def test_all_pixels_vary(draw, mode, classes):
    """No part of a scene is constant (digits: no part of the middle)."""
    spread = np.stack([pixels(draw, index, 32) for index in range(200)]).std(0)
    assert spread[10:22, 12:20].min() > 8 if mode == "L" else spread.min() > 8
