r"""WGAN-GP: Improved Training of Wasserstein GANs (Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, 2017,
arXiv:1704.00028), with options from Progressive GAN (Karras, Aila, Laine and Lehtinen, 2018, arXiv:1710.10196).

The critic C gives real images x high scores and generated images G(z) low ones. A penalty keeps its gradient's norm
near 1, so that the gap between mean scores estimates the Wasserstein distance. The generator G makes that gap small.

    L_C = E[C(G(z))] - E[C(x)] + lambda E[(|grad C(x^)| - 1)^2] + drift E[C(x)^2]       the loss of C
    L_G = -E[C(G(z))]                                                                   the loss of G
    x^  = epsilon x + (1 - epsilon) G(z)                      epsilon uniform in [0, 1], one for each sample

    python wgan_gp.py                                              # drawn fish, 32x32
    python wgan_gp.py --data photos --image-size 64                # a folder of your own pictures
    python wgan_gp.py --resume                                     # continue the newest run
    python wgan_gp.py --init-from runs/wgan_gp-001 --image-size 64 # grow a run on fish to 64x64
    python wgan_gp.py --sample 1000; python wgan_gp.py --interpolate 4  # use the generator of the newest run
    python wgan_gp.py --data photos --augment --dropout 0.5 --n-critic 4 --width 64 --batch-size 64 \
        --lr 1e-4:100,5e-5:300,2e-5~6e-5:400,2.5e-5:300,2e-5:1400 --steps 100000  # the recipe of a known fish generator
    torchrun --nproc_per_node 8 wgan_gp.py --data cifar10 --n-critic 5 --lr 1e-4 --betas 0 0.9 --no-stddev \
        --no-pixel-norm --drift 0 --ema 0 --width 64 --latent 128 --batch-size 64 \
        --steps 200000                                             # the paper's settings, 8 images per GPU

Measured over three seeds: a default run took 6 to 9 minutes on one core of an AMD EPYC. Its fish have 3.2 times the
Frechet distance of held-out fish, precision 0.61 and recall 0.69. One run was grown to 64x64 in 14 more minutes: 3.1,
0.58 and 0.75.
"""

import argparse
import copy
import datetime
import math
import os
import random
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common

SCRIPT = "wgan_gp"  # the name in its checkpoints, whatever this file is called
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes (ranks) that torchrun has started
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # this process

# ---- networks -------------------------------------------------------------------------------------------------------


def pixel_norm(x: Tensor) -> Tensor:
    """Divide each pixel's vector of C features in x [N, C, H, W] by its root mean square."""
    return x * (x.square().sum(dim=1, keepdim=True) / x.shape[1] + 1e-8).rsqrt()  # mean() has a slower backward pass


