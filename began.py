"""BEGAN: Boundary Equilibrium Generative Adversarial Networks (Berthelot, Schumm and Metz, 2017, arXiv:1703.10717).

The discriminator D is an auto-encoder. It learns to reconstruct real images x and not the generated ones G(z); the
generator G learns to make images that D reconstructs well. A number k_t in [0, 1] keeps the two in balance:

    L(v)    = mean |v - D(v)|^eta                                          reconstruction loss of images v
    L_D     = L(x) - k_t L(G(z))           L_G = L(G(z))                   losses of D and of G
    k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1)            holds L(G(z)) / L(x) at gamma
    M       = L(x) + |gamma L(x) - L(G(z))|                                measure of convergence, steers the rate

    python began.py --gamma 0.5                                    # drawn faces, 32x32
    python began.py --data photos --image-size 64                  # a folder of your own pictures
    python began.py --resume                                       # go on with the newest run
    python began.py --sample 1000; python began.py --interpolate 8 # use what it has learnt
    torchrun --nproc_per_node 8 began.py --data celeba --image-size 128 --width 128 --lr 1e-4 --lambda-k 0.001 \\
        --eta 1 --steps 200000                                     # the paper's settings, on eight GPUs

Measured: L(G(z)) / L(x) stays within 0.02 of gamma at 0.3, 0.5 and 0.7, and diversity rises with it: 0.53, 0.69, 0.73.
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
    add("--data", default="faces", help="digits, faces, fish, mnist, fashion, cifar10, celeba, or a folder of pictures")
    add("--data-root", default="data", help="folder for downloads and the picture cache")
    add("--image-size", type=int, choices=(16, 32, 64, 128, 256), default=32, help="height and width, pixels")
    add("--hflip", action="store_true", help="mirror every second real image")
    add("--batch-size", type=number(int, 1), default=16, help="images in a batch, over all ranks")
    add("--steps", type=number(int, 1), default=3000, help="generator updates of the whole run")
    add("--lr", type=number(float, 1e-9, 1), default=4e-4, help="Adam's first learning rate, both networks")
    add("--lr-min", type=number(float, 0, 1), default=2e-5, help="floor under the halving of the rate")
    add("--lr-patience", type=number(int, 1), default=150, help="steps without a better M until the rate halves")
    add("--gamma", type=number(float, 0, 1), default=0.5, help="diversity ratio L(G(z)) / L(x); paper: 0.3 to 0.7")
    add("--lambda-k", type=number(float, 0, 1), default=0.2, help="rate of k_t; paper: 0.001, for long runs")
    add("--eta", type=int, choices=(1, 2), default=2, help="norm of the reconstruction loss")
    add("--width", type=number(int, 1), default=32, help="the paper's n: channels of the first layer")
    add("--latent", type=number(int, 1), default=64, help="length of z and of D's code")
    add("--skip", action=argparse.BooleanOptionalAction, default=True, help="decoders' skip connections")
    add("--residual-steps", type=number(int, 0), default=0, help="steps of vanishing residuals (paper: 16000); 0: none")
    add("--seed", type=number(int, 0), default=0, help="seed of weights, batches and noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the networks")
    add("--no-graph", action="store_true", help="no CUDA graph: run every step eagerly")
    add("--log-every", type=number(int, 1), default=100, help="steps between rows of metrics.csv")
    add("--sample-every", type=number(int, 1), default=100, help="steps between sample pictures")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--keep", action="store_true", help="keep a numbered copy of every checkpoint")
    add("--out", help="run folder (default: the next free runs/began-001); with --sample and the like, their folder")
    add("--checkpoint", metavar="FILE", help="what the following take instead of the newest run's checkpoint.pt")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--resume", action="store_true", help="go on with the newest run, or that of --out or --checkpoint")
    instead("--sample", type=number(int, 1), metavar="N", help="train nothing, write N samples as numbered PNGs")
    instead("--interpolate", type=number(int, 1), metavar="N", help="train nothing, write N walks between random z")
    instead("--embed", metavar="FOLDER", help="train nothing, find z for a folder's pictures and walk between them")
    return settings(parser, argv)


# ---- networks -------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """3x3 convolution and ELU. ``carry`` mixes the input back in: carry x + (1 - carry) f(x), section 3.5."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor, carry: Tensor | None = None) -> Tensor:
        y = F.elu(super().forward(x), inplace=True)
        return y if carry is None else torch.lerp(y, x, carry)


