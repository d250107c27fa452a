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
    python unrolled_gan.py --resume                                # continue the newest run
    python unrolled_gan.py --sample 10000                          # use the trained generator
    torchrun --nproc_per_node 8 unrolled_gan.py --data grid --batch-size 65536 --width 1024   # 8,192 points per GPU
    python unrolled_gan.py --activation relu --lr 1e-4 --d-lr 1e-4 --betas 0.5 0.999 --d-layers 1 --input-scale 4 \\
        --g-loss saddle --steps 25000                              # the paper's settings
    python unrolled_gan.py --d-activation tanh --gain 1.4 --d-lr 1e-4 --unroll-steps 5 --g-loss saddle --steps 25000
                                                                   # those of the authors' notebook, on our ring
    python unrolled_gan.py --activation relu --gain 0 --d-lr 1e-4 --fresh   # those of andrewliao11/unrolled-gans

Measured, with ReLU: K = 10 covers all 8 modes in 3 of 3 runs, K = 0 none. With tanh both cover all 8.
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


def perceptron(layers: list[nn.Linear], activation: str, gain: float) -> list[nn.Module]:
    """The layers of a network, with ``activation`` (relu or tanh) in between.

    Their weights are made orthogonal, times ``gain``, and their biases zero; with gain 0 both are PyTorch's own.
    """
    for layer in layers:
        if gain == 0:
            layer.reset_parameters()
        else:
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    function = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
    return [module for layer in layers for module in (layer, function())][:-1]


class Generator(nn.Sequential):
    """Latent [N, latent] to points [N, 2], by two hidden layers."""

    def __init__(self, latent: int, width: int, activation: str = "relu", gain: float = 0.8):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise([latent, width, width, 2])]
        super().__init__(*perceptron(layers, activation, gain))


class Discriminator(nn.Sequential):
    """Points [N, 2] to logits [N, 1] of being real; its first layer sees x / ``scale``."""

    def __init__(self, width: int, layers: int = 2, activation: str = "relu", gain: float = 0.8, scale: float = 1.0):
        sizes = itertools.pairwise([2, *[width] * layers, 1])
        super().__init__(*perceptron([nn.utils.skip_init(nn.Linear, a, b) for a, b in sizes], activation, gain))
        self.scale = scale

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points / self.scale)


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
MODE_PANELS = [("covered", "reached", "modes", "coverable"), ("quality",), ("kl",)]
PANELS = [("loss_d", "loss_g"), ("unroll_gain",)]


class Mean(torch.autograd.Function):
    """The mean over the ranks of a tensor and, in the backward pass, of its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        mean = x.clone()
        average([mean])
        return mean

    backward = forward


def target(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Means [M, 2], weights [M] and standard deviation of --data. The points of a file are M modes of width 0."""
    if args.data in MODE_STD:
        means, weights = mixture(args.data, args.prior_std, args.seed)
        return means.to(device), weights.to(device), MODE_STD[args.data]
    try:
        points = torch.from_numpy(np.load(args.data).astype(np.float32))
    except Exception:  # whatever another file makes numpy raise
        points = torch.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or not points.isfinite().all():
        raise ValueError(f"argument --data: {args.data!r}: choose from ring, grid, "
                         "or a .npy file with an array [N, 2] of finite numbers")
    if args.prior_std > 0:
        raise ValueError("argument --prior-std: goes with --data ring or grid")
    return points.to(device), torch.full((len(points),), 1 / len(points), device=device), 0.0


def build(network: type[nn.Module], config: dict) -> nn.Module:
    """The Generator or Discriminator of these settings."""
    if network is Generator:
        return Generator(config["latent"], config["width"], config["activation"], config["gain"])
    rest = (config["d_activation"], config["gain"], config["input_scale"])
    return Discriminator(config["width"], config["d_layers"], *rest)


def save_strip(frames: list[Path], real: Image.Image, path: Path) -> None:
    """Four of the sample pictures, evenly along training, and last the data, side by side."""
    shown = [frames[i] for i in sorted({round(k * (len(frames) - 1) / 4) for k in range(1, 5)})]
    titles = [f"step {int(frame.stem):,}" for frame in shown]
    common.save_panels([*map(Image.open, shown), real], [*titles, "data"], path)


