"""Unrolled GAN's gradients against finite differences and torch's Adam, and its mixtures against loops."""

import argparse
import copy
import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import unrolled_gan
from conftest import TINY, flat, load, rows, run, same_state
from PIL import Image
from torch.func import functional_call

DOUBLE = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def networks(activation: str = "tanh", layers: int = 2):
    generator = unrolled_gan.Generator(3, 6, activation, gain=1.2)
    return generator, unrolled_gan.Discriminator(6, layers, activation, gain=1.2)


def adam_of(discriminator, start: str = "warm", lr: float | torch.Tensor = 0.05, **settings) -> torch.optim.Adam:
    """D's optimiser; warm: with moments as after some steps, of different numbers for different parameters."""
    optimizer = torch.optim.Adam(discriminator.parameters(), lr, **{"betas": (0.5, 0.999)} | settings)
    for count, p in enumerate(discriminator.parameters() if start == "warm" else ()):
        exp_avg, exp_avg_sq = 0.01 * torch.randn_like(p), 1e-3 * (0.1 + torch.rand_like(p))
        optimizer.state[p] = dict(step=torch.tensor(7.0 + count), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    return optimizer


def unrolled_loss(generator, discriminator, adam, z, real, steps, kind, fresh=None, first_order=False):
    """L_G, whose inner steps see ``real`` or one of ``fresh`` each."""
    fake, inner = generator(z), iter(itertools.repeat(real) if fresh is None else fresh)

    def loss(theta):
        return unrolled_gan.discriminator_loss(*logits(discriminator, theta, next(inner), fake))

    theta = unrolled_gan.unroll(discriminator, adam, loss, steps)
    theta = {name: value.detach() for name, value in theta.items()} if first_order else theta
    return unrolled_gan.generator_loss(*logits(discriminator, theta, real, fake), kind)


def logits(discriminator, theta, *points):
    return [functional_call(discriminator, theta, (x,)) for x in points]


def real_steps(discriminator, adam, loss, steps):
    """The parameters after real steps of a copy of Adam on a copy of D; ``loss(network, k)``."""
    network = copy.deepcopy(discriminator)
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    for k in range(steps):
        optimizer.zero_grad()
        loss(network, k).backward()
        optimizer.step()
    return dict(network.named_parameters())


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
    adam, z, real = adam_of(discriminator), torch.randn(7, 3), torch.randn(7, 2)
    fresh = torch.randn(steps, 7, 2) if steps == 3 else None
    arguments = generator, discriminator, adam, z, real, steps, kind, fresh

    def after_real_steps():
        """L_G after K steps of torch's own Adam, of which nothing knows how it depends on G."""
        fake = generator(z).detach()

        def loss(network, k):
            x = real if fresh is None else fresh[k]
            return unrolled_gan.discriminator_loss(network(x), network(fake))

        theta = real_steps(discriminator, adam, loss, steps)
        return unrolled_gan.generator_loss(*logits(discriminator, theta, real, fake), kind)

    parameters = list(generator.parameters())
    got = torch.cat([g.flatten() for g in torch.autograd.grad(unrolled_loss(*arguments), parameters)])
    want = differences(after_real_steps, parameters, h=2e-4)
    assert (got - want).norm() < 1e-6 * want.norm()
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    first = torch.autograd.grad(unrolled_loss(*arguments, first_order=True), parameters)
    first = torch.cat([g.flatten() for g in first])  # as if theta^K did not depend on G
    assert (first - want).norm() > 0.02 * want.norm()


def test_the_real_term_of_the_saddle_has_a_gradient(double):
    generator, discriminator = networks()
    z, real = torch.randn(7, 3), torch.randn(7, 2)
    fake = generator(z)
    theta = unrolled_gan.unroll(discriminator, adam_of(discriminator), lambda theta: unrolled_gan.discriminator_loss(
        *logits(discriminator, theta, real, fake)), 3)
    real_term = F.logsigmoid(functional_call(discriminator, theta, (real,))).mean()
    assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(real_term, list(generator.parameters())))


