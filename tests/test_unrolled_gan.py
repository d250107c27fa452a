"""Unrolled GAN: its gradients against finite differences, its steps against PyTorch's Adam, its mixtures by loops."""

import copy
import functools
import itertools
import math
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import unrolled_gan
from conftest import TINY, load, refusal, rows
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm


DISCRIMINATORS = dict(  # the last has buffers that change in a pass, a scalar parameter and a convolution
    relu=lambda: unrolled_gan.Discriminator(6), tanh=lambda: unrolled_gan.Discriminator(6, 2, "tanh"),
    buffers=lambda: nn.Sequential(spectral_norm(nn.Linear(2, 18)), nn.Tanh(), nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(
        2, 4, 2, bias=False), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(16, 1)))


def adam_of(discriminator, **settings) -> torch.optim.Adam:
    """D's Adam with moments as after some steps, whose numbers differ between the parameters."""
    adam = torch.optim.Adam(discriminator.parameters(), **dict(lr=0.05, betas=(0.5, 0.999)) | settings)
    for count, p in enumerate(discriminator.parameters()):
        adam.state[p] = dict(step=torch.tensor(7.0 + count), exp_avg=0.01 * torch.randn_like(p),
                             exp_avg_sq=1e-3 * (0.1 + torch.rand_like(p)))
    return adam


def f(discriminator, theta, real, fake):
    """f(G, theta) as in the paper."""
    D_real, D_fake = functional_call(discriminator, theta, (torch.cat([real, fake]),)).sigmoid().chunk(2)
    return D_real.log().mean() + (1 - D_fake).log().mean()


def unroll(discriminator, adam, real, fake, steps):
    return unrolled_gan.unroll(discriminator, adam, lambda theta: -f(discriminator, theta, real, fake), steps)


def real_steps(discriminator, adam, real, fake, steps):
    """theta^K and the buffers, by PyTorch's own Adam on a copy of D."""
    network = copy.deepcopy(discriminator)
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    for _ in range(steps):
        optimizer.zero_grad()
        (-f(network, {}, real, fake.detach())).backward()
        optimizer.step()
    return dict(network.named_parameters()) | dict(network.named_buffers())


@pytest.mark.parametrize("settings", ({}, dict(lr=torch.tensor(0.03, dtype=torch.float64), betas=(0.8, 0.9), eps=1e-3)))
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_unrolled_steps_are_adams_and_change_nothing(name, settings, double):
    discriminator, real, fake = DISCRIMINATORS[name](), torch.randn(5, 2), torch.randn(5, 2)
    adam = adam_of(discriminator, **settings)
    before = copy.deepcopy([discriminator.state_dict(), adam.state_dict()])
    for steps in range(5):
        theta = unroll(discriminator, adam, real, fake, steps)
        torch.testing.assert_close(theta, real_steps(discriminator, adam, real, fake, steps), rtol=1e-9, atol=1e-12)
    f(discriminator, theta, real, fake)
    torch.testing.assert_close([discriminator.state_dict(), adam.state_dict()], before, rtol=0, atol=0)
    assert all(p.grad is None for p in discriminator.parameters())


@pytest.mark.parametrize("name", ("tanh", "buffers"))
def test_gradient_of_f_K_is_that_of_finite_differences_through_real_steps(name, double):
    discriminator, real, fake = DISCRIMINATORS[name](), torch.randn(5, 2), torch.randn(5, 2, requires_grad=True)
    adam = adam_of(discriminator, lr=0.02)
    theta = unroll(discriminator, adam, real, fake, 3)
    (got,) = torch.autograd.grad(f(discriminator, theta, real, fake), fake)
    for place in np.ndindex(*fake.shape):
        values = []
        for shift in (1e-4, -2e-4):
            fake.data[place] += shift
            values.append(f(discriminator, real_steps(discriminator, adam, real, fake, 3), real, fake).item())
        fake.data[place] += 1e-4
        assert got[place].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4, abs=1e-7)


def test_a_dead_unit_and_a_new_adam_give_finite_gradients():
    discriminator, fake = DISCRIMINATORS["relu"](), torch.randn(7, 2, requires_grad=True)
    discriminator[0].weight.data[0], discriminator[0].bias.data[0] = 0, -1  # never above 0: no gradient, so v = 0
    discriminator[4].bias.requires_grad_(False)
    adam, real = torch.optim.Adam(discriminator.parameters()), torch.randn(7, 2)
    theta = unroll(discriminator, adam, real, fake, 3)
    assert not adam.state and theta["0.weight"][0].eq(0).all() and theta["0.bias"][0] == -1 and "4.bias" not in theta
    (gradient,) = torch.autograd.grad(f(discriminator, theta, real, fake), fake)
    assert gradient.isfinite().all() and gradient.any()