def minibatch_stddev(x: Tensor, groups: int = 1) -> Tensor:
    """Append to x [N, C, H, W] a channel: the standard deviation over the N images, averaged over C, H and W.

    It shows the critic how varied a batch is. ``x`` may hold several batches, of N / groups images each.
    """
    more = []
    for batch in x.chunk(groups):
        deviation = ((batch - batch.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean()
        more.append(deviation.expand(len(batch), 1, *x.shape[2:]))
    return torch.cat([x, torch.cat(more)], dim=1)


def leaky_relu(x: Tensor) -> Tensor:
    """F.leaky_relu(x, 0.2), for networks that are differentiated twice."""
    # A second derivative through F.leaky_relu is zero, but PyTorch still sends it through every layer below. A product
    # with a constant mask has none to send.
    return x * x.detach().sign().clamp(0.2, 1)


def dropout(x: Tensor, p: float) -> Tensor:
    """Set values of x to 0 with probability p, and scale up the rest. Twice as fast as F.dropout on a CPU."""
    return x * (torch.rand_like(x) >= p) / (1 - p) if p > 0 else x


class UpConv(nn.Conv2d):
    """Nearest-neighbour 2x up-sampling and 3x3 convolution.

    They are one transposed convolution, which takes 2.25 times fewer multiplications than up-sampling first.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)
        rows = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # where row i of 3 falls among 4
        self.register_buffer("taps", torch.einsum("hy,wx->hwyx", rows, rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("oihw,hwyx->ioyx", self.weight, self.taps)  # adds weights that meet the same pixel
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def maps(width: int, size: int) -> int:
    """Number of feature maps at a resolution: width at 32x32 and above, and twice as many at each smaller one."""
    return width * max(1, 32 // size)


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in [-1, 1].

    A linear layer makes 4x4 features; an up-convolution and pixel normalisation follow for every resolution. Above
    32x32 the image is a sum: an image of half the size, up-sampled, and what the last layers add. So G can grow.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, normalised: bool = True):
        super().__init__()
        self.norm = pixel_norm if normalised else nn.Identity()
        sizes = [2**level for level in range(3, size.bit_length())]  # 8 to size
        self.first = nn.Linear(latent, maps(width, 4) * 4 * 4)
        self.up = nn.ModuleDict({str(s): UpConv(maps(width, s // 2), maps(width, s)) for s in sizes})
        self.rgb = nn.ModuleDict({str(s): nn.Conv2d(maps(width, s), channels, 3, padding=1)
                                  for s in sizes if s >= min(size, 32)})

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        x, images = self.norm(F.leaky_relu(x, 0.2)), None
        for size, up in self.up.items():
            x = self.norm(F.leaky_relu(up(x), 0.2))
            if size in self.rgb:
                more = self.rgb[size](x)
                images = more if images is None else F.interpolate(images, scale_factor=2) + more
        return images.tanh()


class Critic(nn.Module):
    """Images [N, channels, size, size] to scores [N], by 4x4 convolutions of stride 2 down to 4x4.

    There is no batch norm, because the penalty is on each sample's own gradient. All that a score knows of the other
    images is the standard deviation of their features at 8x8; ``groups`` batches in one call do not see each other.
    Above 32x32 the images also enter at half their size, average-pooled. So C can grow.
    """

    def __init__(self, width: int, size: int, channels: int, dropout: float = 0.0, stddev: bool = True):
        super().__init__()
        self.dropout, self.stddev = dropout, stddev
        sizes = [2**level for level in range(size.bit_length() - 1, 2, -1)]  # size to 8
        inputs = {s: maps(width, s) for s in sizes}
        if stddev:
            inputs[8] += 1
        self.enter = nn.ModuleDict({str(s): nn.Conv2d(channels, maps(width, s // 2), 4, 2, 1)
                                    for s in sizes if s >= min(size, 32)})
        self.down = nn.ModuleDict({str(s): nn.Conv2d(inputs[s], maps(width, s // 2), 4, 2, 1) for s in sizes[1:]})
        self.last = nn.Linear(maps(width, 4) * 4 * 4, 1)

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        p = self.dropout if self.training else 0.0
        x = self.enter[str(images.shape[-1])](images)
        for size, down in self.down.items():
            x = dropout(leaky_relu(x), p)
            x = down(minibatch_stddev(x, groups) if self.stddev and size == "8" else x)
            if size in self.enter:
                images = F.avg_pool2d(images, 2)
                x = x + self.enter[size](images)
        x = dropout(leaky_relu(x), p)
        return self.last(x.flatten(1)).squeeze(1)


# ---- losses ---------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable, real: Tensor, fake: Tensor) -> Tensor:
    """E[(|grad C(x^)| - 1)^2] with x^ = epsilon x + (1 - epsilon) G(z) (eq. 3): samples [N, ...] to a scalar.

    There is one epsilon for each sample, uniform in [0, 1]. The norm is over all values of a sample. Raises ValueError
    if the shapes differ.
    """
    if real.shape != fake.shape:
        raise ValueError(f"shapes differ: {tuple(real.shape)} and {tuple(fake.shape)}")
    epsilon = torch.rand(len(real), *[1] * (real.ndim - 1), dtype=real.dtype, device=real.device)
    between = (epsilon * real + (1 - epsilon) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(real_scores: Tensor, fake_scores: Tensor, penalty: Tensor, gp_weight: float, drift: float) -> Tensor:
    """L_C = E[C(G(z))] - E[C(x)] + lambda penalty (eq. 3) + drift E[C(x)^2], from scores [N] and the penalty.

    The paper's loss depends only on differences of scores. The last term, from Progressive GAN, keeps scores near 0.
    """
    return fake_scores.mean() - real_scores.mean() + gp_weight * penalty + drift * real_scores.square().mean()


def generator_loss(fake_scores: Tensor) -> Tensor:
    """L_G = -E[C(G(z))] (algorithm 1), from scores [N]."""
    return -fake_scores.mean()


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, weight: Tensor | float) -> None:
    """Move an averaged network, buffers included, towards the network: average += weight (network - average).

    Raises ValueError if the average is in half precision, where small moves are rounded away, or of another depth.
    """
    pairs = list(zip(average.parameters(), network.parameters(), strict=True))
    pairs += zip(average.buffers(), network.buffers(), strict=True)
    for mean, value in pairs:
        if mean.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"the average is {mean.dtype}; keep it in torch.float32")
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), weight)
        else:
            mean.copy_(value)


# ---- training -------------------------------------------------------------------------------------------------------

METRICS = ("critic_loss", "generator_loss", "wasserstein", "penalty", "gradient_norm", "lr")
PANELS = [("critic_loss", "generator_loss"), ("wasserstein",), ("gradient_norm", "penalty"), ("lr",),
          ("swd", "diversity")]
# A saved network fits these settings only:
NETWORK_FLAGS = ("image_size", "channels", "width", "latent", "stddev", "pixel_norm")


def build(network: type[nn.Module], settings: dict) -> nn.Module:
    """Make the Generator or the Critic, in the memory layout in which convolutions are fastest."""
    shape = (settings["width"], settings["image_size"], settings["channels"])
    if network is Generator:
        built = Generator(settings["latent"], *shape, settings["pixel_norm"])
    else:
        built = Critic(*shape, settings["dropout"], settings["stddev"])
    for parameter in built.parameters():  # PyTorch's default shrinks the signal at every layer
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
    return built.to(memory_format=torch.channels_last)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, and so faster than in fp32."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def train(args: argparse.Namespace) -> Path:
    """Train up to step --steps, from the start or from a checkpoint. Returns the run's folder."""
    device = start(args)
    fixed_z = torch.randn(256, args.latent).to(device)  # the same z in all sample pictures
    if RANK > 0:
        dist.barrier()  # rank 0 decodes the pictures first, and the others find them in the cache
    images = common.load_images(args.data, args.image_size, args.channels, args.data_root, quiet=RANK > 0)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    args.channels = images.shape[1]
    args.lr_steps = args.lr_steps or args.steps
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    batch_size = args.batch_size // WORLD  # this rank's share
    batches = common.Batches(images, batch_size, device, args.hflip, per_step=args.n_critic)
    reference = common.reference_images(images, 256).to(device)  # real images to compare samples with
    if args.augment:
        reference = common.augment(reference)  # as the critic sees them

    generator = build(Generator, vars(args)).to(device)
    critic = build(Critic, vars(args)).to(device)
    averaged = copy.deepcopy(generator).requires_grad_(False)  # makes all the samples
    g_parameters, c_parameters = list(generator.parameters()), list(critic.parameters())
    lr = torch.zeros((), device=device)
    ema_weight = torch.ones_like(lr)
    options = dict(betas=tuple(args.betas), fused=True, capturable=device.type == "cuda")
    adam_g = torch.optim.Adam(g_parameters, lr, **options)
    adam_c = torch.optim.Adam(c_parameters, lr, **options)
    networks = dict(generator=generator, averaged=averaged, critic=critic)
    state = networks | dict(adam_g=adam_g, adam_c=adam_c)

    done, rows = 0, []
    if args.resume:
        checkpoint = load(args.out, state)
        done, rows = checkpoint["step"], checkpoint["rows"]
    elif args.init_from:
        if load(args.init_from)["settings"]["image_size"] == args.image_size:
            load(args.init_from, networks)
        else:
            grow(args.init_from, networks)
    if RANK == 0 and not args.out:
        args.out = common.next_folder(f"runs/{SCRIPT}")
    folder = Path(args.out or "")  # only rank 0 writes

    def update() -> Tensor:
        """One step: --n-critic updates of C and one of G, without waiting for the device. Returns the METRICS."""
        z = torch.randn(args.n_critic * batch_size, args.latent, device=device)
        with torch.no_grad(), autocast:  # G does not change while C learns, so one pass makes all its images
            fakes = generator(z).to(z.dtype).chunk(args.n_critic)
        for turn, fake in enumerate(fakes):
            real = batches(turn)
            if args.augment:
                real = common.augment(real)
            with autocast:
                scores = critic(torch.cat([real, fake]), groups=2)
            real_scores, fake_scores = scores.to(z.dtype).chunk(2)
            penalty = gradient_penalty(critic, real, fake)  # outside autocast: bf16 is no faster here
            L_C = critic_loss(real_scores, fake_scores, penalty, args.gp_weight, args.drift)
            adam_c.zero_grad()
            L_C.backward(inputs=c_parameters)
            all_reduce_mean([parameter.grad for parameter in c_parameters])
            adam_c.step()

        z = torch.randn(batch_size, args.latent, device=device)
        with autocast:
            fake = generator(z)
            L_G = generator_loss(critic(fake).to(z.dtype))
        fake.retain_grad()
        adam_g.zero_grad()
        L_G.backward(inputs=g_parameters)
        all_reduce_mean([parameter.grad for parameter in g_parameters])
        adam_g.step()
        update_ema(averaged, generator, ema_weight)

        wasserstein = real_scores.mean() - fake_scores.mean()
        # The mean of |grad C(G(z))|, because L_G is a mean. It is near 1 if the penalty works at G(z) too.
        gradient_norm = fake.grad.to(z.dtype).flatten(1).norm(dim=1).sum()
        return torch.stack([L_C, L_G, wasserstein, penalty, gradient_norm, lr]).detach()

    @torch.no_grad()
    def show(step: int) -> None:
        """Write the table, the chart and the pictures."""
        fake, plain = averaged(fixed_z[:64]), generator(fixed_z[:64])  # plain: without the average
        common.attempt(common.save_table, rows, folder / "metrics.csv")
        common.attempt(common.save_chart, rows, folder / "curves.png", PANELS)
        common.attempt(common.save_grid, reference[:64], folder / "samples/real.png")
        common.attempt(common.save_grid, fake, folder / f"samples/{step:06d}.png")
        common.attempt(common.save_grid, plain, folder / f"plain/{step:06d}.png")
        if step == args.steps:
            common.attempt(common.save_gif, sorted(folder.glob("samples/[0-9]*.png")), folder / "training.gif")

    say(f"{folder}: step {done} to {args.steps}")
    if RANK == 0 and done > 0:
        show(done)  # in case the run was killed between a checkpoint and its pictures
    pieces = parse_schedule(args.lr)
    step_once = cuda_graph(update) if args.graph and device.type == "cuda" else update
    total = torch.zeros(len(METRICS), device=device)
    first = last_row = done
    started = time.perf_counter()
    for step in range(first, args.steps):
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)  # so a resumed run draws the same numbers
        low, high = lr_range(step, pieces, args.lr_steps)
        lr.fill_(random.Random(args.seed * 1_000_003 + step).uniform(low, high))  # the same rate on every rank
        ema_weight.fill_(max(1 - args.ema, 9 / (step + 9)))  # at first a copy of G, then an ever longer average
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
        rows.append(dict(step=done, **metrics, **common.compare(averaged(fixed_z), reference)))
        save(args, done, state, rows)
        show(done)
        pace = (done - first) / max(time.perf_counter() - started, 1e-9)
        left = datetime.timedelta(seconds=round((args.steps - done) / pace))
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        say(f"{done}/{args.steps}  {pace:.1f} steps/s  {left} left  {values}")
    return folder


def grow(run: str | Path, networks: dict[str, nn.Module]) -> None:
    """Copy the weights of a run into networks for twice its image size.

    The layers that join the new size to the old ones are set to 0. So at first G(z) is the old G(z) with every pixel
    doubled, and C(x) is the old C of x at half its size (but for dropout).
    """
    checkpoint = load(run)
    size = checkpoint["settings"]["image_size"]
    for name, network in networks.items():
        network.load_state_dict(checkpoint["state"][name], strict=False)  # the layers of the new size are missing
        joints = network.rgb[str(2 * size)] if isinstance(network, Generator) else network.down[str(size)]
        nn.init.zeros_(joints.weight)
        nn.init.zeros_(joints.bias)


def parse_schedule(text: str) -> list[tuple[float, float, float]]:
    """Split the text of --lr into pieces: the lowest rate, the highest rate, and the share of the steps."""
    pieces = []
    for piece in text.split(","):
        rates, _, share = piece.partition(":")
        low, _, high = rates.partition("~")
        pieces.append((float(low), float(high or low), float(share or 1)))
    return pieces


def lr_range(step: int, pieces: list[tuple[float, float, float]], lr_steps: int) -> tuple[float, float]:
    """The lowest and the highest learning rate at a step. The pieces share ``lr_steps``; then the last one goes on."""
    total = sum(share for _, _, share in pieces)
    end = 0.0
    for low, high, share in pieces:
        end += share
        if step < lr_steps * end / total:
            break
    return low, high


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


def load_generator(run: str | Path, device: torch.device | str = "cpu") -> tuple[Generator, dict]:
    """Load the averaged generator of a run's folder or checkpoint, for z [N, latent], and the run's settings.

    Raises FileNotFoundError or ValueError.
    """
    checkpoint = load(run)
    generator = build(Generator, checkpoint["settings"])
    generator.load_state_dict(checkpoint["state"]["averaged"])
    return generator.to(device).eval().requires_grad_(False), checkpoint["settings"]


def sample(args: argparse.Namespace) -> Path:
    """--sample N: write 00000.png, 00001.png and so on, as FID tools want them."""
    device = start(args)
    generator, settings = load_generator(args.out, device)
    folder = common.next_folder(Path(args.out, "sample"))
    for first in range(0, args.sample, 256):
        z = torch.randn(min(256, args.sample - first), settings["latent"])
        common.save_pngs(generator(z.to(device)), folder, first)
    return folder


def slerp(begin: Tensor, end: Tensor, share: float) -> Tensor:
    """z [N, latent] on arcs from begin to end: the direction turns, and the length changes evenly.

    Straight lines would lead through z that are shorter than normal z ever are. They are taken where there is no arc,
    between equal and opposite directions.
    """
    length = torch.lerp(begin.norm(dim=1, keepdim=True), end.norm(dim=1, keepdim=True), share)
    a, b = F.normalize(begin, dim=1), F.normalize(end, dim=1)
    angle = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    direction = F.normalize(((1 - share) * angle).sin() * a + (share * angle).sin() * b, dim=1)
    return torch.where(angle.sin() < 1e-3, torch.lerp(begin, end, share), length * direction)


def interpolate(args: argparse.Namespace) -> Path:
    """--interpolate N: write two walks from each of N samples, to the most and to the least similar of 256 others."""
    device = start(args)
    generator, settings = load_generator(args.out, device)
    folder = common.next_folder(Path(args.out, "interpolate"))
    begin = torch.randn(args.interpolate, settings["latent"]).to(device)
    others = torch.randn(256, settings["latent"]).to(device)
    distance = torch.cdist(generator(begin).flatten(1), generator(others).flatten(1))
    end = others[torch.stack([distance.argmin(dim=1), distance.argmax(dim=1)], dim=1).flatten()]
    begin = begin.repeat_interleave(2, dim=0)
    walk = [generator(slerp(begin, end, step / 22)) for step in range(23)]
    common.save_grid(torch.stack(walk[::2], dim=1), folder / "walks.png")
    frames = [folder / f"frames/{number:02d}.png" for number in range(23)]
    for images, frame in zip(walk, frames):
        common.save_grid(images, frame)
    common.save_gif(frames + frames[-2:0:-1], folder / "walks.gif", hold=120)  # there and back
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------

# These flags must be positive:
POSITIVE = ("batch_size", "steps", "every", "n_critic", "width", "latent", "sample", "interpolate")
# These flags are not settings of a run:
NOT_SETTINGS = dict(out=None, init_from=None, resume=False, sample=None, interpolate=None)


def schedule(text: str) -> str:
    """A type for argparse: text that ``parse_schedule`` understands."""
    try:
        if all(0 < low <= high < 1 and 0 < share < math.inf for low, high, share in parse_schedule(text)):
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not made of RATE:SHARE and LOW~HIGH:SHARE, with rates from 0 to 1")


def make_parser() -> argparse.ArgumentParser:
    """Define the flags. Those in NOT_SETTINGS get their defaults from there."""
    path = os.path.expanduser
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", argument_default=argparse.SUPPRESS,
                                     description="Train WGAN-GP, or use a generator that it has trained.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, default="fish", help=f"{', '.join(common.NAMES)}, or a folder of pictures")
    add("--data-root", type=path, default="data", help="folder for downloads and decoded pictures")
    add("--image-size", type=int, choices=(16, 32, 64, 128, 256), default=32, help="height and width in pixels")
    add("--channels", type=int, choices=(0, 1, 3), default=0, help="1 for grey, 3 for RGB, 0 for what the data are")
    add("--hflip", action=switch, default=False, help="flip half of the real images left to right")
    add("--augment", action=switch, default=False, help="rotate, shift, shear, zoom and tint real images at random")
    add("--batch-size", type=int, default=16, help="images in a batch, counting all ranks")
    add("--steps", type=int, default=7000, help="stop at this step")
    add("--lr", type=schedule, default="1e-3:2,2e-4~6e-4:1", help="Adam's learning rate, or pieces RATE:SHARE and "
        "LOW~HIGH:SHARE; between LOW and HIGH, every step draws its own")
    add("--lr-steps", type=int, default=0, help="steps that the pieces of --lr share; 0 for --steps")
    add("--betas", type=float, nargs=2, default=[0.0, 0.99], metavar="BETA", help="Adam's betas")
    add("--ema", type=float, default=0.999, help="decay of the averaged generator; 0 for no averaging")
    add("--precision", choices=("auto", "fp32", "bf16"), default="fp32", help="auto is bf16 where the hardware has it")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--graph", action=switch, default=True, help="on a GPU, replay the step as a CUDA graph")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--every", type=int, default=100, help="steps between rows of metrics.csv, pictures and checkpoints")
    add("--keep", action=switch, default=False, help="keep a numbered copy of every checkpoint, for --init-from")
    add("--n-critic", type=int, default=2, help="updates of C in a step; 5 in the paper")
    add("--gp-weight", type=float, default=10.0, help="lambda, the weight of the gradient penalty")
    add("--drift", type=float, default=0.001, help="weight of the squared scores of real images; 0 in the paper")
    add("--dropout", type=float, default=0.0, help="share of the critic's features that are dropped")
    add("--width", type=int, default=16, help="channels at 32x32 and above; twice as many at each smaller size")
    add("--latent", type=int, default=64, help="length of z")
    add("--stddev", action=switch, default=True, help="minibatch standard deviation in the critic")
    add("--pixel-norm", action=switch, default=True, help="pixel normalisation in the generator")
    add("--out", type=path, help="folder of the run (default: a new one, or to resume or use, the newest)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--init-from", type=path, metavar="RUN", help="start a new run from the weights of another run or checkpoint; "
        "an --image-size of 64 or more may be twice that run's")
    add("--resume", action="store_true", default=argparse.SUPPRESS, help="continue a run with its settings")
    add("--sample", type=int, metavar="N", help="write N samples of a trained generator")
    add("--interpolate", type=int, metavar="N", help="write two walks from each of N samples")
    return parser


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags. The settings of a run to resume, or of networks to start from, become the defaults."""
    parser, saved = make_parser(), {}
    args = parser.parse_args(argv, argparse.Namespace(**NOT_SETTINGS))
    if WORLD > 1 and (args.sample or args.interpolate):
        parser.error("torchrun is for training only")
    if args.resume or args.sample or args.interpolate:
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
    if args.init_from and args.image_size == 2 * saved["image_size"] >= 64:
        saved["image_size"] = args.image_size  # the networks grow

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
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = argparse.Namespace(**NOT_SETTINGS)
    try:
        args = read_flags(argv)
        action = sample if args.sample else interpolate if args.interpolate else train
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

# `uv run wgan_gp.py` installs what the script needs.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "pillow>=10.1"]
# ///
