"""BEGAN's equations and networks against loops, values computed by hand, and the textbook way to train."""

import copy
import re

import began
import common
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load, rows
from PIL import Image

torch.manual_seed(0)
DOUBLE = dict(dtype=torch.float64)


@pytest.mark.parametrize("eta", (1, 2))
def test_reconstruction_loss_is_the_mean_over_everything(eta):
    one, two = torch.randn(2, 3, 2, 4, 5, **DOUBLE)
    total = sum(abs(v - d) ** eta for v, d in zip(one.flatten().tolist(), two.flatten().tolist()))
    assert began.reconstruction_loss(one, two, eta).item() == pytest.approx(total / 120, rel=1e-12)
    with pytest.raises(ValueError, match="shapes differ"):
        began.reconstruction_loss(one, two[:1], eta)


@pytest.mark.parametrize("k, real, fake, gamma, rate, k_next, m", [
    (0.2, 0.5, 0.1, 0.5, 0.1, 0.215, 0.65),  # 0.2 + 0.1 (0.25 - 0.1); 0.5 + 0.15
    (0.2, 0.5, 0.6, 0.5, 0.1, 0.165, 0.85),
    (0.0, 0.5, 0.6, 0.5, 0.1, 0.0, 0.85),  # clipped below
    (0.99, 1.0, 0.1, 0.5, 0.1, 1.0, 1.4),  # clipped above
])
def test_balance(k, real, fake, gamma, rate, k_next, m):
    inputs = [torch.tensor(value, **DOUBLE, requires_grad=True) for value in (k, real, fake)]
    got = began.balance(*inputs, gamma, rate)
    assert not any(value.requires_grad for value in got)  # or the graphs of all earlier steps would be kept
    assert [value.item() for value in got] == pytest.approx([k_next, m], rel=1e-12)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (8, 8)])
def test_fused_up_convolution_is_up_sampling_then_convolution(height, width):
    layer = began.UpConv(3, 4).double()
    x = torch.randn(2, 3, height, width, **DOUBLE, requires_grad=True)
    want = F.elu(F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1))
    got = layer(x)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    for one, two in zip(*(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (got, want))):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


def test_networks_are_the_papers():
    n, generator, discriminator = 8, began.Generator(64, 8, 64, 3), began.Discriminator(64, 8, 64, 3)
    shapes = [tuple(layer.weight.shape[:2]) for layer in discriminator.modules() if isinstance(layer, began.Conv)]
    pairs = [(k * n, k * n) for k in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert shapes == [(n, 3), *pairs, (2 * n, n), (3 * n, 2 * n), (4 * n, 3 * n), *[(n, n)] * 5]
    assert {name: value.shape for name, value in discriminator.decoder.state_dict().items()} == {
        name: value.shape for name, value in generator.state_dict().items()}
    assert generator(torch.zeros(2, 64)).shape == discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_skip_connections_bring_h0_to_every_resolution():
    generator, z = began.Generator(5, 4, 32, 3, skip=True), torch.randn(2, 5)
    h0 = generator.first(z).view(2, 4, 8, 8)
    x = generator.conv[1](generator.conv[0](h0))
    for up, conv in zip(generator.up, generator.conv[2:]):  # as the paper says it: up-sample, concatenate, convolve
        x = torch.cat([F.interpolate(x, scale_factor=2), F.interpolate(h0, scale_factor=2 * x.shape[-1] // 8)], dim=1)
        x = conv(F.elu(F.conv2d(x, up.weight, up.bias, padding=1)))
    assert torch.allclose(generator(z), 2 * (generator.last(x) / 2).tanh(), atol=1e-5)


def test_vanishing_residuals_carry_the_input():
    layer, x, carry = began.Conv(4, 4), torch.randn(1, 4, 6, 6), torch.tensor(0.3)
    assert torch.allclose(layer(x, carry), 0.3 * x + 0.7 * layer(x), atol=1e-6)
    generator, z = began.Generator(5, 4, 16, 3, residual=True), torch.randn(2, 5)
    want = generator.last(generator.up[0](generator.first(z).view(2, 4, 8, 8)))  # carry 1: the others pass it on
    assert torch.allclose(generator(z), 2 * (want / 2).tanh(), atol=1e-6)


def test_update_ema():
    average, network = (torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1)) for _ in range(2))
    network(torch.randn(9, 2))
    new = network.state_dict()
    want = {name: value.lerp(new[name], 0.25) if value.is_floating_point() else new[name]
            for name, value in average.state_dict().items()}
    began.update_ema(average, network, torch.tensor(0.25))
    for name, value in average.state_dict().items():
        assert torch.equal(value, want[name]), name
    began.update_ema(average, copy.deepcopy(network).bfloat16(), 0.5)
    for wrong, right in (copy.deepcopy(network).half(), network), (network[:1], network), (network, network[:1]):
        with pytest.raises(ValueError):
            began.update_ema(wrong, right, 0.5)


def test_training_is_the_textbooks_though_d_sees_each_batch_once(data_flags, tmp_path, double):
    began.main([*TINY["began"], *data_flags["began"], "--lambda-k", "1", "--keep", "--out", str(tmp_path)])
    before, after = (load(tmp_path / f"checkpoint-00000{step}.pt") for step in (2, 6))
    settings, k = before["settings"], before["state"]["k"].item()
    images = common.load_images(settings["data"], 16, root=settings["data_root"])
    networks = [began.build(network, settings) for network in (began.Generator, began.Discriminator)]
    for name, network in zip(("generator", "discriminator"), networks):
        network.load_state_dict(before["state"][name])
    generator, discriminator = networks
    adam = torch.optim.Adam([parameter for network in networks for parameter in network.parameters()])
    adam.load_state_dict(before["state"]["adam"])
    for step in range(2, 6):
        adam.param_groups[0]["lr"] = 2e-5 + (4e-4 - 2e-5) * (1 - step / 6)
        torch.manual_seed(step)
        z = torch.rand(4, 8) * 2 - 1
        x = images[torch.randint(len(images), (4,))] / 127.5 - 1
        fake = generator(z)
        real_loss, fake_loss = ((v - discriminator(v)).abs().pow(2).mean() for v in (x, fake.detach()))
        adam.zero_grad()
        ((fake - discriminator(fake)).abs().pow(2).mean()).backward()
        discriminator.zero_grad()
        (real_loss - k * fake_loss).backward()
        adam.step()
        k = min(max(k + 0.5 * real_loss.item() - fake_loss.item(), 0), 1)
    assert after["state"]["k"].item() == pytest.approx(k, abs=1e-9) and k > 0.1
    for name, network in zip(("generator", "discriminator"), networks):
        for part, value in network.state_dict().items():
            assert torch.allclose(after["state"][name][part], value, rtol=0, atol=1e-9), (name, part)


def rates(*flags: str, out, steps: str = "6") -> list[float]:
    began.main([*TINY["began"], *flags, "--every", "1", "--steps", steps, "--out", str(out)])
    return [float(row["lr"]) for row in rows(out)]


def test_the_rate_falls_linearly_and_a_longer_run_keeps_the_lowest(data_flags, tmp_path):
    flags = [*data_flags["began"], "--lr", "1e-3", "--lr-min", "4e-4"]
    assert rates(*flags, out=tmp_path / "a") == pytest.approx([1e-3, 9e-4, 8e-4, 7e-4, 6e-4, 5e-4])
    began.main(["--resume", "--steps", "8", "--out", str(tmp_path / "a")])
    assert [float(row["lr"]) for row in rows(tmp_path / "a")][6:] == pytest.approx([4e-4, 4e-4])
    assert rates(*flags, "--lr-steps", "3", out=tmp_path / "b") == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 4e-4, 4e-4])


