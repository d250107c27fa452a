"""WGAN-GP's penalty, layers, schedule, average and growing against loops, closed forms and the textbook's training."""

import argparse
import math
import re
import shutil

import common
import numpy
import pytest
import torch
import torch.nn.functional as F
import wgan_gp
from conftest import TINY, load, rows, same_state
from PIL import Image
from test_scripts import fails

DOUBLE = dict(dtype=torch.float64)


def pair(count: int = 4, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, size, size, **DOUBLE), torch.randn(count, 3, size, size, **DOUBLE)


def test_penalty_of_a_linear_critic_is_known():
    w = torch.randn(3, 5, 5, **DOUBLE)
    want = (math.sqrt(sum(v * v for v in w.flatten().tolist())) - 1) ** 2
    penalty = wgan_gp.gradient_penalty(lambda images: (w * images).sum(dim=(1, 2, 3)), *pair())
    assert penalty.shape == () and penalty.item() == pytest.approx(want, rel=1e-12)


def test_penalty_has_a_norm_for_each_sample():
    w, scales = torch.randn(3, 5, 5, **DOUBLE), torch.tensor([0.1, 1.0, 2.0, 5.0], **DOUBLE)
    penalty = wgan_gp.gradient_penalty(lambda images: scales * (w * images).sum(dim=(1, 2, 3)), *pair())
    want = sum((scale * w.norm().item() - 1) ** 2 for scale in scales.tolist()) / 4
    assert penalty.item() == pytest.approx(want, rel=1e-12)


def test_penalty_is_taken_between_real_and_fake_with_one_epsilon_for_each_sample():
    seen = []

    def critic(images):
        seen.append(images.detach())
        return images.sum(dim=(1, 2, 3))

    real, fake = torch.full((500, 3, 4, 4), 3.0), torch.full((500, 3, 4, 4), 1.0)
    wgan_gp.gradient_penalty(critic, real, fake)
    epsilon = (seen[0] - 1) / 2
    assert torch.allclose(epsilon, epsilon[:, :1, :1, :1].expand_as(epsilon), atol=1e-6)  # one for all pixels
    epsilon = epsilon[:, 0, 0, 0]
    assert len(epsilon.unique()) > 490 and 0 <= epsilon.min() < 0.02 and 0.98 < epsilon.max() <= 1
    wgan_gp.gradient_penalty(critic, *pair(2))
    assert epsilon.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shape", [(7, 2), (7, 5, 3), (7, 3, 4, 5), (7, 1, 2, 3, 4)])
def test_penalty_of_samples_of_any_number_of_dimensions(shape):
    real, fake, epsilon = torch.randn(shape, **DOUBLE), torch.randn(shape, **DOUBLE), torch.rand(7, **DOUBLE)
    total = 0.0
    for x, y, e in zip(real.flatten(1).tolist(), fake.flatten(1).tolist(), epsilon.tolist()):
        between = [e * a + (1 - e) * b for a, b in zip(x, y)]
        total += (math.sqrt(sum((2 * v) ** 2 for v in between)) - 1) ** 2  # of C(x) = |x|^2
    penalty = wgan_gp.gradient_penalty(lambda x: x.flatten(1).square().sum(dim=1), real, fake, epsilon)
    assert penalty.item() == pytest.approx(total / 7, rel=1e-12)


def test_penalty_refuses_shapes_that_would_broadcast():
    critic = lambda x: x.flatten(1).sum(dim=1)
    for real, fake in (((4, 3), (1, 3)), ((4, 3), (4, 1)), ((4, 3), (4, 1, 3)), ((4,), (4,))):
        with pytest.raises(ValueError, match="real and fake must be of one shape"):
            wgan_gp.gradient_penalty(critic, torch.ones(real), torch.ones(fake))
    with pytest.raises(RuntimeError, match=r"shape '\[4, 1\]' is invalid for input of size 1"):
        wgan_gp.gradient_penalty(critic, torch.ones(4, 3), torch.ones(4, 3), torch.rand(1))


