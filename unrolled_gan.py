"""Unrolled GAN: Unrolled Generative Adversarial Networks (Metz, Poole, Pfau, Sohl-Dickstein, 2016, arXiv:1611.02163).

The generator G looks ahead: it is judged not by the discriminator D as it is, but by what K more steps would make of D,
and its gradient runs through these steps. D itself then takes one ordinary step. With theta, the parameters of D:

    f(G, theta) = E log D(x) + E log(1 - D(G(z)))                          D ascends f: L_D = -f(G, theta)
    theta^0     = theta,   theta^{k+1} = theta^k + Adam(df / dtheta^k)     K = --unroll-steps of them, then forgotten
    f_K(G)      = f(G, theta^K(G))                                         G descends f_K: L_G = f_K(G)
    df_K/dG     = df/dG + df/dtheta^K dtheta^K/dG                          the second term is the paper

    python unrolled_gan.py                                         # ring of 8 Gaussians
    python unrolled_gan.py --activation relu --unroll-steps 0      # a plain GAN, which collapses
    python unrolled_gan.py --activation relu                       # the same, unrolled: it does not
    python unrolled_gan.py --data grid --prior-std 0.02            # 25 Gaussians of uneven weights
    python unrolled_gan.py --data points.npy                       # your own points, an array [N, 2]
    python unrolled_gan.py --data photos --batch-size 64           # images: a dataset, or a folder of your own
    python unrolled_gan.py --resume                                # continue the newest run
    python unrolled_gan.py --sample 10000                          # use the trained generator
    torchrun --nproc_per_node 8 unrolled_gan.py --data grid --batch-size 65536 --width 1024   # 8,192 points per GPU
    python unrolled_gan.py --activation relu --lr 1e-4 --betas 0.5 0.999 --d-layers 1 --input-scale 4 \\
        --g-loss saddle --steps 25000                              # the paper's settings
    python unrolled_gan.py --data stacked-mnist --batch-size 128 --activation relu --d-activation leaky --gain 1.4 \\
        --width 64 --d-width 4 --lr 1e-4 2e-4                      # those of its 1,000 modes, D half of G
    python unrolled_gan.py --d-activation tanh --gain 1.4 --lr 1e-3 1e-4 --unroll-steps 5 --g-loss saddle --steps 25000
                                                                   # those of the authors' notebook, on our ring
    python unrolled_gan.py --activation relu --gain 0 --lr 1e-3 1e-4 --fresh   # those of andrewliao11/unrolled-gans

Measured, modes at K = 10 and at K = 0, three seeds: ring with ReLU 8.0 of 8 and 1.0, grid with tanh 25.0 of 25 and 2.3.
"""

import argparse
import contextlib
import datetime
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

import common

SCRIPT = "unrolled_gan"  # checkpoints carry this name, whatever the file is called

# ---- networks -------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh}


def layered(layers: list[nn.Module], activation: str, gain: float) -> list[nn.Module]:
    """The layers of a network, with ``activation`` (relu, leaky or tanh) in between.

    Their weights are made orthogonal, times ``gain``, and their biases zero; with gain 0 both are PyTorch's own.
    """
    for layer in layers if gain > 0 else ():
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return [module for layer in layers for module in (layer, ACTIVATIONS[activation]())][:-1]


class Generator(nn.Sequential):
    """Latent [N, latent] to points [N, 2], by two hidden layers."""

    def __init__(self, latent: int, width: int, activation: str = "relu", gain: float = 0.8):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise([latent, width, width, 2])]
        super().__init__(*layered(layers, activation, gain))


class Discriminator(nn.Sequential):
    """Points [N, 2] to logits [N, 1] of being real; its first layer sees x / ``scale``."""

    def __init__(self, width: int, layers: int = 2, activation: str = "relu", gain: float = 0.8, scale: float = 1.0):
        sizes = itertools.pairwise([2, *[width] * layers, 1])
        super().__init__(*layered([nn.Linear(a, b) for a, b in sizes], activation, gain))
        self.scale = scale

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points / self.scale)