def test_the_rate_is_halved_when_m_stalls_for_some_rows(data_flags, tmp_path, monkeypatch):
    flags = [*data_flags["began"], "--lr", "8e-4", "--lr-min", "1e-4", "--lr-patience", "1"]
    values = iter([5.0, 4.0, 4.0, 4.5, 3.0, 3.0, 3.5, 9.0, 9.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(began, "balance", lambda k, *_: (k, torch.tensor(next(values))))
    want = [8e-4] * 4 + [4e-4] * 3 + [2e-4] * 2 + [1e-4] * 3  # the fourth and the seventh row are the second without
    assert rates(*flags, out=tmp_path / "a", steps="5") == pytest.approx(want[:5])
    began.main(["--resume", "--steps", "12", "--out", str(tmp_path / "a")])
    assert [float(row["lr"]) for row in rows(tmp_path / "a")] == pytest.approx(want)


def test_columns_agree_and_carry_follows_the_step(data_flags, tmp_path):
    flags = [*data_flags["began"], "--keep", "--residual-steps", "4", "--ema", "0"]
    rates(*flags, out=tmp_path)
    for row in rows(tmp_path):
        loss_d, real, fake, ratio, k, m = (float(row[name]) for name in began.METRICS[:-1])
        want = real - k * fake, fake / real, real + abs(0.5 * real - fake)
        assert (loss_d, ratio, m) == pytest.approx(want, rel=1e-4)
    for step, carry in {1: 1, 2: 0.75, 3: 0.5, 4: 0.25, 5: 0, 6: 0}.items():
        state = load(tmp_path / f"checkpoint-00000{step}.pt")["state"]
        assert {state["discriminator"][name].item() for name in ("carry", "decoder.carry")} == {carry}
        assert state["generator"]["carry"] == state["averaged"]["carry"] == carry


def test_embed_finds_pictures_and_walks_between_them(data_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began.main([*TINY["began"], *data_flags["began"], "--out", "run"])
    generator, settings = began.load_generator("run")
    z = began.uniform(3, settings["latent"])
    common.save_pngs(generator(z), "faces")  # a folder, though a dataset has the name
    began.main(["--embed", "faces", "--out", "run", "--data-root", "data"])
    error = float(re.search(r"\| = ([\d.]+)", capsys.readouterr().out)[1])
    targets = torch.cat([generator(z), generator(z).flip(3)])
    assert error < 0.7 * (generator(torch.zeros(6, settings["latent"])) - targets).abs().mean().item()
    for name in "pairs", "mirrors":
        with Image.open(f"run/embed-001/{name}.png") as image:
            first = image.crop((2, 2, 2 + 16 * 4, 2 + 16 * 4)).resize((16, 16), Image.Resampling.NEAREST)
            assert first.tobytes() == Image.open("faces/00000.png").tobytes()
            assert round(image.width / image.height) == 3  # ten columns, three rows
