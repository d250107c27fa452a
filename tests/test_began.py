"""BEGAN's equations and networks against loops, hand-computed values and the textbook way to train."""

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
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("eta", (1, 2))
def test_reconstruction_loss_is_the_mean_over_everything(eta):
    images, reconstructions = torch.randn(3, 2, 4, 5, **DOUBLE), torch.randn(3, 2, 4, 5, **DOUBLE)
    total = 0.0
    for v, d in zip(images.flatten().tolist(), reconstructions.flatten().tolist()):
        total += abs(v - d) ** eta
    assert began.reconstruction_loss(images, reconstructions, eta).item() == pytest.approx(total / 120, rel=1e-12)


@pytest.mark.parametrize("k, real, fake, gamma, rate, k_next, m", [
    (0.2, 0.5, 0.1, 0.5, 0.1, 0.215, 0.65),  # 0.2 + 0.1 (0.25 - 0.1); 0.5 + 0.15
    (0.2, 0.5, 0.6, 0.5, 0.1, 0.165, 0.85),
    (0.0, 0.5, 0.6, 0.5, 0.1, 0.0, 0.85),  # clipped below
    (0.99, 1.0, 0.1, 0.5, 0.1, 1.0, 1.4),  # clipped above
])
def test_balance(k, real, fake, gamma, rate, k_next, m):
    got = began.balance(*(torch.tensor(value, **DOUBLE) for value in (k, real, fake)), gamma, rate)
    assert [value.item() for value in got] == pytest.approx([k_next, m], rel=1e-12)


def test_rate_halves_when_m_stalls_and_stops_at_the_floor():
    lr, smooth, best = (torch.tensor(value) for value in (0.8, 0.0, LARGEST))
    waited, rates = torch.tensor(0.0), []
    for step in range(60):
        m = torch.tensor(1.0 - 0.01 * step if step < 20 else 2.0)
        began.halve_on_stall(m, lr, smooth, best, waited, patience=10, floor=0.15)
        rates.append(round(lr.item(), 3))
    assert rates == [0.8] * 29 + [0.4] * 10 + [0.2] * 10 + [0.15] * 11  # the last new minimum is at step 19


