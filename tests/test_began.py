"""BEGAN's equations and networks against loops, values computed by hand, and the textbook way to train."""

import copy
import itertools
import re

import began
import common
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load, refusal, rows
from PIL import Image

DOUBLE = dict(dtype=torch.float64)


def test_reconstruction_loss_is_the_mean_over_everything():
    one, two = torch.randn(2, 3, 2, 4, 5, **DOUBLE)
    for eta in 1, 2:
        total = sum(abs(v - d) ** eta for v, d in zip(one.flatten().tolist(), two.flatten().tolist()))
        assert began.reconstruction_loss(one, two, eta).item() == pytest.approx(total / 120, rel=1e-12)
    with pytest.raises(ValueError, match="shapes differ"):
        began.reconstruction_loss(one, two[:1], eta)


@pytest.mark.parametrize("k, real, fake, gamma, rate, k_next, m", [
    (0.2, 0.5, 0.1, 0.5, 0.1, 0.215, 0.65),  # 0.2 + 0.1 (0.25 - 0.1); 0.5 + 0.15
    (0.0, 0.5, 0.6, 0.5, 0.1, 0.0, 0.85),  # clipped below
    (0.99, 1.0, 0.1, 0.5, 0.1, 1.0, 1.4),  # clipped above
])
def test_balance(k, real, fake, gamma, rate, k_next, m):
    inputs = [torch.tensor(value, **DOUBLE, requires_grad=True) for value in (k, real, fake)]
    got = began.balance(*inputs, gamma, rate)
    assert not any(value.requires_grad for value in got)  # or the graphs of all earlier steps would be kept
    assert [value.item() for value in got] == pytest.approx([k_next, m], rel=1e-12)


def test_a_batch_of_one_has_no_pairs_to_pull_away(data_flags):
    text = refusal("began", *data_flags["began"], "--batch-size", "1")[1]
    assert "--batch-size: 1 is fewer than 2 images for each rank" in text