def test_losses_by_hand_and_wrong_inputs(double):
    real, fake = torch.randn(5, 1), torch.randn(5, 1)
    want = f(nn.Identity(), {}, real, fake)
    torch.testing.assert_close(unrolled_gan.discriminator_loss(real, fake), -want)
    torch.testing.assert_close(unrolled_gan.generator_loss(real, fake, "saddle"), want)
    torch.testing.assert_close(unrolled_gan.generator_loss(real, fake, "nonsaturating"), -fake.sigmoid().log().mean())
    with pytest.raises(ValueError, match=r"shapes differ: \(5, 1\) and \(5,\)"):
        unrolled_gan.generator_loss(real, fake[:, 0])
    with pytest.raises(ValueError, match="unknown kind 'hinge'"):
        unrolled_gan.generator_loss(real, fake, "hinge")
    discriminator = DISCRIMINATORS["relu"]()
    weights = list(discriminator.parameters())
    for adam in torch.optim.Adam(weights, amsgrad=True), torch.optim.Adam(weights[1:]), torch.optim.SGD(weights, 0.1):
        with pytest.raises(ValueError, match="cannot be unrolled|not an Adam with one group|does not hold all"):
            unrolled_gan.unroll(discriminator, adam, None, 1)


def test_networks():
    discriminator = unrolled_gan.Discriminator(5, 2, "tanh", gain=0.8, scale=4.0)
    w1, b1, w2, b2, w3, b3 = discriminator.parameters()
    x = torch.randn(3, 2)
    assert torch.allclose(discriminator(x), ((x / 4 @ w1.T + b1).tanh() @ w2.T + b2).tanh() @ w3.T + b3, atol=1e-6)
    assert torch.allclose(w2 @ w2.T, 0.64 * torch.eye(5), atol=1e-5) and not b2.any()
    settings = dict(data="fish", latent=7, width=64, d_width=4, gain=0.5, activation="leaky", d_activation="relu",
                    image_size=64, channels=3)
    generator, discriminator = unrolled_gan.build(settings)
    assert discriminator(generator(torch.randn(2, 7))).shape == (2, 1)
    assert [layer.out_channels for layer in generator if isinstance(layer, nn.ConvTranspose2d)] == [32, 16, 8, 4]
    assert [layer.out_channels for layer in discriminator if isinstance(layer, nn.Conv2d)] == [4, 8, 16, 32]
    assert isinstance(generator[2], nn.LeakyReLU) and isinstance(discriminator[1], nn.ReLU)


RING = [(2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)) for k in range(8)]
GRID = list(itertools.product(range(-4, 5, 2), repeat=2))


@pytest.mark.parametrize("kind, expected, extreme", [("ring", RING, 0.32), ("grid", GRID, 0.19)])
def test_mixture(kind, expected, extreme):
    means, weights = unrolled_gan.mixture(kind)
    assert np.allclose(means, expected, atol=1e-6) and weights.tolist() == pytest.approx([1 / len(means)] * len(means))
    for prior_std, seed in itertools.product((0.001, 0.06, extreme), range(10)):
        _, weights = unrolled_gan.mixture(kind, prior_std, seed)
        assert weights.min() > 0 and weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert np.std(weights.double().numpy()) == pytest.approx(prior_std, abs=1e-6)
    with pytest.raises(ValueError, match=f"the standard deviation of {len(means)} weights is below 0."):
        unrolled_gan.mixture(kind, 0.34)
    offsets, nearest = torch.cdist(unrolled_gan.draw(means, weights, 0.02, 100_000), means).min(1)
    assert torch.allclose(torch.bincount(nearest) / 100_000, weights, atol=0.006)
    assert offsets.square().mean().item() == pytest.approx(2 * 0.02**2, rel=0.02)


@pytest.mark.parametrize("kind, std", [("ring", 0.02), ("ring", 0.15), ("grid", 0.05)])
def test_mode_statistics_by_loops(kind, std):
    means, weights = unrolled_gan.mixture(kind, 0.03, 1)
    places = torch.randint(5, (2560,))  # few modes, some hit, some nearly, and stray points
    samples = means[places] + torch.randn(2560, 2) * torch.tensor([0.5, 1.5, 4, 15, 0.1])[places, None] * std
    samples[:19], samples[19:39] = means[6], means[7]  # one too few, and just enough
    gap = min(math.dist(a, b) for a, b in itertools.combinations(means.tolist(), 2))
    distances = torch.tensor([[math.dist(sample, mean) for mean in means.tolist()] for sample in samples.tolist()])
    close, near = (distances < 3 * std).sum(0), (distances < gap / 4).sum(0)
    shares = [(distances.argmin(1) == i).double().mean().item() for i in range(len(means))]
    assert unrolled_gan.mode_statistics(samples, means, weights, std) == dict(
        covered=(close >= 20).sum(), reached=(near >= 20).sum(), modes=(close > 0).sum(),
        quality=pytest.approx((distances < 3 * std).any(1).double().mean().item(), abs=1e-6),
        kl=pytest.approx(sum(h * math.log(h / w) for h, w in zip(shares, weights.tolist()) if h), abs=1e-5))