def test_smoothed_m_ignores_noise():
    lr, smooth, best, waited = (torch.tensor(value) for value in (0.8, 0.0, LARGEST, 0.0))
    for step in range(300):
        noise = 0.05 * (-1) ** step
        began.halve_on_stall(torch.tensor(1.0 - 0.001 * step + noise), lr, smooth, best, waited, 20, 0.0)
    assert lr.item() == pytest.approx(0.8)
    assert smooth.item() == pytest.approx(0.8, abs=0.02)  # the mean lags 100 steps behind


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
    generator, discriminator = began.Generator(64, 8, 64, 3), began.Discriminator(64, 8, 64, 3)
    shapes = [tuple(layer.weight.shape[:2]) for layer in discriminator.modules() if isinstance(layer, began.Conv)]
    n = 8
    pairs = [(n, n)] * 2 + [(2 * n, 2 * n)] * 2 + [(3 * n, 3 * n)] * 2 + [(4 * n, 4 * n)] * 2
    downs = [(2 * n, n), (3 * n, 2 * n), (4 * n, 3 * n)]
    assert shapes == [(n, 3), *pairs, *downs, *[(n, n)] * 5]
    assert {name: value.shape for name, value in discriminator.decoder.state_dict().items()} == {
        name: value.shape for name, value in generator.state_dict().items()}
    assert generator(torch.zeros(2, 64)).shape == discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_skip_connections_bring_h0_to_every_resolution():
    generator = began.Generator(5, 4, 32, 3, skip=True)
    z = torch.randn(2, 5)
    h0 = generator.first(z).view(2, 4, 8, 8)
    x = generator.conv[1](generator.conv[0](h0))
    for up, conv in zip(generator.up, generator.conv[2:]):  # as the paper says it: up-sample, concatenate, convolve
        x = torch.cat([F.interpolate(x, scale_factor=2), F.interpolate(h0, scale_factor=2 * x.shape[-1] // 8)], dim=1)
        x = conv(F.elu(F.conv2d(x, up.weight, up.bias, padding=1)))
    assert torch.allclose(generator(z), 2 * (generator.last(x) / 2).tanh(), atol=1e-5)


def test_vanishing_residuals_carry_the_input():
    layer, x, carry = began.Conv(4, 4), torch.randn(1, 4, 6, 6), torch.tensor(0.3)
    assert torch.allclose(layer(x, carry), 0.3 * x + 0.7 * layer(x), atol=1e-6)
    generator = began.Generator(5, 4, 16, 3, residual=True)
    assert generator.carry == 1  # then the layers that keep the size pass their input on, and only those
    z = torch.randn(2, 5)
    want = generator.last(generator.up[0](generator.first(z).view(2, 4, 8, 8)))
    want = 2 * (want / 2).tanh()
    assert torch.allclose(generator(z), want, atol=1e-6)


def textbook_steps(before: dict, images: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Plain BEGAN from a checkpoint on: D forward three times, a backward for each network's own loss."""
    config = before["config"]
    generator, discriminator = began.build(began.Generator, config), began.build(began.Discriminator, config)
    generator.load_state_dict(before["state"]["generator"])
    discriminator.load_state_dict(before["state"]["discriminator"])
    g_adam, d_adam = (torch.optim.Adam(n.parameters(), lr=config["lr"], betas=(0.5, 0.99))
                      for n in (generator, discriminator))
    torch.set_rng_state(before["state"]["rng"][:-16].clone())
    k = 0.0
    for _ in range(steps):
        z = torch.rand(config["batch_size"], config["latent"]) * 2 - 1
        real = images[torch.randint(len(images), (config["batch_size"],))] / 127.5 - 1
        fake = generator(z)
        real_loss = (real - discriminator(real)).abs().pow(config["eta"]).mean()
        fake_loss = (fake.detach() - discriminator(fake.detach())).abs().pow(config["eta"]).mean()
        d_adam.zero_grad()
        (real_loss - k * fake_loss).backward()
        g_loss = (fake - discriminator_frozen(discriminator, fake)).abs().pow(config["eta"]).mean()
        g_adam.zero_grad()
        g_loss.backward()
        d_adam.step()
        g_adam.step()
        k = min(max(k + config["lambda_k"] * (config["gamma"] * real_loss.item() - fake_loss.item()), 0), 1)
    return {"k": torch.tensor(k), **{f"g/{n}": p for n, p in generator.named_parameters()},
            **{f"d/{n}": p for n, p in discriminator.named_parameters()}}


def discriminator_frozen(discriminator, images):
    """D(images) with gradients to the images alone."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, frozen, (images,))


def test_training_is_the_textbooks_though_d_sees_each_batch_once(data_flags, pictures, tmp_path, double):
    out = tmp_path / "run"
    began.main([*TINY["began"], *data_flags["began"], "--lambda-k", "1", "--keep", "--out", str(out)])
    before, after = load(out / "checkpoint-000000.pt"), load(out / "checkpoint-000006.pt")["state"]
    images = common.load_images(str(pictures), 16, root=before["config"]["data_root"])
    want = textbook_steps(before, images, 6)
    assert want["k"] > 0.1  # so that the fakes' share in D's gradient is seen
    for name, value in want.items():
        part = {"g": after["generator"], "d": after["discriminator"]}.get(name[0], after)
        assert torch.allclose(part[name[2:] if "/" in name else name], value, rtol=0, atol=1e-9), name


def test_carry_reaches_zero_after_the_residual_steps(data_flags, tmp_path):
    flags = [*TINY["began"], *data_flags["began"], "--keep", "--out", str(tmp_path / "run")]
    began.main([*flags, "--residual-steps", "4"])
    carries = [load(tmp_path / f"run/checkpoint-{step:06d}.pt")["state"]["discriminator"]["decoder.carry"].item()
               for step in (0, 2, 6)]
    assert carries == pytest.approx([1, 0.5, 0])


def test_without_patience_the_rate_falls_linearly_to_its_floor(data_flags, tmp_path):
    flags = [*TINY["began"], *data_flags["began"], "--log-every", "1", "--lr", "1e-3", "--lr-min", "4e-4"]
    began.main([*flags, "--lr-patience", "0", "--out", str(tmp_path / "run")])
    began.main(["--resume", "--steps", "8", "--out", str(tmp_path / "run")])  # a longer run keeps the pace
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, 9e-4, 8e-4, 7e-4, 6e-4, 5e-4, 4e-4, 4e-4])


def test_columns_agree_with_each_other(data_flags, tmp_path):
    began.main([*TINY["began"], *data_flags["began"], "--log-every", "1", "--out", str(tmp_path / "run")])
    for row in rows(tmp_path / "run"):
        row = {name: float(cell) for name, cell in row.items()}
        assert row["ratio"] == pytest.approx(row["loss_fake"] / row["loss_real"], rel=1e-4)
        assert row["m"] == pytest.approx(row["loss_real"] + abs(0.5 * row["loss_real"] - row["loss_fake"]), rel=1e-4)


def test_embed_finds_pictures_and_walks_between_them(data_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data-root", str(tmp_path / "data")]
    began.main([*TINY["began"], *data_flags["began"], *flags, "--out", "run"])
    generator, config = began.load_generator("run/checkpoint.pt")
    z = began.uniform(3, config["latent"])
    common.save_pngs(generator(z), "faces")  # a folder, though a data set has the name
    began.main([*flags, "--checkpoint", "run/checkpoint.pt", "--embed", "faces", "--out", "embedded"])
    error = float(re.search(r"\| = ([\d.]+)", capsys.readouterr().out)[1])
    targets = torch.cat([generator(z), generator(z).flip(3)])
    nothing = (generator(torch.zeros(6, config["latent"])) - targets).abs().mean().item()
    assert error < 0.7 * nothing  # half of the pictures are G's own, the mirror images are not
    for name in ("pairs", "mirrors"):
        with Image.open(f"embedded/{name}.png") as image:
            first = image.crop((2, 2, 2 + 16 * 4, 2 + 16 * 4)).resize((16, 16), Image.Resampling.NEAREST)
            assert first.tobytes() == Image.open("faces/00000.png").tobytes()
            assert round(image.width / image.height) == 3  # ten columns, three rows
