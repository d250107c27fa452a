r"""EBGAN: Energy-Based Generative Adversarial Networks (Zhao, Mathieu and LeCun, 2016, arXiv:1609.03126).

The discriminator D is an autoencoder, and its reconstruction error is the energy of an image. D learns to give real
images x a low energy, and to raise the energy of generated images G(z) up to a margin m. The generator G learns to make
images of low energy. The pull-away term f_PT keeps the codes S = Enc(G(z)) of a batch apart, so that images vary:

    D(v)    = ||Dec(Enc(v)) - v||                                    the energy of one image v, an L2 norm over pixels
    L_D     = D(x) + [m - D(G(z))]^+                                 the loss of D, averaged over the batch
    L_G     = D(G(z)) + w f_PT(S)                                    the loss of G, averaged over the batch
    f_PT(S) = 1 / (N (N - 1)) sum_i sum_{j != i} cos(S_i, S_j)^2     mean over the pairs of N codes

    python ebgan.py                                                # drawn digits, 32x32
    python ebgan.py --data photos --image-size 64                  # a folder of your own pictures
    python ebgan.py --resume                                       # continue the newest run
    python ebgan.py --init-from runs/ebgan-001 --data photos       # start a new run from the weights of another
    python ebgan.py --sample 1000; python ebgan.py --interpolate 8 # use the generator of the newest run
    python ebgan.py --data mnist --margin 16 --d-width 2 --d-steps 5 # a narrow D, updated more often than G
    torchrun --nproc_per_node 2 ebgan.py --data celeba --image-size 64 --layers paper --g-width 1024 --d-width 64 \
        --latent 100 --batch-size 128 --margin 20 --pt-weight 0.1 --lr 2e-4 --betas 0.5 0.999 \
        --steps 100000                                             # the paper's settings, 64 images per GPU

Measured over three seeds: with --data mnist and 5,000 digits, samples have 0.73 times the Frechet distance of 500 real
digits, precision 0.75 and recall 0.74. A run took 8 to 11 minutes on one core of an AMD EPYC.
"""

import argparse
import copy
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common

SCRIPT = "ebgan"  # the name in its checkpoints, whatever this file is called
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes (ranks) that torchrun has started
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # this process

# ---- networks -------------------------------------------------------------------------------------------------------


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


