r"""Unrolled Generative Adversarial Networks (Metz, Poole, Pfau and Sohl-Dickstein, 2016, arXiv:1611.02163).

The generator G looks ahead. It is judged not by the discriminator D as it is, but by what K more steps would make of D,
and its gradient runs through these steps. D itself then takes one ordinary step. With theta, the parameters of D:

    f(G, theta) = E log D(x) + E log(1 - D(G(z)))                          D ascends f: L_D = -f(G, theta)
    theta^0     = theta,   theta^{k+1} = theta^k + Adam(df / dtheta^k)     K steps that D does not keep
    f_K(G)      = f(G, theta^K(G))                                         G descends f_K: L_G = f_K(G)
    df_K/dG     = df/dG + df/dtheta^K dtheta^K/dG                          the second term is the paper's idea

    python unrolled_gan.py                                         # a ring of 8 Gaussians
    python unrolled_gan.py --activation relu --unroll-steps 0      # a plain GAN, which collapses
    python unrolled_gan.py --activation relu                       # the same GAN unrolled, which does not
    python unrolled_gan.py --data grid --prior-std 0.02            # 25 Gaussians of uneven weights
    python unrolled_gan.py --data points.npy                       # your own points, an array [N, 2]
    python unrolled_gan.py --data photos --batch-size 64           # a folder of your own pictures
    python unrolled_gan.py --resume                                # continue the newest run
    python unrolled_gan.py --init-from runs/unrolled_gan-001 --lr 1e-4    # start a new run from the weights of another
    python unrolled_gan.py --sample 10000                          # use the generator of the newest run
    torchrun --nproc_per_node 8 unrolled_gan.py --data grid --batch-size 65536 --width 1024    # 8,192 points per GPU
    python unrolled_gan.py --activation relu --lr 1e-4 --betas 0.5 0.999 --d-layers 1 --input-scale 4 \
        --g-loss saddle --steps 25000                              # the paper's settings
    python unrolled_gan.py --data stacked-mnist --batch-size 128 --activation relu --d-activation leaky --gain 1.4 \
        --width 64 --d-width 4 --lr 1e-4 2e-4                      # its 1,000 modes
    python unrolled_gan.py --d-activation tanh --gain 1.4 --lr 1e-3 1e-4 --unroll-steps 5 --g-loss saddle \
        --steps 25000                                              # the settings of the authors' notebook
    python unrolled_gan.py --activation relu --gain 0 --lr 1e-3 1e-4 --fresh    # settings of andrewliao11/unrolled-gans

Measured over three seeds: a ReLU generator finds 7.7 of the ring's 8 modes with K = 10 and 0.3 with K = 0. A tanh
generator finds 22.3 of the grid's 25 with K = 10 and 4.0 with K = 0.
"""

import argparse
import datetime
import itertools
import math
import os
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

import common

SCRIPT = "unrolled_gan"  # the name in its checkpoints, whatever this file is called
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes (ranks) that torchrun has started
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # this process

# ---- networks -------------------------------------------------------------------------------------------------------

ACTIVATIONS = dict(relu=nn.ReLU, leaky=lambda: nn.LeakyReLU(0.2), tanh=nn.Tanh)


def layered(layers: list[nn.Module], activation: str, gain: float) -> list[nn.Module]:
    """Initialise layers, and put an activation (relu, leaky or tanh) between them.

    Their weights become orthogonal, times ``gain``, and their biases zero. With gain 0 they stay as PyTorch made them.
    """
    modules = []
    for layer in layers:
        if gain > 0:
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        modules += [layer, ACTIVATIONS[activation]()]
    return modules[:-1]  # no activation after the last layer


class Generator(nn.Sequential):
    """Latent [N, latent] to points [N, 2], with two hidden layers."""

    def __init__(self, latent: int, width: int, activation: str = "tanh", gain: float = 0.8):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise([latent, width, width, 2])]
        super().__init__(*layered(layers, activation, gain))


class Discriminator(nn.Sequential):
    """Points [N, 2] to logits [N, 1] of being real. The first layer sees x / ``scale``."""

    def __init__(self, width: int, layers: int = 2, activation: str = "relu", gain: float = 0.8, scale: float = 1.0):
        sizes = itertools.pairwise([2, *[width] * layers, 1])
        super().__init__(*layered([nn.Linear(a, b) for a, b in sizes], activation, gain))
        self.scale = scale

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points / self.scale)


