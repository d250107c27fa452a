"""The judge tells real images, noise, one repeated image and half of the classes apart."""

import torch

import judge


def test_images_are_told_apart(tmp_path):
    digits = judge.Judge("digits", str(tmp_path), count=1500, steps=150)
    images, labels = judge.drawings("digits", 3, 500, 32)
    real, half = digits.score(images), digits.score(images[labels < 5])
    noise, one = digits.score(torch.rand(500, 1, 32, 32) * 2 - 1), digits.score(images[:1].expand(500, -1, -1, -1))
    assert digits.accuracy > 0.9 and 0.8 < real["frechet"] < 1.2
    assert real["precision"] > 0.7 and real["recall"] > 0.6 and real["least_class"] > 0.06 and real["kl"] < 0.05
    assert noise["precision"] < 0.05 and noise["frechet"] > 10
    assert one["recall"] < 0.05 and one["least_class"] == 0 and one["frechet"] > 5
    assert half["least_class"] < 0.01 and half["kl"] > 0.6 and half["recall"] < real["recall"] - 0.2
    assert half["frechet"] > 5 and half["precision"] > 0.7
    assert digits.score(torch.nn.functional.avg_pool2d(images, 3, 1, 1))["frechet"] > 2


def test_distances():
    a = torch.randn(500, 4, dtype=torch.float64)
    assert abs(judge.frechet(a, a)) < 1e-6
    assert abs(judge.frechet(a, a + 3) - 4 * 9) < 1e-6
    others = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # their third neighbours are 3, 2, 2 and 3 away
    assert judge.among(torch.tensor([[-3.0], [-3.1], [1.5], [6.1]]), others) == 0.5
