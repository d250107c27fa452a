"""Unrolled GAN's gradients against finite differences and torch's Adam, and its mixtures against loops."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import unrolled_gan
from conftest import TINY, load, rows
from PIL import Image

DOUBLE = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def networks(activation: str = "tanh", layers: int = 2):
    generator = unrolled_gan.Generator(3, 6, activation, gain=1.2)
    return generator, unrolled_gan.Discriminator(6, layers, activation, gain=1.2)


def warm(discriminator) -> dict[str, torch.Tensor]:
    """Moments as after some steps of Adam."""
    theta = discriminator.theta
    exp_avg, exp_avg_sq = 0.01 * torch.randn_like(theta), 1e-3 * (0.1 + torch.rand_like(theta))
    return dict(step=torch.tensor(7.0), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def cold(discriminator) -> dict[str, torch.Tensor]:
    theta = discriminator.theta
    return dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(theta), exp_avg_sq=torch.zeros_like(theta))


def unrolled_loss(generator, discriminator, moments, z, real, steps, kind, fresh=None):
    fake = generator(z)
    inner = real if fresh is None else fresh
    theta = unrolled_gan.unrolled_parameters(discriminator.theta, moments, inner, fake, steps, discriminator, lr=0.05)
    return unrolled_gan.generator_loss(*discriminator.both(real, fake, theta), kind)


def differences(loss, parameters, h=1e-5) -> torch.Tensor:
    """The gradient by central differences of fourth order."""
    found = []
    for parameter in parameters:
        for index in range(parameter.numel()):
            values, old = {}, parameter.data.flatten()[index].item()
            for shift in (-2, -1, 1, 2):
                parameter.data.flatten()[index] = old + shift * h
                values[shift] = loss().item()
            parameter.data.flatten()[index] = old
            found.append((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h))
    return torch.tensor(found)


@pytest.mark.parametrize("kind", ("saddle", "nonsaturating"))
@pytest.mark.parametrize("steps", (1, 3, 5))
def test_gradient_through_the_unrolled_steps_is_that_of_finite_differences(steps, kind, double):
    generator, discriminator = networks()
    moments, z, real = warm(discriminator), torch.randn(7, 3), torch.randn(7, 2)
    fresh = torch.randn(steps, 7, 2) if steps == 3 else None
    loss = lambda: unrolled_loss(generator, discriminator, moments, z, real, steps, kind, fresh)
    parameters = list(generator.parameters())
    got = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
    want = differences(loss, parameters, h=2e-4)
    assert (got - want).norm() < 1e-6 * want.norm()
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    fake = generator(z)  # the first order: theta^K as if it did not depend on G
    inner = real if fresh is None else fresh
    theta = unrolled_gan.unrolled_parameters(discriminator.theta, moments, inner, fake, steps, discriminator, lr=0.05)
    loss = unrolled_gan.generator_loss(*discriminator.both(real, fake, theta.detach()), kind)
    first = torch.autograd.grad(loss, parameters)
    first = torch.cat([g.flatten() for g in first])
    assert (first - want).norm() > 0.02 * want.norm()


def test_the_real_term_of_the_saddle_has_a_gradient(double):
    generator, discriminator = networks()
    z, real, moments = torch.randn(7, 3), torch.randn(7, 2), warm(discriminator)
    fake = generator(z)
    theta = unrolled_gan.unrolled_parameters(discriminator.theta, moments, real, fake, 3, discriminator, lr=0.05)
    real_term = F.logsigmoid(discriminator(real, theta)).mean()
    assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(real_term, list(generator.parameters())))


@pytest.mark.parametrize("start", (cold, warm))
@pytest.mark.parametrize("activation, layers", [("relu", 2), ("tanh", 1)])
def test_unrolled_adam_is_torchs_step_for_step(start, activation, layers, double):
    generator, discriminator = networks(activation, layers)
    moments, reals, fake = start(discriminator), torch.randn(6, 7, 2), torch.randn(7, 2)
    twin = unrolled_gan.Discriminator(6, layers, activation)
    twin.load_state_dict(discriminator.state_dict())
    optimizer = torch.optim.Adam([twin.theta], lr=0.01, betas=(0.5, 0.999))
    optimizer.state[twin.theta] = {name: value.clone() for name, value in moments.items()}
    for steps in range(1, 7):
        logits = twin(reals[steps - 1]), twin(fake)
        loss = -torch.sigmoid(logits[0]).log().mean() - (1 - torch.sigmoid(logits[1])).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        got = unrolled_gan.unrolled_parameters(discriminator.theta, moments, reals[:steps], fake, steps, discriminator,
                                               lr=0.01, betas=(0.5, 0.999))
        assert torch.allclose(got, twin.theta, rtol=1e-6, atol=1e-9), steps
        assert (got - discriminator.theta).abs().max() > 1e-3


def test_unrolling_leaves_parameters_and_moments_to_the_bit():
    generator, discriminator = networks("relu")
    optimizer = torch.optim.Adam([discriminator.theta], lr=0.01, betas=(0.5, 0.999), fused=True)
    unrolled_gan.discriminator_loss(*discriminator.both(torch.randn(5, 2), torch.randn(5, 2))).backward()
    optimizer.step()
    moments = optimizer.state[discriminator.theta]
    before = [value.clone() for value in (discriminator.theta, discriminator.theta.grad, *moments.values())]
    loss = unrolled_loss(generator, discriminator, moments, torch.randn(5, 3), torch.randn(5, 2), 5, "saddle")
    loss.backward()
    after = [discriminator.theta, discriminator.theta.grad, *moments.values()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(parameter.grad is not None for parameter in generator.parameters())


@pytest.mark.parametrize("kind", ("saddle", "nonsaturating"))
def test_a_dead_unit_and_cold_moments_give_adams_values_and_finite_gradients(kind):
    generator, discriminator = networks("relu")
    weight, bias = discriminator.layers(discriminator.theta.data)[0]
    weight[0], bias[0] = 0, -1  # never above 0: no gradient, so v = 0
    z, real, moments = torch.randn(7, 3), torch.randn(7, 2), cold(discriminator)
    theta = unrolled_gan.unrolled_parameters(discriminator.theta, moments, real, generator(z), 3, discriminator)
    w, b = discriminator.layers(theta)[0]
    assert w[0].eq(0).all() and b[0] == -1  # Adam does not move what has no gradient
    loss = unrolled_loss(generator, discriminator, moments, z, real, 3, kind)
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_losses_are_those_of_probabilities():
    real, fake = torch.randn(5, 1, **DOUBLE), torch.randn(5, 1, **DOUBLE)
    f, other = 0.0, 0.0
    for r, g in zip(real.flatten().tolist(), fake.flatten().tolist()):
        f += math.log(1 / (1 + math.exp(-r))) / 5 + math.log(1 - 1 / (1 + math.exp(-g))) / 5
        other -= math.log(1 / (1 + math.exp(-g))) / 5
    assert unrolled_gan.discriminator_loss(real, fake).item() == pytest.approx(-f, rel=1e-12)
    assert unrolled_gan.generator_loss(real, fake, "saddle").item() == pytest.approx(f, rel=1e-12)
    assert unrolled_gan.generator_loss(real, fake, "nonsaturating").item() == pytest.approx(other, rel=1e-12)


def test_networks():
    discriminator = unrolled_gan.Discriminator(5, 2, "tanh", gain=0.8, scale=4.0)
    (w1, b1), (w2, b2), (w3, b3) = discriminator.layers(discriminator.theta)
    x = torch.randn(3, 2)
    want = torch.tanh(torch.tanh(x / 4 @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    assert torch.allclose(discriminator(x), want, atol=1e-6) and want.shape == (3, 1)
    assert torch.allclose(w2 @ w2.T, 0.64 * torch.eye(5), atol=1e-5) and not b2.any()
    assert [w.shape for w, _ in unrolled_gan.Discriminator(5, 1).layers(unrolled_gan.Discriminator(5, 1).theta)] == [
        (5, 2), (1, 5)]
    generator = unrolled_gan.Generator(7, 5, "relu", gain=0)
    assert [layer.weight.shape for layer in generator.layers] == [(5, 7), (5, 5), (2, 5)]
    assert 0.3 < generator.layers[0].weight.abs().max() < 7**-0.5 and generator.layers[0].bias.any()
    z = torch.randn(4, 7)
    one, two, three = generator.layers
    assert torch.allclose(generator(z), three(F.relu(two(F.relu(one(z))))))


@pytest.mark.parametrize("kind, count, extreme", [("ring", 8, 0.32), ("grid", 25, 0.19)])
def test_mixture_has_exactly_the_asked_spread(kind, count, extreme):
    means, weights = unrolled_gan.mixture(kind, 0, 0)
    assert means.shape == (count, 2) and torch.equal(weights, torch.full((count,), 1 / count))
    for prior_std in (0.001, 0.06, 0.12, extreme):
        for seed in range(20):
            _, weights = unrolled_gan.mixture(kind, prior_std, seed)
            assert weights.min() > 0 and weights.sum().item() == pytest.approx(1, abs=1e-6)
            assert np.std(weights.double().numpy()) == pytest.approx(prior_std, abs=1e-7)
    assert torch.equal(unrolled_gan.mixture(kind, 0.06, 3)[1], unrolled_gan.mixture(kind, 0.06, 3)[1])
    assert not torch.equal(unrolled_gan.mixture(kind, 0.06, 3)[1], unrolled_gan.mixture(kind, 0.06, 4)[1])
    with pytest.raises(ValueError, match=f"--prior-std 0.34: {count} positive weights have less than 0"):
        unrolled_gan.mixture(kind, 0.34, 0)


def test_means_are_the_ring_and_the_grid():
    ring, _ = unrolled_gan.mixture("ring", 0, 0)
    assert ring.norm(dim=1).tolist() == pytest.approx([2] * 8)
    assert torch.pdist(ring).min().item() == pytest.approx(4 * math.sin(math.pi / 8))
    grid, _ = unrolled_gan.mixture("grid", 0, 0)
    assert sorted(map(tuple, grid.tolist())) == [(x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)]


def test_data_follow_the_mixture():
    means, weights = unrolled_gan.mixture("ring", 0.12, 5)
    points = unrolled_gan.draw(means, weights, 0.02, 100_000)
    offsets, nearest = torch.cdist(points, means).min(1)
    assert torch.allclose(torch.bincount(nearest, minlength=8) / 100_000, weights, atol=0.006)
    assert offsets.square().mean().item() == pytest.approx(2 * 0.02**2, rel=0.02)


@pytest.mark.parametrize("kind, std", [("ring", 0.02), ("ring", 0.15), ("grid", 0.05)])
def test_mode_statistics_against_loops(kind, std):
    means, weights = unrolled_gan.mixture(kind, 0.03, 1)
    places = torch.randint(5, (2560,))  # few modes, some hit hard, some nearly, and stray points
    samples = means[places] + torch.randn(2560, 2) * torch.tensor([0.5, 1.5, 4, 15, 0.1])[places, None] * std
    samples[:19], samples[19:39] = means[6], means[7]  # one too few, and just enough
    close, near, nearest, good = [0] * len(means), [0] * len(means), [0] * len(means), 0
    neighbour = min(math.dist(a, b) for i, a in enumerate(means.tolist()) for b in means.tolist()[:i])
    for sample in samples.tolist():
        distances = [math.dist(sample, mean) for mean in means.tolist()]
        for i, distance in enumerate(distances):
            close[i] += distance < 3 * std
            near[i] += distance < neighbour / 4
        good += min(distances) < 3 * std
        nearest[distances.index(min(distances))] += 1
    kl = sum(n / 2560 * math.log(n / 2560 / w) for n, w in zip(nearest, weights.tolist()) if n)
    got = unrolled_gan.mode_statistics(samples, means, std, weights)
    assert got["covered"] == sum(n >= 20 for n in close) and got["reached"] == sum(n >= 20 for n in near)
    assert got["quality"] == pytest.approx(good / 2560, abs=1e-6) and got["kl"] == pytest.approx(kl, abs=1e-5)
    assert 0 < got["covered"] < len(means) and 0 < got["reached"] < len(means)


def test_mode_statistics_of_known_samples():
    means, weights = unrolled_gan.mixture("ring", 0, 0)
    exact = unrolled_gan.mode_statistics(means.repeat(320, 1), means, 0.02, weights)
    assert exact == dict(covered=8, reached=8, quality=1, kl=pytest.approx(0, abs=1e-6))
    one = unrolled_gan.mode_statistics(means[:1].repeat(2560, 1), means, 0.02, weights)
    assert one == dict(covered=1, reached=1, quality=1, kl=pytest.approx(math.log(8)))


def plain_steps(before: dict, steps: int) -> dict[str, torch.Tensor]:
    """A GAN without any unrolling, from a checkpoint on: D's and G's gradients at the same parameters, two Adams."""
    config = before["config"]
    generator = unrolled_gan.build(unrolled_gan.Generator, config)
    discriminator = unrolled_gan.build(unrolled_gan.Discriminator, config)
    generator.load_state_dict(before["state"]["generator"])
    discriminator.load_state_dict(before["state"]["discriminator"])
    g_adam = torch.optim.Adam(generator.parameters(), lr=config["lr"], betas=(0.5, 0.999), fused=True)
    d_adam = torch.optim.Adam(discriminator.parameters(), lr=config["d_lr"], betas=(0.5, 0.999), fused=True)
    means, weights = unrolled_gan.mixture(config["data"], config["prior_std"], config["seed"])
    torch.set_rng_state(before["rng"])
    for _ in range(steps):
        z = torch.randn(config["batch_size"], config["latent"])
        real = unrolled_gan.draw(means, weights, 0.02, config["batch_size"])
        fake = generator(z)
        real_logits, fake_logits = discriminator(torch.cat([real, fake])).chunk(2)
        f = -(F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
        g_loss = f if config["g_loss"] == "saddle" else F.softplus(-fake_logits).mean()
        g_gradients = torch.autograd.grad(g_loss, list(generator.parameters()), retain_graph=True)
        d_adam.zero_grad()
        (-f).backward()
        for parameter, gradient in zip(generator.parameters(), g_gradients):
            parameter.grad = gradient
        d_adam.step()
        g_adam.step()
    return {**{f"generator/{n}": p for n, p in generator.named_parameters()},
            **{f"discriminator/{n}": p for n, p in discriminator.named_parameters()}}


@pytest.mark.parametrize("kind", ("saddle", "nonsaturating"))
def test_no_unrolling_is_the_plain_gan_to_the_bit(kind, tmp_path):
    out = tmp_path / "run"
    unrolled_gan.main([*TINY["unrolled_gan"], "--unroll-steps", "0", "--g-loss", kind, "--keep", "--out", str(out)])
    after = load(out / "checkpoint-000006.pt")["state"]
    for name, value in plain_steps(load(out / "checkpoint-000000.pt"), 6).items():
        network, name = name.split("/")
        assert torch.equal(after[network][name], value), name
    assert all(float(row["unroll_gain"]) == 0 for row in rows(out))


def test_discriminator_takes_one_ordinary_step_whatever_is_unrolled(tmp_path):
    states = []
    for steps in ("0", "5"):
        out = tmp_path / steps
        unrolled_gan.main([*TINY["unrolled_gan"], "--unroll-steps", steps, "--steps", "1", "--out", str(out)])
        states.append(load(out / "checkpoint.pt")["state"])
    plain, unrolled = states
    assert torch.equal(plain["discriminator"]["theta"], unrolled["discriminator"]["theta"])
    assert all(torch.equal(value, unrolled["d_optimizer"]["state"][0][name])
               for name, value in plain["d_optimizer"]["state"][0].items())
    assert any(not torch.equal(value, unrolled["generator"][name]) for name, value in plain["generator"].items())


@pytest.mark.parametrize("more", (["--fresh"], ["--gain", "0", "--activation", "tanh", "--d-activation", "tanh"],
                                  ["--data", "grid", "--prior-std", "0.03", "--g-loss", "saddle", "--d-layers", "1"]))
def test_settings_train(more, tmp_path):
    unrolled_gan.main([*TINY["unrolled_gan"], *more, "--log-every", "1", "--out", str(tmp_path / "run")])
    modes = 25 if "grid" in more else 8
    for row in rows(tmp_path / "run"):
        assert 0 < int(row["coverable"]) <= modes and 0 <= float(row["quality"]) <= 1 and float(row["kl"]) > 0
        assert float(row["unroll_gain"]) > 0  # D's steps from where it stands improve its own f


def test_too_much_spread_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--prior-std 0.5: 8 positive weights have less than 0.331"):
        unrolled_gan.main([*TINY["unrolled_gan"], "--prior-std", "0.5"])
    assert not list(tmp_path.iterdir())


def test_strip_and_samples(tmp_path):
    out = tmp_path / "run"
    every = ["--log-every", "1", "--sample-every", "1"]
    unrolled_gan.main([*TINY["unrolled_gan"], "--steps", "12", *every, "--out", str(out)])
    with Image.open(out / "strip.png") as strip:
        assert strip.width > 7 * strip.height  # eight panels along training, thinned from 13, and the data
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ["--checkpoint", str(out / "checkpoint.pt"), "--sample", "5000", "--seed", seed, "--device", "cpu"]
        unrolled_gan.main([*flags, "--out", str(tmp_path / name)])
    a, b, c = (np.load(tmp_path / name / "samples.npy") for name in "abc")
    assert a.shape == (5000, 2) and a.dtype == np.float32 and np.array_equal(a, b) and not np.array_equal(a, c)
    assert json.loads((out / "config.json").read_text())["unroll_steps"] == 2