def train(args: argparse.Namespace) -> Path:
    """Train with the ``settings``; returns the run's folder. Raises ValueError, OSError and FloatingPointError."""
    device = start(args)
    source = args.checkpoint if args.resume else args.init_from
    saved = from_rank_0(read_checkpoint, source) if source else {}
    former = saved["config"]["data"] if args.resume else args.data
    if args.data != former and not MODE_STD.keys().isdisjoint([args.data, former]):  # but a file may have moved
        raise ValueError(f"argument --data: the run has {former} and cannot continue with {args.data}")
    means, weights, std = target(args, device)
    generator, discriminator = build(Generator, vars(args)).to(device), build(Discriminator, vars(args)).to(device)
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    adam_g, adam_d = adam(g_parameters, args.lr, args.betas), adam(d_parameters, args.d_lr, args.betas)
    fixed_z = torch.randn(2560, args.latent, device=device)
    data, extent = draw(means, weights, std, len(fixed_z)), 1.5 * means.abs().max().item()
    coverable = mode_statistics(data, means, std, weights)["covered"] if std > 0 else None
    real, panels = common.density_picture(data, extent), MODE_PANELS + PANELS if std > 0 else PANELS
    record = common.Record(SCRIPT, vars(args), METRICS, device, means.cpu(), writes=RANK == 0)
    networks = dict(generator=generator.state_dict(), discriminator=discriminator.state_dict())
    state = networks | record.state | dict(
        adam_g=adam_g.state_dict()["state"], adam_d=adam_d.state_dict()["state"], fixed_z=fixed_z)

    def logits(theta: dict[str, Tensor], x: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Those of real and of generated points, in one pass through D with the parameters theta."""
        return functional_call(discriminator, theta, (torch.cat([x, fake]),)).chunk(2)

    def update() -> Tensor:
        """One step of D and G, all of it work for the device; returns the METRICS."""
        z = torch.randn(args.batch_size, args.latent, device=device).chunk(WORLD)[RANK]
        x = draw(means, weights, std, args.batch_size).chunk(WORLD)[RANK]
        fake = generator(z)

        def inner_loss(theta_k: dict[str, Tensor]) -> Tensor:
            """-f(G, theta^k), with --fresh of other real points in every unrolled step."""
            points = draw(means, weights, std, args.batch_size).chunk(WORLD)[RANK] if args.fresh else x
            return discriminator_loss(*logits(theta_k, points, fake))

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

    def show() -> None:
        record.show(dict(samples=common.density_picture(generator(fixed_z), extent)), real, panels)
        with common.only_warn("strip.png"):
            save_strip(record.frames(), real, record.folder / "strip.png")

    def measure() -> dict[str, float]:
        """How the samples cover the modes, beside the modes ``coverable`` by as many points of the data."""
        if std == 0:
            return {}
        return mode_statistics(generator(fixed_z), means, std, weights) | dict(coverable=coverable)

    if source:
        common.fill(state if args.resume else networks, saved["state"], source)
    results = repeat(update, args.graph and device.type == "cuda")
    with record, common.stop_requests() as requests:
        if RANK == 0 and record.first == 0:
            record.save(state)
        if RANK == 0 and (record.first % args.sample_every == 0 or record.first == args.steps):
            show()  # on resume too, in case a kill prevented it
        for step in range(record.first + 1, args.steps + 1):
            record.add(step, next(results))
            stop, last = told_to_stop(requests), step == args.steps
            if RANK == 0 and (step % args.log_every == 0 or last):
                record.row(measure())
                record.warn(common.collapse(record.rows))
            if RANK == 0 and (step % args.save_every == 0 or last or stop):
                record.save(state)
            if RANK == 0 and (step % args.sample_every == 0 or last):
                show()
            if stop and not last:
                raise KeyboardInterrupt(f"stopped at step {step}; to continue: --resume --out {record.folder}")
    return record.folder


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[Generator, dict]:
    """A checkpoint's generator, for z [N, latent], and the run's settings. Raises OSError, ValueError."""
    content = read_checkpoint(path)
    generator = build(Generator, content["config"])
    common.fill({"generator": generator.state_dict()}, content["state"], path)
    return generator.to(device).eval().requires_grad_(False), content["config"]


def sample(args: argparse.Namespace) -> Path:
    """--sample N: N points, in a new folder's samples.npy [N, 2]."""
    device = start(args)
    generator, config = load_generator(args.checkpoint, device)
    folder = Path(args.out or common.next_folder(Path(args.checkpoint).parent / "sample"))
    counts = [min(4096, args.sample - first) for first in range(0, args.sample, 4096)]
    points = [generator(torch.randn(count, config["latent"]).to(device)).cpu() for count in counts]
    with common.atomic_write(folder / "samples.npy") as file:
        np.save(file, torch.cat(points).numpy())
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags, each with its check."""
    number, switch = common.number, argparse.BooleanOptionalAction
    parser = common.Parser(SCRIPT, __doc__.split("\n")[0])
    add = parser.add_argument_group("Unrolled GAN").add_argument
    add("--data", type=common.filled, default="ring", help="ring, grid, or a .npy file of your own points [N, 2]")
    add("--prior-std", type=number(float, 0, 1), default=0.0, help="standard deviation of the mixture's weights")
    add("--batch-size", type=number(int, 1, 1e6), default=512, help="points per batch, over all ranks")
    add("--steps", type=number(int, 1), default=3000, help="generator updates of the whole run")
    add("--lr", type=number(float, 1e-9, 1), default=1e-3, help="Adam's learning rate, generator")
    add("--d-lr", type=number(float, 1e-9, 1), default=3e-4, help="Adam's learning rate, discriminator")
    add("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.999], metavar="B", help="Adam's betas")
    add("--unroll-steps", type=number(int, 0, 1000), default=10, help="the paper's K; 0: the plain GAN")
    add("--g-loss", choices=("saddle", "nonsaturating"), default="nonsaturating", help="f_K, or -E log D(G(z))")
    add("--fresh", action=switch, default=False, help="new real points for every unrolled step, not one batch for all")
    add("--activation", choices=("relu", "tanh"), default="tanh", help="non-linearity of the generator")
    add("--d-activation", choices=("relu", "tanh"), default="relu", help="non-linearity of the discriminator")
    add("--d-layers", type=number(int, 1, 9), default=2, help="hidden layers of the discriminator; paper: 1")
    add("--gain", type=number(float, 0, 9), default=0.8, help="of the orthogonal initial weights; 0: PyTorch's own")
    add("--input-scale", type=number(float, 1e-3, 1e6), default=1.0, help="D sees x / this; paper: 4")
    add("--width", type=number(int, 1, 65536), default=128, help="units of a hidden layer, both networks")
    add("--latent", type=number(int, 1, 65536), default=256, help="length of z")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    with common.one_line_errors(SCRIPT), ranks():
        args = from_rank_0(settings, argv)
        use = sample if args.sample else train
        folder = use(args) if use is train or RANK == 0 else None
        if RANK == 0:
            print(f"{SCRIPT}: results are in {folder}")


# ---- runs: the same text in all four scripts ------------------------------------------------------------------------

RANK, WORLD, LAUNCHER = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), os.getppid()
MAY_CHANGE = ("steps", "data", "data_root", "device", "graph", "log_every", "sample_every", "save_every", "keep", "out")


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked command line; with --resume the run's saved settings, of which only MAY_CHANGE can be given anew."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if not args.resume:
        return args
    path, saved = args.checkpoint, read_checkpoint(args.checkpoint)["config"]
    args = parser().parse_args([*common.as_flags(saved), *argv])
    args.checkpoint, args.out = path, os.path.dirname(path) or "."
    for name, value in saved.items():
        new = getattr(args, name)
        if name == "steps" and new < value or name not in MAY_CHANGE and new != value:
            raise ValueError(f"argument --{name.replace('_', '-')}: the run has {value} and cannot continue with {new}")
    return args


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's config, checked as flags are, and its state. Raises OSError; ValueError for other files."""
    content = common.load_checkpoint(path)
    try:
        if content["script"] != SCRIPT:
            raise ValueError(f"it is not one of {SCRIPT}.py")
        parser().check_saved(content["config"])
    except ValueError as error:
        raise ValueError(f"checkpoint {str(path)!r}: {error}") from error
    return content


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


def adam(parameters: list[nn.Parameter], lr: float | Tensor, betas: list[float]) -> torch.optim.Adam:
    """Adam whose moments exist from the start, so that all checkpoints hold the same tensors."""
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr, tuple(betas), fused=True, capturable=device.type == "cuda")
    for p in parameters:
        step = torch.zeros((), device=device, dtype=torch.float32)
        optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


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
