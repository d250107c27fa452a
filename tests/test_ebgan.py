"""EBGAN's equations and networks against loops, hand-computed values and the textbook way to train."""

import functools
import math
import shutil
from pathlib import Path

import common
import ebgan
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load, rows

torch.manual_seed(0)
DOUBLE = dict(dtype=torch.float64)


def cosine(one: list[float], two: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, two))
    return product / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in two))


def pull_away_by_loops(codes: torch.Tensor) -> float:
    s = codes.flatten(1).tolist()
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if i != j:
                total += cosine(s[i], s[j]) ** 2
    return total / (len(s) * (len(s) - 1))


def test_energy_is_one_l2_norm_per_image():
    images, reconstructions = torch.randn(3, 2, 4, 5, **DOUBLE), torch.randn(3, 2, 4, 5, **DOUBLE)
    want = []
    for v, d in zip(images, reconstructions):
        want.append(math.sqrt(sum((a - b) ** 2 for a, b in zip(v.flatten().tolist(), d.flatten().tolist()))))
    assert ebgan.energy(images, reconstructions).tolist() == pytest.approx(want, rel=1e-12)
    flat, volumes = ([v.reshape(3, *shape) for v in (images, reconstructions)] for shape in ([40], [2, 2, 2, 5]))
    for pair in (flat, volumes):
        assert ebgan.energy(*pair).tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("one, two", [((4, 1, 2, 2), (4, 3, 2, 2)), ((4, 6), (1, 6)), ((4,), (4,))])
def test_energy_refuses_other_shapes(one, two):
    with pytest.raises(ValueError, match=r"not of one shape \[N, ...\]: \(4,.*\) and \("):
        ebgan.energy(torch.zeros(one), torch.zeros(two))


@pytest.mark.parametrize("shape", [(1, 6), (1, 3, 2, 2), (6,)])
def test_pull_away_term_refuses_a_single_code(shape):
    with pytest.raises(ValueError, match=r"not codes \[N, ...\] with N > 1: \([16],"):
        ebgan.pull_away_term(torch.ones(shape))
    with pytest.raises(ValueError, match="N > 1"):
        ebgan.generator_loss(torch.ones(1), torch.ones(shape), 0.1)


@pytest.mark.parametrize("network", (ebgan.Generator, ebgan.Discriminator))
def test_networks_refuse_unknown_layers(network):
    with pytest.raises(ValueError, match="no such layers: 'conv'; accepted: fused, paper"):
        network(4, 4, 16, 1, "conv", torch.nn.Identity)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2), (2, 1)])
def test_pull_away_term_is_the_mean_squared_cosine_of_pairs(shape):
    codes = torch.randn(*shape, **DOUBLE)
    assert ebgan.pull_away_term(codes).item() == pytest.approx(pull_away_by_loops(codes), rel=1e-12)


def test_pull_away_term_of_known_codes():
    assert ebgan.pull_away_term(torch.randn(1, 6, **DOUBLE).repeat(4, 1)).item() == pytest.approx(1, rel=1e-12)
    assert ebgan.pull_away_term(torch.eye(5, **DOUBLE) * 3).item() == pytest.approx(0, abs=1e-12)
    codes, scales = torch.randn(4, 6, **DOUBLE), torch.tensor([[0.01], [-1], [7], [300]], **DOUBLE)
    assert ebgan.pull_away_term(codes * scales).item() == pytest.approx(ebgan.pull_away_term(codes).item(), rel=1e-12)
    pair = torch.tensor([[1.0, 0.0], [1.0, 1.0]], **DOUBLE)  # 45 degrees apart
    assert ebgan.pull_away_term(pair).item() == pytest.approx(0.5, rel=1e-12)


def test_discriminator_loss_has_a_hinge_for_each_image():
    real, fake, margin = torch.rand(4, **DOUBLE) * 9, torch.tensor([2.0, 5.0, 9.0, 20.0], **DOUBLE), 8
    total = 0.0
    for x, g in zip(real.tolist(), fake.tolist()):
        total += x + max(0, margin - g)
    assert ebgan.discriminator_loss(real, fake, margin).item() == pytest.approx(total / 4, rel=1e-12)
    assert fake.mean() > margin  # where a hinge on the batch's mean would be 0
    fake.requires_grad_()
    gradient, = torch.autograd.grad(ebgan.discriminator_loss(real, fake, margin), fake)
    assert gradient.tolist() == [-0.25, -0.25, 0, 0]


