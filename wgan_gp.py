"""WGAN-GP: Improved Training of Wasserstein GANs (Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, 2017,
arXiv:1704.00028), with the recipe of a fish generator that borrows from Progressive GAN (Karras et al., 2018).

The critic C gives real images x high scores and generated ones G(z) low scores. A penalty holds its slope near 1, so
that the gap of the mean scores estimates the Wasserstein distance; the generator G lowers that distance:

    L_C = E[C(G(z))] - E[C(x)] + lambda E[(|grad C(x^)| - 1)^2] + drift E[C(x)^2]       loss of C
    L_G = -E[C(G(z))]                                                                   loss of G
    x^  = epsilon x + (1 - epsilon) G(z), epsilon uniform in [0, 1], one for each sample

Each of the recipe's items can be left out: --ema 0 --no-stddev --no-pixel-norm --dropout 0 --no-augment --drift 0.

    python wgan_gp.py                                              # drawn fish, 32x32
    python wgan_gp.py --data mnist --no-augment                    # digits, which should not be turned
    python wgan_gp.py --image-size 64 --grow-from runs/wgan_gp-001/checkpoint.pt    # go on from 32x32 to 64x64
    python wgan_gp.py --resume                                     # go on with the newest run
    python wgan_gp.py --sample 1000; python wgan_gp.py --interpolate 4              # use what it has learnt
    python wgan_gp.py --data photos --width 64 --dropout 0.5 --batch-size 64 --steps 100000 \\
        --lr 1e-4:100,5e-5:300,2e-5~6e-5:400,2.5e-5:300,2e-5:1400  # the fish recipe's settings, for days on a GPU

Measured: the default shows fish that one recognises, after 6 minutes on two cores. Without the average of weights
the sliced Wasserstein distance is 0.051 instead of 0.020; no other item moves it by more than 0.003 (1,500 steps).
"""

import argparse
import contextlib
import copy
import datetime
import functools
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ---- arguments ------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; exits with one clear line where a flag is wrong."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n")[:2]),
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="fish", help="digits, faces, fish, mnist, fashion, cifar10, celeba, or a folder of pictures")
    add("--data-root", default="data", help="folder for downloads and the picture cache")
    add("--image-size", type=int, choices=(16, 32, 64, 128), default=32, help="height and width, pixels")
    add("--grow-from", metavar="FILE", help="begin with a checkpoint of half the image size")
    add("--hflip", action="store_true", help="mirror every second real image")
    add("--no-augment", action="store_true", help="do not turn, shift, shear, zoom and tint the real images")
    add("--batch-size", type=number(int, 1), default=16, help="images in a batch, over all ranks")
    add("--steps", type=number(int, 1), default=4000, help="generator updates of the whole run")
    add("--lr", type=lambda text: parse_schedule(text) and text, default="1e-3:2,2e-4~6e-4:1",
        help="Adam's learning rate: pieces RATE:SHARE or LOW~HIGH:SHARE of the run, a range drawn from at every step")
    add("--lr-steps", type=number(int, 1), help="length of the run to which --lr refers (default: --steps)")
    add("--n-critic", type=number(int, 1), default=4, help="critic updates for every generator update")
    add("--gp-weight", type=number(float, 0), default=10.0, help="lambda, weight of the gradient penalty")
    add("--drift", type=number(float, 0), default=0.001, help="weight of the squared scores of real images")
    add("--dropout", type=number(float, 0, 0.99), default=0.2, help="share of the critic's features left out")
    add("--ema", type=number(float, 0, 1), default=0.999, help="decay of the averaged generator; 0: no average")
    add("--no-stddev", action="store_true", help="no minibatch standard deviation in the critic")
    add("--no-pixel-norm", action="store_true", help="no pixel normalisation in the generator")
    add("--width", type=number(int, 1), default=16, help="channels at 32x32 and above; twice as many at every halving")
    add("--latent", type=number(int, 1), default=64, help="length of z")
    add("--seed", type=number(int, 0), default=0, help="seed of weights, batches and noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the networks; penalty: fp32")
    add("--no-graph", action="store_true", help="no CUDA graph: run every step eagerly")
    add("--log-every", type=number(int, 1), default=100, help="steps between rows of metrics.csv")
    add("--sample-every", type=number(int, 1), default=100, help="steps between sample pictures")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--keep", action="store_true", help="keep a numbered copy of every checkpoint")
    add("--out", help="run folder (default: the next free runs/wgan_gp-001); with --sample and the like, their folder")
    add("--checkpoint", metavar="FILE", help="what the following take instead of the newest run's checkpoint.pt")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--resume", action="store_true", help="go on with the newest run, or that of --out or --checkpoint")
    instead("--sample", type=number(int, 1), metavar="N", help="train nothing, write N samples as numbered PNGs")
    instead("--interpolate", type=number(int, 1), metavar="N",
            help="train nothing, write walks from N samples to the nearest and to the farthest of others")
    return settings(parser, argv)


