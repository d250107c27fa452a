"""EBGAN's equations and networks against loops and hand-computed values, and its training against a textbook's."""

import common
import ebgan
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load, refusal
from torch import Tensor, nn

DOUBLE = dict(dtype=torch.float64)


def networks(settings: dict) -> tuple[ebgan.Generator, ebgan.Discriminator]:
    return ebgan.build(ebgan.Generator, settings), ebgan.build(ebgan.Discriminator, settings)


def test_energy_is_one_l2_norm_per_image():
    images, reconstructions = torch.randn(2, 3, 2, 4, 5, **DOUBLE)
    want = [(v - d).square().sum().sqrt().item() for v, d in zip(images, reconstructions)]
    assert ebgan.energy(images, reconstructions).tolist() == pytest.approx(want, rel=1e-12)


def test_discriminator_loss_has_a_hinge_for_each_image():
    real, fake = torch.tensor([3.0, 1, 2, 6], **DOUBLE), torch.tensor([2.0, 5, 9, 20], **DOUBLE, requires_grad=True)
    loss = ebgan.discriminator_loss(real, fake, 8)
    assert loss.item() == pytest.approx(12 / 4 + (6 + 3) / 4)  # a hinge on the batch's mean, which is 9, would be 0
    assert torch.autograd.grad(loss, fake)[0].tolist() == [-0.25, -0.25, 0, 0]


def test_pull_away_term_of_known_codes():
    same = torch.randn(1, 6).repeat(256, 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):  # the sum of squares overflows fp16
        assert ebgan.pull_away_term(same.to(dtype)).item() == pytest.approx(1, rel=1e-3)
    assert ebgan.pull_away_term(torch.eye(5, **DOUBLE) * 3).item() == pytest.approx(0, abs=1e-12)
    assert ebgan.pull_away_term(torch.tensor([[1.0, 0], [7, -7]])).item() == pytest.approx(0.5)  # 45 degrees apart


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2), (2, 1)])
def test_generator_loss_by_loops_and_finite_differences(shape):
    energies = (torch.rand(4, **DOUBLE) * 9).requires_grad_()
    codes = torch.randn(shape, **DOUBLE, requires_grad=True)
    squares = [F.cosine_similarity(one.flatten(), two.flatten(), dim=0).item() ** 2
               for i, one in enumerate(codes) for j, two in enumerate(codes) if i != j]
    want = sum(energies.tolist()) / 4 + 0.3 * sum(squares) / len(squares)
    assert ebgan.generator_loss(energies, codes, 0.3).item() == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(lambda e, s: ebgan.generator_loss(e, s, 0.3), (energies, codes))


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        ebgan.energy(torch.zeros(4, 6), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="N > 1"):
        ebgan.pull_away_term(torch.ones(1, 6))
    with pytest.raises(ValueError, match="'conv'"):
        ebgan.decoder([4], 1, "conv", nn.Identity)
    for flags, message in {"--batch-size 1": "fewer than 2 images", "--lr 1 2 3": "takes one rate, or two",
                           "--g-steps 0": "must be positive"}.items():
        assert message in refusal("ebgan", *TINY["ebgan"], *flags.split())[1]


def test_up_convolution_is_up_sampling_then_convolution():
    layer, x = ebgan.UpConv(3, 4).double(), torch.randn(2, 3, 3, 5, **DOUBLE, requires_grad=True)
    got, want = layer(x), F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()]) for y in (got, want)]
    assert all(torch.allclose(one, two, rtol=1e-12, atol=1e-12) for one, two in zip(*gradients))