@pytest.mark.parametrize("stddev", (False, True))
def test_gradient_of_the_penalty_against_finite_differences(stddev):
    torch.manual_seed(1)
    critic = wgan_gp.Critic(1, 16, 2, dropout=0, stddev=stddev).double()
    real, fake = torch.randn(2, 3, 2, 16, 16, **DOUBLE)
    names, values = zip(*critic.named_parameters())

    def penalty(*parameters):
        torch.manual_seed(2)
        call = lambda images: torch.func.functional_call(critic, dict(zip(names, parameters)), (images,))
        return wgan_gp.gradient_penalty(call, real, fake)

    assert torch.autograd.gradcheck(penalty, values, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    gradients = torch.autograd.grad(penalty(*values), values, allow_unused=True)
    assert all(g is not None and g.abs().max() > 0 for n, g in zip(names, gradients) if n.endswith("weight"))


def test_losses_by_hand():
    real, fake, penalty = torch.tensor([1.0, 3.0]), torch.tensor([0.5, -0.5, 0.9]), torch.tensor(0.2)
    want = 0.3 - 2 + 10 * 0.2 + 0.01 * (1 + 9) / 2  # the drift is of real images' scores
    assert wgan_gp.critic_loss(real, fake, penalty, 10, 0.01).item() == pytest.approx(want, rel=1e-6)
    assert wgan_gp.generator_loss(fake).item() == pytest.approx(-0.3, rel=1e-6)


def test_minibatch_stddev_against_loops():
    x = torch.randn(3, 2, 4, 5, **DOUBLE)
    total = 0.0
    for c in range(2):
        for i in range(4):
            for j in range(5):
                values = [x[n, c, i, j].item() for n in range(3)]
                mean = sum(values) / 3
                total += math.sqrt(sum((v - mean) ** 2 for v in values) / 3)
    y = wgan_gp.minibatch_stddev(x)
    assert y.shape == (3, 3, 4, 5) and torch.equal(y[:, :2], x)
    assert torch.allclose(y[:, 2], torch.tensor(total / 40, **DOUBLE), rtol=1e-6)
    same = torch.ones(4, 2, 3, 3, requires_grad=True)  # a collapsed batch must not give NaN
    y = wgan_gp.minibatch_stddev(same)
    y.sum().backward()
    assert y[:, 2].max() < 1e-3 and same.grad.isfinite().all()


def test_pixel_norm_against_loops():
    x = torch.randn(2, 3, 4, 5, **DOUBLE)
    y = wgan_gp.pixel_norm(x)
    for n in range(2):
        for i in range(4):
            for j in range(5):
                root = math.sqrt(sum(x[n, c, i, j].item() ** 2 for c in range(3)) / 3)
                assert [v / root for v in x[n, :, i, j].tolist()] == pytest.approx(y[n, :, i, j].tolist(), rel=1e-6)
    assert torch.equal(wgan_gp.pixel_norm(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (8, 8)])
def test_fused_up_convolution_is_up_sampling_then_convolution(height, width):
    layer = wgan_gp.UpConv(3, 4).double()
    x = torch.randn(2, 3, height, width, **DOUBLE, requires_grad=True)
    want = F.leaky_relu(F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1), 0.2)
    got = layer(x)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    for one, two in zip(*(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (got, want))):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", (16, 32, 64, 128))
def test_networks(size):
    generator, critic = wgan_gp.Generator(7, 2, size, 3), wgan_gp.Critic(2, size, 3)
    images = generator(torch.randn(4, 7))
    assert images.shape == (4, 3, size, size) and images.abs().max() <= 1
    assert critic(images).shape == (4,)
    for layer in critic.modules():
        assert not isinstance(layer, torch.nn.BatchNorm2d)
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.kernel_size == (4, 4) and layer.stride == (2, 2)
    for parameter in [*generator.parameters(), *critic.parameters()]:
        parameter.grad = None
    critic(images).sum().backward()
    assert all(p.grad is not None for p in [*generator.parameters(), *critic.parameters()])  # nothing idle


def test_dropout_leaves_the_mean_as_it_is():
    x = torch.ones(100, 1000)
    y = wgan_gp.dropout(x, 0.2)
    assert torch.equal(y.unique(), torch.tensor([0, 1.25])) and abs(y.mean() - 1) < 0.01
    assert abs((y == 0).double().mean() - 0.2) < 0.01 and wgan_gp.dropout(x, 0) is x