def parse_schedule(text: str) -> list[tuple[float, float, float]]:
    """``1e-4:100,2e-5~6e-5:400`` as (low, high, share) of every piece; the share may be left out of a single one.

    Raises argparse.ArgumentTypeError unless every rate is from 1e-9 to 1, low <= high, and every share is positive.
    """
    pieces = []
    for piece in text.split(","):
        rates, _, share = piece.partition(":")
        low, tilde, high = rates.partition("~")
        with contextlib.suppress(ValueError):
            low, high, share = float(low), float(high if tilde else low), float(share or ("," not in text))
            if 1e-9 <= low <= high <= 1 and 0 < share < math.inf:
                pieces.append((low, high, share))
                continue
        raise argparse.ArgumentTypeError(f"{text!r}: {piece!r} is not RATE:SHARE or LOW~HIGH:SHARE, with rates from "
                                         "1e-9 to 1 and a positive share")
    return pieces


# ---- networks -------------------------------------------------------------------------------------------------------


def pixel_norm(x: Tensor) -> Tensor:
    """x [N, C, H, W] with every pixel's vector of C features divided by its root mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def minibatch_stddev(x: Tensor) -> Tensor:
    """x [N, C, H, W] and one more channel, everywhere the mean over C, H, W of the standard deviation over the N.

    It lets the critic see how varied a batch is. Each rank takes its own share of the batch.
    """
    spread = ((x - x.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean()
    return torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], dim=1)


def dropout(x: Tensor, share: float) -> Tensor:
    """x with this share of its values set to 0 at random, and the others scaled up; on CPUs 2x as fast as F.dropout."""
    return x * (torch.rand_like(x) >= share) / (1 - share) if share else x


class UpConv(nn.Conv2d):
    """Nearest-neighbour 2x up-sampling, 3x3 convolution and leaky ReLU, as one transposed convolution.

    Up-sampling repeats pixels, so the products of the 3x3 kernel that meet the same input pixel can be summed once,
    beforehand: into a 4x4 kernel of stride 2, the sum of the 3x3 kernel's four one-pixel shifts. Same result to
    rounding, 2.25 times fewer multiplications.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.pad(self.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
        return F.leaky_relu(F.conv_transpose2d(x, 4 * F.avg_pool2d(kernel, 2, 1), self.bias, stride=2, padding=1), 0.2)


def features(width: int, size: int) -> int:
    """Channels at a resolution: 8 width at 4x4, halved at every doubling down to width at 32x32 and above."""
    return width * max(1, 32 // size)


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in [-1, 1].

    A linear layer to 4x4, then an up-convolution to every resolution, all with pixel normalisation. Above 32x32 an
    image is the sum of one of half the size, up-sampled, and what the last resolution adds: so a model can grow.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, normalised: bool = True):
        super().__init__()
        self.norm = pixel_norm if normalised else nn.Identity()
        sizes = [2**level for level in range(3, size.bit_length())]  # 8 to size
        self.first = nn.Linear(latent, features(width, 4) * 4 * 4)
        self.up = nn.ModuleDict({str(s): UpConv(features(width, s // 2), features(width, s)) for s in sizes})
        self.rgb = nn.ModuleDict({str(s): nn.Conv2d(features(width, s), channels, 3, padding=1)
                                  for s in sizes if s >= min(size, 32)})

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        x, images = self.norm(F.leaky_relu(x, 0.2)), None
        for size, up in self.up.items():
            x = self.norm(up(x))
            if size in self.rgb:
                more = self.rgb[size](x)
                images = more if images is None else F.interpolate(images, scale_factor=2) + more
        return images.tanh()


class Critic(nn.Module):
    """Images [N, channels, size, size] to scores [N], by 4x4 convolutions of stride 2 down to 4x4.

    The minibatch standard deviation joins at 8x8. No batch norm, which would make the penalty's samples depend on each
    other's scale. Above 32x32 the images also enter at half their size, average-pooled: so a model can grow.
    """

    def __init__(self, width: int, size: int, channels: int, dropout: float = 0.5, stddev: bool = True):
        super().__init__()
        self.dropout, self.stddev = dropout, stddev
        sizes = [2**level for level in range(size.bit_length() - 1, 2, -1)]  # size to 8
        self.enter = nn.ModuleDict({str(s): nn.Conv2d(channels, features(width, s // 2), 4, 2, 1)
                                    for s in sizes if s >= min(size, 32)})
        self.down = nn.ModuleDict({str(s): nn.Conv2d(features(width, s) + (stddev and s == 8),
                                                     features(width, s // 2), 4, 2, 1) for s in sizes[1:]})
        self.last = nn.Linear(features(width, 4) * 4 * 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter[str(images.shape[-1])](images)
        for size, down in self.down.items():
            x = dropout(F.leaky_relu(x, 0.2), self.dropout * self.training)
            x = down(minibatch_stddev(x) if self.stddev and size == "8" else x)
            if size in self.enter:
                images = F.avg_pool2d(images, 2)
                x = x + self.enter[size](images)
        x = dropout(F.leaky_relu(x, 0.2), self.dropout * self.training)
        return self.last(x.flatten(1)).squeeze(1)


# ---- losses ---------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """E[(|grad C(x^)| - 1)^2], a scalar, of images [N, C, H, W] on the lines between real and fake ones (eq. 3).

    One epsilon for each sample; the norm is over all pixels and channels of a sample. It can be differentiated again.
    """
    epsilon = mine(torch.rand(len(real) * ranks()[1], 1, 1, 1, dtype=real.dtype, device=real.device))
    between = torch.lerp(fake, real, epsilon).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(real_scores: Tensor, fake_scores: Tensor, penalty: Tensor, gp_weight: float, drift: float) -> Tensor:
    """L_C of scores [N] and the penalty: E[C(G(z))] - E[C(x)] + lambda penalty + drift E[C(x)^2], a scalar."""
    distance = real_scores.mean() - fake_scores.mean()  # the Wasserstein estimate
    return gp_weight * penalty + drift * real_scores.square().mean() - distance


def scheduled_rate(pieces: Tensor, update: Tensor, chance: Tensor) -> Tensor:
    """The learning rate of an update, counted from 0: a scalar, all on the device.

    ``pieces`` [P, 3] has a row (low, high, end in updates) for each; the last goes on for ever. ``chance`` in [0, 1]
    says where between low and high.
    """
    row = (update >= pieces[:-1, 2]).sum().view(1)
    low, high, _ = pieces.index_select(0, row)[0].unbind()
    return torch.lerp(low, high, chance)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, update: Tensor, decay: float) -> None:
    """Moves the averaged network: average <- d average + (1 - d) network, with d = min(decay, update / (update + 9)).

    d warms up: the average looks back over about a ninth of the updates so far (counted from 0), and no further than
    ``decay`` lets it. So it has left the first weights behind even in a short run.
    """
    weight = (9 / (update + 9)).clamp(min=1 - decay)
    for mean, parameter in zip(average.parameters(), network.parameters()):
        mean.lerp_(parameter, weight)


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


def normal(count: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
    """z [count, latent], normal."""
    return torch.randn(count, latent, device=device)


def build(network: type[nn.Module], config: dict) -> nn.Module:
    """The Generator or Critic of these settings, laid out as convolutions are fastest."""
    shape = (config["width"], config["image_size"], config["channels"])
    if network is Generator:
        built = Generator(config["latent"], *shape, not config["no_pixel_norm"])
    else:
        built = Critic(*shape, config["dropout"], not config["no_stddev"])
    for parameter in built.parameters():
        nn.init.orthogonal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return built.to(memory_format=torch.channels_last)


def small_model(args: argparse.Namespace) -> dict:
    """The state of the checkpoint --grow-from, if any. Raises ValueError where its networks do not fit."""
    if not args.grow_from or args.resume:  # a resumed run has grown already
        return {}
    content = read_checkpoint(args.grow_from)
    half = vars(args) | dict(image_size=args.image_size // 2)
    for name in ("image_size", "width", "latent", "no_stddev", "no_pixel_norm"):
        if content["config"][name] != half[name] or args.image_size < 64:
            flag = name.replace("_", "-")
            raise ValueError(f"--grow-from {args.grow_from}: it has --{flag} {content['config'][name]}; accepted is "
                             f"{half[name]}, and 32 or 64 as the size to grow from")
    return content["state"]


@torch.no_grad()
def grow(network: nn.Module, small: dict[str, Tensor]) -> None:
    """Copies a network of half the image size into this one, whose output then is that network's.

    To be exact, G(z) is the small G(z) with every pixel repeated 2x2, and C(x) the small C of x average-pooled 2x2,
    dropout aside. For the layer through which the new resolution joins the old ones is set to zero: G's ``rgb`` and
    C's ``down``. Raises ValueError where layers do not match.
    """
    try:
        new = network.load_state_dict(small, strict=False).missing_keys
    except RuntimeError as error:  # several lines, of which the last names a layer
        raise ValueError("--grow-from: " + str(error).split("\t")[-1].strip()) from error
    for name in new:
        if name.startswith(("rgb", "down")):
            network.get_parameter(name).zero_()


def train(args: argparse.Namespace) -> Path:
    """Trains as the settings of ``parse_arguments`` say; returns the run's folder. Raises ValueError, OSError."""
    device, args.lr_steps = start(args), args.lr_steps or args.steps
    small = small_model(args)
    images = in_turn(lambda: common.load_images(args.data, args.image_size, root=args.data_root))
    batches = common.Batches(images, args.batch_size, device, args.hflip, *ranks(), per_step=args.n_critic)
    args.channels = images.shape[1]
    generator, critic = build(Generator, vars(args)).to(device), build(Critic, vars(args)).to(device)
    ema = copy.deepcopy(generator)
    for network, name in ((generator, "generator"), (ema, "ema"), (critic, "critic")) if small else ():
        grow(network, small[name])
    g_parameters, c_parameters = list(generator.parameters()), list(critic.parameters())
    lr, updates = torch.zeros(2, device=device).unbind()
    lows, highs, shares = zip(*parse_schedule(args.lr))
    ends = [round(args.lr_steps * share / sum(shares)) for share in itertools.accumulate(shares)]
    pieces = torch.tensor(list(zip(lows, highs, ends)), device=device)
    adam = dict(lr=lr, betas=(0.0, 0.99), fused=True, capturable=device.type == "cuda")
    g_optimizer, c_optimizer = torch.optim.Adam(g_parameters, **adam), torch.optim.Adam(c_parameters, **adam)
    fixed_z = normal(256, args.latent, device)
    state = dict(generator=generator, ema=ema, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer,
                 lr=lr, updates=updates, fixed_z=fixed_z, step=torch.tensor(0))
    augment = (lambda real, *_: real) if args.no_augment else common.augment
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def step() -> dict[str, Tensor]:
        lr.copy_(scheduled_rate(pieces, updates, torch.rand((), device=device)))
        z = torch.cat([mine(normal(args.batch_size, args.latent, device)) for _ in range(args.n_critic)])
        with torch.no_grad(), autocast():
            fakes = generator(z).to(z).chunk(args.n_critic)  # of all the critic's updates at once
        for turn, fake in enumerate(fakes):
            real = augment(batches(turn), *ranks())
            with autocast():
                real_scores, fake_scores = critic(real).to(real), critic(fake).to(fake)
            penalty = gradient_penalty(critic, real, fake)
            c_loss = critic_loss(real_scores, fake_scores, penalty, args.gp_weight, args.drift)
            update(c_optimizer, torch.autograd.grad(c_loss, c_parameters))
        with autocast():
            z = mine(normal(args.batch_size, args.latent, device))
            fake = generator(z)
            g_loss = -critic(fake).to(z).mean()
        image_gradient, *g_gradients = torch.autograd.grad(g_loss, [fake, *g_parameters])
        update(g_optimizer, g_gradients)
        follow(ema, generator, updates, args.ema)
        updates.add_(1)
        # The penalty has this near 1: the mean slope |grad C(G(z))|, which is all that the generator learns from.
        slope = image_gradient.to(z).flatten(1).norm(dim=1).sum()
        values = dict(critic_loss=c_loss, generator_loss=g_loss, wasserstein=real_scores.mean() - fake_scores.mean(),
                      penalty=penalty, gradient_norm=slope)
        averages = average([value.detach() for value in values.values()])
        return dict(zip(values, averages)) | dict(lr=lr.clone())

    # The data as the critic sees them, drawn here, so that no picture takes a random number from the training.
    shown = augment(common.normalise(images[torch.linspace(0, len(images) - 1, 256).long()].to(device)))

    @torch.no_grad()
    def measure(row: dict[str, float]) -> dict[str, float]:
        fake = ema(fixed_z)
        return dict(swd=common.sliced_wasserstein(fake, shown), diversity=common.diversity_ratio(fake, shown))

    @torch.no_grad()
    def dump(folder: Path, now: int) -> None:
        common.save_grid(ema(fixed_z[:64]), folder / f"samples/{now:06d}.png")
        common.save_grid(generator(fixed_z[:64]), folder / f"plain/{now:06d}.png")  # without the average
        if now == 0:
            common.save_grid(shown[:64], folder / "samples/real.png")
            return
        panels = [("critic_loss", "generator_loss"), ("wasserstein",), ("gradient_norm", "penalty"), ("lr",),
                  ("swd", "diversity")]
        common.save_chart(folder / "metrics.csv", folder / "curves.png", panels)
        if now == args.steps:
            common.save_gif(sorted(folder.glob("samples/0*.png")), folder / "training.gif")

    return loop(args, state, device, step, batches.refill, measure, dump)


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[Generator, dict]:
    """A checkpoint's averaged generator, for z [N, latent], and the run's settings. Raises OSError, ValueError."""
    content = read_checkpoint(path, device)
    generator = build(Generator, content["config"]).to(device)
    generator.load_state_dict(content["state"]["ema"])
    return generator.eval().requires_grad_(False), content["config"]


def opened(args: argparse.Namespace, purpose: str) -> tuple[Generator, dict, torch.device, Path]:
    """The generator that --checkpoint or the newest run holds, its settings, the device, and a new folder to fill."""
    device, checkpoint = start(args), find_checkpoint(args)
    generator, config = load_generator(checkpoint, device)
    folder = Path(args.out) if args.out else new_folder(checkpoint.parent / purpose)
    folder.mkdir(parents=True, exist_ok=True)
    return generator, config, device, folder


def sample(args: argparse.Namespace) -> Path:
    """--sample N: N pictures, numbered, as FID tools want them."""
    generator, config, device, folder = opened(args, "sample")
    for first in range(0, args.sample, 256):
        z = normal(min(256, args.sample - first), config["latent"])
        common.save_pngs(generator(z.to(device)), folder, first)
    return folder


def slerp(begin: Tensor, end: Tensor, share: float) -> Tensor:
    """z [N, latent] on arcs from begin to end: unlike on straight lines, its length stays that of normal z."""
    angle = F.cosine_similarity(begin, end, dim=1, eps=0).clamp(-1, 1).acos().clamp(min=1e-4)[:, None]
    return (begin * ((1 - share) * angle).sin() + end * (share * angle).sin()) / angle.sin()


def interpolate(args: argparse.Namespace) -> Path:
    """--interpolate N: walks from N samples, in turn to that of 256 others which looks most alike and the least."""
    generator, config, device, folder = opened(args, "interpolate")
    begin = normal(args.interpolate, config["latent"]).to(device)
    others = normal(256, config["latent"]).to(device)
    distance = torch.cdist(generator(begin).flatten(1), generator(others).flatten(1))
    end = others[torch.stack([distance.argmin(dim=1), distance.argmax(dim=1)], dim=1).flatten()]
    begin = begin.repeat_interleave(2, dim=0)
    walk = torch.stack([generator(slerp(begin, end, step / 22)) for step in range(23)], dim=1)
    common.save_strip(walk[:, ::2], folder / "walks.png")
    for count, frame in enumerate(walk.unbind(dim=1)):
        common.save_grid(frame, folder / f"frames/{count:02d}.png")
    frames = sorted(folder.glob("frames/*.png"))
    common.save_gif(frames + frames[-2:0:-1], folder / "walks.gif", hold=120)  # there and back
    return folder


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(argv)
    try:
        use = sample if args.sample else interpolate if args.interpolate else train
        folder = use(args)
        if ranks()[0] == 0:
            print(f"{SCRIPT}: all is in {folder}")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{SCRIPT}.py: error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