class ImageGenerator(nn.Sequential):
    """Latent [N, latent] to images [N, channels, size, size] in [-1, 1].

    ``width`` channels of 4x4 pixels, then transposed convolutions, which double the pixels and halve the channels.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, activation: str = "relu", gain: float = 1.4):
        widths = [max(1, width // 2**level) for level in range(int(math.log2(size // 4)) + 1)]
        up = [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths)]
        layers = [nn.Linear(latent, width * 4 * 4), *up, nn.Conv2d(widths[-1], channels, 3, padding=1)]
        first, *rest = layered(layers, activation, gain)
        super().__init__(first, nn.Unflatten(1, (width, 4, 4)), *rest, nn.Tanh())


class ImageDiscriminator(nn.Sequential):
    """Images [N, channels, size, size] to logits [N, 1] of being real.

    Convolutions of stride 2 down to 4x4 pixels, the first with ``width`` channels, each next with twice as many. There
    is no batch norm, whose running statistics the unrolled steps would change.
    """

    def __init__(self, width: int, size: int, channels: int, activation: str = "leaky", gain: float = 1.4):
        widths = [channels, *(width * 2**level for level in range(int(math.log2(size // 4))))]
        down = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)]
        *rest, last = layered([*down, nn.Linear(widths[-1] * 4 * 4, 1)], activation, gain)
        super().__init__(*rest, nn.Flatten(), last)


# ---- losses ---------------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-f = -E log D(x) - E log(1 - D(G(z))) (eq. 1 and 2): logits of one shape, as [N, 1], to a scalar.

    Raises ValueError where the shapes differ.
    """
    if real_logits.shape != fake_logits.shape:
        raise ValueError(f"shapes differ: {tuple(real_logits.shape)} and {tuple(fake_logits.shape)}")
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "saddle") -> Tensor:
    """``saddle``: f (eq. 8), whose real term matters too, as theta^K depends on G. ``nonsaturating``: -E log D(G(z)).

    The logits are those of theta^K. Raises ValueError for another kind, or where their shapes differ.
    """
    f = -discriminator_loss(real_logits, fake_logits)
    if kind == "saddle":
        return f
    if kind == "nonsaturating":
        return F.softplus(-fake_logits).mean()
    raise ValueError(f"unknown kind {kind!r}; accepted: saddle, nonsaturating")


def unroll(discriminator: nn.Module, adam: torch.optim.Adam, loss: Callable[[dict[str, Tensor]], Tensor], steps: int,
           mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """theta^K (eq. 7): what K = ``steps`` more steps of its ``adam`` on ``loss`` would make of any discriminator.

    The result, like what ``loss`` is called with once per step, is for functional_call(discriminator, theta, (x,)). It
    is differentiable in all that ``loss`` depends on, such as G(z). The discriminator and ``adam`` do not change. Where
    ranks share a batch, ``mean`` replaces a gradient by its mean over them, differentiably. Raises ValueError unless
    ``adam`` is a plain Adam, of rates, betas and eps alone, with one group that holds all of the parameters.
    """
    group, *others = adam.param_groups
    if others or not isinstance(adam, torch.optim.Adam):
        raise ValueError("the optimiser is not an Adam with one group of parameters")
    if extras := [name for name in ("weight_decay", "amsgrad", "maximize") if group[name]]:
        raise ValueError(f"an Adam with {' and '.join(extras)} cannot be unrolled")
    parameters = {name: p for name, p in discriminator.named_parameters() if p.requires_grad}
    if not set(parameters.values()) <= set(group["params"]):
        raise ValueError("the optimiser does not hold all of the discriminator's parameters")
    if steps == 0:
        return parameters

    # All parameters lie end to end in one vector, on which a step of Adam is a few operations.
    def flat(name: str) -> Tensor:
        """What Adam keeps by this name for each parameter; 0 where it has kept nothing yet."""
        kept = [adam.state.get(p, {}).get(name, torch.zeros(())) for p in parameters.values()]
        return torch.cat([value.to(p).expand_as(p).flatten() for value, p in zip(kept, parameters.values())])

    def views(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in parameters.values()])
        return {name: part.view_as(p) for part, (name, p) in zip(parts, parameters.items())}

    (beta1, beta2), t, m, v = group["betas"], flat("step"), flat("exp_avg"), flat("exp_avg_sq")
    power1, power2 = beta1**t, beta2**t
    theta = torch.cat([p.detach().flatten() for p in parameters.values()]).requires_grad_()
    for _ in range(steps):
        (g,) = torch.autograd.grad(loss(views(theta)), theta, create_graph=True)
        g = g if mean is None else mean(g)
        power1, power2 = beta1 * power1, beta2 * power2
        m = torch.lerp(g, m, beta1)
        v = torch.addcmul(beta2 * v, g, g, value=1 - beta2)
        # The derivative of a square root is infinite at 0, where a dead unit's v is. 1e-36 is nothing beside eps.
        root = (v.clamp(min=1e-36) / (1 - power2)).sqrt()
        theta = theta - group["lr"] / (1 - power1) * m / (root + group["eps"])
    return views(theta)


