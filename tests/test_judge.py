"""The judge must tell real images, noise, one repeated image and half of the classes apart."""

import math

import pytest
import torch

import common
import judge
from conftest import TINY, module


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def digits(root) -> judge.Judge:
    return judge.Judge("digits", root, count=1500, steps=150)


@pytest.fixture(scope="module")
def unseen() -> tuple[torch.Tensor, torch.Tensor]:
    return judge.drawings("digits", 3, 500, 32)


def test_held_out_images_score_one(digits, unseen):
    scores = digits.score(unseen[0])
    assert digits.accuracy > 0.9
    assert 0.8 < scores["frechet"] < 1.2
    assert scores["precision"] > 0.7 and scores["recall"] > 0.6
    assert scores["least_class"] > 0.06 and scores["kl"] < 0.05


def test_noise_is_not_among_real_images(digits):
    scores = digits.score(torch.rand(500, 1, 32, 32) * 2 - 1)
    assert scores["precision"] < 0.05 and scores["frechet"] > 10


def test_one_repeated_image_covers_nothing(digits, unseen):
    scores = digits.score(unseen[0][:1].expand(500, -1, -1, -1))
    assert scores["recall"] < 0.05 and scores["least_class"] == 0 and scores["frechet"] > 5


def test_half_of_the_classes(digits, unseen):
    images, labels = unseen
    whole, half = digits.score(images), digits.score(images[labels < 5])
    assert half["least_class"] < 0.01 and half["kl"] > 0.6
    assert half["recall"] < whole["recall"] - 0.2 and half["frechet"] > 5 and half["precision"] > 0.7


def test_blur_is_seen(digits, unseen):
    blurred = torch.nn.functional.avg_pool2d(unseen[0], 3, 1, 1)
    assert digits.score(blurred)["frechet"] > 2


def test_raw_features_are_not_whitened(digits, unseen, root):
    raw = judge.Judge("digits", root, count=1500, steps=150, raw=True)
    blurred = unseen[0].lerp(unseen[0].roll(1, 3), 0.2)  # a detail
    assert torch.allclose(digits.real.T.cov(), torch.eye(digits.real.shape[1]), atol=1e-3)
    assert torch.equal(raw.look(unseen[0])[0] @ raw.whiten, raw.look(unseen[0])[0]) and raw.unit != digits.unit
    assert raw.score(blurred)["frechet"] < digits.score(blurred)["frechet"]


def test_a_second_judge_comes_from_the_cache_and_scores_alike(digits, unseen, tmp_path, monkeypatch):
    first = judge.Judge("digits", str(tmp_path), count=300, steps=3).score(unseen[0])
    monkeypatch.setattr(judge, "trained", None)
    state = torch.get_rng_state()
    assert judge.Judge("digits", str(tmp_path), count=300, steps=3).score(unseen[0]) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_training_a_judge_leaves_the_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    judge.Judge("digits", str(tmp_path), count=300, steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_frechet_distance_of_known_normals():
    torch.manual_seed(0)
    a = torch.randn(500, 4, dtype=torch.float64)
    assert abs(judge.frechet(a, a)) < 1e-6
    assert abs(judge.frechet(a, a + 3) - 4 * 9) < 1e-6  # means alone
    spread = a.T.cov().trace().item()  # |s - 1|^2 tr(A) for a scaled by s
    assert abs(judge.frechet(a - a.mean(0), 2 * (a - a.mean(0))) - spread) < 1e-6


def test_among_counts_third_neighbours():
    others = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # their third neighbours are 3, 2, 2 and 3 away
    assert judge.among(torch.tensor([[-3.0], [-3.1], [1.5], [6.1]]), others) == 0.5


def test_modes_are_the_numbers_read_in_the_channels():
    class Reader:
        def look(self, images):  # the digit d is shown as brightness d / 9
            return images, ((images.mean((1, 2, 3)) + 1) * 4.5).round().long()

    numbers = torch.tensor([0, 7, 70, 700, 123, 123, 123, 123])
    digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], dim=1)
    images = (digits / 4.5 - 1)[:, :, None, None].expand(-1, -1, 4, 4)
    entropy = 4 / 8 * math.log(8) + 1 / 2 * math.log(2)
    found = judge.modes(Reader(), images)
    assert found["modes"] == 5 and found["kl"] == pytest.approx(math.log(1000) - entropy, rel=1e-6)


@pytest.mark.parametrize("script", ["began", "ebgan", "wgan_gp"])
def test_the_command_scores_a_checkpoint_as_a_folder_of_its_samples(script, data_flags, tmp_path, capsys, monkeypatch):
    flags = [*TINY[script], *data_flags[script], "--image-size", "32", "--steps", "1", "--out", str(tmp_path / "run")]
    module(script).main(flags)
    samples, quick = judge.sampled(tmp_path / "run/checkpoint.pt", 300), judge.Judge
    common.save_pngs(samples, tmp_path / "pictures")
    monkeypatch.setattr(judge, "sampled", lambda *_: samples)
    monkeypatch.setattr(judge, "Judge", lambda *args, **more: quick(*args, count=300, steps=3, **more))
    capsys.readouterr()
    for source in "run/checkpoint.pt", "pictures":
        judge.main(["fish", str(tmp_path / source), "--data-root", str(tmp_path)])
    one, two = (line.split()[1::2] for line in capsys.readouterr().out.splitlines())
    assert len(one) == 5 and all(abs(float(a) - float(b)) <= 0.01 + 0.02 * float(a) for a, b in zip(one, two))