class ImageGenerator(nn.Sequential):
    """Latent [N, latent] to images [N, channels, size, size] in [-1, 1].

    It starts with ``width`` channels of 4x4 pixels. Transposed convolutions double the size and halve the channels.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, activation: str = "relu", gain: float = 1.4):
        widths = [max(1, width // 2**level) for level in range(int(math.log2(size // 4)) + 1)]
        up = [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths)]
        layers = [nn.Linear(latent, width * 4 * 4), *up, nn.Conv2d(widths[-1], channels, 3, padding=1)]
        first, *rest = layered(layers, activation, gain)
        super().__init__(first, nn.Unflatten(1, (width, 4, 4)), *rest, nn.Tanh())


class ImageDiscriminator(nn.Sequential):
    """Images [N, channels, size, size] to logits [N, 1] of being real.

    Convolutions of stride 2 lead down to 4x4 pixels. The first has ``width`` channels, and each next one twice as many.
    There is no batch norm, because real and generated images go through D in one batch.
    """

    def __init__(self, width: int, size: int, channels: int, activation: str = "leaky", gain: float = 1.4):
        widths = [channels, *(width * 2**level for level in range(int(math.log2(size // 4))))]
        down = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)]
        *rest, last = layered([*down, nn.Linear(widths[-1] * 4 * 4, 1)], activation, gain)
        super().__init__(*rest, nn.Flatten(), last)


# ---- losses ---------------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """L_D = -f = -E log D(x) - E log(1 - D(G(z))) (section 2.1): two tensors of logits of one shape to a scalar.

    Raises ValueError if the shapes differ.
    """
    if real_logits.shape != fake_logits.shape:
        raise ValueError(f"shapes differ: {tuple(real_logits.shape)} and {tuple(fake_logits.shape)}")
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "saddle") -> Tensor:
    """L_G of the logits of theta^K: f for ``saddle`` (section 2.2), or -E log D(G(z)) for ``nonsaturating``.

    The real term of f matters, because theta^K depends on G. Raises ValueError for another kind, or if shapes differ.
    """
    f = -discriminator_loss(real_logits, fake_logits)
    if kind == "saddle":
        return f
    if kind == "nonsaturating":
        return F.softplus(-fake_logits).mean()
    raise ValueError(f"unknown kind {kind!r}; accepted: saddle, nonsaturating")


def unroll(discriminator: nn.Module, adam: torch.optim.Adam, loss: Callable[[dict[str, Tensor]], Tensor],
           steps: int) -> dict[str, Tensor]:
    """theta^K (section 2.2): what K = ``steps`` more steps of its ``adam`` on ``loss`` would make of any discriminator.

    ``loss`` is called once per step with theta^k, a dict for functional_call(discriminator, theta, (x,)). The result is
    such a dict. It is differentiable in everything that ``loss`` depends on, such as G(z). The discriminator and
    ``adam`` do not change. Batch norm and spectral norm write to copies of their buffers, which the dicts hold too.
    Raises ValueError unless ``adam`` is a plain Adam, without weight decay, amsgrad and maximize, whose one group holds
    all the parameters.
    """
    group, *others = adam.param_groups
    if others or not isinstance(adam, torch.optim.Adam):
        raise ValueError("the optimizer is not an Adam with one group of parameters")
    if extras := [name for name in ("weight_decay", "amsgrad", "maximize") if group[name]]:
        raise ValueError(f"an Adam with {' and '.join(extras)} cannot be unrolled")
    parameters = {name: p for name, p in discriminator.named_parameters() if p.requires_grad}
    if not set(parameters.values()) <= set(group["params"]):
        raise ValueError("the optimizer does not hold all of the discriminator's parameters")
    buffers = {name: buffer.detach().clone() for name, buffer in discriminator.named_buffers()}

    # All parameters lie end to end in one vector, on which a step of Adam is a few operations. Matrices are transposed
    # in it, because a gradient with two columns is slow to compute, and one with two rows is not.
    def transposed(tensor: Tensor) -> Tensor:
        return tensor.mT if tensor.ndim == 2 else tensor

    def flat(name: str) -> Tensor:
        """One part of Adam's state as a vector, with zeros before Adam's first step."""
        kept = (adam.state.get(p, {}).get(name, torch.zeros(())).to(p).expand_as(p) for p in parameters.values())
        return torch.cat([transposed(tensor).flatten() for tensor in kept])

    def views(vector: Tensor) -> dict[str, Tensor]:
        """The parameters as parts of the vector, and the copies of the buffers."""
        parts = zip(parameters.items(), vector.split([p.numel() for p in parameters.values()]))
        return {name: transposed(part.view_as(transposed(p))) for (name, p), part in parts} | buffers

    t, m, v = flat("step"), flat("exp_avg"), flat("exp_avg_sq")
    beta1, beta2 = group["betas"]
    power1, power2 = beta1**t, beta2**t
    theta = torch.cat([transposed(p.detach()).flatten() for p in parameters.values()]).requires_grad_()
    for _ in range(steps):
        (g,) = torch.autograd.grad(loss(views(theta)), theta, create_graph=True)
        power1, power2 = beta1 * power1, beta2 * power2
        m = torch.lerp(g, m, beta1)
        v = torch.addcmul(beta2 * v, g, g, value=1 - beta2)
        # A dead unit has v = 0, where the derivative of the square root is infinite. 1e-36 is nothing beside eps.
        root = (v.clamp(min=1e-36) / (1 - power2)).sqrt()
        theta = theta - group["lr"] / (1 - power1) * m / (root + group["eps"])
    return views(theta)


# ---- points ---------------------------------------------------------------------------------------------------------

MODE_STD = dict(ring=0.02, grid=0.05)  # standard deviations of the Gaussians


def mixture(kind: str, prior_std: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means [M, 2] and weights [M] of a ``ring`` (radius 2) or a ``grid`` (spacing 2) of Gaussians.

    The weights are positive, sum to 1 and have exactly the population standard deviation ``prior_std``. They are a
    softmax of normals drawn with ``seed``, at the temperature that gives this spread. Raises ValueError if none does.
    """
    if kind not in MODE_STD:
        raise ValueError(f"unknown kind {kind!r}; accepted: {', '.join(MODE_STD)}")
    angle, line = torch.arange(8) * (2 * math.pi / 8), torch.arange(-4.0, 5.0, 2.0)
    means = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1) if kind == "ring" else torch.cartesian_prod(line, line)
    normals = torch.randn(len(means), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, 1e4
    for _ in range(100):  # bisection, because the spread grows with the inverse temperature
        middle = (low + high) / 2
        weights = ((normals * middle).softmax(0) + 1e-6) / (1 + 1e-6 * len(means))  # no weight vanishes
        if weights.std(correction=0) < prior_std:
            low = middle
        else:
            high = middle
    if abs(weights.std(correction=0) - prior_std) > 1e-6:
        most = math.sqrt(len(means) - 1) / len(means)
        raise ValueError(f"prior_std {prior_std}: the standard deviation of {len(means)} weights is below {most:.3f}")
    return means, weights.to(means.dtype)


def draw(means: Tensor, weights: Tensor, std: float, count: int) -> Tensor:
    """Points [count, 2] of a mixture."""
    modes = torch.searchsorted(weights.cumsum(0)[:-1], torch.rand(count, device=means.device))
    return means[modes] + std * torch.randn(count, 2, device=means.device)


def mode_statistics(samples: Tensor, means: Tensor, weights: Tensor, std: float) -> dict[str, float]:
    """How samples [N, 2] spread over a mixture.

    ``covered`` and ``reached`` count the modes with at least N / 128 samples (20 of 2,560): within 3 std of the mean,
    or within a quarter of the way to the next mode. ``modes`` counts those with one sample within 3 std. ``quality`` is
    the share of samples within 3 std of any mode. Both are as in VEEGAN and PacGAN. ``kl`` is KL(h || weights), where h
    are the shares of the samples by nearest mode.
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
PANELS = [("covered", "reached", "modes", "coverable"), ("quality",), ("kl",), ("swd", "diversity"),
          ("loss_d", "loss_g"), ("unroll_gain",)]
# A saved network fits these settings only:
NETWORK_FLAGS = ("image_size", "channels", "width", "d_width", "latent", "activation", "d_activation", "d_layers",
                 "input_scale")


def data_kind(data: str) -> str:
    """What --data names: a mixture, the points in a file, or images."""
    if data in MODE_STD:
        return "mixture"
    return "points" if data.endswith(".npy") else "images"


def load_points(data: str, prior_std: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Means, weights and standard deviation of a mixture. The points of a file are the means of modes of width 0."""
    if data in MODE_STD:
        return *mixture(data, prior_std, seed), MODE_STD[data]
    try:
        points = torch.from_numpy(np.load(data).astype(np.float32))
    except Exception:  # a damaged or foreign file makes numpy raise nearly every kind
        points = torch.empty(0)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or not points.isfinite().all():
        raise ValueError(f"argument --data: {data!r} is not a file with an array [N, 2] of finite numbers")
    return points, torch.full((len(points),), 1 / len(points)), 0.0


def build(settings: dict) -> tuple[nn.Module, nn.Module]:
    """Make the generator and the discriminator, in the memory layout in which convolutions are fastest."""
    latent, width, gain = settings["latent"], settings["width"], settings["gain"]
    g_activation, d_activation = settings["activation"], settings["d_activation"]
    if data_kind(settings["data"]) != "images":
        generator = Generator(latent, width, g_activation, gain)
        discriminator = Discriminator(width, settings["d_layers"], d_activation, gain, settings["input_scale"])
    else:
        shape = settings["image_size"], settings["channels"]
        generator = ImageGenerator(latent, width, *shape, g_activation, gain)
        discriminator = ImageDiscriminator(settings["d_width"], *shape, d_activation, gain)
    return generator.to(memory_format=torch.channels_last), discriminator.to(memory_format=torch.channels_last)


def save_samples(samples: Tensor, reference: Tensor, path: Path) -> None:
    """Write the density of points, in a square around the real points, or a grid of images."""
    if samples.ndim == 2:
        with common.atomic_write(path) as file:
            common.density_picture(samples, 1.5 * reference.abs().max().item()).save(file)
    else:
        common.save_grid(samples[:64], path)


def save_strip(folder: Path, pictures: list[Path]) -> None:
    """Write strip.png: four of the sample pictures, evenly spaced over the run, and the data, side by side."""
    places = sorted({max(0, len(pictures) * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
    titles = [f"step {int(pictures[place].stem):,}" for place in places]
    paths = [*(pictures[place] for place in places), folder / "samples/real.png"]
    common.save_panels([Image.open(path) for path in paths], [*titles, "data"], folder / "strip.png")


def train(args: argparse.Namespace) -> Path:
    """Train up to step --steps, from the start or from a checkpoint. Returns the run's folder."""
    device = start(args)
    of_points = data_kind(args.data) != "images"
    count = 2560 if of_points else 256  # how many samples to measure
    fixed_z = torch.randn(count, args.latent).to(device)  # the same z in all sample pictures
    batch_size = args.batch_size // WORLD  # this rank's share
    if RANK > 0:
        dist.barrier()  # rank 0 decodes the pictures first, and the others find them in the cache
    if of_points:
        means, weights, std = load_points(args.data, args.prior_std, args.seed)
        means, weights = means.to(device), weights.to(device)
        reference = draw(means, weights, std, count)  # real points to compare samples with
    else:
        images = common.load_images(args.data, args.image_size, args.channels, args.data_root, quiet=RANK > 0)
        args.channels = images.shape[1]
        batches = common.Batches(images, batch_size, device, args.hflip,
                                 per_step=1 + args.unroll_steps if args.fresh else 1)
        reference = common.reference_images(images, count).to(device)  # real images to compare samples with
    if RANK == 0 and WORLD > 1:
        dist.barrier()

    generator, discriminator = (network.to(device) for network in build(vars(args)))
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    options = dict(betas=tuple(args.betas), fused=True, capturable=device.type == "cuda")
    adam_g = torch.optim.Adam(g_parameters, args.lr[0], **options)
    adam_d = torch.optim.Adam(d_parameters, args.lr[-1], **options)
    networks = dict(generator=generator, discriminator=discriminator)
    state = networks | dict(adam_g=adam_g, adam_d=adam_d)

    done, rows = 0, []
    if args.resume:
        checkpoint = load(args.out, state)
        done, rows = checkpoint["step"], checkpoint["rows"]
    elif args.init_from:
        load(args.init_from, networks)
    if RANK == 0 and not args.out:
        args.out = common.next_folder(f"runs/{SCRIPT}")
    folder = Path(args.out or "")  # only rank 0 writes

    def real_batch(number: int = 0) -> Tensor:
        """A batch of real points or images. ``number`` counts the batches of a step."""
        return draw(means, weights, std, batch_size) if of_points else batches(number)

    def logits(theta: dict[str, Tensor], x: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of real and of generated data, from one pass through D with the parameters theta."""
        return functional_call(discriminator, theta, (torch.cat([x, fake]),)).chunk(2)

    def update() -> Tensor:
        """One step of D and G, without waiting for the device. Returns the METRICS."""
        z, x = torch.randn(batch_size, args.latent, device=device), real_batch()
        fake = generator(z)
        reals = iter([real_batch(1 + k) if args.fresh else x for k in range(args.unroll_steps)])

        def inner_loss(theta_k: dict[str, Tensor]) -> Tensor:
            """-f(G, theta^k), on the next of the real batches."""
            return discriminator_loss(*logits(theta_k, next(reals), fake))

        now = discriminator(torch.cat([x, fake])).chunk(2)
        ahead = now
        if args.unroll_steps > 0:
            theta_K = unroll(discriminator, adam_d, inner_loss, args.unroll_steps)
            ahead = logits(theta_K, x, fake)
        L_D = discriminator_loss(*now)
        L_G = generator_loss(*ahead, args.g_loss)
        adam_d.zero_grad()
        adam_g.zero_grad()
        L_D.backward(inputs=d_parameters, retain_graph=True)
        L_G.backward(inputs=g_parameters)
        all_reduce_mean([parameter.grad for parameter in g_parameters + d_parameters])
        adam_d.step()
        adam_g.step()
        return torch.stack([L_D, L_G, L_D - discriminator_loss(*ahead)]).detach()

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """Compare samples with the data. The points in a file have no modes to count."""
        samples = generator(fixed_z)
        if args.data in MODE_STD:
            coverable = mode_statistics(reference, means, weights, std)["covered"]  # the most that can be expected
            return mode_statistics(samples, means, weights, std) | dict(coverable=coverable)
        return {} if of_points else common.compare(samples, reference)

    @torch.no_grad()
    def show(step: int) -> None:
        """Write the table, the chart and the pictures."""
        panels = [names for names in PANELS if names[0] in rows[-1]]
        common.attempt(common.save_table, rows, folder / "metrics.csv")
        common.attempt(common.save_chart, rows, folder / "curves.png", panels)
        common.attempt(save_samples, reference, reference, folder / "samples/real.png")
        common.attempt(save_samples, generator(fixed_z), reference, folder / f"samples/{step:06d}.png")
        pictures = sorted(folder.glob("samples/[0-9]*.png"))
        if of_points:
            common.attempt(save_strip, folder, pictures)
        if step == args.steps:
            common.attempt(common.save_gif, pictures, folder / "training.gif")

    say(f"{folder}: step {done} to {args.steps}")
    if RANK == 0 and done > 0:
        show(done)  # in case the run was killed between a checkpoint and its pictures
    step_once = cuda_graph(update) if args.graph and device.type == "cuda" else update
    total = torch.zeros(len(METRICS), device=device)
    first = last_row = done
    started = time.perf_counter()
    for step in range(first, args.steps):
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)  # so a resumed run draws the same numbers
        if not of_points:
            batches.refill()
        total += step_once()
        done = step + 1
        say(f"{done}/{args.steps}", end="\r")
        if done % args.every != 0 and done != args.steps:
            continue

        all_reduce_mean([total])
        metrics = dict(zip(METRICS, (total / (done - last_row)).tolist()))
        check_finite(done, metrics, networks)
        total.zero_()
        last_row = done
        if RANK > 0:
            continue
        rows.append(dict(step=done, **metrics, **measure()))
        save(args, done, state, rows)
        show(done)
        pace = (done - first) / max(time.perf_counter() - started, 1e-9)
        left = datetime.timedelta(seconds=round((args.steps - done) / pace))
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        say(f"{done}/{args.steps}  {pace:.1f} steps/s  {left} left  {values}")
    return folder


# ---- device, ranks, checkpoints: the same text in all four scripts --------------------------------------------------


def start(args: argparse.Namespace) -> torch.device:
    """Choose the device, join the other ranks and seed the weights. Raises ValueError if there is no such device."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if args.device != "auto":
        device = torch.device(args.device)
        if not torch.get_device_module(device).is_available():
            raise ValueError(f"argument --device: this machine has no {args.device}")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured in a graph
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 in matrix products, as convolutions have it by default
    if WORLD > 1:
        dist.init_process_group(timeout=datetime.timedelta(minutes=30))
    torch.manual_seed(args.seed)  # the same on every rank
    return device


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over the ranks, in one all-reduce."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / WORLD).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))


def cuda_graph(update: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that runs ``update`` three times, then records it in a CUDA graph and replays that."""
    def results() -> Iterator[Tensor]:
        for _ in range(3):
            yield update()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                result = update()  # recorded, not run
        except RuntimeError as error:
            say(f"no CUDA graph could be captured, so training runs without: {str(error).splitlines()[0]}")
            while True:
                yield update()
        while True:
            graph.replay()
            yield result

    steps = results()
    return lambda: next(steps)


def say(text: str, end: str = "\n") -> None:
    """Print on rank 0, and a counter (end="\\r") only on a terminal. A closed output never stops a run."""
    try:
        if RANK == 0 and (end == "\n" or getattr(sys.stdout, "isatty", bool)()):
            print(text, end=end, flush=True)
    except UnicodeError:
        print(ascii(text), flush=True)
    except (OSError, ValueError):  # a broken pipe or a closed file
        sys.stdout = None


def check_finite(step: int, metrics: dict[str, float], networks: dict[str, nn.Module]) -> None:
    """Raises FloatingPointError if a metric or a weight is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    bad += [name for name, network in networks.items()
            if not all(tensor.isfinite().all() for tensor in network.state_dict().values())]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)} not finite; start over with a lower --lr, "
                                 "or from the last checkpoint with --init-from")


def save(args: argparse.Namespace, step: int, state: dict, rows: list[dict]) -> None:
    """Write checkpoint.pt, and with --keep a numbered copy. Raises OSError."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    saved = {name: item if isinstance(item, Tensor) else item.state_dict() for name, item in state.items()}
    names = [f"checkpoint-{step:06d}.pt", "checkpoint.pt"] if args.keep else ["checkpoint.pt"]
    for name in names:
        with common.atomic_write(Path(args.out, name)) as file:
            torch.save(dict(script=SCRIPT, settings=settings, step=step, rows=rows, state=saved), file)


def load(path: str | Path, state: dict | None = None) -> dict:
    """Read a checkpoint, a file or a run's folder, and restore the networks, optimizers and tensors in ``state``.

    The file cannot run code. Raises FileNotFoundError, or ValueError for a damaged or foreign file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError("it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it was written by {checkpoint['script']}.py")
        settings, known = checkpoint.get("settings", {}), vars(make_parser().parse_args([]))
        if others := sorted(known.keys() ^ settings.keys()):
            raise ValueError(f"it was written by another version, with other settings: {', '.join(others)}")
        for name, value in settings.items():
            if type(value) is not type(known[name]):
                raise ValueError(f"its setting {name} is {value!r}")
        for name, item in (state or {}).items():
            if isinstance(item, Tensor):
                item.copy_(checkpoint["state"][name])
            elif isinstance(item, torch.optim.Adam):
                restore_adam(item, checkpoint["state"][name])
            else:
                item.load_state_dict(checkpoint["state"][name])
    except Exception as error:  # a damaged file can make torch raise almost anything
        reason = " ".join(str(error).partition(". ")[0].split())  # torch's second sentence advises an unsafe load
        raise ValueError(f"{str(path)!r} is not a checkpoint of this {SCRIPT}.py: {reason}") from error
    return checkpoint


def restore_adam(adam: torch.optim.Adam, saved: dict) -> None:
    """Restore Adam's moments. Its settings stay: flags may have changed, and train() may fill the tensor ``lr``."""
    groups = adam.param_groups
    adam.load_state_dict(saved)
    adam.param_groups = groups
    for parameter in groups[0]["params"]:  # a fused Adam would write past the end of moments that are too small
        shapes = {name: moment.shape for name, moment in adam.state[parameter].items()}
        if shapes != dict(step=torch.Size(), exp_avg=parameter.shape, exp_avg_sq=parameter.shape):
            raise ValueError("Adam's moments do not fit the weights")


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(run: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """Load the generator of a run's folder or checkpoint, for z [N, latent], and the run's settings.

    Raises FileNotFoundError or ValueError.
    """
    checkpoint = load(run)
    generator, _ = build(checkpoint["settings"])
    generator.load_state_dict(checkpoint["state"]["generator"])
    return generator.to(device).eval().requires_grad_(False), checkpoint["settings"]


def sample(args: argparse.Namespace) -> Path:
    """--sample N: write N points to samples.npy, or N pictures, numbered, as FID tools want them."""
    device = start(args)
    generator, settings = load_generator(args.out, device)
    folder, points = common.next_folder(Path(args.out, "sample")), []
    for first in range(0, args.sample, 256):
        z = torch.randn(min(256, args.sample - first), settings["latent"])
        samples = generator(z.to(device))
        if samples.ndim == 2:
            points.append(samples.cpu())
        else:
            common.save_pngs(samples, folder, first)
    if points:
        with common.atomic_write(folder / "samples.npy") as file:
            np.save(file, torch.cat(points).numpy())
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------

# These flags must be positive:
POSITIVE = ("batch_size", "steps", "every", "width", "d_width", "latent", "d_layers", "input_scale", "sample")
# These flags are not settings of a run:
NOT_SETTINGS = dict(out=None, init_from=None, resume=False, sample=None)


def make_parser() -> argparse.ArgumentParser:
    """Define the flags. Those in NOT_SETTINGS get their defaults from there."""
    path = os.path.expanduser
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", argument_default=argparse.SUPPRESS,
                                     description="Train an Unrolled GAN, or use a generator that it has trained.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, default="ring",
        help=f"ring, grid, a .npy file of points [N, 2], {', '.join(common.NAMES)}, or a folder of pictures")
    add("--data-root", type=path, default="data", help="folder for downloads and decoded pictures")
    add("--image-size", type=int, choices=(16, 32, 64, 128, 256), default=32, help="height and width in pixels")
    add("--channels", type=int, choices=(0, 1, 3), default=0, help="1 for grey, 3 for RGB, 0 for what the data are")
    add("--hflip", action=switch, default=False, help="flip half of the real images left to right")
    add("--prior-std", type=float, default=0.0, help="standard deviation of the weights of ring or grid")
    add("--batch-size", type=int, default=512, help="points or images in a batch, counting all ranks")
    add("--steps", type=int, default=3000, help="stop at this step")
    add("--lr", type=float, nargs="+", default=[1e-3, 3e-4], help="Adam's learning rate, or two: for G and for D")
    add("--betas", type=float, nargs=2, default=[0.5, 0.999], metavar="BETA", help="Adam's betas")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--graph", action=switch, default=True, help="on a GPU, replay the step as a CUDA graph")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--every", type=int, default=100, help="steps between rows of metrics.csv, pictures and checkpoints")
    add("--keep", action=switch, default=False, help="keep a numbered copy of every checkpoint, for --init-from")
    add("--unroll-steps", type=int, default=10, help="the paper's K; 0 for a plain GAN")
    add("--g-loss", choices=("saddle", "nonsaturating"), default="nonsaturating", help="f_K, or -E log D(G(z))")
    add("--fresh", action=switch, default=False, help="take a new real batch in every unrolled step")
    add("--activation", choices=ACTIVATIONS, default="tanh", help="activation of the generator")
    add("--d-activation", choices=ACTIVATIONS, default="relu", help="activation of the discriminator")
    add("--d-layers", type=int, default=2, help="points: hidden layers of the discriminator; 1 in the paper")
    add("--gain", type=float, default=0.8, help="scale of the orthogonal initial weights; 0 for PyTorch's weights")
    add("--input-scale", type=float, default=1.0, help="points: the discriminator sees x / this; 4 in the paper")
    add("--width", type=int, default=128, help="points: units of a hidden layer; images: channels of G's first layer")
    add("--d-width", type=int, default=8, help="images: channels of D's first layer")
    add("--latent", type=int, default=256, help="length of z")
    add("--out", type=path, help="folder of the run (default: a new one, or to resume or use, the newest)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--init-from", type=path, metavar="RUN", help="start a new run from the weights of another run or checkpoint")
    add("--resume", action="store_true", default=argparse.SUPPRESS, help="continue a run with its settings")
    add("--sample", type=int, metavar="N", help="write N samples of a trained generator")
    return parser


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags. The settings of a run to resume, or of networks to start from, become the defaults."""
    parser, saved = make_parser(), {}
    args = parser.parse_args(argv, argparse.Namespace(**NOT_SETTINGS))
    if WORLD > 1 and args.sample:
        parser.error("torchrun is for training only")
    if args.resume or args.sample:
        args.out = args.out or common.newest_folder(f"runs/{SCRIPT}-*", "checkpoint.pt")
    elif args.out and any(Path(args.out).glob("[!.]*")):
        parser.error(f"argument --out: {args.out!r} is not empty; choose a new folder, or --resume the run in it")
    if args.out and os.path.isfile(args.out):
        parser.error(f"argument --out: {args.out!r} is a file, not a folder")
    if args.resume:
        saved = load(args.out)["settings"]
        parser.set_defaults(**saved)
    elif args.init_from:
        saved = load(args.init_from)["settings"]
        parser.set_defaults(**{name: saved[name] for name in NETWORK_FLAGS})
    # The saved settings are the defaults now, so parse again: flags on the command line win
    args = parser.parse_args(argv, argparse.Namespace(**NOT_SETTINGS | dict(out=args.out)))

    for name, value in vars(args).items():
        flag = f"argument --{name.replace('_', '-')}"
        if value == "":
            parser.error(f"{flag}: must not be empty")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not 0 <= number < 2**32:
                parser.error(f"{flag}: {number} is negative or too large")
        if name in POSITIVE and value == 0:
            parser.error(f"{flag}: must be positive")
        if name in NETWORK_FLAGS and name in saved and value != saved[name]:
            parser.error(f"{flag}: the saved networks have {saved[name]}, not {value}")
    if args.batch_size % WORLD:
        parser.error(f"argument --batch-size: {args.batch_size} is not a multiple of the {WORLD} ranks")
    if len(args.lr) > 2:
        parser.error("argument --lr: takes one rate, or two: for G and for D")
    if data_kind(args.data) == "images" and args.data not in common.NAMES and not os.path.exists(args.data):
        parser.error(f"argument --data: no such data: {args.data!r}; give ring, grid, a .npy file, {common.ACCEPTED}")
    if saved and data_kind(args.data) != data_kind(saved["data"]):
        parser.error(f"argument --data: a run on {saved['data']} cannot go on with {args.data}")
    if args.prior_std > 0 and args.data not in MODE_STD:
        parser.error("argument --prior-std: goes with --data ring or grid only")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = argparse.Namespace(**NOT_SETTINGS)
    try:
        args = read_flags(argv)
        action = sample if args.sample else train
        folder = action(args)
        say(f"the results are in {folder}")
        if WORLD > 1:
            dist.barrier()  # with gloo, a rank that leaves early can crash the others
            dist.destroy_process_group()
    except KeyboardInterrupt:
        if args.out and Path(args.out, "checkpoint.pt").exists():
            command = ["python", os.path.relpath(__file__), "--resume", "--out", str(args.out)]
            sys.exit(f"stopped; to continue training: {shlex.join(command)}")
        sys.exit("stopped before the first checkpoint, so nothing has been saved" if RANK == 0 else 1)
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # memory has not run out
            raise
        sys.exit(f"{SCRIPT}.py: error: {' '.join(str(error).split()) or 'out of memory'}")


if __name__ == "__main__":
    main()

# `uv run unrolled_gan.py` installs what the script needs.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "pillow>=10.1"]
# ///
