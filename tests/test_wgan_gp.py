"""WGAN-GP against loops, closed forms, finite differences and a textbook's training."""

import argparse
import math
import random

import common
import pytest
import torch
import torch.nn.functional as F
import wgan_gp
from conftest import TINY, load, refusal, rows

KINDS = dict(generator=wgan_gp.Generator, averaged=wgan_gp.Generator, critic=wgan_gp.Critic)
squares = lambda x: x.flatten(1).square().sum(dim=1)  # a critic with the gradient 2 x


@pytest.mark.parametrize("shape", [(7, 2), (7, 5, 3), (7, 3, 4, 5)])
def test_penalty_against_loops(shape, double):
    real, fake = torch.randn(2, *shape)
    torch.manual_seed(1)
    penalty = wgan_gp.gradient_penalty(squares, real, fake).item()
    torch.manual_seed(1)
    epsilon = torch.rand(7)
    total = 0.0
    for x, y, e in zip(real.flatten(1).tolist(), fake.flatten(1).tolist(), epsilon.tolist()):
        between = [e * a + (1 - e) * b for a, b in zip(x, y)]
        total += (math.sqrt(sum((2 * v) ** 2 for v in between)) - 1) ** 2
    assert penalty == pytest.approx(total / 7, rel=1e-12)