def test_networks_are_the_papers():
    def layers(network: nn.Module, kind: type) -> list[tuple]:
        return [(layer.in_channels, layer.out_channels, *layer.kernel_size, *layer.stride)
                for layer in network.modules() if isinstance(layer, kind)]

    flags = "--image-size 64 --channels 3 --layers paper --latent 100 --g-width 1024 --d-width 64"
    generator, discriminator = networks(vars(ebgan.read_flags(flags.split())))
    assert generator.first.weight.shape == (1024 * 4 * 4, 100)  # (1024)4c from a single pixel
    for network, kind, widths in (generator, nn.ConvTranspose2d, [1024, 512, 256, 128, 3]), (
            discriminator, nn.Conv2d, [3, 64, 128, 256]), (discriminator, nn.ConvTranspose2d, [256, 128, 64, 3]):
        assert layers(network, kind) == [(*pair, 4, 4, 2, 2) for pair in zip(widths, widths[1:])]
    for network, widths in (generator, [1024, 512, 256, 128]), (discriminator, [128, 256, 128, 64]):
        assert [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == widths
    assert discriminator(torch.zeros(2, 3, 64, 64))[1].shape == (2, 256, 8, 8)


def textbook_steps(start: dict, images: Tensor) -> dict[str, nn.Module]:
    """The networks of plain EBGAN after steps 3 to 6: one pass of D for each loss, and samples cut off from G for D."""
    s, state = start["settings"], start["state"]
    (generator, discriminator), (averaged, _) = networks(s), networks(s)
    nets = dict(generator=generator, discriminator=discriminator, averaged=averaged)
    for name, network in nets.items():
        network.load_state_dict(state[name])
    adam_g = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    adam_d = torch.optim.Adam(discriminator.parameters(), 1.5e-3, betas=(0.5, 0.999))
    for name, adam in ("adam_g", adam_g), ("adam_d", adam_d):
        adam.load_state_dict(adam.state_dict() | dict(state=state[name]["state"]))
    for step in range(2, 6):
        torch.manual_seed(s["seed"] * 1_000_003 + step)
        for turn in range(max(s["d_steps"], s["g_steps"])):
            fake = generator(torch.rand(4, s["latent"]) * 2 - 1)
            if turn < s["g_steps"]:
                reconstructions, codes = discriminator(fake)
                norms = (fake - reconstructions).square().sum((1, 2, 3)).sqrt()
                cosines = F.cosine_similarity(codes[:, None], codes[None], dim=2)[~torch.eye(4, dtype=torch.bool)]
                adam_g.zero_grad()
                (norms.mean() + s["pt_weight"] * cosines.square().mean()).backward()
                adam_g.step()
            if turn < s["d_steps"]:
                real = images[torch.randint(len(images), (4,))] / 127.5 - 1
                one, two = ((v - discriminator(v)[0]).square().sum((1, 2, 3)).sqrt() for v in (real, fake.detach()))
                adam_d.zero_grad()  # removes what G's loss has left in D
                (one.mean() + F.relu(s["margin"] - two).mean()).backward()
                adam_d.step()
        for mean, value in zip(averaged.parameters(), generator.parameters()):
            mean.data += max(1 - s["ema"], 9 / (step + 9)) * (value.data - mean.data)
    return nets


@pytest.mark.parametrize("turns", ("--d-steps 1", "--d-steps 3", "--g-steps 2"))
def test_training_is_the_textbooks(turns, pictures, data_flags, tmp_path, double):
    """So the pull-away term, whose weight is large here, trains G alone, and the hinge trains D alone."""
    flags = f"--pt-weight 5 --margin 14 --lr 1e-3 1.5e-3 --seed 7 --keep {turns} --out {tmp_path / 'run'}".split()
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], *flags])
    start, end = load(tmp_path / "run/checkpoint-000002.pt"), load(tmp_path / "run/checkpoint.pt")
    hinges = [(row["loss_d"] - row["energy_real"], 14 - row["energy_fake"]) for row in end["rows"][1:]]
    assert any(mean > max(0, of_mean) + 0.1 for mean, of_mean in hinges)  # samples on either side of the margin
    images = common.load_images(str(pictures), 16, 3, start["settings"]["data_root"])
    for name, network in textbook_steps(start, images).items():
        for key, value in network.named_parameters():
            assert torch.allclose(end["state"][name][key], value, rtol=0, atol=1e-7), (name, key)


def test_pictures_are_made_in_eval_mode(data_flags, tmp_path, monkeypatch, capsys):
    forward, seen = nn.BatchNorm2d.forward, set()
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda m, x: seen.add((m.training, x.requires_grad))
                        or forward(m, x))
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], "--out", str(tmp_path / "run")])
    assert seen == {(True, True), (False, False)}
    assert "warning" not in capsys.readouterr().err  # as of a chart without a column
    assert load(tmp_path / "run/checkpoint.pt")["settings"]["margin"] == pytest.approx((3 * 16 * 16) ** 0.5 / 4)