def test_the_recipes_items_are_in_the_networks_and_can_be_left_out():
    images, z = torch.randn(6, 3, 16, 16), torch.randn(6, 5)
    critic, dropped = wgan_gp.Critic(4, 16, 3, dropout=0.5), []
    assert not torch.equal(critic(images), critic(images))
    for layer in (critic.down["8"], critic.last):
        layer.register_forward_pre_hook(lambda _, x: dropped.append((x[0].flatten(1)[:, :256] == 0).double().mean()))
    critic(images)
    assert len(dropped) == 2 and all(0.45 < share < 0.55 for share in dropped)
    assert torch.equal(critic.eval()(images), critic(images))
    assert not torch.allclose(critic(images)[:2], critic(images[:2]))  # the rest of the batch counts
    critic = wgan_gp.Critic(4, 16, 3, dropout=0, stddev=False)
    assert torch.allclose(critic(images)[:2], critic(images[:2]), atol=1e-6)
    for normalised in (True, False):
        generator, seen = wgan_gp.Generator(5, 4, 16, 3, normalised), []
        generator.rgb["16"].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        generator(z)
        power = seen[0].square().mean(dim=1)
        assert torch.allclose(power, torch.ones_like(power), atol=0.01) == normalised


def test_average_in_closed_form():
    average, network = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    values = [float(value) for value in torch.randn(30)]
    for n, value in enumerate(values):
        torch.nn.init.constant_(network.weight, value)
        wgan_gp.update_ema(average, network, torch.tensor(float(n), **DOUBLE), 0.999)
    # The weight of value n: 9 / (n + 9), times m / (m + 9) for every later m: the first weights have none at all.
    want = sum(v * 9 / (n + 9) * math.prod(m / (m + 9) for m in range(n + 1, 30)) for n, v in enumerate(values))
    assert average.weight.item() == pytest.approx(want, rel=1e-9)
    torch.nn.init.constant_(average.weight, 1.0)
    torch.nn.init.constant_(network.weight, 0.0)
    for n in range(7):  # long after the warm-up
        wgan_gp.update_ema(average, network, torch.tensor(1e6 + n, **DOUBLE), 0.9)
    assert average.weight.item() == pytest.approx(0.9**7, rel=1e-9)
    wgan_gp.update_ema(average, network, torch.tensor(1e6, **DOUBLE), 0.0)
    assert torch.equal(average.weight, network.weight)  # no average


SEEDS = "1e-4:100,5e-5:300,2e-5~6e-5:400,2.5e-5:300,2e-5:1400"


def test_schedule_of_the_seed():
    assert wgan_gp.parse_schedule(SEEDS) == [
        (1e-4, 1e-4, 100), (5e-5, 5e-5, 300), (2e-5, 6e-5, 400), (2.5e-5, 2.5e-5, 300), (2e-5, 2e-5, 1400)]
    assert wgan_gp.parse_schedule("1e-3") == [(1e-3, 1e-3, 1)]


@pytest.mark.parametrize("text", ["", "x", "0", "-1e-3", "2", "nan", "inf", "1e-3:0", "1e-3:-1", "1e-3:inf", "1e-3:nan",
                                  "1e-3:1,1e-4", "1e-3,1e-4", "1e-3:1,", "1e-3:1:1", "2e-4~1e-4:1", "1e-4~:1",
                                  "~1e-4:1", "1e-4~2e-4~3e-4:1"])
def test_schedules_that_are_none_say_so(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="is not float from .* to "):
        wgan_gp.parse_schedule(text)
    message = fails(capsys, "wgan_gp", f"--lr={text}")
    assert f"argument --lr: {text!r} is not made of RATE:SHARE or LOW~HIGH:SHARE: " in message


def test_every_piece_of_the_schedule_comes_in_its_share_of_the_run(data_flags, tmp_path):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--log-every", "1", "--sample-every", "99", "--save-every", "99"]
    main, out = wgan_gp.main, ["--out", str(tmp_path / "run")]
    main([*flags, "--lr", "1e-3:1,2e-5~6e-5:10,5e-4:3,1e-4:1", "--steps", "30", *out])
    main(["--resume", "--steps", "34", *out])  # the schedule is not stretched: its last piece goes on
    lr = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert lr[:2] == [1e-3] * 2 and lr[22:28] == [5e-4] * 6 and lr[28:] == [1e-4] * 6
    drawn = lr[2:22]
    assert len(set(drawn)) == 20 and all(2e-5 <= rate <= 6e-5 for rate in drawn)
    assert min(drawn) < 3e-5 and max(drawn) > 5e-5


