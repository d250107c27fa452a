"""The Fréchet distance by which tests/reproduce.py scores digits."""

import torch

import digits


def test_frechet_distance_of_known_normals():
    torch.manual_seed(0)
    a = torch.randn(500, 4, dtype=torch.float64)
    assert abs(digits.frechet(a, a)) < 1e-6
    assert abs(digits.frechet(a, a + 3) - 4 * 9) < 1e-6  # means alone
    spread = a.T.cov().trace().item()  # |s - 1|^2 tr(A) for a scaled by s
    assert abs(digits.frechet(a - a.mean(0), 2 * (a - a.mean(0))) - spread) < 1e-6
