"""EBGAN: Energy-Based Generative Adversarial Networks (Zhao, Mathieu and LeCun, 2016, arXiv:1609.03126).

The discriminator D is an auto-encoder, and its reconstruction error is the energy of an image. D learns low energy for
real images x and energy up to a margin m for generated ones G(z); the generator G learns to make images of low energy.
The pull-away term f_PT keeps the codes S = Enc(G(z)) of a batch apart, and so the images varied (EBGAN-PT):

    D(v)    = ||Dec(Enc(v)) - v||                              energy: L2 norm over the pixels, in [-1, 1], per image
    L_D     = D(x) + [m - D(G(z))]^+                           per image, then the mean; tends to m at the equilibrium
    L_G     = D(G(z)) + w f_PT(S)
    f_PT(S) = 1 / (N (N - 1)) sum_i sum_{j != i} cos(S_i, S_j)^2

    python ebgan.py --margin 8                                     # drawn digits, 32x32
    python ebgan.py --data photos --image-size 64                  # a folder of your own pictures
    python ebgan.py --resume                                       # go on with the newest run
    python ebgan.py --sample 1000; python ebgan.py --interpolate 8 # use what it has learnt
    torchrun --nproc_per_node 8 ebgan.py --data celeba --image-size 64 --layers paper --g-width 1024 --d-width 64 \\
        --latent 100 --steps 200000                                # the paper's networks, on eight GPUs

Measured: the default takes 4 minutes on two cores; a classifier finds every digit in at least 4 % of the samples. From
5,000 MNIST digits, samples are 3.8 times as far as held-out digits are (Frechet distance of its features).
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ---- arguments ------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; exits with one clear line where a flag is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits, faces, fish, mnist, fashion, cifar10, celeba, or a folder of "
        "pictures")
    add("--data-root", default="data", help="folder for downloads and the picture cache")
    add("--image-size", type=int, choices=(16, 32, 64, 128), default=32, help="height and width, pixels")
    add("--hflip", action="store_true", help="mirror every second real image")
    add("--batch-size", type=number(int, 2), default=64, help="images in a batch, over all ranks")
    add("--steps", type=number(int, 1), default=3000, help="steps of the whole run, each of --d-steps and --g-steps "
        "updates")
    add("--lr", type=number(float, 1e-9, 1), default=1e-3, help="Adam's learning rate, both networks")
    add("--margin", type=number(float, 0), help="m, on energies of pixels in [-1, 1] (default: sqrt(C H W) / 4, which "
        "is 8 for 32x32 grey)")
    add("--pt-weight", type=number(float, 0), default=0.1, help="weight w of the pull-away term; 0: none")
    add("--d-steps", type=number(int, 1), default=1, help="discriminator updates in a step")
    add("--g-steps", type=number(int, 1), default=1, help="generator updates in a step")
    add("--layers", choices=("fused", "paper"), default="fused", help="up-sampling + convolution and a linear code, or "
        "the paper's transposed convolutions and a code of feature maps")
    add("--g-width", type=number(int, 1), default=256, help="channels of G's first layer, halved by every next one")
    add("--d-width", type=number(int, 1), default=32, help="channels of D's first layer, doubled by every next one")
    add("--latent", type=number(int, 1), default=64, help="length of z")
    add("--code", type=number(int, 1), default=32, help="length of D's linear code")
    add("--no-batch-norm", action="store_true", help="leave it out (several ranks on a CPU have one each)")
    add("--seed", type=number(int, 0), default=0, help="seed of weights, batches and noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the networks")
    add("--no-graph", action="store_true", help="no CUDA graph: run every step eagerly")
    add("--log-every", type=number(int, 1), default=100, help="steps between rows of metrics.csv")
    add("--sample-every", type=number(int, 1), default=100, help="steps between sample pictures")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--keep", action="store_true", help="keep a numbered copy of every checkpoint")
    add("--out", help="run folder (default: the next free runs/ebgan-001); with --sample and the like, their folder")
    add("--checkpoint", metavar="FILE", help="what the following take instead of the newest run's checkpoint.pt")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--resume", action="store_true", help="go on with the newest run, or that of --out or --checkpoint")
    instead("--sample", type=number(int, 1), metavar="N", help="train nothing, write N samples as numbered PNGs")
    instead("--interpolate", type=number(int, 1), metavar="N", help="train nothing, write N walks between random z")
    return settings(parser, argv)


# ---- networks -------------------------------------------------------------------------------------------------------


class UpConv(nn.Conv2d):
    """Nearest-neighbour 2x up-sampling and 3x3 convolution, as one transposed convolution.

    Up-sampling repeats pixels, so the products of the 3x3 kernel that meet the same input pixel can be summed once,
    beforehand: into a 4x4 kernel of stride 2, the sum of the 3x3 kernel's four one-pixel shifts. Same result to
    rounding, 2.25 times fewer multiplications.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.pad(self.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
        return F.conv_transpose2d(x, 4 * F.avg_pool2d(kernel, 2, 1), self.bias, stride=2, padding=1)


def decoder(widths: list[int], channels: int, layers: str, norm: type[nn.Module]) -> nn.Sequential:
    """Feature maps of widths[0] to images: every layer doubles the size. The last has no batch norm."""
    blocks = []
    for inputs, outputs in itertools.pairwise([*widths, channels]):
        up = UpConv(inputs, outputs) if layers == "fused" else nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        blocks += [up, norm(outputs), nn.ReLU()]
    return nn.Sequential(*blocks[:-2])


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in (-1, 1).

    A linear layer to [N, width, 4, 4] (the paper's transposed convolution from 1x1), then half as many channels at
    every doubling of the size; with width 1024 at 64x64 the paper's 1024-512-256-128.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, layers: str, norm: type[nn.Module]):
        super().__init__()
        widths = [max(1, width >> level) for level in range(int(math.log2(size // 4)))]
        self.first = nn.Linear(latent, width * 4 * 4)
        self.norm = norm(width)
        self.decoder = decoder(widths, channels, layers, norm)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.norm(x).relu()).tanh()


class Discriminator(nn.Module):
    """Auto-encoder: images [N, channels, size, size] to their reconstructions and codes [N, ...].

    Every layer halves the size and doubles the channels, down to 8x8 (4x4 of 32x32, 2x2 of 16x16); with width 64 at
    64x64 the paper's 64-128-256. The code is linear, or with ``layers`` "paper" the last feature maps.
    """

    def __init__(self, code: int, width: int, size: int, channels: int, layers: str, norm: type[nn.Module]):
        super().__init__()
        widths = [width << level for level in range(max(3, int(math.log2(size // 8))))]
        blocks = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs in itertools.pairwise(widths):
            blocks += [nn.Conv2d(inputs, outputs, 4, 2, 1), norm(outputs), nn.LeakyReLU(0.2)]
        maps = (widths[-1], size >> len(widths), size >> len(widths))
        self.first = nn.Sequential()
        if layers == "fused":
            blocks += [nn.Flatten(), nn.Linear(math.prod(maps), code)]
            self.first.extend([nn.Linear(code, math.prod(maps)), nn.Unflatten(1, maps), norm(maps[0]), nn.ReLU()])
        self.encoder = nn.Sequential(*blocks)
        self.decoder = decoder(widths[::-1], channels, layers, norm)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(images)
        return self.decoder(self.first(code).contiguous(memory_format=torch.channels_last)), code


# ---- losses ---------------------------------------------------------------------------------------------------------


def energy(images: Tensor, reconstructions: Tensor) -> Tensor:
    """D(v) = ||Dec(Enc(v)) - v||: one L2 norm per image; both arguments [N, C, H, W], the result [N] (eq. 1)."""
    return (reconstructions - images).flatten(1).norm(dim=1)


def discriminator_loss(real_energy: Tensor, fake_energy: Tensor, margin: float) -> Tensor:
    """L_D = D(x) + [m - D(G(z))]^+, the hinge on each energy [N] by itself, then means: a scalar (eq. 1)."""
    return real_energy.mean() + (margin - fake_energy).relu().mean()


def pull_away_term(codes: Tensor) -> Tensor:
    """f_PT, the mean of cos(S_i, S_j)^2 over the pairs i != j of codes [N, ...]: a scalar from 0 to 1 (eq. 4)."""
    directions = F.normalize(codes.flatten(1), dim=1)
    squares = (directions @ directions.T).square()
    return (squares.sum() - squares.trace()) / (len(codes) * (len(codes) - 1))


def generator_loss(fake_energy: Tensor, codes: Tensor, pt_weight: float) -> Tensor:
    """L_G = D(G(z)) + w f_PT(S), from energies [N] and codes [N, ...] of generated images: a scalar (eq. 2)."""
    return fake_energy.mean() + pt_weight * pull_away_term(codes)


def collapse(rows: list[dict[str, float]]) -> str | None:
    """The sign of a collapse that the rows of metrics.csv, the newest last, show, and what may help; or None.

    A run may well begin with the first two, so they count where a row before had not that sign, or from step 300 on.
    """
    *past, row = rows
    late = row["step"] >= 300
    if row["diversity"] < 0.3 and (late or any(r["diversity"] > 0.5 for r in past)):
        return "the samples are becoming one image: try a --margin above D(x), a higher --pt-weight or a lower --lr"
    if row["energy_fake"] < 0.8 * row["energy_real"] and (
            late or any(r["energy_fake"] > r["energy_real"] for r in past)):
        return "D reconstructs samples better than real images: try a --margin above D(x) or a lower --lr"
    if past and all(row[name] > 2 * min(r[name] for r in past) for name in ("energy_real", "energy_fake")):
        return "D no longer reconstructs anything, both energies have doubled: try a lower --margin or a lower --lr"
    return None


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


def uniform(count: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
    """z [count, latent], uniform in [-1, 1]."""
    return torch.rand(count, latent, device=device) * 2 - 1


def build(network: type[nn.Module], config: dict) -> nn.Module:
    """The Generator or Discriminator of these settings, laid out as convolutions are fastest."""
    vector, width = ("latent", "g_width") if network is Generator else ("code", "d_width")
    norm = nn.Identity if config["no_batch_norm"] else nn.BatchNorm2d
    built = network(config[vector], config[width], config["image_size"], config["channels"], config["layers"], norm)
    return built.to(memory_format=torch.channels_last)


def gathered(codes: Tensor) -> Tensor:
    """All ranks' codes. The gradient reaches this rank's, times the number of ranks: the mean is one process's."""
    rank, world = ranks()
    if world == 1:
        return codes
    values = codes.detach().flatten(1).contiguous()
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values)
    parts[rank] = values + world * (codes.flatten(1) - values)
    return torch.cat(parts)


def train(args: argparse.Namespace) -> Path:
    """Trains as the settings of ``parse_arguments`` say; returns the run's folder. Raises ValueError, OSError."""
    device = start(args)
    images = in_turn(lambda: common.load_images(args.data, args.image_size, root=args.data_root))
    batches = common.Batches(images, args.batch_size, device, args.hflip, *ranks(), per_step=args.d_steps)
    args.channels = images.shape[1]
    args.margin = math.sqrt(images[0].numel()) / 4 if args.margin is None else args.margin
    generator, discriminator = build(Generator, vars(args)).to(device), build(Discriminator, vars(args)).to(device)
    if ranks()[1] > 1 and device.type == "cuda":  # on a CPU there is none over all ranks: each normalises its share
        generator, discriminator = map(nn.SyncBatchNorm.convert_sync_batchnorm, (generator, discriminator))
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    adam = dict(lr=args.lr, betas=(0.5, 0.999), fused=True, capturable=device.type == "cuda")
    g_optimizer, d_optimizer = torch.optim.Adam(g_parameters, **adam), torch.optim.Adam(d_parameters, **adam)
    fixed_z = uniform(256, args.latent, device)
    state = dict(generator=generator, discriminator=discriminator, g_optimizer=g_optimizer, d_optimizer=d_optimizer,
                 fixed_z=fixed_z, step=torch.tensor(0))

    def step() -> dict[str, Tensor]:
        generator.train(), discriminator.train()
        for turn in range(max(args.d_steps, args.g_steps)):
            z = mine(uniform(args.batch_size, args.latent, device))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                fake = generator(z).to(z.dtype)
                leaf = fake.detach().requires_grad_()
                reconstructions, codes = discriminator(leaf)  # for the losses of both networks
            codes, fake_energy = gathered(codes.to(z.dtype)), energy(leaf, reconstructions)
            if turn < args.g_steps:
                loss_g = generator_loss(fake_energy, codes, args.pt_weight)
                (image_gradient,) = torch.autograd.grad(loss_g, leaf, retain_graph=True)
                update(g_optimizer, torch.autograd.grad(fake, g_parameters, image_gradient))
            if turn < args.d_steps:
                real = batches(turn)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    reconstructions, _ = discriminator(real)
                real_energy = energy(real, reconstructions)
                loss_d = discriminator_loss(real_energy, fake_energy, args.margin)
                update(d_optimizer, torch.autograd.grad(loss_d, d_parameters))
        names = ("energy_real", "energy_fake", "loss_d", "loss_g", "pull_away")
        values = real_energy.mean(), fake_energy.mean(), loss_d, loss_g, pull_away_term(codes)
        return dict(zip(names, average(value.detach() for value in values)))

    shown = common.normalise(images[torch.linspace(0, len(images) - 1, 256).long()].to(device))
    recent: list[dict[str, float]] = []

    @torch.no_grad()
    def measure(row: dict[str, float]) -> dict[str, float]:
        fake = generator.eval()(fixed_z)
        more = dict(swd=common.sliced_wasserstein(fake, shown), diversity=common.diversity_ratio(fake, shown))
        recent.append(row | more | dict(step=int(state["step"])))
        if (warning := collapse(recent)) and warning != collapse(recent[:-1]):
            print(f"{SCRIPT}: warning: {warning}", file=sys.stderr, flush=True)
        return more

    @torch.no_grad()
    def dump(folder: Path, now: int) -> None:
        fake, real = generator.eval()(fixed_z[:64]), shown[:16]
        common.save_grid(fake, folder / f"samples/{now:06d}.png")
        discriminator.eval()
        rows = [real, discriminator(real)[0], fake[:16], discriminator(fake[:16])[0]]
        common.save_grid(torch.cat(rows), folder / f"reconstructions/{now:06d}.png", columns=16)
        if now == 0:
            common.save_grid(shown[:64], folder / "samples/real.png")
            return
        panels = [("energy_real", "energy_fake"), ("loss_d", "loss_g"), ("pull_away",), ("swd", "diversity")]
        common.save_chart(folder / "metrics.csv", folder / "curves.png", panels)
        if now == args.steps:
            common.save_gif(sorted(folder.glob("samples/0*.png")), folder / "training.gif")

    return loop(args, state, device, step, batches.refill, measure, dump)


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[Generator, dict]:
    """A checkpoint's trained generator, for z [N, latent], and the run's settings. Raises OSError, ValueError."""
    content = read_checkpoint(path, device)
    generator = build(Generator, content["config"]).to(device)
    generator.load_state_dict(content["state"]["generator"])
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
        z = uniform(min(256, args.sample - first), config["latent"])
        common.save_pngs(generator(z.to(device)), folder, first)
    return folder


def interpolate(args: argparse.Namespace) -> Path:
    """--interpolate N: N straight walks between two random z, a row each."""
    generator, config, device, folder = opened(args, "interpolate")
    begin, end = uniform(2 * args.interpolate, config["latent"]).to(device).chunk(2)
    walk = [generator(torch.lerp(begin, end, step / 11)) for step in range(12)]
    common.save_strip(torch.stack(walk, dim=1), folder / "walks.png")
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