def test_a_longer_resumed_run_keeps_the_length_of_its_schedule(data_flags, tmp_path):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--log-every", "1"]
    wgan_gp.main([*flags, "--steps", "4", "--lr", "1e-3:1,5e-4:1", "--out", str(tmp_path / "run")])
    wgan_gp.main(["--resume", "--steps", "8", "--out", str(tmp_path / "run")])
    assert [float(row["lr"]) for row in rows(tmp_path / "run")] == [1e-3] * 2 + [5e-4] * 6


def textbook_steps(before: dict, images: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Plain WGAN-GP from a checkpoint on: a batch of fakes for each critic update, a backward for each loss.

    Returns all parameters and, under "adam_g" and "adam_c", the gradients of the last update of each network.
    """
    config, networks = before["config"], {}
    batch, latent = config["batch_size"], config["latent"]
    for name, network in (("generator", wgan_gp.Generator), ("critic", wgan_gp.Critic), ("ema", wgan_gp.Generator)):
        networks[name] = wgan_gp.build(network, config)
        networks[name].load_state_dict(before["state"][name])
    generator, critic, ema = networks.values()
    g_adam, c_adam = (torch.optim.Adam(n.parameters(), lr=1.0, betas=(0.0, 0.99)) for n in (generator, critic))
    torch.set_rng_state(before["state"]["rng"][:-16])
    for step in range(steps):
        chance = torch.rand(()).item()
        rate = 1e-3 if step < 2 else 5e-4 + chance * 1.5e-3
        for adam in (g_adam, c_adam):
            adam.param_groups[0]["lr"] = rate
        latents = [torch.randn(batch, latent) for _ in range(config["n_critic"])]
        for z in latents:
            real = images[torch.randint(len(images), (batch,))] / 127.5 - 1
            real = common.augment(real) if config["augment"] else real
            fake = generator(z).detach()
            real_scores, fake_scores = critic(real), critic(fake)
            epsilon = torch.rand(batch, 1, 1, 1)
            between = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()
            loss = fake_scores.mean() - real_scores.mean() + 10 * penalty + config["drift"] * (real_scores**2).mean()
            c_adam.zero_grad()
            loss.backward()
            c_adam.step()
        g_adam.zero_grad()
        (-critic(generator(torch.randn(batch, latent))).mean()).backward(inputs=list(generator.parameters()))
        g_adam.step()
        decay = min(0.999, step / (step + 9))
        for mean, parameter in zip(ema.parameters(), generator.parameters()):
            mean.data = decay * mean.data + (1 - decay) * parameter.data
    parameters = {f"{n}/{name}": p for n, network in networks.items() for name, p in network.named_parameters()}
    gradients = {f"{name}/{i}": p.grad for name, adam in (("adam_g", g_adam), ("adam_c", c_adam))
                 for i, p in enumerate(adam.param_groups[0]["params"])}
    return parameters | gradients


@pytest.mark.parametrize("flags", (["--augment"], ["--n-critic", "1", "--drift", "0.1"]))
def test_training_is_the_textbooks(flags, data_flags, pictures, tmp_path, double):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], *flags, "--dropout", "0", "--lr", "1e-3:1,5e-4~2e-3:2"]
    wgan_gp.main([*flags, "--keep", "--out", str(tmp_path / "run")])
    before, after = (load(tmp_path / f"run/checkpoint-{step:06d}.pt") for step in (0, 6))
    images = common.load_images(str(pictures), 16, root=before["config"]["data_root"])
    for name, value in textbook_steps(before, images, 6).items():
        part, name = name.split("/")
        if part.startswith("adam"):  # the first moment is the gradient, as the first beta is 0
            assert torch.allclose(after["state"][part][int(name)]["exp_avg"], value, rtol=0, atol=1e-7), (part, name)
            continue
        assert torch.allclose(after["state"][part][name], value, rtol=0, atol=1e-9), name
        assert not torch.equal(before["state"][part][name], value), name


@pytest.mark.parametrize("off", (["--ema", "0"], ["--no-stddev"], ["--no-pixel-norm"], ["--dropout", "0.5"],
                                 ["--augment"], ["--drift", "0"], ["--gp-weight", "0"]))
def test_every_switch_counts(off, data_flags, tmp_path):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--steps", "2"]
    states = []
    for name, more in (("full", []), ("less", off)):
        wgan_gp.main([*flags, *more, "--out", str(tmp_path / name)])
        states.append(load(tmp_path / name / "checkpoint.pt"))
    assert not same_state(*states)
    if off[0] == "--ema":
        assert all(torch.equal(v, states[1]["state"]["ema"][n]) for n, v in states[1]["state"]["generator"].items())


def test_the_average_is_what_is_used(data_flags, tmp_path):
    out = tmp_path / "run"
    wgan_gp.main([*TINY["wgan_gp"], *data_flags["wgan_gp"], "--out", str(out)])
    state = load(out / "checkpoint.pt")["state"]
    generator, config = wgan_gp.load_generator(out / "checkpoint.pt")
    for name, value in generator.state_dict().items():
        assert torch.equal(value, state["ema"][name]) and not torch.equal(value, state["generator"][name])
    common.save_grid(generator(state["fixed_z"][:64]), tmp_path / "again.png")
    assert (out / "samples/000006.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (out / "samples/000006.png").read_bytes() != (out / "plain/000006.png").read_bytes()


def test_pictures_take_no_random_number_from_the_training(data_flags, tmp_path):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"]]
    for name, every in (("often", "2"), ("once", "99")):
        wgan_gp.main([*flags, "--sample-every", every, "--out", str(tmp_path / name)])
    assert same_state(load(tmp_path / "often/checkpoint.pt"), load(tmp_path / "once/checkpoint.pt"))


def test_real_png_shows_the_augmented_data_that_samples_are_compared_with(data_flags, pictures, tmp_path, monkeypatch):
    flags, seen = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--steps", "1"], []
    monkeypatch.setattr(common, "sliced_wasserstein", lambda samples, data: seen.append(data) or 0.0)
    wgan_gp.main([*flags, "--augment", "--out", str(tmp_path / "on")])
    common.save_grid(seen[0][:64], tmp_path / "seen.png", columns=8)
    wgan_gp.main([*flags, "--out", str(tmp_path / "off")])
    images = common.load_images(str(pictures), 16, root=flags[flags.index("--data-root") + 1])
    common.save_grid(common.spread(images, 256)[:64], tmp_path / "plain.png", columns=8)
    on, off = ((tmp_path / name / "samples/real.png").read_bytes() for name in ("on", "off"))
    assert off == (tmp_path / "plain.png").read_bytes() != on == (tmp_path / "seen.png").read_bytes()


# ---- growing


def test_growing_keeps_the_output():
    for size in (32, 64):
        small, large = ({"generator": wgan_gp.Generator(5, 3, s, 3), "critic": wgan_gp.Critic(3, s, 3).eval()}
                        for s in (size, 2 * size))
        states = [{name: network.state_dict() for name, network in networks.items()} for networks in (large, small)]
        wgan_gp.grow(*states, 2 * size, "a.pt")
        z, images = torch.randn(4, 5), torch.randn(4, 3, 2 * size, 2 * size)
        assert torch.equal(large["generator"](z), F.interpolate(small["generator"](z), scale_factor=2))
        want = small["critic"](F.avg_pool2d(images, 2))
        assert torch.allclose(large["critic"](images), want, rtol=0, atol=1e-6)
        for broken in ({}, states[1] | {"critic": states[1]["critic"] | {"up.8.weight": want}}):
            with pytest.raises(ValueError, match="a.pt.* is missing or not known"):
                wgan_gp.grow(states[0], broken, 2 * size, "a.pt")


def test_grown_layers_learn(data_flags, tmp_path):
    """32 to 64 by the command line: the old output at first, every new layer moved by training, resumable alone."""
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--image-size", "32", "--dropout", "0", "--steps", "2"]
    wgan_gp.main([*flags, "--out", str(tmp_path / "small")])
    small = tmp_path / "small/checkpoint.pt"
    grown = [*flags, "--image-size", "64", "--init-from", str(small), "--keep", "--steps", "4"]
    wgan_gp.main([*grown, "--out", str(tmp_path / "large")])
    z = torch.randn(3, 8)
    one, two = (wgan_gp.load_generator(path)[0] for path in (small, tmp_path / "large/checkpoint-000000.pt"))
    assert torch.equal(two(z), F.interpolate(one(z), scale_factor=2))
    before, after = (load(tmp_path / f"large/checkpoint-{step:06d}.pt")["state"] for step in (0, 4))
    for network in ("generator", "ema", "critic"):
        assert not any(torch.equal(value, after[network][name]) for name, value in before[network].items())
    shutil.copytree(tmp_path / "large", tmp_path / "again")
    small.unlink()
    wgan_gp.main(["--resume", "--checkpoint", str(tmp_path / "again/checkpoint-000002.pt")])
    assert same_state(load(tmp_path / "again/checkpoint.pt"), load(tmp_path / "large/checkpoint.pt"))


def test_what_cannot_be_grown_is_refused_in_one_line(data_flags, tmp_path, capsys):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"]]
    small = [*flags, "--image-size", "32", "--steps", "1"]
    wgan_gp.main([*small, "--out", str(tmp_path / "small")])
    path, out = str(tmp_path / "small/checkpoint.pt"), str(tmp_path / "large")
    large = [*small, "--out", out, "--image-size", "64", "--init-from"]
    for more in (["--width", "3"], ["--latent", "9"], ["--no-stddev"], ["--channels", "1"], ["--image-size", "128"]):
        message = fails(capsys, "wgan_gp", *large, path, *more)
        assert re.search(r"small/checkpoint.pt\.(generator|ema|critic)\.\S+ is (missing|.*; accepted here is)", message)
    assert "nowhere.pt" in fails(capsys, "wgan_gp", *large, "nowhere.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt' is not a checkpoint" in fails(capsys, "wgan_gp", *large, tmp_path / "text.pt")
    assert not (tmp_path / "large").exists()


def test_a_new_run_begins_with_the_networks_of_another(data_flags, tmp_path):
    flags = [*TINY["wgan_gp"], *data_flags["wgan_gp"], "--steps", "2"]
    wgan_gp.main([*flags, "--out", str(tmp_path / "one")])
    path = str(tmp_path / "one/checkpoint.pt")
    wgan_gp.main([*flags, "--init-from", path, "--n-critic", "1", "--keep", "--out", str(tmp_path / "two")])
    one, two = load(path)["state"], load(tmp_path / "two/checkpoint-000000.pt")["state"]
    for network in ("generator", "ema", "critic"):
        assert all(torch.equal(value, two[network][name]) for name, value in one[network].items())
    assert two["updates"] == 0 and not any(moments["exp_avg"].any() for moments in two["adam_c"].values())


# ---- sampling


def test_slerp_follows_the_arc():
    begin, end = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert torch.allclose(wgan_gp.slerp(begin, end, 0), begin, atol=1e-6)
    assert torch.allclose(wgan_gp.slerp(begin, end, 1), end, atol=1e-6)
    third = [math.cos(math.pi / 6), math.sin(math.pi / 6)]
    assert torch.allclose(wgan_gp.slerp(begin, end, 1 / 3), torch.tensor([third, [3.0, 0.0]]), atol=1e-5)
    begin, end = torch.randn(2, 50, 64)
    lengths = wgan_gp.slerp(begin, end, 0.5).norm(dim=1) / begin.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1, abs=0.05)  # 0.71 on straight lines


def test_walks_are_to_near_and_far_samples(data_flags, tmp_path):
    out = tmp_path / "run"
    wgan_gp.main([*TINY["wgan_gp"], *data_flags["wgan_gp"], "--steps", "2", "--out", str(out)])
    wgan_gp.main(["--checkpoint", str(out / "checkpoint.pt"), "--interpolate", "4", "--out", str(tmp_path / "walks")])
    with Image.open(tmp_path / "walks/walks.gif") as gif:
        assert gif.n_frames == 44
    with Image.open(tmp_path / "walks/walks.png") as image:
        strip = torch.from_numpy(numpy.array(image.convert("L"), dtype="float32"))
    cell = 16 * 4 + 2
    tiles = strip[2:, 2:].unfold(0, cell - 2, cell).unfold(1, cell - 2, cell)  # 8 rows, 12 columns
    assert tiles.shape[:2] == (8, 12)
    assert (tiles[0::2, 0] - tiles[1::2, 0]).abs().max() <= 1  # a near and a far walk from each, to rounding
    near, far = ((tiles[rest::2, -1] - tiles[rest::2, 0]).square().mean(dim=(1, 2)) for rest in (0, 1))
    assert (near < far).all()
    steps = (tiles[:, 1:] - tiles[:, :-1]).square().mean(dim=(2, 3))
    assert steps.max() < 0.9 * (tiles[:, -1] - tiles[:, 0]).square().mean(dim=(1, 2)).max()  # no jump