@pytest.mark.parametrize("stddev", (False, True))
def test_gradient_of_the_penalty_against_finite_differences(stddev, double):
    critic = wgan_gp.Critic(1, 16, 2, dropout=0, stddev=stddev)
    real, fake = torch.randn(2, 3, 2, 16, 16)
    names, values = zip(*critic.named_parameters())

    def penalty(*parameters):
        call = lambda images: torch.func.functional_call(critic, dict(zip(names, parameters)), (images,))
        torch.manual_seed(1)  # for the same epsilon
        return wgan_gp.gradient_penalty(call, real, fake)

    assert torch.autograd.gradcheck(penalty, values, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


def test_penalty_takes_mixed_precision_and_refuses_what_it_cannot_use():
    real, fake = torch.randn(2, 4, 3)
    for one, two in ((real, fake.bfloat16()), (real.bfloat16(), fake)):
        assert wgan_gp.gradient_penalty(squares, one, two).dtype == torch.float32
    for one, two in ((real, fake[:1]), (real, fake[:, :1]), (real[:, None], fake)):
        with pytest.raises(ValueError, match="shapes differ"):
            wgan_gp.gradient_penalty(squares, one, two)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        wgan_gp.gradient_penalty(squares, real, fake)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_leaky_relu_and_its_gradients(dtype):
    tiny, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    values = [0.0, -0.0, 1, -1, tiny, -tiny, tiny / 4, most, -most, math.inf, -math.inf]
    weight = torch.linspace(-2, 3, len(values)).to(dtype).requires_grad_()
    results = []
    for function in (wgan_gp.leaky_relu, lambda x: F.leaky_relu(x, 0.2)):
        x = torch.tensor(values, dtype=dtype, requires_grad=True)
        (first,) = torch.autograd.grad(function(x), x, weight, create_graph=True)
        second, zeros = torch.autograd.grad(first.square().sum(), [weight, x], allow_unused=True)
        results.append((function(x), first, second))
        assert (zeros is None) == (function is wgan_gp.leaky_relu)  # what ours is there to avoid
    torch.testing.assert_close(*results)


def test_pixel_norm(double):
    x = torch.randn(2, 3, 4, 5)
    assert torch.allclose(wgan_gp.pixel_norm(x), x / (sum(x[:, c] ** 2 for c in range(3)) / 3).sqrt()[:, None])


@pytest.mark.parametrize("size", (16, 64))
def test_one_pass_of_the_critic_is_two_passes(size, double):
    critic = wgan_gp.build(wgan_gp.Critic, dict(image_size=size, width=2, channels=3, dropout=0.0, stddev=True))
    real, fake = torch.randn(4, 3, size, size), 0.3 * torch.randn(4, 3, size, size)
    results = []
    for scores in critic(torch.cat([real, fake]), groups=2), torch.cat([critic(real), critic(fake)]):
        results.append((scores, *torch.autograd.grad(scores @ torch.arange(8.0), list(critic.parameters()))))
    torch.testing.assert_close(*results)
    more = wgan_gp.minibatch_stddev(torch.cat([real, fake]), groups=2)[:, 3]
    for batch, channel in (real, more[:4]), (fake, more[4:]):
        columns = [(column, sum(column) / 4) for column in batch.flatten(1).T.tolist()]
        deviations = [math.sqrt(sum((v - mean) ** 2 for v in column) / 4) for column, mean in columns]
        assert torch.allclose(channel, torch.tensor(sum(deviations) / len(deviations)), rtol=1e-6)


def test_schedule(data_flags, tmp_path, capsys):
    pieces = wgan_gp.parse_schedule("1e-4:100,2e-5~6e-5:400,2e-5:1500")
    ranges = [wgan_gp.lr_range(step, pieces, 4000) for step in (0, 199, 200, 999, 1000, 9999)]
    assert ranges == [(1e-4, 1e-4)] * 2 + [(2e-5, 6e-5)] * 2 + [(2e-5, 2e-5)] * 2
    for text in ("x", "0", "nan", "-1e-3", "1", "1e-3:0", "1e-3:nan", "1e-3:inf", "1e-3:1,", "1e-3:1:1", "2e-4~1e-4"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not made of RATE:SHARE"):
            wgan_gp.schedule(text)
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--every", "1", "--out", str(tmp_path / "run")]
    wgan_gp.main([*flags, "--lr", "1e-3:1,5e-4:1", "--steps", "2"])
    wgan_gp.main(["--resume", "--steps", "5", "--out", str(tmp_path / "run")])  # the last piece goes on
    assert [float(row["lr"]) for row in rows(tmp_path / "run")] == pytest.approx([1e-3] + [5e-4] * 4)
    assert "warning" not in capsys.readouterr().err  # as of a chart without a column


def test_growing(data_flags, tmp_path):
    run = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--steps", "3", "--every", "3", "--image-size"]
    wgan_gp.main([*run, "32", "--no-pixel-norm", "--out", str(tmp_path / "32")])
    for size in (64, 128):
        path = tmp_path / str(size // 2)
        settings = load(path / "checkpoint.pt")["settings"]
        small = {name: wgan_gp.build(kind, settings) for name, kind in KINDS.items()}
        large = {name: wgan_gp.build(kind, settings | dict(image_size=size)) for name, kind in KINDS.items()}
        wgan_gp.load(path, small)
        wgan_gp.grow(path, large)
        z, images = torch.randn(4, 8), torch.randn(4, 3, size, size)
        assert torch.equal(large["averaged"](z), F.interpolate(small["averaged"](z), scale_factor=2))
        assert torch.allclose(large["critic"](images), small["critic"](F.avg_pool2d(images, 2)), rtol=0, atol=1e-6)
        wgan_gp.main([*run, str(size), "--init-from", str(path), "--out", str(tmp_path / str(size))])
        after = load(tmp_path / f"{size}/checkpoint.pt")["state"]
        assert all(after[name][part].any() for name in KINDS for part in after[name])  # the zeros have learnt
        assert torch.allclose(after["generator"]["first.weight"], small["generator"].first.weight, rtol=0, atol=0.02)
    for flags in (["--image-size", "128"], ["--image-size", "64", "--width", "3"], ["--pixel-norm"]):
        text = refusal("wgan_gp", "--init-from", tmp_path / "32", "--out", tmp_path / "no", *flags)[1]
        assert "the saved networks have" in text


def test_slerp():
    begin, end = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [-1.0, 0.0], [0.0, 4.0]])
    third = [4 / 3 * math.cos(math.pi / 6), 4 / 3 * math.sin(math.pi / 6)]  # an arc, an opposite and a zero vector
    assert torch.allclose(wgan_gp.slerp(begin, end, 1 / 3), torch.tensor([third, [5 / 3, 0], [0, 4 / 3]]), atol=1e-5)
    for latent in (1, 3, 64):
        begin = torch.randn(1000, latent)
        for end in (begin, -begin, 1e-5 * torch.randn_like(begin) - begin, torch.randn_like(begin)):
            longest = torch.maximum(begin.norm(dim=1), end.norm(dim=1))
            assert all((wgan_gp.slerp(begin, end, s / 10).norm(dim=1) <= 1.001 * longest).all() for s in range(11))
            assert torch.allclose(wgan_gp.slerp(begin, end, 1), end, atol=1e-5)


def textbook(run: str, images: torch.Tensor, steps: range) -> dict[str, torch.nn.Module]:
    """Train plain WGAN-GP from a checkpoint on. Returns the networks."""
    settings = load(run)["settings"]
    args, networks = argparse.Namespace(**settings), {name: wgan_gp.build(KINDS[name], settings) for name in KINDS}
    generator, averaged, critic = networks.values()
    adam_g, adam_c = (torch.optim.Adam(network.parameters(), betas=(0.0, 0.99)) for network in (generator, critic))
    wgan_gp.load(run, networks | dict(adam_g=adam_g, adam_c=adam_c))
    for step in steps:
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = random.Random(args.seed * 1_000_003 + step).uniform(5e-4, 2e-3) if step >= 3 else 1e-3
        adam_g.param_groups[0]["lr"] = adam_c.param_groups[0]["lr"] = rate
        for z in torch.randn(args.n_critic * args.batch_size, args.latent).split(args.batch_size):
            real = images[torch.randint(len(images), (args.batch_size,))] / 127.5 - 1
            real = common.augment(real) if args.augment else real
            fake = generator(z).detach()
            epsilon = torch.rand(args.batch_size, 1, 1, 1)
            between = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()
            loss = critic(fake).mean() - critic(real).mean() + args.gp_weight * penalty
            adam_c.zero_grad()
            (loss + args.drift * (critic(real) ** 2).mean()).backward()
            adam_c.step()
        adam_g.zero_grad()
        (-critic(generator(torch.randn(args.batch_size, args.latent))).mean()).backward()
        adam_g.step()
        decay = min(args.ema, step / (step + 9))
        for mean, parameter in zip(averaged.parameters(), generator.parameters()):
            mean.data = decay * mean.data + (1 - decay) * parameter.data
    return networks


@pytest.mark.parametrize("more", ("--augment --seed 3", "--n-critic 1 --drift 0.1", "--gp-weight 5 --ema 0.3"))
def test_training_is_the_textbooks(more, data_flags, pictures, tmp_path, double):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--lr", "1e-3:1,5e-4~2e-3:1", *more.split()]
    wgan_gp.main([*flags, "--keep", "--out", str(tmp_path / "run")])
    before, after = (tmp_path / f"run/checkpoint-{step:06d}.pt" for step in (2, 6))
    images = common.load_images(str(pictures), 16, 3, load(before)["settings"]["data_root"])
    for name, network in textbook(before, images, range(2, 6)).items():
        torch.testing.assert_close(load(after)["state"][name], dict(network.state_dict()), rtol=0, atol=1e-9)