class UpConv(nn.Conv2d):
    """Nearest-neighbour 2x up-sampling, 3x3 convolution and ELU, as one transposed convolution.

    Up-sampling repeats pixels, so the products of the 3x3 kernel that meet the same input pixel can be summed once,
    beforehand: into a 4x4 kernel of stride 2, the sum of the 3x3 kernel's four one-pixel shifts. Same result to
    rounding, 2.25 times fewer multiplications.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.pad(self.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
        y = F.conv_transpose2d(x, 4 * F.avg_pool2d(kernel, 2, 1), self.bias, stride=2, padding=1)
        return F.elu(y, inplace=True)


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in [-2, 2]; also D's decoder.

    A linear layer to h0 [N, width, 8, 8], then two convolutions at every resolution. ``skip`` concatenates h0,
    up-sampled, after every up-sampling (here before it: the two commute). ``residual`` gives successive layers of
    one size a vanishing residual, whose weight is the buffer ``carry``. The paper does not say how images end. Here by
    2 tanh(x / 2), hardly bent from -1 to 1: without a bound D may drive the error of the fakes, which it wants large,
    to any height; and a tanh that reaches black and white only at infinity leaves G grey on such data.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, skip: bool = False, residual: bool = False):
        super().__init__()
        self.skip = skip
        self.register_buffer("carry", torch.ones(()) if residual else None)
        levels = int(math.log2(size // 8))
        self.first = nn.Linear(latent, width * 8 * 8)
        self.up = nn.ModuleList(UpConv(2 * width if skip else width, width) for _ in range(levels))
        self.conv = nn.ModuleList(Conv(width, width) for _ in range(levels + 2))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h0 = self.first(z).unflatten(1, (-1, 8, 8)).contiguous(memory_format=torch.channels_last)
        x = self.conv[1](self.conv[0](h0, self.carry), self.carry)
        for up, conv in zip(self.up, self.conv[2:]):
            x = torch.cat([x, F.interpolate(h0, size=x.shape[2:])], dim=1) if self.skip else x
            x = conv(up(x), self.carry)
        return 2 * (self.last(x) / 2).tanh()


class Discriminator(nn.Module):
    """Auto-encoder: images [N, channels, size, size] to reconstructions. Channels grow n, 2n, 3n, ... downwards."""

    def __init__(self, latent: int, width: int, size: int, channels: int, skip: bool = False, residual: bool = False):
        super().__init__()
        self.register_buffer("carry", torch.ones(()) if residual else None)
        widths = [width * (i + 1) for i in range(int(math.log2(size // 8)) + 1)]
        self.first = Conv(channels, width)
        self.conv = nn.ModuleList(nn.ModuleList([Conv(w, w), Conv(w, w)]) for w in widths)
        self.down = nn.ModuleList(Conv(a, b, stride=2) for a, b in itertools.pairwise(widths))
        self.code = nn.Linear(widths[-1] * 8 * 8, latent)  # no non-linearity before or after the code
        self.decoder = Generator(latent, width, size, channels, skip, residual)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for level, (one, two) in enumerate(self.conv):
            x = two(one(x, self.carry), self.carry)
            if level < len(self.down):
                x = self.down[level](x)
        return self.decoder(self.code(x.flatten(1)))


# ---- losses ---------------------------------------------------------------------------------------------------------


def reconstruction_loss(images: Tensor, reconstructions: Tensor, eta: float = 1.0) -> Tensor:
    """L(v) = |v - D(v)|^eta, the mean over everything; both arguments [N, C, H, W], the result a scalar (eq. 1)."""
    return (images - reconstructions).abs().pow(eta).mean()


def balance(k: Tensor, real_loss: Tensor, fake_loss: Tensor, gamma: float, lambda_k: float) -> tuple[Tensor, Tensor]:
    """Scalars k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1), M = L(x) + |gamma L(x) - L(G(z))|."""
    gap = gamma * real_loss - fake_loss
    return (k + lambda_k * gap).clamp(0, 1), real_loss + gap.abs()


def halve_on_stall(m: Tensor, lr: Tensor, smooth: Tensor, best: Tensor, waited: Tensor, patience: int, floor: float):
    """Halves ``lr`` when the running mean ``smooth`` of M has had no new minimum for ``patience`` steps.

    All are scalars on the device; lr, smooth, best and waited (start: inf, inf, 0) change in place. The floor is there
    because long runs are known to collapse once the rate has decayed away.
    """
    smooth.copy_(torch.where(smooth.isinf(), m, torch.lerp(smooth, m, 0.01)))
    waited.copy_(torch.where(smooth < best, 0, waited + 1))
    best.copy_(torch.minimum(smooth, best))
    lr.copy_(torch.where(waited < patience, lr, (lr / 2).clamp(min=floor)))
    waited.copy_(torch.where(waited < patience, waited, 0))


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
    shape = (config["latent"], config["width"], config["image_size"], config["channels"])
    built = network(*shape, config["skip"], config["residual_steps"] > 0)
    for parameter in built.parameters():  # the default shrinks the signal at every layer, and with it what z can do
        nn.init.orthogonal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return built.to(memory_format=torch.channels_last)


def train(args: argparse.Namespace) -> Path:
    """Trains as the settings of ``parse_arguments`` say; returns the run's folder. Raises ValueError, OSError."""
    device = start(args)
    images = in_turn(lambda: common.load_images(args.data, args.image_size, root=args.data_root))
    batches = common.Batches(images, args.batch_size, device, args.hflip, *ranks())
    args.channels = images.shape[1]
    generator, discriminator = build(Generator, vars(args)).to(device), build(Discriminator, vars(args)).to(device)
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    k, lr, smooth, best, waited = torch.tensor([0, args.lr, math.inf, math.inf, 0], device=device).unbind()
    # A memory of 100 steps: with 0.999, a burst of gradients makes steps many times lr, which D may not survive.
    adam = dict(lr=lr, betas=(0.5, 0.99), fused=True, capturable=device.type == "cuda")
    g_optimizer, d_optimizer = torch.optim.Adam(g_parameters, **adam), torch.optim.Adam(d_parameters, **adam)
    fixed_z = uniform(256, args.latent, device)
    state = dict(generator=generator, discriminator=discriminator, g_optimizer=g_optimizer, d_optimizer=d_optimizer,
                 k=k, lr=lr, smooth=smooth, best=best, waited=waited, fixed_z=fixed_z, step=torch.tensor(0))

    def step() -> dict[str, Tensor]:
        z = mine(uniform(args.batch_size, args.latent, device))
        real = batches()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            fake = generator(z)
            leaf = fake.detach().requires_grad_()
            real_loss = reconstruction_loss(real, discriminator(real), args.eta)
            fake_loss = reconstruction_loss(leaf, discriminator(leaf), args.eta)
        # L(G(z)) is in both losses, so one backward through D serves both: by D's parameters and by the images.
        real_gradients = torch.autograd.grad(real_loss, d_parameters)
        *fake_gradients, image_gradient = torch.autograd.grad(fake_loss, [*d_parameters, leaf])
        g_gradients = torch.autograd.grad(fake, g_parameters, image_gradient)
        update(d_optimizer, [r - k * f for r, f in zip(real_gradients, fake_gradients)])  # of L_D = L(x) - k L(G(z))
        update(g_optimizer, g_gradients)
        real_loss, fake_loss = average([real_loss.detach(), fake_loss.detach()])
        values = dict(loss_real=real_loss, loss_fake=fake_loss, ratio=fake_loss / real_loss, k=k.clone(), lr=lr.clone())
        k_next, m = balance(k, real_loss, fake_loss, args.gamma, args.lambda_k)
        k.copy_(k_next)
        halve_on_stall(m, lr, smooth, best, waited, args.lr_patience, args.lr_min)
        for network in (generator, discriminator, discriminator.decoder) if args.residual_steps else ():
            network.carry.sub_(1 / args.residual_steps).clamp_(min=0)
        return values | dict(m=m)

    shown = common.normalise(images[torch.linspace(0, len(images) - 1, 256).long()].to(device))

    @torch.no_grad()
    def measure(row: dict[str, float]) -> dict[str, float]:
        fake = generator(fixed_z).clamp(-1, 1)  # as pictures show it
        return dict(swd=common.sliced_wasserstein(fake, shown), diversity=common.diversity_ratio(fake, shown))

    @torch.no_grad()
    def dump(folder: Path, now: int) -> None:
        fake, real = generator(fixed_z[:64]), shown[:16]
        common.save_grid(fake, folder / f"samples/{now:06d}.png")
        rows = [real, discriminator(real), fake[:16], discriminator(fake[:16])]
        common.save_grid(torch.cat(rows), folder / f"reconstructions/{now:06d}.png", columns=16)
        if now == 0:
            common.save_grid(shown[:64], folder / "samples/real.png")
            return
        panels = [("loss_real", "loss_fake"), ("ratio",), ("k",), ("m",), ("lr",), ("swd", "diversity")]
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