def convolutional():
    """A discriminator of images [N, 2, 8, 8], with one parameter that is a scalar, in channels_last."""
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(1.3))

        def forward(self, x):
            return self.factor * x

    layers = [Scale(), torch.nn.Conv2d(2, 3, 3, 2), torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(),
              torch.nn.Flatten(), torch.nn.Linear(4, 1)]
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("start", ("cold", "warm", "some"))
@pytest.mark.parametrize("network", ("relu 2", "tanh 1", "images"))
@pytest.mark.parametrize("settings", ({}, {"lr": torch.tensor(0.03, **DOUBLE), "betas": (0.8, 0.9), "eps": 1e-3}))
def test_unrolled_adam_is_torchs_step_for_step(network, start, settings, double):
    shape = (2, 8, 8) if network == "images" else (2,)
    discriminator = convolutional() if network == "images" else networks(network[:4], int(network[-1]))[1]
    adam = adam_of(discriminator, start.replace("some", "warm"), **settings)
    if start == "some":  # as after a new layer: the others go on where they are
        del adam.state[list(discriminator.parameters())[2]]
    before = copy.deepcopy((discriminator.state_dict(), adam.state_dict()))
    reals, fake = torch.randn(6, 5, *shape), torch.randn(5, *shape)
    for steps in range(7):
        inner = iter(reals)
        want = real_steps(discriminator, adam, lambda network, k: unrolled_gan.discriminator_loss(
            network(reals[k]), network(fake)), steps)
        got = unrolled_gan.unroll(discriminator, adam, lambda theta: unrolled_gan.discriminator_loss(
            *logits(discriminator, theta, next(inner), fake)), steps)
        assert got.keys() == want.keys() and len(list(inner)) == 6 - steps  # the loss is called once a step
        for name, value in want.items():
            assert torch.allclose(got[name], value, rtol=1e-9, atol=1e-12), (steps, name)
    assert all((got[name] - value).abs().max() > 1e-3 for name, value in before[0].items())
    assert_equal((discriminator.state_dict(), adam.state_dict()), before)


def assert_equal(one, two):
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        assert torch.equal(leaf, two[path]) if isinstance(leaf, torch.Tensor) else leaf == two[path], path


def test_gradient_for_images_is_that_of_finite_differences(double):
    discriminator, real, fake = convolutional(), torch.randn(3, 2, 8, 8), torch.nn.Parameter(torch.randn(3, 2, 8, 8))
    adam = adam_of(discriminator, lr=0.02)
    theta = unrolled_gan.unroll(discriminator, adam, lambda theta: unrolled_gan.discriminator_loss(
        *logits(discriminator, theta, real, fake)), 3)
    (got,) = torch.autograd.grad(unrolled_gan.generator_loss(*logits(discriminator, theta, real, fake)), fake)
    indices, h = torch.randperm(fake.numel())[:25].tolist(), 1e-4

    def after_real_steps():
        theta = real_steps(discriminator, adam, lambda network, k: unrolled_gan.discriminator_loss(
            network(real), network(fake.detach())), 3)
        return unrolled_gan.generator_loss(*logits(discriminator, theta, real, fake)).item()

    for index in indices:
        place = np.unravel_index(index, fake.shape)
        values = []
        for shift in (h, -2 * h):
            fake.data[place] += shift
            values.append(after_real_steps())
        fake.data[place] += h
        assert got[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-8)


def test_no_steps_are_the_parameters_themselves():
    _, discriminator = networks()
    theta = unrolled_gan.unroll(discriminator, adam_of(discriminator), None, 0)
    assert all(theta[name] is p for name, p in discriminator.named_parameters()) and len(theta) == 6


def test_frozen_parameters_stay_and_a_shared_adam_serves(double):
    generator, discriminator = networks()
    list(discriminator.parameters())[0].requires_grad_(False)
    both = torch.nn.ModuleList([discriminator, generator])
    x = torch.randn(4, 2)
    got = [unrolled_gan.unroll(discriminator, torch.optim.Adam(parameters, 0.01), lambda theta:
           functional_call(discriminator, theta, (x,)).square().mean(), 2)
           for parameters in (discriminator.parameters(), both.parameters())]
    assert_equal(*got)
    assert len(got[0]) == 5