def decoder(widths: list[int], channels: int, layers: str, norm: type[nn.Module]) -> nn.Sequential:
    """Feature maps of widths[0] channels to images. Every layer doubles the size, and the last has no batch norm."""
    if layers not in ("fused", "paper"):
        raise ValueError(f"layers must be 'fused' or 'paper', not {layers!r}")
    blocks = []
    for inputs, outputs in itertools.pairwise([*widths, channels]):
        up = UpConv(inputs, outputs) if layers == "fused" else nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        blocks += [up, norm(outputs), nn.ReLU()]
    return nn.Sequential(*blocks[:-2])


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in [-1, 1].

    A linear layer, which is the paper's transposed convolution of a single pixel, makes [N, width, 4, 4]. Every
    following layer doubles the size and halves the channels. Width 1024 at 64x64 is the paper's 1024-512-256-128.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, layers: str, norm: type[nn.Module]):
        super().__init__()
        widths = [max(1, width // 2**level) for level in range(int(math.log2(size // 4)))]
        self.first = nn.Linear(latent, width * 4 * 4)
        self.norm = norm(width)
        self.decoder = decoder(widths, channels, layers, norm)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.norm(x).relu()).tanh()


class Discriminator(nn.Module):
    """Autoencoder: images [N, channels, size, size] to their reconstructions and their codes [N, ...].

    Every layer halves the size and doubles the channels, at least three times and down to 8x8. Width 64 at 64x64 is
    the paper's 64-128-256. A linear layer makes the code. With ``layers`` "paper" the last feature maps are the code.
    """

    def __init__(self, code: int, width: int, size: int, channels: int, layers: str, norm: type[nn.Module]):
        super().__init__()
        widths = [width * 2**level for level in range(max(3, int(math.log2(size // 8))))]
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
    """D(v) = ||Dec(Enc(v)) - v|| (section 2.3): [N, ...] to energies [N]. Raises ValueError if the shapes differ."""
    if images.shape != reconstructions.shape:
        raise ValueError(f"shapes differ: {tuple(images.shape)} and {tuple(reconstructions.shape)}")
    return (reconstructions - images).flatten(1).norm(dim=1)


def discriminator_loss(real_energy: Tensor, fake_energy: Tensor, margin: float) -> Tensor:
    """L_D = D(x) + [m - D(G(z))]^+ (eq. 1), the mean over energies [N]: a scalar. Each image has its own hinge."""
    return real_energy.mean() + (margin - fake_energy).relu().mean()


def pull_away_term(codes: Tensor) -> Tensor:
    """f_PT, the mean of cos(S_i, S_j)^2 over i != j (EBGAN, section 2.4): N > 1 codes [N, ...] to a scalar."""
    if codes.ndim < 2 or len(codes) < 2:
        raise ValueError(f"not codes [N, ...] with N > 1: {tuple(codes.shape)}")
    codes = codes.flatten(1).to(torch.promote_types(codes.dtype, torch.float32))  # in fp16 the sum would overflow
    directions = F.normalize(codes, dim=1)
    squares = (directions @ directions.T).square()
    return (squares.sum() - squares.trace()) / (len(codes) * (len(codes) - 1))


def generator_loss(fake_energy: Tensor, codes: Tensor, pt_weight: float) -> Tensor:
    """L_G = D(G(z)) + w f_PT(S) (eq. 2), from energies [N] and codes [N, ...] of generated images: a scalar."""
    return fake_energy.mean() + pt_weight * pull_away_term(codes)


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

METRICS = ("energy_real", "energy_fake", "loss_d", "loss_g", "pull_away")  # D(x), D(G(z)), L_D, L_G, f_PT
PANELS = [("energy_real", "energy_fake"), ("loss_d", "loss_g"), ("pull_away",), ("swd", "diversity")]
# A saved network fits these settings only:
NETWORK_FLAGS = ("image_size", "channels", "layers", "g_width", "d_width", "latent", "code", "batch_norm")


def uniform(count: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
    """z [count, latent], uniform in [-1, 1]."""
    return torch.rand(count, latent, device=device) * 2 - 1


def build(network: type[nn.Module], settings: dict) -> nn.Module:
    """Make the Generator or the Discriminator, in the memory layout in which convolutions are fastest."""
    if network is Generator:
        vector, width = settings["latent"], settings["g_width"]
    else:
        vector, width = settings["code"], settings["d_width"]
    norm = nn.BatchNorm2d if settings["batch_norm"] else nn.Identity
    built = network(vector, width, settings["image_size"], settings["channels"], settings["layers"], norm)
    return built.to(memory_format=torch.channels_last)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, and so faster than in fp32."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def train(args: argparse.Namespace) -> Path:
    """Train up to step --steps, from the start or from a checkpoint. Returns the run's folder."""
    device = start(args)
    fixed_z = uniform(256, args.latent).to(device)  # the same z in all sample pictures
    if RANK > 0:
        dist.barrier()  # rank 0 decodes the pictures first, and the others find them in the cache
    images = common.load_images(args.data, args.image_size, args.channels, args.data_root, quiet=RANK > 0)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    args.channels = images.shape[1]
    args.margin = args.margin or math.sqrt(images[0].numel()) / 4
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    batch_size = args.batch_size // WORLD  # this rank's share
    batches = common.Batches(images, batch_size, device, args.hflip, per_step=args.d_steps)
    reference = common.reference_images(images, 256).to(device)  # real images to compare samples with

    generator = build(Generator, vars(args)).to(device)
    discriminator = build(Discriminator, vars(args)).to(device)
    averaged = copy.deepcopy(generator).eval().requires_grad_(False)  # makes all the samples
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    ema_weight = torch.ones((), device=device)
    options = dict(betas=tuple(args.betas), fused=True, capturable=device.type == "cuda")
    adam_g = torch.optim.Adam(g_parameters, args.lr[0], **options)
    adam_d = torch.optim.Adam(d_parameters, args.lr[-1], **options)
    networks = dict(generator=generator, averaged=averaged, discriminator=discriminator)
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

    def update() -> Tensor:
        """One step: --d-steps updates of D and --g-steps of G, without waiting for the device. Returns the METRICS."""
        for turn in range(max(args.d_steps, args.g_steps)):
            z = uniform(batch_size, args.latent, device)
            # One pass of the samples through D serves both losses. G may step first: that leaves D as it is, and
            # ``inputs`` keeps the gradient of L_D out of G.
            with autocast:
                fake = generator(z).to(z.dtype)  # in bf16 the energies would be rounded
                reconstructions, codes = discriminator(fake)
                fake_energy = energy(fake, reconstructions)
            if turn < args.g_steps:
                L_G = generator_loss(fake_energy, codes, args.pt_weight)
                adam_g.zero_grad()
                L_G.backward(inputs=g_parameters, retain_graph=True)
                all_reduce_mean([parameter.grad for parameter in g_parameters])
                adam_g.step()
            if turn < args.d_steps:
                x = batches(turn)
                with autocast:
                    real_energy = energy(x, discriminator(x)[0])
                L_D = discriminator_loss(real_energy, fake_energy, args.margin)
                adam_d.zero_grad()
                L_D.backward(inputs=d_parameters)
                all_reduce_mean([parameter.grad for parameter in d_parameters])
                adam_d.step()
        update_ema(averaged, generator, ema_weight)
        return torch.stack([real_energy.mean(), fake_energy.mean(), L_D, L_G, pull_away_term(codes)]).detach()

    @torch.no_grad()
    def show(step: int) -> None:
        """Write the table, the chart and the pictures."""
        fake, real = averaged(fixed_z[:64]), reference[:16]
        samples = fake[:len(real)]
        discriminator.eval()
        reconstructions = torch.cat([real, discriminator(real)[0], samples, discriminator(samples)[0]])
        discriminator.train()
        common.attempt(common.save_table, rows, folder / "metrics.csv")
        common.attempt(common.save_chart, rows, folder / "curves.png", PANELS)
        common.attempt(common.save_grid, reference[:64], folder / "samples/real.png")
        common.attempt(common.save_grid, fake, folder / f"samples/{step:06d}.png")
        common.attempt(common.save_grid, reconstructions, folder / f"reconstructions/{step:06d}.png", len(real))
        if step == args.steps:
            common.attempt(common.save_gif, sorted(folder.glob("samples/[0-9]*.png")), folder / "training.gif")

    say(f"{folder}: step {done} to {args.steps}")
    if RANK == 0 and done > 0:
        show(done)  # in case the run was killed between a checkpoint and its pictures
    step_once = cuda_graph(update) if args.graph and device.type == "cuda" else update
    total = torch.zeros(len(METRICS), device=device)
    first = last_row = done
    started = time.perf_counter()
    for step in range(first, args.steps):
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)  # so a resumed run draws the same numbers
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
        z = uniform(min(256, args.sample - first), settings["latent"])
        common.save_pngs(generator(z.to(device)), folder, first)
    return folder


def interpolate(args: argparse.Namespace) -> Path:
    """--interpolate N: write N straight walks between two random z, one per row."""
    device = start(args)
    generator, settings = load_generator(args.out, device)
    folder = common.next_folder(Path(args.out, "interpolate"))
    begin, end = uniform(2 * args.interpolate, settings["latent"]).to(device).chunk(2)
    walk = [generator(torch.lerp(begin, end, step / 11)) for step in range(12)]
    common.save_grid(torch.stack(walk, dim=1), folder / "walks.png")
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------

# These flags must be positive:
POSITIVE = ("batch_size", "steps", "every", "d_steps", "g_steps", "g_width", "d_width", "latent", "code", "sample",
          "interpolate")
# These flags are not settings of a run:
NOT_SETTINGS = dict(out=None, init_from=None, resume=False, sample=None, interpolate=None)


def make_parser() -> argparse.ArgumentParser:
    """Define the flags. Those in NOT_SETTINGS get their defaults from there."""
    path = os.path.expanduser
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", argument_default=argparse.SUPPRESS,
                                     description="Train EBGAN, or use a generator that it has trained.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, default="digits", help=f"{', '.join(common.NAMES)}, or a folder of pictures")
    add("--data-root", type=path, default="data", help="folder for downloads and decoded pictures")
    add("--image-size", type=int, choices=(16, 32, 64, 128, 256), default=32, help="height and width in pixels")
    add("--channels", type=int, choices=(0, 1, 3), default=0, help="1 for grey, 3 for RGB, 0 for what the data are")
    add("--hflip", action=switch, default=False, help="flip half of the real images left to right")
    add("--batch-size", type=int, default=64, help="images in a batch, counting all ranks")
    add("--steps", type=int, default=5000, help="stop at this step")
    add("--lr", type=float, nargs="+", default=[1e-3], help="Adam's learning rate, or two: for G and for D")
    add("--betas", type=float, nargs=2, default=[0.5, 0.999], metavar="BETA", help="Adam's betas")
    add("--ema", type=float, default=0.999, help="decay of the averaged generator; 0 for no averaging")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 where the hardware has it")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--graph", action=switch, default=True, help="on a GPU, replay the step as a CUDA graph")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--every", type=int, default=100, help="steps between rows of metrics.csv, pictures and checkpoints")
    add("--keep", action=switch, default=False, help="keep a numbered copy of every checkpoint, for --init-from")
    add("--margin", type=float, default=0.0, help="m, the energy that D learns to give samples; 0 for sqrt(C H W) / 4")
    add("--pt-weight", type=float, default=0.1, help="w, the weight of the pull-away term; 0 for none")
    add("--d-steps", type=int, default=1, help="updates of D in a step")
    add("--g-steps", type=int, default=1, help="updates of G in a step")
    add("--layers", choices=("fused", "paper"), default="fused", help="paper for the paper's layers, without --code")
    add("--g-width", type=int, default=256, help="channels of G's first layer; every following layer has half as many")
    add("--d-width", type=int, default=32, help="channels of D's first layer; every following layer has twice as many")
    add("--latent", type=int, default=64, help="length of z")
    add("--code", type=int, default=32, help="length of D's code")
    add("--batch-norm", action=switch, default=True, help="batch norm in both networks")
    add("--out", type=path, help="folder of the run (default: a new one, or to resume or use, the newest)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--init-from", type=path, metavar="RUN", help="start a new run from the weights of another run or checkpoint")
    add("--resume", action="store_true", default=argparse.SUPPRESS, help="continue a run with its settings")
    add("--sample", type=int, metavar="N", help="write N samples of a trained generator")
    add("--interpolate", type=int, metavar="N", help="write N walks between random z")
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
    if args.batch_size < 2 * WORLD:
        parser.error(f"argument --batch-size: {args.batch_size} is fewer than 2 images for each rank")
    if len(args.lr) > 2:
        parser.error("argument --lr: takes one rate, or two: for G and for D")
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

# `uv run ebgan.py` installs what the script needs.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "pillow>=10.1"]
# ///