def embed(args: argparse.Namespace) -> Path:
    """--embed FOLDER: z of least |x - G(z)| for its first 16 pictures and their mirror images, by Adam; then walks."""
    generator, config, device, folder = opened(args, "embed")
    source = os.path.join(args.embed, "")  # a folder, even where its name is a data set's
    pictures = common.load_images(source, config["image_size"], config["channels"], args.data_root)
    real = common.normalise(pictures[:16].to(device))
    targets = torch.cat([real, real.flip(3)])
    z = torch.zeros(len(targets), config["latent"], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.03)
    for _ in range(500):
        error = (generator(z) - targets).abs().mean()
        (z.grad,) = torch.autograd.grad(error * len(targets), z)  # every picture's own mean
        optimizer.step()
        z.data.clamp_(-1, 1)
    print(f"mean |x - G(z)| = {error.item():.4f} on pixels in [-1, 1]")
    found, mirrored = z.detach().chunk(2)
    for name, end, goal in ("pairs", found.roll(-1, 0), real.roll(-1, 0)), ("mirrors", mirrored, real.flip(3)):
        walk = [generator(torch.lerp(found, end, step / 7)) for step in range(8)]
        common.save_strip(torch.stack([real, *walk, goal], dim=1), folder / f"{name}.png")  # real pictures at both ends
    return folder


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(argv)
    try:
        use = sample if args.sample else interpolate if args.interpolate else embed if args.embed else train
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