@pytest.mark.parametrize("settings, message", [
    (dict(weight_decay=0.1), "Adam with weight_decay cannot"), (dict(amsgrad=True), "Adam with amsgrad cannot"),
    (dict(maximize=True, weight_decay=1), "Adam with weight_decay and maximize cannot")])
def test_unroll_refuses_other_adams(settings, message):
    _, discriminator = networks()
    with pytest.raises(ValueError, match=message):
        unrolled_gan.unroll(discriminator, adam_of(discriminator, **settings), None, 1)


def test_unroll_refuses_other_optimisers():
    generator, discriminator = networks()
    weights = list(discriminator.parameters())
    groups = [{"params": weights[:3]}, {"params": weights[3:]}]
    for optimizer in (torch.optim.SGD(weights, 0.1), torch.optim.Adam(groups)):
        with pytest.raises(ValueError, match="not an Adam with one group"):
            unrolled_gan.unroll(discriminator, optimizer, None, 1)
    for parameters in (generator.parameters(), weights[1:]):
        with pytest.raises(ValueError, match="does not hold all"):
            unrolled_gan.unroll(discriminator, torch.optim.Adam(parameters), None, 1)


def test_mean_takes_every_gradient_of_the_unrolled_steps(double):
    """Here it halves them, as half of the loss does; what ranks do with it is tested with two of them below."""
    _, discriminator = networks()
    adam, real, fake = adam_of(discriminator), torch.randn(8, 2), torch.randn(8, 2)

    def loss(theta):
        return unrolled_gan.discriminator_loss(*logits(discriminator, theta, real, fake))

    seen = []
    theta = unrolled_gan.unroll(discriminator, adam, loss, 2, lambda g: seen.append(g) or g / 2)
    halved = unrolled_gan.unroll(discriminator, adam, lambda theta: loss(theta) / 2, 2)
    assert all(torch.allclose(theta[name], halved[name], rtol=1e-12) for name in theta)
    assert [g.shape for g in seen] == [(sum(p.numel() for p in discriminator.parameters()),)] * 2


def test_unrolling_leaves_parameters_and_moments_to_the_bit():
    generator, discriminator = networks("relu")
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.01, betas=(0.5, 0.999), fused=True)
    unrolled_gan.discriminator_loss(discriminator(torch.randn(5, 2)), discriminator(torch.randn(5, 2))).backward()
    optimizer.step()
    gradients = {name: p.grad for name, p in discriminator.named_parameters()}
    before = copy.deepcopy((discriminator.state_dict(), optimizer.state_dict(), gradients))
    unrolled_loss(generator, discriminator, optimizer, torch.randn(5, 3), torch.randn(5, 2), 5, "saddle").backward(
        inputs=list(generator.parameters()))
    assert_equal((discriminator.state_dict(), optimizer.state_dict(), gradients), before)
    assert all(parameter.grad is not None for parameter in generator.parameters())