@pytest.mark.parametrize("more", ("--g-loss saddle", "--unroll-steps 0", "--fresh --lr 0.01", "IMAGES --fresh"))
def test_training_takes_textbook_steps(more, pictures, tmp_path, double, monkeypatch):
    """Steps 3 and 4, from the checkpoint of step 2 on. Every unrolled step has a real batch of its own."""
    numbers, call = [], common.Batches.__call__
    monkeypatch.setattr(common.Batches, "__call__", lambda self, number=0: numbers.append(number) or call(self, number))
    folders = ["--data", str(pictures), "--data-root", str(tmp_path), "--image-size", "16", "--d-width", "2"]
    flags = [*(folders if "IMAGES" in more else []), *more.replace("IMAGES", "").split(), "--d-activation", "tanh"]
    unrolled_gan.main([*TINY["unrolled_gan"], *flags, "--keep", "--out", str(tmp_path / "run")])
    assert numbers == ([0, 1, 2] * 6 if "IMAGES" in more else [])
    saved, after = (load(tmp_path / f"run/checkpoint-00000{step}.pt") for step in (2, 4))
    settings, metrics = saved["settings"], []
    G, D = unrolled_gan.build(settings)
    adam_g = torch.optim.Adam(G.parameters(), settings["lr"][0], (0.5, 0.999))
    adam_d = torch.optim.Adam(D.parameters(), settings["lr"][-1], (0.5, 0.999))
    state = dict(generator=G, discriminator=D, adam_g=adam_g, adam_d=adam_d)
    unrolled_gan.load(tmp_path / "run/checkpoint-000002.pt", state)
    draw = functools.partial(unrolled_gan.draw, *unrolled_gan.mixture("ring"), 0.02, 4)
    if "IMAGES" in more:
        draw = common.Batches(common.load_images(str(pictures), 16, 3, str(tmp_path)), 4, torch.device("cpu"))
    for step in (2, 3):
        torch.manual_seed(step)
        fake, x = G(torch.randn(4, 4)), draw()
        reals = [draw() if settings["fresh"] else x for _ in range(settings["unroll_steps"])]
        theta = unrolled_gan.unroll(D, adam_d, lambda theta: -f(D, theta, reals.pop(0), fake), len(reals))
        f_K, L_D = f(D, theta, x, fake), -f(D, {}, x, fake)
        L_G = f_K if settings["g_loss"] == "saddle" else -functional_call(D, theta, (fake,)).sigmoid().log().mean()
        for loss, network in (L_G, G), (L_D, D):
            parameters = list(network.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
                parameter.grad = gradient
        adam_g.step()
        adam_d.step()
        metrics.append([L_D.item(), L_G.item(), (f_K + L_D).item()])
    for name, network in dict(generator=G, discriminator=D).items():
        torch.testing.assert_close(dict(after["state"][name]), dict(network.state_dict()), rtol=1e-8, atol=1e-10)
    row = [after["rows"][1][name] for name in unrolled_gan.METRICS]
    assert row == pytest.approx(np.mean(metrics, axis=0), abs=1e-6)


def test_data_of_all_kinds(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", np.random.default_rng(0).normal(size=(100, 2)))
    for data, columns, files in (("points.npy", "", 1), (str(pictures), "swd diversity", 300),
                                 ("grid", "covered reached modes quality kl coverable", 1)):
        out = Path(Path(data).stem)
        unrolled_gan.main([*TINY["unrolled_gan"], "--image-size", "16", "--data", data, "--out", str(out)])
        unrolled_gan.main(["--sample", "300", "--out", str(out), "--device", "cpu"])
        assert list(rows(out)[-1]) == ["step", "loss_d", "loss_g", "unroll_gain", *columns.split()]
        assert (out / "training.gif").exists() and (out / "strip.png").exists() == (files == 1)
        assert len(list(out.glob("sample-001/*"))) == files
    assert np.load("points/sample-001/samples.npy").shape == (300, 2)
    assert "warning" not in capsys.readouterr().err  # as of a chart without a column


def test_data_and_flags_are_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("text")
    np.save("shape.npy", np.zeros((5, 3)))
    np.save("nan.npy", np.full((5, 2), np.nan))
    unrolled_gan.main([*TINY["unrolled_gan"], "--steps", "1", "--out", "run"])
    for flags, message in {
            **{f"--data {name}.npy": "is not a file with an array" for name in ("shape", "nan", "text", "missing")},
            "--data moon": "no such data: 'moon'; give ring, grid, a .npy file, ",
            "--lr 1 2 3": "--lr: takes one rate, or two",
            "--data a.npy --prior-std 0.1": "--prior-std: goes with --data ring or grid",
            "--resume --out run --data a.npy": "a run on ring cannot go on with a.npy",
            "--init-from run --data digits": "a run on ring cannot go on with digits"}.items():
        assert message in refusal("unrolled_gan", *flags.split())[1] and not Path("runs").exists()