def test_networks_are_the_papers():
    n, generator, discriminator = 8, began.Generator(64, 8, 64, 3), began.Discriminator(64, 8, 64, 3)
    shapes = [tuple(layer.weight.shape[:2]) for layer in discriminator.modules() if isinstance(layer, began.Conv)]
    pairs = [(k * n, k * n) for k in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert shapes == [(n, 3), *pairs, (2 * n, n), (3 * n, 2 * n), (4 * n, 3 * n), *[(n, n)] * 5]
    assert str(discriminator.decoder) == str(generator)
    reconstructions, codes = discriminator(torch.zeros(2, 3, 64, 64))
    assert generator(torch.zeros(2, 64)).shape == reconstructions.shape == (2, 3, 64, 64) and codes.shape == (2, 64)


def test_layers_are_those_of_the_paper():
    """Vanishing residuals in convolutions; h0 beside the input of every up-sampling, which UpConv fuses."""
    def conv(layer, x):
        return 0.3 * x + 0.7 * F.elu(F.conv2d(x, layer.weight, layer.bias, padding=1))

    generator, z = began.Generator(5, 4, 32, 3, skip=True, residual=True).double(), torch.randn(2, 5, **DOUBLE)
    generator.carry.fill_(0.3)
    h0 = generator.first(z).view(2, 4, 8, 8)
    x = conv(generator.conv[1], conv(generator.conv[0], h0))
    for size, up, layer in zip((16, 32), generator.up, generator.conv[2:], strict=True):
        x = torch.cat([F.interpolate(x, size=size), F.interpolate(h0, size=size)], dim=1)
        x = conv(layer, F.elu(F.conv2d(x, up.weight, up.bias, padding=1)))
    want = 2 * (generator.last(x) / 2).tanh()
    gradients = [torch.autograd.grad(y.square().sum(), generator.parameters()) for y in (generator(z), want)]
    torch.testing.assert_close([generator(z), *gradients[0]], [want, *gradients[1]], rtol=1e-9, atol=1e-12)


def test_training_is_the_textbooks_though_d_sees_each_batch_once(data_flags, tmp_path, double):
    flags = "--lambda-k 1 --pt-weight 5 --keep".split()
    began.main([*TINY["began"], *data_flags["began"], *flags, "--out", str(tmp_path)])
    before, after = (load(tmp_path / f"checkpoint-00000{step}.pt") for step in (2, 6))
    images = common.load_images(data_flags["began"][1], 16, root=data_flags["began"][3])
    generator, discriminator = (began.build(network, before["settings"]).double()
                                for network in (began.Generator, began.Discriminator))
    adam = torch.optim.Adam([*generator.parameters(), *discriminator.parameters()])
    for name, item in dict(generator=generator, discriminator=discriminator, adam=adam).items():
        item.load_state_dict(before["state"][name])
    k = before["state"]["k"].item()

    def losses(v):
        """L(v), and L(v) + 5 k f_PT."""
        reconstructions, codes = discriminator(v)
        cosines = [F.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(codes, 2)]
        loss = (v - reconstructions).abs().pow(2).mean()
        return loss, loss + 5 * k * torch.stack(cosines).square().mean()

    for step in range(2, 6):
        adam.param_groups[0]["lr"] = 2e-5 + (4e-4 - 2e-5) * (1 - step / 6)
        torch.manual_seed(step)
        z = torch.rand(4, 8) * 2 - 1
        x = images[torch.randint(len(images), (4,))] / 127.5 - 1
        fake = generator(z)
        (real_loss, _), (fake_loss, loss_g) = losses(x), losses(fake.detach())
        adam.zero_grad()
        losses(fake)[1].backward()
        discriminator.zero_grad()
        (real_loss - k * loss_g).backward()
        adam.step()
        k = min(max(k + 0.5 * real_loss.item() - fake_loss.item(), 0), 1)
    assert after["state"]["k"].item() == pytest.approx(k, abs=1e-9) and k > 0.1
    for name, network in dict(generator=generator, discriminator=discriminator).items():
        torch.testing.assert_close(dict(after["state"][name]), dict(network.state_dict()), rtol=0, atol=1e-9)


def test_columns_agree_and_rate_and_carry_follow_the_step(data_flags, tmp_path, capsys):
    flags = "--lr 1e-3 --lr-min 4e-4 --every 1 --keep --residual-steps 4 --ema 0 --pt-weight 5".split()
    began.main([*TINY["began"], *data_flags["began"], *flags, "--out", str(tmp_path)])
    began.main(["--resume", "--steps", "8", "--out", str(tmp_path)])  # goes on at the lowest rate
    began.main(["--resume", "--steps", "9", "--lr-steps", "20", "--out", str(tmp_path)])
    began.main(["--resume", "--steps", "10", "--lr", "1e-5", "--out", str(tmp_path)])  # does not rise to --lr-min
    assert "warning" not in capsys.readouterr().err  # as of a chart without a column
    want = [1e-3, 9e-4, 8e-4, 7e-4, 6e-4, 5e-4, 4e-4, 4e-4, 7.6e-4, 1e-5]
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx(want)
    for step, row in enumerate(rows(tmp_path), 1):
        loss_d, real, fake, pull_away, ratio, k, m = (float(row[name]) for name in began.METRICS[:-1])
        want = real - k * (fake + 5 * k * pull_away), fake / real, real + abs(0.5 * real - fake)
        assert (loss_d, ratio, m) == pytest.approx(want, rel=1e-4)
        state = load(tmp_path / f"checkpoint-{step:06d}.pt")["state"]
        carries = [state[network]["carry"].item() for network in ("discriminator", "generator", "averaged")]
        assert {*carries, state["discriminator"]["decoder.carry"].item()} == {max(0, 1 - (step - 1) / 4)}


def test_the_rate_is_halved_when_m_stalls_for_some_rows(data_flags, tmp_path, monkeypatch):
    values = iter([5.0, 4.0, 4.0, 4.5, 3.0, 3.0, 3.5, 9.0, 9.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(began, "balance", lambda k, *_: (k, torch.tensor(next(values))))
    flags = "--lr 8e-4 --lr-min 1e-4 --lr-patience 1 --every 1 --steps 5".split()
    began.main([*TINY["began"], *data_flags["began"], *flags, "--out", str(tmp_path)])
    began.main(["--resume", "--steps", "12", "--out", str(tmp_path)])
    want = [8e-4] * 4 + [4e-4] * 3 + [2e-4] * 2 + [1e-4] * 3  # the fourth and the seventh row are the second without
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx(want)


def test_embed_finds_pictures_and_walks_between_them(data_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began.main([*TINY["began"], *data_flags["began"], "--out", "run"])
    generator = began.load_generator("run")[0]
    targets = generator(began.uniform(3, 8))
    common.save_pngs(targets, "faces")  # a folder, though a dataset has the name
    began.main(["--embed", "faces", "--out", "run", "--data-root", "data"])
    error = float(re.search(r"\| = ([\d.]+)", capsys.readouterr().out)[1])
    assert error < 0.7 * (generator(torch.zeros(3, 8)) - targets).abs().mean().item()
    for name in "pairs", "mirrors":
        image = Image.open(f"run/embed-001/{name}.png")
        assert round(image.width / image.height) == 3  # ten columns, three rows
        first = image.crop((2, 2, 66, 66)).resize((16, 16), Image.Resampling.NEAREST)
        assert first.tobytes() == Image.open("faces/00000.png").tobytes()


def test_update_ema_refuses_half_precision_and_another_depth():
    network = torch.nn.Linear(2, 2).bfloat16()
    average = copy.deepcopy(network).float()
    network.weight.data += 1
    began.update_ema(average, network, 0.5)
    assert torch.allclose(average.weight, network.weight.float() - 0.5, atol=0.01)
    with pytest.raises(ValueError, match="keep it in torch.float32"):
        began.update_ema(copy.deepcopy(network), network, 0.5)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        began.update_ema(average, torch.nn.Sequential(network, copy.deepcopy(network)), 0.5)