def test_generator_loss_and_its_gradient():
    fake, codes = (torch.rand(4, **DOUBLE) * 9).requires_grad_(), torch.randn(4, 6, **DOUBLE, requires_grad=True)
    want = sum(fake.tolist()) / 4 + 0.3 * pull_away_by_loops(codes)
    assert ebgan.generator_loss(fake, codes, 0.3).item() == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(lambda e, s: ebgan.generator_loss(e, s, 0.3), (fake, codes))


def networks(config: dict, **changes) -> tuple[ebgan.Generator, ebgan.Discriminator]:
    return tuple(ebgan.build(network, config | changes) for network in (ebgan.Generator, ebgan.Discriminator))


TINIEST = dict(latent=3, code=4, g_width=4, d_width=2, image_size=16, channels=1, layers="fused", batch_norm=True)


def test_gradient_of_g_goes_through_both_arguments_of_the_energy(double):
    torch.manual_seed(1)
    generator, discriminator = networks(TINIEST)
    z = torch.randn(5, 3)

    def loss(*parameters):
        fake = torch.func.functional_call(generator, dict(zip(names, parameters)), (z,))
        reconstructions, codes = discriminator(fake)
        return ebgan.generator_loss(ebgan.energy(fake, reconstructions), codes, 0.5)

    names, parameters = zip(*generator.named_parameters())
    assert torch.autograd.gradcheck(loss, parameters, atol=1e-6)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (8, 8)])
def test_fused_up_convolution_is_up_sampling_then_convolution(height, width):
    layer = ebgan.UpConv(3, 4).double()
    x = torch.randn(2, 3, height, width, **DOUBLE, requires_grad=True)
    want = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    got = layer(x)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    for one, two in zip(*(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (got, want))):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


def shapes(network: torch.nn.Module, kinds) -> list[tuple]:
    return [(layer.in_channels, layer.out_channels, *layer.kernel_size, *layer.stride)
            for layer in network.modules() if isinstance(layer, kinds)]


def test_networks_are_the_papers():
    config = TINIEST | dict(latent=100, g_width=1024, d_width=64, image_size=64, channels=3, layers="paper")
    generator, discriminator = networks(config)
    assert generator.first.weight.shape == (1024 * 4 * 4, 100)  # (1024)4c from 1x1
    widths = [(1024, 512), (512, 256), (256, 128), (128, 3)]
    assert shapes(generator, torch.nn.ConvTranspose2d) == [(*pair, 4, 4, 2, 2) for pair in widths]
    assert shapes(discriminator, torch.nn.Conv2d) == [(*pair, 4, 4, 2, 2) for pair in [(3, 64), (64, 128), (128, 256)]]
    widths = [(256, 128), (128, 64), (64, 3)]
    assert shapes(discriminator, torch.nn.ConvTranspose2d) == [(*pair, 4, 4, 2, 2) for pair in widths]
    norms = [[layer.num_features for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
             for network in (generator, discriminator)]
    assert norms == [[1024, 512, 256, 128], [128, 256, 128, 64]]  # none on G's output, D's input and D's output
    reconstructions, code = discriminator(torch.zeros(2, 3, 64, 64))
    assert code.shape == (2, 256, 8, 8) and reconstructions.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("layers", ("fused", "paper"))
@pytest.mark.parametrize("size", (16, 32, 64, 128))
def test_networks_of_every_size(size, layers):
    generator, discriminator = networks(TINIEST, image_size=size, layers=layers)
    images = generator(torch.randn(2, 3))
    reconstructions, code = discriminator(images)
    assert images.shape == reconstructions.shape == (2, 1, size, size) and images.abs().max() <= 1
    assert layers == "paper" or code.shape == (2, 4)
    assert not [m for n in networks(TINIEST, batch_norm=False) for m in n.modules() if "BatchNorm" in str(type(m))]


@pytest.fixture
def first(tmp_path, monkeypatch) -> Path:
    """Where the next run's checkpoint of step 0 is kept."""
    save = common.Record.save

    def watched(record, state):
        save(record, state)
        if record.state["step"] == 0:
            shutil.copy(record.folder / "checkpoint.pt", tmp_path / "first.pt")

    monkeypatch.setattr(common.Record, "save", watched)
    return tmp_path / "first.pt"


def loaded(checkpoint: dict) -> tuple[ebgan.Generator, ebgan.Discriminator]:
    generator, discriminator = networks(checkpoint["config"])
    generator.load_state_dict(checkpoint["state"]["generator"])
    discriminator.load_state_dict(checkpoint["state"]["discriminator"])
    return generator, discriminator


def test_gradients_are_those_of_the_written_losses(data_flags, pictures, first, tmp_path, double, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: taken.append(
        [parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]]))
    flags = [*TINY["ebgan"], *data_flags["ebgan"], "--steps", "1", "--pt-weight", "5", "--margin", "15.5"]
    ebgan.main([*flags, "--out", str(tmp_path / "run")])
    before = load(first)
    (generator, discriminator), config = loaded(before), before["config"]
    torch.set_rng_state(before["state"]["rng"][:-16].clone())
    z = ebgan.uniform(config["batch_size"], config["latent"])
    images = common.load_images(str(pictures), 16, root=config["data_root"])
    x = common.normalise(images[torch.randint(len(images), (config["batch_size"],))])
    fake = generator(z)
    L_G = ebgan.generator_loss(ebgan.energy(fake, discriminator(fake)[0]), discriminator(fake)[1], 5)
    energies = [ebgan.energy(v, discriminator(v)[0]) for v in (x, fake.detach())]
    L_D = ebgan.discriminator_loss(*energies, 15.5)
    want = [torch.autograd.grad(loss, list(network.parameters()))
            for loss, network in ((L_G, generator), (L_D, discriminator))]
    for ours, written in zip(taken, want, strict=True):
        for one, two in zip(ours, written, strict=True):
            assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)