# ---- data -----------------------------------------------------------------------------------------------------------

MODE_STD = {"ring": 0.02, "grid": 0.05}


def mixture(kind: str, prior_std: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means [M, 2] and weights [M] of the ring (radius 2) or the grid (spacing 2) of Gaussians.

    The weights are positive, sum to 1 and have exactly the population standard deviation ``prior_std``: they are a
    softmax of normals from ``seed``, whose temperature is solved for. Raises ValueError where there are none.
    """
    if kind not in MODE_STD:
        raise ValueError(f"unknown kind {kind!r}; accepted: {', '.join(MODE_STD)}")
    angle, line = torch.arange(8) * (2 * math.pi / 8), torch.arange(-4.0, 5.0, 2.0)
    means = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1) if kind == "ring" else torch.cartesian_prod(line, line)
    normals = torch.randn(len(means), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, 1e4
    for _ in range(100):  # bisection: the spread grows with the inverse temperature
        middle = (low + high) / 2
        weights = ((normals * middle).softmax(0) + 1e-6) / (1 + 1e-6 * len(means))  # none vanishes
        low, high = (middle, high) if weights.std(correction=0) < prior_std else (low, middle)
    weights = weights.to(means.dtype)
    if weights.min() <= 0 or abs(weights.std(correction=0) - prior_std) > 1e-6:
        most = math.sqrt(len(means) - 1) / len(means)
        raise ValueError(f"prior_std {prior_std}: that of {len(means)} positive weights is less than {most:.3f}")
    return means, weights


def draw(means: Tensor, weights: Tensor, std: float, count: int) -> Tensor:
    """Points [count, 2] of the mixture."""
    modes = torch.searchsorted(weights.cumsum(0)[:-1], torch.rand(count, device=means.device))
    return means[modes] + std * torch.randn(count, 2, device=means.device)


def mode_statistics(samples: Tensor, means: Tensor, std: float, weights: Tensor) -> dict[str, float]:
    """How samples [N, 2] spread over the mixture.

    ``covered``, ``reached``: modes with N / 128 samples (20 of 2,560) or more, within 3 std of the mean, or nearer than
    a quarter of the way to the next one. ``modes``: modes with one sample within 3 std, and ``quality``: the share of
    samples within 3 std of any mode, both as VEEGAN and PacGAN count. ``kl``: KL(h || weights), where h are the shares
    of the samples by nearest mode.
    """
    distances = torch.cdist(samples, means)
    close, near = distances < 3 * std, distances < torch.pdist(means).min() / 4
    shares = torch.bincount(distances.argmin(1), minlength=len(means)) / len(samples)
    return dict(covered=int((close.sum(0) >= len(samples) / 128).sum()),
                reached=int((near.sum(0) >= len(samples) / 128).sum()),
                modes=int(close.any(0).sum()),
                quality=close.any(1).double().mean().item(),
                kl=(torch.xlogy(shares, shares) - torch.xlogy(shares, weights)).sum().item())


# ---- training -------------------------------------------------------------------------------------------------------

METRICS = ("loss_d", "loss_g", "unroll_gain")  # L_D, L_G, f(G, theta^K) - f(G, theta)
PANELS = [("loss_d", "loss_g"), ("unroll_gain",)]
MODE_PANELS = [("covered", "reached", "modes", "coverable"), ("quality",), ("kl",)]


class Mean(torch.autograd.Function):
    """The mean over the ranks of a tensor and, in the backward pass, of its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        mean = x.clone()
        average([mean])
        return mean

    backward = forward


def names_points(data: str) -> bool:
    """Whether --data names points, not images."""
    return data in MODE_STD or data.endswith(".npy")


class Points:
    """Batches of a mixture or, as modes of width 0, of the points in a file; and how samples are shown and measured."""

    shown, panels = 2560, PANELS

    def __init__(self, args: argparse.Namespace, device: torch.device):
        if args.data in MODE_STD:
            (means, weights), self.std = mixture(args.data, args.prior_std, args.seed), MODE_STD[args.data]
        else:
            try:
                means = torch.from_numpy(np.load(os.path.expanduser(args.data)).astype(np.float32))
            except Exception:  # whatever another file makes numpy raise
                means = torch.empty(0)
            if means.ndim != 2 or means.shape[1] != 2 or len(means) == 0 or not means.isfinite().all():
                raise ValueError(f"argument --data: {args.data!r} is not a file with an array [N, 2] of finite numbers")
            weights, self.std = torch.full((len(means),), 1 / len(means)), 0.0
        self.content, self.means, self.weights = means, means.to(device), weights.to(device)
        self.batch_size, self.extent = args.batch_size, 1.5 * means.abs().max().item()
        points = draw(self.means, self.weights, self.std, self.shown)
        self.real = self.picture(points)
        if self.std > 0:
            self.coverable = mode_statistics(points, self.means, self.std, self.weights)["covered"]
            self.panels = [*MODE_PANELS, *PANELS]

    def __call__(self, number: int = 0) -> Tensor:
        """This rank's share of a batch: points [batch_size / WORLD, 2]."""
        return draw(self.means, self.weights, self.std, self.batch_size).chunk(WORLD)[RANK]

    def refill(self) -> None:
        """Nothing to do, as the device draws the points."""

    def picture(self, samples: Tensor) -> Image.Image:
        """Their density."""
        return common.density_picture(samples, self.extent)

    def measure(self, samples: Tensor) -> dict[str, float]:
        """How they cover the modes, beside the modes ``coverable`` by as many points of the data."""
        if self.std == 0:
            return {}
        return mode_statistics(samples, self.means, self.std, self.weights) | dict(coverable=self.coverable)


class Images(common.Batches):
    """The same for images."""

    shown, panels = 256, [("swd", "diversity"), *PANELS]

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.content = common.load_images(args.data, args.image_size, args.channels, args.data_root)
        per_step = 1 + args.unroll_steps if args.fresh else 1
        super().__init__(self.content, args.batch_size, device, args.hflip, RANK, WORLD, per_step)
        self.compared = common.normalise(common.spread(self.content, self.shown).to(device))
        self.real = self.picture(self.compared)

    def picture(self, samples: Tensor) -> Tensor:
        """A grid of the first of them."""
        return samples[:64]

    def measure(self, samples: Tensor) -> dict[str, float]:
        """How they compare with images of the data."""
        return common.compare(samples, self.compared)


def build(config: dict) -> tuple[nn.Module, nn.Module]:
    """The generator and the discriminator of these settings."""
    g_rest, d_rest = ((config[name], config["gain"]) for name in ("activation", "d_activation"))
    if names_points(config["data"]):
        discriminator = Discriminator(config["width"], config["d_layers"], *d_rest, config["input_scale"])
        return Generator(config["latent"], config["width"], *g_rest), discriminator
    shape = config["image_size"], config["channels"]
    generator = ImageGenerator(config["latent"], config["width"], *shape, *g_rest)
    return generator, ImageDiscriminator(config["d_width"], *shape, *d_rest)


def save_strip(frames: list[Path], real: Image.Image, path: Path) -> None:
    """Four of the sample pictures, evenly along training, and last the data, side by side."""
    shown = [frames[i] for i in sorted({round(k * (len(frames) - 1) / 4) for k in range(1, 5)})]
    titles = [f"step {int(frame.stem):,}" for frame in shown]
    common.save_panels([*map(Image.open, shown), real], [*titles, "data"], path)


def train(args: argparse.Namespace) -> Path:
    """Train with the ``settings``; returns the run's folder. Raises ValueError, OSError and FloatingPointError."""
    if len(args.lr) > 2:
        raise ValueError(f"argument --lr: {len(args.lr)} rates; accepted: one, or that of G and that of D")
    of_points = names_points(args.data)
    if not (of_points or args.data in common.NAMES or os.path.exists(os.path.expanduser(args.data))):
        raise ValueError(f"argument --data: {args.data!r}: choose from ring, grid, a .npy file of points [N, 2], "
                         f"{common.ACCEPTED}")
    device = start(args)
    source = args.checkpoint if args.resume else args.init_from
    saved = from_rank_0(parser().load_checkpoint, source) if source else {}
    if args.resume and args.data != (former := saved["config"]["data"]):  # a file or a folder may have moved
        if of_points != names_points(former) or not MODE_STD.keys().isdisjoint([args.data, former]):
            raise ValueError(f"argument --data: the run has {former} and cannot continue with {args.data}")
    if args.prior_std > 0 and args.data not in MODE_STD:
        raise ValueError("argument --prior-std: goes with --data ring or grid")
    data = Points(args, device) if of_points else Images(args, device)
    args.channels = 1 if of_points else data.content.shape[1]
    generator, discriminator = (network.to(device, memory_format=torch.channels_last) for network in build(vars(args)))
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    adam_g = common.adam(g_parameters, args.lr[0], args.betas)
    adam_d = common.adam(d_parameters, args.lr[-1], args.betas)
    fixed_z = torch.randn(data.shown, args.latent, device=device)
    record = common.Record(SCRIPT, vars(args), METRICS, device, data.content, writes=RANK == 0)
    networks = dict(generator=generator.state_dict(), discriminator=discriminator.state_dict())
    state = networks | record.state | dict(
        adam_g=adam_g.state_dict()["state"], adam_d=adam_d.state_dict()["state"], fixed_z=fixed_z)

    def logits(theta: dict[str, Tensor], x: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Those of real and of generated data, in one pass through D with the parameters theta."""
        return functional_call(discriminator, theta, (torch.cat([x, fake]),)).chunk(2)

    def update() -> Tensor:
        """One step of D and G, all of it work for the device; returns the METRICS."""
        z = torch.randn(args.batch_size, args.latent, device=device).chunk(WORLD)[RANK]
        x, unrolled_steps = data(), itertools.count(1)
        fake = generator(z)

        def inner_loss(theta_k: dict[str, Tensor]) -> Tensor:
            """-f(G, theta^k), with --fresh of another real batch in every unrolled step."""
            return discriminator_loss(*logits(theta_k, data(next(unrolled_steps)) if args.fresh else x, fake))

        theta_K = unroll(discriminator, adam_d, inner_loss, args.unroll_steps, Mean.apply if WORLD > 1 else None)
        now = discriminator(torch.cat([x, fake])).chunk(2)
        ahead = logits(theta_K, x, fake) if args.unroll_steps else now
        L_D = discriminator_loss(*now)
        L_G = generator_loss(*ahead, args.g_loss)
        adam_d.zero_grad()
        adam_g.zero_grad()
        L_D.backward(inputs=d_parameters, retain_graph=True)
        L_G.backward(inputs=g_parameters)
        metrics = torch.stack([L_D, L_G, L_D - discriminator_loss(*ahead)]).detach()
        average([metrics, *(parameter.grad for parameter in g_parameters + d_parameters)])
        adam_d.step()
        adam_g.step()
        return metrics

    @torch.no_grad()
    def show() -> None:
        record.show(dict(samples=data.picture(generator(fixed_z))), data.real, data.panels)
        if of_points:
            with common.only_warn("strip.png"):
                save_strip(record.frames(), data.real, record.folder / "strip.png")

    if source:
        common.fill(state if args.resume else networks, saved["state"], source)
    results = repeat(update, args.graph and device.type == "cuda")
    with record, common.stop_requests() as requests:
        if RANK == 0 and record.first == 0:
            record.save(state)
        if RANK == 0 and (record.first % args.sample_every == 0 or record.first == args.steps):
            show()  # on resume too, in case a kill prevented it
        for step in range(record.first + 1, args.steps + 1):
            data.refill()
            record.add(step, next(results))
            stop, last = told_to_stop(requests), step == args.steps
            if RANK == 0 and (step % args.log_every == 0 or last):
                record.row(data.measure(generator(fixed_z).detach()))
                record.warn(common.collapse(record.rows))
            if RANK == 0 and (step % args.save_every == 0 or last or stop):
                record.save(state)
            if RANK == 0 and (step % args.sample_every == 0 or last):
                show()
            if stop and not last:
                raise KeyboardInterrupt(f"stopped at step {step}; to continue: --resume --out {record.folder}")
    return record.folder


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """A checkpoint's generator, for z [N, latent], and the run's settings. Raises OSError, ValueError."""
    content = parser().load_checkpoint(path)
    generator, _ = build(content["config"])
    common.fill({"generator": generator.state_dict()}, content["state"], path)
    return generator.to(device).eval().requires_grad_(False), content["config"]


def sample(args: argparse.Namespace) -> Path:
    """--sample N: in a new folder N pictures, numbered, as FID tools want them, or N points, samples.npy [N, 2]."""
    device = start(args)
    generator, config = load_generator(args.checkpoint, device)
    folder, points = Path(args.out or common.next_folder(Path(args.checkpoint).parent / "sample")), []
    for first in range(0, args.sample, 256):
        samples = generator(torch.randn(min(256, args.sample - first), config["latent"]).to(device))
        if names_points(config["data"]):
            points.append(samples.cpu())
        else:
            common.save_pngs(samples, folder, first)
    if points:
        with common.atomic_write(folder / "samples.npy") as file:
            np.save(file, torch.cat(points).numpy())
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags, each with its check."""
    number, switch = common.number, argparse.BooleanOptionalAction
    parser = common.Parser(SCRIPT, __doc__.split("\n")[0], data="ring", precision=None,
                           more="ring, grid, a .npy file of your own points [N, 2], ")
    add = parser.add_argument_group("Unrolled GAN").add_argument
    add("--prior-std", type=number(float, 0, 1), default=0.0, help="standard deviation of the mixture's weights")
    add("--batch-size", type=number(int, 1, 1e6), default=512, help="points or images per batch, over all ranks")
    add("--steps", type=number(int, 1), default=3000, help="generator updates of the whole run")
    add("--lr", type=number(float, 1e-9, 1), nargs="+", default=[1e-3, 3e-4],
        help="Adam's learning rate; or G's and D's")
    add("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.999], metavar="B", help="Adam's betas")
    add("--unroll-steps", type=number(int, 0, 1000), default=10, help="the paper's K; 0: the plain GAN")
    add("--g-loss", choices=("saddle", "nonsaturating"), default="nonsaturating", help="f_K, or -E log D(G(z))")
    add("--fresh", action=switch, default=False, help="a new real batch for every unrolled step, not one for all")
    add("--activation", choices=ACTIVATIONS, default="tanh", help="non-linearity of the generator")
    add("--d-activation", choices=ACTIVATIONS, default="relu", help="non-linearity of the discriminator")
    add("--d-layers", type=number(int, 1, 9), default=2, help="points: hidden layers of the discriminator; paper: 1")
    add("--gain", type=number(float, 0, 9), default=0.8, help="of the orthogonal initial weights; 0: PyTorch's own")
    add("--input-scale", type=number(float, 1e-3, 1e6), default=1.0, help="points: D sees x / this; paper: 4")
    add("--width", type=number(int, 1, 65536), default=128,
        help="points: units of a hidden layer of both networks; images: channels of G's first layer, halved onwards")
    add("--d-width", type=number(int, 1, 4096), default=8, help="images: channels of D's first layer, doubled onwards")
    add("--latent", type=number(int, 1, 65536), default=256, help="length of z")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    with common.one_line_errors(SCRIPT), ranks():
        args = from_rank_0(parser().settings, argv)
        use = sample if args.sample else train
        folder = use(args) if use is train or RANK == 0 else None
        if RANK == 0:
            print(f"{SCRIPT}: results are in {folder}")


# ---- runs: the same text in all four scripts ------------------------------------------------------------------------

RANK, WORLD, LAUNCHER = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), os.getppid()


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Join the ranks that torchrun started, if any."""
    if WORLD > 1:
        dist.init_process_group(timeout=datetime.timedelta(minutes=30))
    yield
    if WORLD > 1:
        dist.barrier()  # gloo may abort a rank when another leaves before it
        dist.destroy_process_group()


def from_rank_0(make: Callable, *inputs: object) -> object:
    """make(*inputs), made on rank 0, which alone may have the files, and sent to the other ranks."""
    result = [make(*inputs) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over the ranks, in one all-reduce."""
    if WORLD > 1:
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / WORLD).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def told_to_stop(requests: list[int]) -> bool:
    """Whether any rank has been asked to stop or has lost its launcher; all ranks get the same answer."""
    asked = torch.tensor(float(len(requests) > 0 or WORLD > 1 and os.getppid() != LAUNCHER))
    average([asked])
    return asked.item() > 0


def start(args: argparse.Namespace) -> torch.device:
    """Seed, and choose the device and, where it is "auto", the precision. Raises ValueError."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(args.device if args.device != "auto" else next(kind for kind in found if found[kind]))
    if not found[device.type]:
        raise ValueError(f"argument --device: this machine has no {args.device}; accepted: auto, cpu")
    if args.batch_size % WORLD:
        raise ValueError(f"argument --batch-size: {args.batch_size} is not a multiple of the {WORLD} ranks")
    if vars(args).get("precision") == "auto":
        args.precision = "bf16" if common.has_bf16(device) else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_stream(torch.cuda.Stream())  # a step is captured on the stream that has warmed it up
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for matrix products, as convolutions have it by default
    torch.manual_seed(args.seed)  # alike on every rank: the same weights and the same global batches
    return device


def repeat(update: Callable[[], Tensor], graph: bool) -> Iterator[Tensor]:
    """Results of update(), endlessly; with ``graph`` its first three warm up and the others replay one CUDA graph."""
    for _ in range(3):
        yield update()
    if graph:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                result = update()  # recorded, not run
        except RuntimeError as error:
            print(f"{SCRIPT}: no CUDA graph, running eagerly: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            while True:
                captured.replay()
                yield result
    while True:
        yield update()


if __name__ == "__main__":
    main()
