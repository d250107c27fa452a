"""Unrolled GAN: Unrolled Generative Adversarial Networks (Metz, Poole, Pfau, Sohl-Dickstein, 2016, arXiv:1611.02163).

The generator G looks ahead: it is judged not by the discriminator D as it is, but by what K more steps would make of D,
and its gradient runs through these steps. D itself then takes one ordinary step. With theta, the parameters of D:

    f(G, theta)   = E log D(x) + E log(1 - D(G(z)))                        D ascends f
    theta^0       = theta,   theta^{k+1} = theta^k + Adam(df/dtheta^k)     K = --unroll-steps of them, then forgotten
    f_K(G)        = f(G, theta^K(G))                                       G descends f_K
    df_K/dG       = df/dG + df/dtheta^K dtheta^K/dG                        the second term is the paper

    python unrolled_gan.py                                         # ring of 8 Gaussians
    python unrolled_gan.py --activation relu --unroll-steps 0      # a plain GAN, which collapses
    python unrolled_gan.py --activation relu                       # the same, unrolled: it does not
    python unrolled_gan.py --data grid --prior-std 0.02            # 25 Gaussians of uneven weights
    python unrolled_gan.py --resume                                # go on with the newest run
    python unrolled_gan.py --sample 10000                          # samples.npy: 10,000 points
    python unrolled_gan.py --activation relu --lr 1e-4 --d-lr 1e-4 --d-layers 1 --input-scale 4 --g-loss saddle \\
        --steps 25000                                              # the paper's settings
    python unrolled_gan.py --d-activation tanh --gain 1.4 --d-lr 1e-4 --unroll-steps 5 --g-loss saddle --steps 25000
                                                                   # those of the authors' notebook, on our ring
    python unrolled_gan.py --activation relu --gain 0 --d-lr 1e-4 --fresh
                                                                   # those of github.com/andrewliao11/unrolled-gans

Measured, with ReLU: K = 10 covers all 8 modes in 3 of 3 runs, K = 0 none. With tanh both cover all 8.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common

# ---- arguments ------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; exits with one clear line where a flag is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("ring", "grid"), default="ring", help="8 Gaussians on a circle, or 5 x 5 of them")
    add("--prior-std", type=number(float, 0, 1), default=0.0, help="standard deviation of the mixture's weights")
    add("--batch-size", type=number(int, 1), default=512, help="points in a batch, over all ranks")
    add("--steps", type=number(int, 1), default=3000, help="generator updates of the whole run")
    add("--lr", type=number(float, 1e-9, 1), default=1e-3, help="Adam's learning rate, generator")
    add("--d-lr", type=number(float, 1e-9, 1), default=3e-4, help="Adam's learning rate, discriminator")
    add("--unroll-steps", type=number(int, 0, 1000), default=10, help="the paper's K; 0: the plain GAN")
    add("--g-loss", choices=("saddle", "nonsaturating"), default="nonsaturating", help="f_K, or -E log D(G(z))")
    add("--fresh", action="store_true", help="new real points for every unrolled step, not one batch for all")
    add("--activation", choices=("relu", "tanh"), default="tanh", help="non-linearity of the generator")
    add("--d-activation", choices=("relu", "tanh"), default="relu", help="non-linearity of the discriminator")
    add("--d-layers", type=number(int, 1, 9), default=2, help="hidden layers of the discriminator; paper: 1")
    add("--gain", type=number(float, 0, 9), default=0.8, help="of the orthogonal initial weights; 0: PyTorch's own")
    add("--input-scale", type=number(float, 1e-3), default=1.0, help="the discriminator sees x / this; paper: 4")
    add("--width", type=number(int, 1), default=128, help="units of a hidden layer, both networks")
    add("--latent", type=number(int, 1), default=256, help="length of z")
    add("--seed", type=number(int, 0), default=0, help="seed of weights, batches and noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--no-graph", action="store_true", help="no CUDA graph: run every step eagerly")
    add("--log-every", type=number(int, 1), default=100, help="steps between rows of metrics.csv")
    add("--sample-every", type=number(int, 1), default=100, help="steps between sample pictures")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--keep", action="store_true", help="keep a numbered copy of every checkpoint")
    add("--out", help="run folder (default: the next free runs/unrolled_gan-001); with --sample, its folder")
    add("--checkpoint", metavar="FILE", help="what the following take instead of the newest run's checkpoint.pt")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--resume", action="store_true", help="go on with the newest run, or that of --out or --checkpoint")
    instead("--sample", type=number(int, 1), metavar="N", help="train nothing, write N samples as samples.npy [N, 2]")
    return settings(parser, argv)


# ---- networks -------------------------------------------------------------------------------------------------------


def initialise(weight: Tensor, bias: Tensor, gain: float) -> None:
    """Orthogonal weights times ``gain`` and zero biases; with gain 0 what nn.Linear starts from."""
    if gain:
        nn.init.orthogonal_(weight, gain), nn.init.zeros_(bias)
    else:
        bound = weight.shape[1] ** -0.5
        nn.init.uniform_(weight, -bound, bound), nn.init.uniform_(bias, -bound, bound)


class Generator(nn.Module):
    """Latent [N, latent] to points [N, 2], by two hidden layers."""

    def __init__(self, latent: int, width: int, activation: str = "relu", gain: float = 0.8):
        super().__init__()
        self.activation = getattr(torch, activation)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([latent, width, width, 2]))
        for layer in self.layers:
            initialise(layer.weight.data, layer.bias.data, gain)

    def forward(self, z: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            z = self.activation(layer(z))
        return last(z)


class Discriminator(nn.Module):
    """Points [N, 2] to logits [N, 1] of being real.

    Its weights and biases lie end to end in one vector ``theta``, on which a step of Adam is a few operations; forward
    takes another such vector in its place.
    """

    def __init__(self, width: int, layers: int = 2, activation: str = "relu", gain: float = 0.8, scale: float = 1.0):
        super().__init__()
        self.activation, self.scale = getattr(torch, activation), scale
        sizes = itertools.pairwise([2, *[width] * layers, 1])
        self.shapes = [shape for a, b in sizes for shape in ((b, a), (b,))]
        self.theta = nn.Parameter(torch.zeros(sum(map(math.prod, self.shapes))))
        for weight, bias in self.layers(self.theta.data):
            initialise(weight, bias, gain)

    def layers(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The weight and bias of every layer, as views of ``theta``."""
        parts = theta.split([math.prod(shape) for shape in self.shapes])
        parts = [part.view(shape) for part, shape in zip(parts, self.shapes)]
        return list(zip(parts[::2], parts[1::2]))

    def forward(self, points: Tensor, theta: Tensor | None = None) -> Tensor:
        *hidden, last = self.layers(self.theta if theta is None else theta)
        x = points / self.scale
        for layer in hidden:
            x = self.activation(F.linear(x, *layer))
        return F.linear(x, *last)

    def both(self, real: Tensor, fake: Tensor, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The logits of as many real as generated points, in one pass."""
        return self(torch.cat([real, fake]), theta).chunk(2)


# ---- losses ---------------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-f = -E log D(x) - E log(1 - D(G(z))) of logits [N, 1], as a scalar (eq. 1 and 2)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "saddle") -> Tensor:
    """The saddle's f (eq. 8: its real term matters too, as theta^K depends on G), or else -E log D(G(z))."""
    return -discriminator_loss(real_logits, fake_logits) if kind == "saddle" else F.softplus(-fake_logits).mean()


class Mean(torch.autograd.Function):
    """The mean over the ranks, and in the backward pass that of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return average([x])[0].clone()

    backward = forward


def unrolled_parameters(params: Tensor, adam_state: dict[str, Tensor], real: Tensor, fake: Tensor, steps: int,
                        discriminator: Discriminator, lr: float = 1e-4, betas: tuple[float, float] = (0.5, 0.999),
                        eps: float = 1e-8) -> Tensor:
    """theta^K (eq. 7): ``params`` after K = ``steps`` steps of Adam on discriminator_loss, differentiable in ``fake``.

    ``params`` [P] and torch.optim.Adam's ``adam_state`` (step, exp_avg, exp_avg_sq) are where it begins, and do not
    change. ``fake`` is [N, 2], ``real`` [N, 2] or, with its own points for every step, [steps, N, 2].
    """
    theta = params.detach().requires_grad_(steps > 0)
    t, m, v = adam_state["step"], adam_state["exp_avg"], adam_state["exp_avg_sq"]
    for k in range(steps):
        loss = discriminator_loss(*discriminator.both(real[k] if real.ndim == 3 else real, fake, theta))
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        g = Mean.apply(g) if ranks()[1] > 1 else g
        t = t + 1
        m = torch.lerp(g, m, betas[0])
        v = torch.addcmul(betas[1] * v, g, g, value=1 - betas[1])
        # The derivative of a square root is infinite at 0, where a dead unit's v is. 1e-36 is nothing beside eps.
        root = v.clamp(min=1e-36).sqrt() / (1 - betas[1] ** t).sqrt()
        theta = theta - lr / (1 - betas[0] ** t) * m / (root + eps)
    return theta


# ---- data -----------------------------------------------------------------------------------------------------------

MODE_STD = {"ring": 0.02, "grid": 0.05}


def mixture(kind: str, prior_std: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means [M, 2] and weights [M] of the ring (radius 2) or the grid (spacing 2) of Gaussians.

    The weights are positive, sum to 1 and have just the population standard deviation ``prior_std``: they are a softmax
    of normals from ``seed``, whose temperature is solved for. Raises ValueError where there are none.
    """
    angle, line = torch.arange(8) * (2 * math.pi / 8), torch.arange(-4.0, 5.0, 2.0)
    means = torch.stack([2 * angle.cos(), 2 * angle.sin()], 1) if kind == "ring" else torch.cartesian_prod(line, line)
    normals = torch.randn(len(means), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, 1e4
    for _ in range(100):  # halve: the spread grows with the inverse temperature
        middle = (low + high) / 2
        weights = ((normals * middle).softmax(0) + 1e-6) / (1 + 1e-6 * len(means))  # none vanishes
        low, high = (middle, high) if weights.std(correction=0) < prior_std else (low, middle)
    weights = weights.to(means.dtype)
    if weights.min() <= 0 or abs(weights.std(correction=0) - prior_std) > 1e-6:
        most = math.sqrt(len(means) - 1) / len(means)
        raise ValueError(f"--prior-std {prior_std}: {len(means)} positive weights have less than {most:.3f}")
    return means, weights


def draw(means: Tensor, weights: Tensor, std: float, count: int) -> Tensor:
    """Points [count, 2] of the mixture."""
    modes = torch.searchsorted(weights.cumsum(0)[:-1], torch.rand(count, device=means.device))
    return means[modes] + std * torch.randn(count, 2, device=means.device)


def mode_statistics(samples: Tensor, means: Tensor, std: float, weights: Tensor) -> dict[str, float]:
    """How samples [N, 2] spread over the mixture. A mode counts if it has N / 128 of them (20 of 2,560) or more,

    ``covered``: within 3 std of it; ``reached``: nearer than a quarter of the way to the next mode. ``quality`` is the
    share of samples within 3 std of any mode, ``kl`` KL(h || weights) with h the shares of samples by nearest mode.
    """
    distances = torch.cdist(samples, means)
    quarter = torch.pdist(means).min() / 4
    enough = lambda near: int((near.sum(0) * 128 >= len(samples)).sum())
    shares = torch.bincount(distances.argmin(1), minlength=len(means)) / len(samples)
    return dict(covered=enough(distances < 3 * std), reached=enough(distances < quarter),
                quality=(distances < 3 * std).any(1).double().mean().item(),
                kl=(torch.xlogy(shares, shares) - torch.xlogy(shares, weights)).sum().item())


# ---- plumbing: the same text in all four scripts; it knows nothing of GANs ------------------------------------------

SCRIPT = Path(__file__).stem
ACTIONS = {"resume", "sample", "interpolate", "embed"}
MAY_CHANGE = {"steps", "data_root", "device", "no_graph", "log_every", "sample_every", "save_every", "keep", "out"}


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: a number of this kind, from low to high."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low:g} to {high:g}")

    return parse


def settings(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line's settings; a resumed run's are its saved ones, of which only MAY_CHANGE can be given anew."""
    args = parser.parse_args(argv)
    if args.checkpoint and not any(getattr(args, action, None) for action in ACTIONS):
        choice = ", ".join(f"--{action}" for action in sorted(ACTIONS) if hasattr(args, action))
        parser.error(f"argument --checkpoint: goes with one of {choice}")
    if not args.resume:
        if args.out and os.path.lexists(args.out) and not (os.path.isdir(args.out) and not os.listdir(args.out)):
            parser.error(f"argument --out: {args.out} is not empty; name a new folder, or --resume the run in it")
        return args
    try:
        checkpoint = find_checkpoint(args)
        saved = read_checkpoint(checkpoint)["config"]
    except (ValueError, OSError) as error:
        parser.error(f"argument --resume: {error}")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    for name, value in saved.items():
        new = getattr(args, name)
        if new != value and name not in MAY_CHANGE or name == "steps" and new < value:
            parser.error(f"argument --{name.replace('_', '-')}: the run has {value}, and cannot go on with {new}")
    args.out, args.checkpoint = str(checkpoint.parent), str(checkpoint)
    return args


def find_checkpoint(args: argparse.Namespace) -> Path:
    """--checkpoint, or with --resume that of --out, or else the newest run's. Raises OSError."""
    if args.checkpoint or args.resume and args.out:
        return Path(args.checkpoint or Path(args.out, "checkpoint.pt"))
    runs = Path("runs").glob(f"{SCRIPT}-*/checkpoint.pt")
    with contextlib.suppress(ValueError):
        return max(runs, key=lambda path: path.stat().st_mtime)
    raise FileNotFoundError(f"no run of {SCRIPT}.py in {Path('runs').absolute()}; name one by --checkpoint")


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint's content: script, config, state, random numbers. Raises OSError, or ValueError for other files."""
    open(path, "rb").close()  # raises OSError where there is no such file
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise, OSError among it
        raise ValueError(f"{path} is not a checkpoint that can be read") from error
    if not isinstance(content, dict) or content.get("script") != SCRIPT:
        raise ValueError(f"{path} is not a checkpoint of {SCRIPT}.py")
    return content


def new_folder(stem: str | Path) -> Path:
    """Makes the first of stem-001, stem-002, ... that is not there yet."""
    for count in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = Path(f"{stem}-{count:03d}")
            folder.mkdir(parents=True)
            return folder


def in_turn(load: Callable[[], Tensor]) -> Tensor:
    """Loads on rank 0 first, so that it alone downloads and builds caches."""
    rank, world = ranks()
    if rank > 0:
        dist.barrier()
    data = load()
    if rank == 0 and world > 1:
        dist.barrier()
    return data


def start(args: argparse.Namespace) -> torch.device:
    """Joins the ranks that torchrun has started, if any; seeds; returns the device. Raises ValueError."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(args.device if args.device != "auto" else next(kind for kind in found if found[kind]))
    if not found[device.type]:
        raise ValueError(f"--device {args.device}: this machine has none; accepted: auto, cpu")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    if args.batch_size % ranks()[1]:
        raise ValueError(f"--batch-size {args.batch_size}: accepted are multiples of the {ranks()[1]} ranks")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for matrix products, as convolutions have it by default
    torch.manual_seed(args.seed)  # alike on every rank: the same weights and the same global batches
    return device


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(batch: Tensor) -> Tensor:
    """This rank's share of a global batch. All ranks draw it alike, so that one process and N train the same."""
    return batch.chunk(ranks()[1])[ranks()[0]]


def average(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Means over the ranks, by one all-reduce of all the tensors laid end to end."""
    tensors = list(tensors)
    if ranks()[1] == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / ranks()[1]).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def update(optimizer: torch.optim.Optimizer, gradients: Iterable[Tensor]) -> None:
    """One step of the optimiser by these gradients, averaged over the ranks, and by nothing left over from before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, average(gradients), strict=True):
        same = gradient.stride() == parameter.stride()  # fused Adam takes one memory layout for granted
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    optimizer.step()


def replays(step: Callable[[], dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Runs a step as a CUDA graph: three eager steps to warm up, one capture, and from then on its replays."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for _ in range(3):  # on the stream of the capture, so that the libraries are set up for it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            values = step()
        torch.cuda.current_stream().wait_stream(stream)
        yield values
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # records, runs nothing
        values = step()
    while True:
        graph.replay()
        yield values


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Notes Ctrl-C and SIGTERM in the list it yields, to be looked at between steps; a second one stops at once."""
    stops: list[int] = []

    def note(kind: int, _: object) -> None:
        if stops:
            raise KeyboardInterrupt
        stops.append(kind)

    handlers = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def save(folder: Path, state: dict, config: dict) -> None:
    """Writes checkpoint.pt whole or not at all: to a temporary file, then renamed. --keep adds a numbered copy."""
    content = {"script": SCRIPT, "config": config, "rng": torch.get_rng_state()}
    content["cuda_rng"] = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    content["state"] = {name: item if isinstance(item, Tensor) else item.state_dict() for name, item in state.items()}
    with open(folder / "checkpoint.tmp", "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if config["keep"]:
        shutil.copyfile(file.name, folder / f"checkpoint-{int(state['step']):06d}.pt")
    os.replace(file.name, folder / "checkpoint.pt")


def restore(path: str, state: dict, device: torch.device) -> None:
    """Puts a checkpoint into ``state``, in place, and sets the random numbers back to where they were."""
    content = read_checkpoint(path, device)
    for name, item in state.items():
        if isinstance(item, Tensor):
            item.copy_(content["state"][name])
            continue
        rates = [group["lr"] for group in getattr(item, "param_groups", [])]
        item.load_state_dict(content["state"][name])
        for rate, group in zip(rates, getattr(item, "param_groups", [])):
            group["lr"] = rate  # an optimiser loads a copy, but the step changes the tensor in ``state``
    torch.set_rng_state(content["rng"].cpu())
    if device.type == "cuda" and content["cuda_rng"] is not None:
        torch.cuda.set_rng_state(content["cuda_rng"].cpu())


def loop(args: argparse.Namespace, state: dict, device: torch.device, step: Callable[[], dict[str, Tensor]],
         refill: Callable[[], None], measure: Callable[[dict], dict], dump: Callable[[Path, int], None]) -> Path:
    """Runs ``step`` up to --steps; returns the run's folder. Raises FloatingPointError, and SystemExit after Ctrl-C.

    The host reads numbers back once every --log-every steps: their means, so that a non-finite value at any step
    shows. Only after that look does rank 0 write a row, with what ``measure`` adds, pictures and checkpoints.
    """
    rank, world = ranks()
    if args.resume:
        restore(args.checkpoint, state, device)
    elif rank == 0:
        args.out = args.out or str(new_folder(Path("runs", SCRIPT)))
    folder, first = Path(args.out or ""), int(state["step"])
    config = {name: value for name, value in vars(args).items() if name not in ACTIONS | {"checkpoint"}}
    table = folder / "metrics.csv"
    if rank == 0:
        print(f"{SCRIPT}: {folder}, step {first} to {args.steps}, {device}, {world} rank(s)", flush=True)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        if not first:
            save(folder, state, config)
            dump(folder, 0)
        elif table.exists():  # what came after the checkpoint will come again
            header, *rows = table.read_text().splitlines(True)
            rows = [row for row in rows if row[-1] == "\n" and int(row.split(",")[0]) <= first]
            table.write_text(header + "".join(rows))
    run = iter(step, None) if args.no_graph or device.type != "cuda" else replays(step)
    sums, last, clock = 0, first, time.perf_counter()
    with interruptible() as stops:
        for now in range(first + 1, args.steps + 1):
            refill()
            values = next(run)
            sums = sums + torch.stack(list(values.values()))
            if now % args.log_every and now < args.steps:
                continue
            row = dict(zip(values, (sums / (now - last)).tolist()))
            show = lambda: "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            if not all(map(math.isfinite, row.values())):
                raise FloatingPointError(f"step {now}: {show()}; the last good checkpoint is {folder}/checkpoint.pt")
            stop = bool(average([torch.tensor(float(len(stops)), device=device)])[0])  # all ranks stop at one step
            state["step"].fill_(now)
            if rank == 0:
                row |= measure(row)
                seconds = time.perf_counter() - clock
                with open(table, "a") as file:
                    if file.tell() == 0:
                        print("step", *row, "seconds", sep=",", file=file)
                    print(now, *(f"{value:.6g}" for value in row.values()), f"{seconds:.1f}", sep=",", file=file)
                pace = (now - first) / seconds
                left = (args.steps - now) / pace
                print(f"{now}/{args.steps}  {show()}  {pace:.1f} steps/s  {left:.0f} s left", flush=True)
                due = lambda every: now // every > last // every or now == args.steps or stop
                if due(args.sample_every):
                    dump(folder, now)
                if due(args.save_every):
                    save(folder, state, config)
            if stop:
                message = f"stopped at step {now}; to go on: python {SCRIPT}.py --resume --out {folder}"
                raise SystemExit(message if rank == 0 else 1)
            sums, last = 0, now
    if world > 1:
        dist.barrier()  # ranks leave together: gloo may abort one that goes first
    return folder


# ---- training -------------------------------------------------------------------------------------------------------


def build(network: type[nn.Module], config: dict) -> nn.Module:
    """The Generator or Discriminator of these settings."""
    if network is Generator:
        return Generator(config["latent"], config["width"], config["activation"], config["gain"])
    rest = (config["d_activation"], config["gain"], config["input_scale"])
    return Discriminator(config["width"], config["d_layers"], *rest)


def train(args: argparse.Namespace) -> Path:
    """Trains as the settings of ``parse_arguments`` say; returns the run's folder. Raises ValueError, OSError."""
    device = start(args)
    means, weights = (part.to(device) for part in mixture(args.data, args.prior_std, args.seed))
    std, extent = MODE_STD[args.data], means.max().item() + 1
    generator, discriminator = build(Generator, vars(args)).to(device), build(Discriminator, vars(args)).to(device)
    g_parameters, theta = list(generator.parameters()), discriminator.theta
    adam = dict(betas=(0.5, 0.999), fused=True, capturable=device.type == "cuda")
    g_optimizer = torch.optim.Adam(g_parameters, lr=args.lr, **adam)
    d_optimizer = torch.optim.Adam([theta], lr=args.d_lr, **adam)
    d_optimizer.state[theta] = dict(step=torch.zeros((), device=device, dtype=torch.float32),
                                    exp_avg=torch.zeros_like(theta), exp_avg_sq=torch.zeros_like(theta))
    fixed_z = torch.randn(2560, args.latent, device=device)
    state = dict(generator=generator, discriminator=discriminator, g_optimizer=g_optimizer, d_optimizer=d_optimizer,
                 fixed_z=fixed_z, step=torch.tensor(0))

    def step() -> dict[str, Tensor]:
        z = mine(torch.randn(args.batch_size, args.latent, device=device))
        real = inner = mine(draw(means, weights, std, args.batch_size))
        if args.fresh:
            inner = draw(means, weights, std, args.batch_size * args.unroll_steps).view(args.batch_size, -1, 2)
            inner = mine(inner).transpose(0, 1)
        fake = generator(z)
        logits = discriminator.both(real, fake)
        d_loss = discriminator_loss(*logits)
        d_gradient = torch.autograd.grad(d_loss, theta, retain_graph=True)
        theta_k = unrolled_parameters(theta, d_optimizer.state[theta], inner, fake, args.unroll_steps, discriminator,
                                      args.d_lr, adam["betas"])
        logits = discriminator.both(real, fake, theta_k) if args.unroll_steps else logits
        g_loss = generator_loss(*logits, args.g_loss)
        g_gradients = torch.autograd.grad(g_loss, g_parameters)
        update(d_optimizer, d_gradient)
        update(g_optimizer, g_gradients)
        gain = d_loss.detach() - discriminator_loss(*logits).detach()  # f(theta^K) - f(theta)
        return dict(zip(("loss_d", "loss_g", "unroll_gain"), average([d_loss.detach(), g_loss.detach(), gain])))

    data = draw(means, weights, std, len(fixed_z))
    coverable = mode_statistics(data, means, std, weights)["covered"]

    @torch.no_grad()
    def measure(row: dict[str, float]) -> dict[str, float]:
        statistics = mode_statistics(generator(fixed_z), means, std, weights)
        return dict(covered=statistics.pop("covered"), coverable=coverable) | statistics

    @torch.no_grad()
    def dump(folder: Path, now: int) -> None:
        picture = common.density_picture(generator(fixed_z), extent)
        picture.save(folder / f"samples/{now:06d}.png")
        if now == 0:
            common.density_picture(data, extent).save(folder / "samples/real.png")
            return
        panels = [("covered", "reached", "coverable"), ("quality",), ("kl",), ("loss_d", "loss_g"), ("unroll_gain",)]
        common.save_chart(folder / "metrics.csv", folder / "curves.png", panels)
        paths = [path for path in sorted(folder.glob("samples/0*.png")) if int(path.stem) <= now]
        shown = [paths[round(i * (len(paths) - 1) / 7)] for i in range(8)] if len(paths) > 8 else paths
        titles = [f"step {int(path.stem):,}" for path in shown] + ["data"]
        pictures = [Image.open(path) for path in [*shown, folder / "samples/real.png"]]
        common.save_panels(pictures, titles, folder / "strip.png")
        if now == args.steps:
            common.save_gif(paths, folder / "training.gif")

    return loop(args, state, device, step, lambda: None, measure, dump)


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[Generator, dict]:
    """A checkpoint's trained generator, for z [N, latent], and the run's settings. Raises OSError, ValueError."""
    content = read_checkpoint(path, device)
    generator = build(Generator, content["config"]).to(device)
    generator.load_state_dict(content["state"]["generator"])
    return generator.eval().requires_grad_(False), content["config"]


def sample(args: argparse.Namespace) -> Path:
    """--sample N: N points, in a new folder's samples.npy [N, 2]."""
    device, checkpoint = start(args), find_checkpoint(args)
    generator, config = load_generator(checkpoint, device)
    folder = Path(args.out) if args.out else new_folder(checkpoint.parent / "sample")
    folder.mkdir(parents=True, exist_ok=True)
    counts = [min(4096, args.sample - first) for first in range(0, args.sample, 4096)]
    points = [generator(torch.randn(count, config["latent"]).to(device)).cpu() for count in counts]
    np.save(folder / "samples.npy", torch.cat(points).numpy())
    return folder


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(argv)
    try:
        folder = (sample if args.sample else train)(args)
        if ranks()[0] == 0:
            print(f"{SCRIPT}: all is in {folder}")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{SCRIPT}.py: error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