def textbook_steps(before: dict, images: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Plain EBGAN from a checkpoint on: G's loss backward through D, then D on the same images, cut off from G.

    Of several updates of each network, the first of G and the first of D take the same z, and so on.
    """
    config = before["config"]
    generator, discriminator = loaded(before)
    g_adam = torch.optim.Adam(generator.parameters(), lr=config["lr"][0], betas=(0.5, 0.999))
    d_adam = torch.optim.Adam(discriminator.parameters(), lr=config["lr"][1], betas=(0.5, 0.999))
    torch.set_rng_state(before["state"]["rng"][:-16].clone())
    for _ in range(steps):
        for turn in range(max(config["d_steps"], config["g_steps"])):
            fake = generator(torch.rand(config["batch_size"], config["latent"]) * 2 - 1)
            if turn < config["g_steps"]:
                reconstructions, codes = discriminator(fake)
                norms = (fake - reconstructions).square().sum((1, 2, 3)).sqrt()
                cosines = F.cosine_similarity(codes[:, None], codes[None], dim=2)
                pairs = cosines.square()[~torch.eye(len(codes), dtype=torch.bool)]
                g_adam.zero_grad()
                (norms.mean() + config["pt_weight"] * pairs.mean()).backward()
            if turn < config["d_steps"]:
                real = images[torch.randint(len(images), (config["batch_size"],))] / 127.5 - 1
                one, two = ((v - discriminator(v)[0]).square().sum((1, 2, 3)).sqrt() for v in (real, fake.detach()))
                d_adam.zero_grad()  # away with what G's loss has left there
                (one.mean() + F.relu(config["margin"] - two).mean()).backward()
                d_adam.step()
            if turn < config["g_steps"]:
                g_adam.step()
    return {**{f"g/{n}": p for n, p in generator.named_parameters()},
            **{f"d/{n}": p for n, p in discriminator.named_parameters()}}


@pytest.mark.parametrize("turns", ("1 1", "1 3", "2 1"))
def test_training_is_the_textbooks_though_d_sees_each_batch_once(turns, data_flags, pictures, first, tmp_path, double):
    """So no gradient of the pull-away term, here with a great weight, reaches D, and none of the hinge G."""
    out, margin, (d_steps, g_steps) = tmp_path / "run", 15.5, turns.split()
    extra = f"--pt-weight 5 --margin {margin} --lr 1e-3 1.5e-3 --d-steps {d_steps} --g-steps {g_steps}".split()
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], *extra, "--out", str(out)])
    before, after = load(first), load(out / "checkpoint.pt")["state"]
    images = common.load_images(str(pictures), 16, root=before["config"]["data_root"])
    hinges = [float(row["loss_d"]) - float(row["energy_real"]) for row in rows(out)]
    fakes = [float(row["energy_fake"]) for row in rows(out)]
    assert min(hinges) > 0.01 and max(map(sum, zip(fakes, hinges))) > margin + 0.01  # some inside it, others beyond
    for name, value in textbook_steps(before, images, 6).items():
        got = after["generator" if name[0] == "g" else "discriminator"][name[2:]]
        assert torch.allclose(got, value, rtol=0, atol=1e-7), name


def test_columns_agree_with_each_other(data_flags, tmp_path):
    flags = [*TINY["ebgan"], *data_flags["ebgan"], "--log-every", "1", "--pt-weight", "0.5", "--margin", "100"]
    ebgan.main([*flags, "--out", str(tmp_path / "run")])
    for row in rows(tmp_path / "run"):
        row = {name: float(cell) for name, cell in row.items()}
        assert row["loss_d"] == pytest.approx(row["energy_real"] + 100 - row["energy_fake"], rel=1e-4)
        assert row["loss_g"] == pytest.approx(row["energy_fake"] + 0.5 * row["pull_away"], rel=1e-4)


HEALTHY = [  # energy_real, energy_fake, diversity of the default run, a row every 50 steps
    (12.90, 10.66, 0.61), (9.21, 9.15, 0.72), (8.22, 8.81, 0.84), (7.78, 8.78, 0.90), (7.32, 8.47, 0.86),
    (7.14, 8.43, 0.96), (6.93, 8.39, 0.98), (6.78, 8.35, 0.90), (6.62, 8.24, 0.98), (6.56, 8.25, 0.98),
    (6.48, 8.26, 0.96), (6.33, 8.21, 0.96), (6.27, 8.23, 0.94), (6.25, 8.21, 1.01), (6.21, 8.18, 0.95)]


def first_warning(table: list[tuple[float, float, float]]) -> tuple[int | None, str]:
    """The number of the first row that collapse() warns at, and the warning."""
    names = "step", "energy_real", "energy_fake", "diversity"
    table = [dict(zip(names, (100 * number, *row))) for number, row in enumerate(table, 1)]
    parts = [table[:index + 1] for index in range(len(table))]
    warnings = [(index, common.collapse(part) or ebgan.collapse(part)) for index, part in enumerate(parts)]
    return next((warning for warning in warnings if warning[1]), (None, ""))


def test_no_warning_of_a_collapse_in_a_healthy_run():
    assert first_warning(HEALTHY) == (None, "")
    begin = [(15, 8, 0.1), (14, 7, 0.05)]  # as an untrained network may be
    assert first_warning(begin + HEALTHY) == (None, "")


@pytest.mark.parametrize("after, sign", [
    ([(6.2, 8.1, 0.50), (6.2, 8.0, 0.01)], "one image"),
    ([(6.2, 8.1, 0.02), (6.2, 8.0, 0.02)], "one image"),  # at once
    ([(9.0, 8.0, 0.9), (12.0, 5.0, 0.9)], "better than real"),
    ([(12.0, 16.0, 0.9), (13.0, 18.0, 0.9)], "no longer reconstructs"),  # of the default run, 6.2 and 8.2
])
def test_a_collapse_is_named_within_two_rows(after, sign):
    index, text = first_warning(HEALTHY + after)
    assert index in (len(HEALTHY), len(HEALTHY) + 1) and sign in text and "lower --lr" in text


def test_a_run_that_never_leaves_its_first_image_is_named():
    index, text = first_warning([(9.0, 8.5, 0.1)] * 20)
    assert index == 2 and "one image" in text  # at step 300
    index, text = first_warning([(5.5, 3.2, 0.9)] * 20)
    assert index == 2 and "better than real" in text


def test_the_warning_comes_once_and_before_the_next_row(data_flags, tmp_path, monkeypatch, capsys):
    values = iter([0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(common, "diversity_ratio", lambda *_: next(values))
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], "--log-every", "1", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.count("ebgan: warning: the samples are becoming one image") == 1


def test_every_update_of_d_has_real_images_of_its_own(data_flags, tmp_path, monkeypatch):
    """Where the host fills a buffer before the step, each takes its own part of it."""
    real, taken = common.Batches.__call__, []
    monkeypatch.setattr(common.Batches, "__init__", functools.partialmethod(common.Batches.__init__, resident=False))
    monkeypatch.setattr(common.Batches, "__call__", lambda self, number=0: taken.append(number) or real(self, number))
    flags = [*TINY["ebgan"], *data_flags["ebgan"], "--steps", "2", "--d-steps", "3"]
    ebgan.main([*flags, "--out", str(tmp_path / "run")])
    assert taken == [0, 1, 2] * 2


def test_margin_grows_with_the_image(data_flags, tmp_path):
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], "--steps", "2", "--out", str(tmp_path / "run")])
    assert load(tmp_path / "run/checkpoint.pt")["config"]["margin"] == pytest.approx(math.sqrt(3 * 16 * 16) / 4)


@pytest.mark.parametrize("network", ("Generator", "Discriminator"))
def test_pictures_are_made_in_eval_mode(network, data_flags, tmp_path, monkeypatch):
    forward, seen = getattr(ebgan, network).forward, set()

    def watched(self, x):
        result = forward(self, x)
        seen.add((self.training, (result[0] if network == "Discriminator" else result).requires_grad))
        return result

    monkeypatch.setattr(getattr(ebgan, network), "forward", watched)
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], "--steps", "2", "--out", str(tmp_path / "run")])
    assert seen == {(True, True), (False, False)}


def test_ema_averages_weights_and_the_buffers_of_batch_norm(data_flags, first, tmp_path):
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], "--save-every", "1", "--keep", "--out", str(tmp_path / "run")])
    files = [first, *(tmp_path / f"run/checkpoint-{step:06d}.pt" for step in range(1, 7))]
    states = [load(file)["state"] for file in files]
    want = {name: value.clone() for name, value in states[0]["ema"].items()}
    for updates, state in enumerate(states[1:]):
        decay = min(0.999, updates / (updates + 9))
        for name, value in state["generator"].items():
            want[name] = decay * want[name] + (1 - decay) * value if value.is_floating_point() else value
    assert any("running_var" in name for name in want) and want["norm.num_batches_tracked"] == 6
    for name, value in states[-1]["ema"].items():
        assert torch.allclose(value, want[name], rtol=1e-5, atol=1e-6), name
    assert not torch.equal(states[-1]["ema"]["first.weight"], states[-1]["generator"]["first.weight"])
    generator, _ = ebgan.load_generator(tmp_path / "run/checkpoint.pt")
    assert all(torch.equal(value, states[-1]["ema"][name]) for name, value in generator.state_dict().items())


def test_without_averaging_ema_is_the_generator(data_flags, tmp_path):
    ebgan.main([*TINY["ebgan"], *data_flags["ebgan"], "--ema", "0", "--out", str(tmp_path / "run")])
    state = load(tmp_path / "run/checkpoint.pt")["state"]
    assert all(torch.equal(value, state["generator"][name]) for name, value in state["ema"].items())


def test_betas_reach_both_optimisers(data_flags, tmp_path, monkeypatch):
    betas, real = [], torch.optim.Adam.step

    def watched(optimizer):
        betas.append(optimizer.param_groups[0]["betas"])
        real(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    flags = [*TINY["ebgan"], *data_flags["ebgan"], "--steps", "1", "--betas", "0.1", "0.9"]
    ebgan.main([*flags, "--out", str(tmp_path / "run")])
    assert betas == [(0.1, 0.9)] * 2


@pytest.mark.parametrize("flag, value", [
    ("--margin", "1e5"), ("--batch-size", "1"), ("--d-steps", "101"), ("--g-steps", "0"), ("--g-width", "4097"),
    ("--d-width", "0"), ("--code", "65537"), ("--ema", "1.5"), ("--channels", "2"), ("--layers", "conv")])
def test_refused_flags(flag, value):
    with pytest.raises(ValueError, match=f"argument {flag}: .*{value}"):
        ebgan.parser().settings([flag, value])