@pytest.mark.parametrize("kind", ("saddle", "nonsaturating"))
def test_a_dead_unit_and_cold_moments_give_adams_values_and_finite_gradients(kind):
    generator, discriminator = networks("relu")
    discriminator[0].weight.data[0], discriminator[0].bias.data[0] = 0, -1  # never above 0: no gradient, so v = 0
    z, real, adam = torch.randn(7, 3), torch.randn(7, 2), adam_of(discriminator, "cold", lr=1e-4)
    theta = unrolled_gan.unroll(discriminator, adam, lambda theta: unrolled_gan.discriminator_loss(
        *logits(discriminator, theta, real, generator(z))), 3)
    assert not adam.state  # nor are there moments now
    assert theta["0.weight"][0].eq(0).all() and theta["0.bias"][0] == -1  # Adam does not move what has no gradient
    loss = unrolled_loss(generator, discriminator, adam, z, real, 3, kind)
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_other_shapes_and_kinds_are_refused():
    for loss in (unrolled_gan.discriminator_loss, unrolled_gan.generator_loss):
        with pytest.raises(ValueError, match=r"shapes differ: \(5, 1\) and \(5,\)"):
            loss(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match="unknown kind 'hinge'; accepted: saddle, nonsaturating"):
        unrolled_gan.generator_loss(torch.zeros(5, 1), torch.zeros(5, 1), "hinge")
    with pytest.raises(ValueError, match="unknown kind 'moon'; accepted: ring, grid"):
        unrolled_gan.mixture("moon")


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
    w1, b1, w2, b2, w3, b3 = discriminator.parameters()
    x = torch.randn(3, 2)
    want = torch.tanh(torch.tanh(x / 4 @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    assert torch.allclose(discriminator(x), want, atol=1e-6) and want.shape == (3, 1)
    assert torch.allclose(w2 @ w2.T, 0.64 * torch.eye(5), atol=1e-5) and not b2.any()
    assert [w.shape for w in unrolled_gan.Discriminator(5, 1).parameters()] == [(5, 2), (5,), (1, 5), (1,)]
    generator = unrolled_gan.Generator(7, 5, "relu", gain=0)
    w1, b1, w2, b2, w3, b3 = generator.parameters()
    assert [w.shape for w in (w1, w2, w3)] == [(5, 7), (5, 5), (2, 5)]
    assert 0.3 < w1.abs().max() < 7**-0.5 and b1.any()
    z = torch.randn(4, 7)
    assert torch.allclose(generator(z), F.relu(F.relu(z @ w1.T + b1) @ w2.T + b2) @ w3.T + b3, atol=1e-6)


@pytest.mark.parametrize("size, channels", [(16, 1), (32, 3), (64, 3)])
def test_networks_of_images(size, channels):
    generator = unrolled_gan.ImageGenerator(7, 64, size, channels, "leaky", gain=0.5)
    discriminator = unrolled_gan.ImageDiscriminator(4, size, channels, "relu", gain=0)
    images = generator(torch.randn(2, 7))
    assert images.shape == (2, channels, size, size) and images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1)
    levels = [64, 32, 16, 8, 4][:size.bit_length() - 2]
    up = [module for module in generator if isinstance(module, torch.nn.ConvTranspose2d)]
    down = [module for module in discriminator if isinstance(module, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in up] == list(itertools.pairwise(levels))
    assert [m.out_channels for m in down] == [4, 8, 16, 32][:len(up)]
    assert all((m.kernel_size, m.stride) == ((3, 3), (2, 2)) for m in down)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in discriminator)
    rows_of_first = generator[0].weight.T  # the shorter side of an orthogonal matrix
    assert torch.allclose(rows_of_first @ rows_of_first.T, 0.25 * torch.eye(7), atol=1e-5)
    assert not any(m.bias.any() for m in up) and all(m.bias.any() for m in down)


@pytest.mark.parametrize("activation, other", [("relu", "leaky"), ("leaky", "tanh"), ("tanh", "relu")])
def test_settings_reach_the_networks_of_images(activation, other):
    config = dict(data="fish", image_size=32, channels=3, latent=7, width=16, d_width=4, gain=0.5)
    for network, name in zip(unrolled_gan.build(config | dict(activation=activation, d_activation=other)),
                             (activation, other)):
        layers = [module for module in network if hasattr(module, "weight")]
        kinds = torch.nn.ReLU, torch.nn.LeakyReLU, torch.nn.Tanh
        between = [type(module) for module in list(network)[:-1] if isinstance(module, kinds)]
        assert between == [type(unrolled_gan.ACTIVATIONS[name]())] * (len(layers) - 1)
        for layer in layers:
            weight = layer.weight.flatten(1)
            weight = weight if weight.shape[0] < weight.shape[1] else weight.T
            assert torch.allclose(weight @ weight.T, 0.25 * torch.eye(len(weight)), atol=1e-5) and not layer.bias.any()


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
    with pytest.raises(ValueError, match=f"prior_std 0.34: that of {count} positive weights is less than 0"):
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
    assert unrolled_gan.mode_statistics(samples, means, std, weights)["modes"] == sum(n > 0 for n in close)
    kl = sum(n / 2560 * math.log(n / 2560 / w) for n, w in zip(nearest, weights.tolist()) if n)
    got = unrolled_gan.mode_statistics(samples, means, std, weights)
    assert got["covered"] == sum(n >= 20 for n in close) and got["reached"] == sum(n >= 20 for n in near)
    assert got["quality"] == pytest.approx(good / 2560, abs=1e-6) and got["kl"] == pytest.approx(kl, abs=1e-5)
    assert 0 < got["covered"] < len(means) and 0 < got["reached"] < len(means)


def test_mode_statistics_of_known_samples():
    means, weights = unrolled_gan.mixture("ring", 0, 0)
    exact = unrolled_gan.mode_statistics(means.repeat(320, 1), means, 0.02, weights)
    assert exact == dict(covered=8, reached=8, modes=8, quality=1, kl=pytest.approx(0, abs=1e-6))
    one = unrolled_gan.mode_statistics(means[:1].repeat(2560, 1), means, 0.02, weights)
    assert one == dict(covered=1, reached=1, modes=1, quality=1, kl=pytest.approx(math.log(8)))


def plain_steps(before: dict, steps: int) -> dict[str, torch.Tensor]:
    """A GAN without any unrolling, from a checkpoint on: D's and G's gradients at the same parameters, two Adams."""
    config = before["config"]
    generator, discriminator = (n.to(memory_format=torch.channels_last) for n in unrolled_gan.build(config))
    generator.load_state_dict(before["state"]["generator"])
    discriminator.load_state_dict(before["state"]["discriminator"])
    g_adam = torch.optim.Adam(generator.parameters(), lr=config["lr"][0], betas=(0.5, 0.999), fused=True)
    d_adam = torch.optim.Adam(discriminator.parameters(), lr=config["lr"][-1], betas=(0.5, 0.999), fused=True)
    args = argparse.Namespace(**config)
    data = (unrolled_gan.Points if config["data"] == "ring" else unrolled_gan.Images)(args, torch.device("cpu"))
    torch.set_rng_state(before["state"]["rng"][:-16].clone())
    for _ in range(steps):
        z = torch.randn(config["batch_size"], config["latent"])
        real, fake = data(), generator(z)
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


@pytest.fixture
def image_flags(pictures, tmp_path) -> list[str]:
    folders = ["--data", str(pictures), "--data-root", str(tmp_path / "data")]
    return [*TINY["unrolled_gan"], *folders, "--image-size", "16", "--d-width", "2"]


@pytest.mark.parametrize("data", ("points", "images"))
@pytest.mark.parametrize("kind", ("saddle", "nonsaturating"))
def test_no_unrolling_is_the_plain_gan_to_the_bit(kind, data, image_flags, tmp_path):
    out, flags = tmp_path / "run", image_flags if data == "images" else TINY["unrolled_gan"]
    unrolled_gan.main([*flags, "--unroll-steps", "0", "--g-loss", kind, "--keep", "--out", str(out)])
    after = load(out / "checkpoint-000006.pt")["state"]
    for name, value in plain_steps(load(out / "checkpoint-000000.pt"), 6).items():
        network, name = name.split("/")
        assert torch.equal(after[network][name], value), name
    assert all(float(row["unroll_gain"]) == 0 for row in rows(out))


@pytest.mark.parametrize("more", ("--g-loss saddle", "--fresh --hflip"))
def test_training_takes_the_gradient_through_real_steps(more, image_flags, tmp_path, double):
    """G's gradient in step 4, which Adam's moments tell, is that of finite differences through torch's own Adam."""
    out = tmp_path / "run"
    smooth = "--activation tanh --d-activation tanh --lr 1e-3 0.02 --steps 4 --save-every 1 --keep".split()
    unrolled_gan.main([*image_flags, *smooth, *more.split(), "--out", str(out)])
    content, after = load(out / "checkpoint-000003.pt"), load(out / "checkpoint.pt")["state"]
    config, before = content["config"], content["state"]
    generator, discriminator = unrolled_gan.build(config)
    generator.load_state_dict(before["generator"])
    discriminator.load_state_dict(before["discriminator"])
    adam = torch.optim.Adam(discriminator.parameters(), config["lr"][-1], (0.5, 0.999))
    adam.load_state_dict(adam.state_dict() | dict(state=before["adam_d"]))
    images = common.load_images(config["data"], 16, 3, config["data_root"])
    draw = common.Batches(images, 4, torch.device("cpu"), config["hflip"])
    torch.set_rng_state(before["rng"][:-16].clone())
    z, real = torch.randn(4, config["latent"]), draw()
    inner = [draw(), draw()] if config["fresh"] else [real, real]

    def after_real_steps():
        fake = generator(z).detach()
        theta = real_steps(discriminator, adam, lambda network, k: unrolled_gan.discriminator_loss(
            network(inner[k]), network(fake)), 2)
        return unrolled_gan.generator_loss(*logits(discriminator, theta, real, fake), config["g_loss"])

    few = {i: p for i, p in enumerate(generator.parameters()) if p.numel() < 10}  # biases
    got = torch.cat([2 * after["adam_g"][i]["exp_avg"] - before["adam_g"][i]["exp_avg"] for i in few])
    want = differences(after_real_steps, few.values(), h=1e-4)
    assert len(want) > 8 and (got - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("data", ("points", "images"))
def test_discriminator_takes_one_ordinary_step_whatever_is_unrolled(data, image_flags, tmp_path):
    states, flags = [], image_flags if data == "images" else TINY["unrolled_gan"]
    for more in (["--unroll-steps", "0"], ["--unroll-steps", "5"], ["--unroll-steps", "5", "--fresh"]):
        out = tmp_path / "-".join(more)
        unrolled_gan.main([*flags, *more, "--steps", "1", "--out", str(out)])
        states.append(load(out / "checkpoint.pt")["state"])
    for one, two in itertools.combinations(states, 2):
        assert_equal(one["discriminator"], two["discriminator"])
        assert_equal(one["adam_d"], two["adam_d"])
        assert any(not torch.equal(value, two["generator"][name]) for name, value in one["generator"].items())


@pytest.mark.parametrize("more", (["--fresh"], ["--gain", "0", "--activation", "tanh", "--d-activation", "tanh"],
                                  ["--data", "grid", "--prior-std", "0.03", "--g-loss", "saddle", "--d-layers", "1"]))
def test_settings_train(more, tmp_path):
    unrolled_gan.main([*TINY["unrolled_gan"], *more, "--log-every", "1", "--out", str(tmp_path / "run")])
    modes = 25 if "grid" in more else 8
    for row in rows(tmp_path / "run"):
        assert int(row["covered"]) <= int(row["modes"]) <= modes
        assert 0 < int(row["coverable"]) <= modes and 0 <= float(row["quality"]) <= 1 and float(row["kl"]) > 0
        assert float(row["unroll_gain"]) > 0  # D's steps from where it stands improve its own f


def test_too_much_spread_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="prior_std 0.5: that of 8 positive weights is less than 0.331"):
        unrolled_gan.main([*TINY["unrolled_gan"], "--prior-std", "0.5"])
    assert not list(tmp_path.iterdir())


def test_strip_and_samples(tmp_path):
    out = tmp_path / "run"
    every = ["--log-every", "1", "--sample-every", "1"]
    unrolled_gan.main([*TINY["unrolled_gan"], "--steps", "12", *every, "--out", str(out)])
    with Image.open(out / "strip.png") as strip:
        assert strip.size == (5 * 208 + 8, 246)  # four panels along training, thinned from 13, and the data
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ["--checkpoint", str(out / "checkpoint.pt"), "--sample", "5000", "--seed", seed, "--device", "cpu"]
        unrolled_gan.main([*flags, "--out", str(tmp_path / name)])
    a, b, c = (np.load(tmp_path / name / "samples.npy") for name in "abc")
    assert a.shape == (5000, 2) and a.dtype == np.float32 and np.array_equal(a, b) and not np.array_equal(a, c)
    assert json.loads((out / "config.json").read_text())["unroll_steps"] == 2


@pytest.mark.parametrize("more", ("--g-loss saddle", "--g-loss nonsaturating", "IMAGES", "IMAGES --fresh --hflip"))
def test_two_ranks_are_one(more, image_flags, tmp_path):
    flags = image_flags if "IMAGES" in more else TINY["unrolled_gan"]
    flags = [*flags, "--unroll-steps", "3", "--steps", "4", *more.replace("IMAGES", "").split()]
    for name, ranks in (("one", 1), ("two", 2)):
        done = run("unrolled_gan", *flags, "--out", name, cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (load(tmp_path / name / "checkpoint.pt")["state"] for name in ("one", "two"))
    for network in ("generator", "discriminator"):
        assert all(torch.allclose(value, two[network][name], rtol=0, atol=2e-6) for name, value in one[network].items())


@pytest.mark.parametrize("more", ([], ["--fresh", "--hflip"], ["--channels", "1", "--unroll-steps", "0"]))
def test_images_resume_to_the_bit(more, image_flags, tmp_path):
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    unrolled_gan.main([*image_flags, *more, "--out", whole])
    unrolled_gan.main([*image_flags, *more, "--steps", "4", "--out", halves])
    unrolled_gan.main(["--resume", "--out", halves, "--steps", "6"])
    one, two = (load(Path(folder, "checkpoint.pt")) for folder in (whole, halves))
    assert same_state(one, two) and rows(Path(whole)) == rows(Path(halves))
    assert one["config"]["channels"] == (1 if "--channels" in more else 3)
    assert list(rows(Path(whole))[0]) == ["step", "loss_d", "loss_g", "unroll_gain", "swd", "diversity"]


@pytest.mark.parametrize("size, channels", [(16, 1), (64, 3)])
def test_images_are_compared_with_those_of_the_data(size, channels, image_flags, pictures, tmp_path):
    out = tmp_path / "run"
    unrolled_gan.main([*image_flags, "--image-size", str(size), "--channels", str(channels), "--out", str(out)])
    generator, config = unrolled_gan.load_generator(out / "checkpoint.pt")
    samples = generator(load(out / "checkpoint.pt")["state"]["fixed_z"])
    images = common.load_images(str(pictures), size, channels, config["data_root"])
    assert samples.shape == (256, channels, size, size)
    want = common.compare(samples, images)
    assert {name: float(rows(out)[-1][name]) for name in want} == pytest.approx(want, rel=1e-3)
    common.save_grid(samples[:64], tmp_path / "samples.png", columns=8)
    common.save_grid(images, tmp_path / "real.png", columns=8)
    for one, two in ("samples", "000006"), ("real", "real"):
        with Image.open(tmp_path / f"{one}.png") as wanted, Image.open(out / f"samples/{two}.png") as got:
            assert wanted.size == got.size and np.abs(np.asarray(wanted, int) - np.asarray(got, int)).max() <= 1


def test_every_unrolled_step_has_real_images_of_its_own(image_flags, tmp_path, monkeypatch):
    """Where the host fills a buffer before the step, each takes its own part of it."""
    real, taken = common.Batches.__call__, []
    monkeypatch.setattr(common.Batches, "__init__", functools.partialmethod(common.Batches.__init__, resident=False))
    monkeypatch.setattr(common.Batches, "__call__", lambda self, number=0: taken.append(number) or real(self, number))
    unrolled_gan.main([*image_flags, "--fresh", "--steps", "2", "--out", str(tmp_path / "run")])
    assert taken == [0, 1, 2] * 2


def test_images_are_sampled_and_shown(image_flags, pictures, tmp_path):
    out = tmp_path / "run"
    unrolled_gan.main([*image_flags, "--image-size", "32", "--out", str(out)])
    assert Image.open(out / "samples/real.png").width == Image.open(out / "samples/000006.png").width
    assert (out / "training.gif").exists() and not (out / "strip.png").exists()
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ["--checkpoint", str(out / "checkpoint.pt"), "--sample", "300", "--seed", seed, "--device", "cpu"]
        unrolled_gan.main([*flags, "--out", str(tmp_path / name)])
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc")
    assert len(a) == 300 and a == b and a != c
    with Image.open(tmp_path / "a/00299.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_one_kind_of_data_does_not_continue_with_another(image_flags, pictures, tmp_path):
    moved, points = shutil.copytree(pictures, tmp_path / "moved"), str(tmp_path / "points.npy")
    np.save(points, np.eye(2))
    for name, flags in (("points", [*TINY["unrolled_gan"], "--data", points]), ("images", image_flags)):
        unrolled_gan.main([*flags, "--out", str(tmp_path / name)])
    unrolled_gan.main(["--resume", "--out", str(tmp_path / "images"), "--data", str(moved), "--steps", "7"])
    for name, data in (("points", str(moved)), ("images", points), ("points", "grid")):
        with pytest.raises(SystemExit, match=f"argument --data: the run has .* and cannot continue with {data}"):
            unrolled_gan.main(["--resume", "--out", str(tmp_path / name), "--data", data])
    with pytest.raises(SystemExit, match="--prior-std: goes with"):
        unrolled_gan.main([*image_flags, "--prior-std", "0.1"])
    with pytest.raises(SystemExit, match="argument --data: 'moon': choose from ring, grid, .* digits, .* or a folder"):
        unrolled_gan.main([*TINY["unrolled_gan"], "--data", "moon"])


def test_points_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", np.random.default_rng(0).normal(size=(100, 2)))
    unrolled_gan.main([*TINY["unrolled_gan"], "--data", "points.npy", "--out", "run"])
    assert list(rows(tmp_path / "run")[-1]) == ["step", "loss_d", "loss_g", "unroll_gain"]
    assert all((tmp_path / "run" / name).exists() for name in ("samples/real.png", "strip.png", "curves.png"))
    (tmp_path / "points.npy").rename("moved.npy")
    unrolled_gan.main(["--resume", "--out", "run", "--data", "moved.npy", "--steps", "8"])
    assert rows(tmp_path / "run")[-1]["step"] == "8"
    with pytest.raises(SystemExit, match="argument --data: the run has moved.npy and cannot continue with ring"):
        unrolled_gan.main(["--resume", "--out", "run", "--data", "ring"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="--prior-std: goes with"):
        unrolled_gan.main([*TINY["unrolled_gan"], "--data", "moved.npy", "--prior-std", "0.1"])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("array", (np.zeros((5, 3)), np.zeros(4), np.zeros((0, 2)), np.full((5, 2), np.nan), None))
def test_other_files_are_refused_in_one_line(array, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("points.npy").write_text("text") if array is None else np.save("points.npy", array)
    with pytest.raises(SystemExit, match="argument --data: 'points.npy' is not a file with an array"):
        unrolled_gan.main([*TINY["unrolled_gan"], "--data", "points.npy"])
    assert len(list(tmp_path.iterdir())) == 1


def test_draws_from_points_are_those_points():
    points = torch.randn(50, 2)
    drawn = unrolled_gan.draw(points, torch.full((50,), 1 / 50), 0.0, 2000)
    places = torch.cdist(drawn, points, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert places.values.max() == 0 and len(places.indices.unique()) == 50


def test_losses_paste_without_the_rest():
    text = Path(unrolled_gan.__file__).read_text()
    text = text[text.index("# ---- networks"):text.index("# ---- training")]
    names = {}
    exec("import math, itertools, torch, torch.nn.functional as F\nfrom torch import Tensor, nn\n"
         "from torch.func import functional_call\n"
         "from collections.abc import Callable, Iterable, Iterator, Sequence\n" + text, names)
    discriminator = names["Discriminator"](6)
    real, fake = torch.randn(4, 2), names["Generator"](3, 6)(torch.randn(4, 3))
    theta = names["unroll"](discriminator, torch.optim.Adam(discriminator.parameters()), lambda theta: names[
        "discriminator_loss"](*logits(discriminator, theta, real, fake)), 2)
    assert names["generator_loss"](*logits(discriminator, theta, real, fake)).isfinite()
    means, weights = names["mixture"]("grid")
    assert names["mode_statistics"](names["draw"](means, weights, 0.05, 9), means, 0.05, weights)["quality"] > 0
