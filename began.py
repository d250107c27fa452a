r"""BEGAN: Boundary Equilibrium Generative Adversarial Networks (Berthelot, Schumm and Metz, 2017, arXiv:1703.10717).

The discriminator D is an autoencoder. It learns to reconstruct real images x and to fail on generated images G(z). The
generator G learns to make images that D reconstructs well. A number k_t in [0, 1] keeps the two in balance:

    L(v)    = mean |v - D(v)|^eta                                          how badly D reconstructs images v
    L_G     = L(G(z)) + w k_t f_PT         L_D = L(x) - k_t L_G            the losses of G and of D
    k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1)            holds L(G(z)) / L(x) at gamma
    M       = L(x) + |gamma L(x) - L(G(z))|                                falls as training converges

The paper has w = 0, and short runs then make few kinds of images. f_PT is the pull-away term of the EBGAN paper, the
mean squared cosine between the codes that D's encoder gives to the samples of a batch. G lowers it, which makes samples
vary, and D raises it. When D can no longer reconstruct the samples well, k_t falls, and the term fades.

    python began.py --gamma 0.5                                    # drawn faces, 32x32
    python began.py --data photos --image-size 64                  # a folder of your own pictures
    python began.py --resume                                       # continue the newest run
    python began.py --init-from runs/began-001 --data photos       # start a new run from the weights of another
    python began.py --sample 1000; python began.py --interpolate 8 # use the generator of the newest run
    python began.py --embed photos                                 # find the z of real pictures, and walk between them
    torchrun --nproc_per_node 8 began.py --data celeba --image-size 128 --width 128 --batch-size 128 --lr 1e-4 \
        --betas 0.9 0.999 --gamma 0.5 --pt-weight 0 --lambda-k 0.001 --lr-patience 20 --eta 1 \
        --residual-steps 16000 --steps 200000                      # the paper's settings, 16 images per GPU

Measured: the mean of L(G(z)) / L(x) late in a run is within 0.03 of gamma (0.3, 0.5, 0.7 and 0.9). A run of 6,000 steps
takes 10 to 16 minutes on one core of an AMD EPYC. Over three seeds its faces have precision 0.79 and recall 0.13. With
w = 0, recall is 0.01.
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

SCRIPT = "began"  # the name in its checkpoints, whatever this file is called
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes (ranks) that torchrun has started
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # this process

# ---- networks -------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """3x3 convolution and ELU. ``carry`` mixes the input back in: carry x + (1 - carry) f(x) (section 3.5)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor, carry: Tensor | None = None) -> Tensor:
        y = F.elu(super().forward(x), inplace=True)
        return y if carry is None else torch.lerp(y, x, carry)


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


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in [-2, 2]. D's decoder is a second such network.

    A linear layer makes h0 [N, width, 8, 8]; two convolutions follow at every resolution. ``skip`` concatenates h0 to
    the input of every up-sampling. ``residual`` adds a vanishing residual, with the weight ``carry``, to each layer
    that keeps the size. The paper names no output activation. Images end in 2 tanh(x / 2): without a bound, D could
    drive the error of generated images to any height, and a plain tanh reaches black and white only at infinity.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, skip: bool = True, residual: bool = False):
        super().__init__()
        self.skip, self.residual = skip, residual
        self.register_buffer("carry", torch.ones(()))
        levels = int(math.log2(size // 8))
        self.first = nn.Linear(latent, width * 8 * 8)
        self.up = nn.ModuleList(UpConv(2 * width if skip else width, width) for _ in range(levels))
        self.conv = nn.ModuleList(Conv(width, width) for _ in range(levels + 2))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        carry = self.carry if self.residual else None
        h0 = self.first(z).unflatten(1, (-1, 8, 8)).contiguous(memory_format=torch.channels_last)
        x = self.conv[1](self.conv[0](h0, carry), carry)
        for up, conv in zip(self.up, self.conv[2:]):
            if self.skip:
                x = torch.cat([x, F.interpolate(h0, size=x.shape[2:])], dim=1)
            x = conv(F.elu(up(x), inplace=True), carry)
        return 2 * (self.last(x) / 2).tanh()


class Discriminator(nn.Module):
    """Autoencoder: images [N, channels, size, size] to their reconstructions and their codes [N, latent].

    The encoder has n, 2n, 3n, ... channels.
    """

    def __init__(self, latent: int, width: int, size: int, channels: int, skip: bool = True, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.register_buffer("carry", torch.ones(()))
        widths = [width * (i + 1) for i in range(int(math.log2(size // 8)) + 1)]
        self.first = Conv(channels, width)
        self.conv = nn.ModuleList(nn.ModuleList([Conv(w, w), Conv(w, w)]) for w in widths)
        self.down = nn.ModuleList(Conv(a, b, stride=2) for a, b in itertools.pairwise(widths))
        self.code = nn.Linear(widths[-1] * 8 * 8, latent)  # no non-linearity before or after the code
        self.decoder = Generator(latent, width, size, channels, skip, residual)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        carry = self.carry if self.residual else None
        x = self.first(images)
        for level, (one, two) in enumerate(self.conv):
            x = two(one(x, carry), carry)
            if level < len(self.down):
                x = self.down[level](x)
        code = self.code(x.flatten(1))
        return self.decoder(code), code


# ---- losses ---------------------------------------------------------------------------------------------------------


def reconstruction_loss(images: Tensor, reconstructions: Tensor, eta: float = 1.0) -> Tensor:
    """L(v) = mean |v - D(v)|^eta (section 3.1), a scalar. Raises ValueError if the shapes differ."""
    if images.shape != reconstructions.shape:
        raise ValueError(f"shapes differ: {tuple(images.shape)} and {tuple(reconstructions.shape)}")
    return (images - reconstructions).abs().pow(eta).mean()


def pull_away_term(codes: Tensor) -> Tensor:
    """f_PT, the mean of cos(S_i, S_j)^2 over i != j (EBGAN, section 2.4): N > 1 codes [N, ...] to a scalar."""
    if codes.ndim < 2 or len(codes) < 2:
        raise ValueError(f"not codes [N, ...] with N > 1: {tuple(codes.shape)}")
    codes = codes.flatten(1).to(torch.promote_types(codes.dtype, torch.float32))  # in fp16 the sum would overflow
    directions = F.normalize(codes, dim=1)
    squares = (directions @ directions.T).square()
    return (squares.sum() - squares.trace()) / (len(codes) * (len(codes) - 1))


@torch.no_grad()
def balance(k: Tensor, real_loss: Tensor, fake_loss: Tensor, gamma: float, lambda_k: float) -> tuple[Tensor, Tensor]:
    """k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1) and M = L(x) + |gamma L(x) - L(G(z))|, scalars.

    The results carry no gradient, because k_t is kept from step to step.
    """
    gap = gamma * real_loss - fake_loss
    return (k + lambda_k * gap).clamp(0, 1), real_loss + gap.abs()


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

METRICS = ("loss_d", "loss_real", "loss_fake", "pull_away", "ratio", "k", "m", "lr")  # ratio: L(G(z)) / L(x)
PANELS = [("loss_real", "loss_fake"), ("pull_away",), ("ratio",), ("k",), ("m",), ("lr",), ("swd", "diversity")]
# A saved network fits these settings only:
NETWORK_FLAGS = ("image_size", "channels", "width", "latent", "skip")


def uniform(count: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
    """z [count, latent], uniform in [-1, 1]."""
    return torch.rand(count, latent, device=device) * 2 - 1


def build(network: type[nn.Module], settings: dict) -> nn.Module:
    """Make the Generator or the Discriminator, with orthogonal weights and in the fastest memory layout."""
    shape = (settings["latent"], settings["width"], settings["image_size"], settings["channels"])
    built = network(*shape, settings["skip"], settings["residual_steps"] > 0)
    for parameter in built.parameters():  # PyTorch's default shrinks the signal, and with it the influence of z
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
    fixed_z = uniform(256, args.latent).to(device)  # the same z in all sample pictures
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
    torch.zeros(100_000, dtype=torch.bfloat16).tanh()  # on some CPUs, ELU in fp32 is 13 times as fast after this
    batch_size = args.batch_size // WORLD  # this rank's share
    batches = common.Batches(images, batch_size, device, args.hflip)
    reference = common.reference_images(images, 256).to(device)  # real images to compare samples with

    generator = build(Generator, vars(args)).to(device)
    discriminator = build(Discriminator, vars(args)).to(device)
    averaged = copy.deepcopy(generator).requires_grad_(False)  # makes all the samples
    parameters = [*generator.parameters(), *discriminator.parameters()]
    k = torch.zeros((), device=device)  # what changes from step to step is a tensor, which a CUDA graph can read
    lr = torch.full_like(k, args.lr)
    lr_min = min(args.lr_min, args.lr)  # a rate below --lr-min stays as it is
    ema_weight = torch.ones_like(k)
    adam = torch.optim.Adam(parameters, lr, tuple(args.betas), fused=True, capturable=device.type == "cuda")
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=args.lr_patience, threshold=0,
                                                         min_lr=lr_min, eps=0)
    networks = dict(generator=generator, averaged=averaged, discriminator=discriminator)
    state = networks | dict(adam=adam, k=k)

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
        """One step of D and G, without waiting for the device. Returns the METRICS."""
        z, x = uniform(batch_size, args.latent, device), batches()
        with autocast:
            fake = generator(z).to(z.dtype)  # in bf16 the losses would be rounded
            reconstructions, codes = discriminator(fake)
            fake_loss = reconstruction_loss(fake, reconstructions, args.eta)
            real_loss = reconstruction_loss(x, discriminator(x)[0], args.eta)
        pull_away = pull_away_term(codes)
        L_G = fake_loss + args.pt_weight * k * pull_away
        L_D = real_loss - k * L_G
        adam.zero_grad()
        # One backward pass through D(G(z)) serves both losses. It leaves the gradient of L_G in D as well. Times -k_t,
        # plus the gradient of L(x), it is the gradient of L_D = L(x) - k_t L_G.
        L_G.backward()
        for parameter in discriminator.parameters():
            parameter.grad *= -k
        real_loss.backward()
        losses = torch.stack([L_D, real_loss, fake_loss, pull_away]).detach()
        all_reduce_mean([losses, *(parameter.grad for parameter in parameters)])
        adam.step()
        update_ema(averaged, generator, ema_weight)

        L_D, real_loss, fake_loss, pull_away = losses  # now means over the ranks
        next_k, m = balance(k, real_loss, fake_loss, args.gamma, args.lambda_k)
        metrics = torch.stack([L_D, real_loss, fake_loss, pull_away, fake_loss / real_loss, k, m, lr])
        k.copy_(next_k)
        return metrics

    @torch.no_grad()
    def show(step: int) -> None:
        """Write the table, the chart and the pictures."""
        fake, real = averaged(fixed_z[:64]), reference[:16]
        samples = fake[:len(real)]
        reconstructions = torch.cat([real, discriminator(real)[0], samples, discriminator(samples)[0]])
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
    if args.lr_patience > 0:
        for row in rows:
            plateau.step(row["m"])  # a resumed run finds its rate again
    step_once = cuda_graph(update) if args.graph and device.type == "cuda" else update
    total = torch.zeros(len(METRICS), device=device)
    first = last_row = done
    started = time.perf_counter()
    for step in range(first, args.steps):
        torch.manual_seed((args.seed * 1_000_003 + step) * WORLD + RANK)  # so a resumed run draws the same numbers
        if args.lr_patience == 0:
            lr.fill_(lr_min + (args.lr - lr_min) * max(0.0, 1 - step / args.lr_steps))
        ema_weight.fill_(max(1 - args.ema, 9 / (step + 9)))  # at first a copy of G, then an ever longer average
        if args.residual_steps > 0:
            for network in (generator, discriminator, discriminator.decoder):
                network.carry.fill_(max(0.0, 1 - step / args.residual_steps))
        batches.refill()
        total += step_once()
        done = step + 1
        say(f"{done}/{args.steps}", end="\r")
        if done % args.every != 0 and done != args.steps:
            continue

        all_reduce_mean([total])
        metrics = dict(zip(METRICS, (total / (done - last_row)).tolist()))
        check_finite(done, metrics, networks)
        if args.lr_patience > 0:
            plateau.step(metrics["m"])
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


def embed(args: argparse.Namespace) -> Path:
    """--embed FOLDER: find the z that minimise |x - G(z)| for 16 pictures and their mirror images, and walk to them."""
    device = start(args)
    generator, settings = load_generator(args.out, device)
    pictures = os.path.abspath(args.embed)  # a folder, even if it has a dataset's name
    images = common.load_images(pictures, settings["image_size"], settings["channels"], args.data_root)[:16]
    folder = common.next_folder(Path(args.out, "embed"))
    real = common.normalise(images.to(device))
    targets = torch.cat([real, real.flip(3)])
    z = torch.zeros(len(targets), settings["latent"], device=device, requires_grad=True)
    adam = torch.optim.Adam([z], lr=0.03)
    for _ in range(500):
        error = (generator(z) - targets).abs().mean()
        adam.zero_grad()
        error.backward()
        adam.step()
        with torch.no_grad():
            z.clamp_(-1, 1)
    say(f"mean |x - G(z)| = {error.item():.4f} on pixels in [-1, 1]")
    found, mirrored = z.detach().chunk(2)
    for name, end, goal in ("pairs", found.roll(-1, 0), real.roll(-1, 0)), ("mirrors", mirrored, real.flip(3)):
        walk = [generator(torch.lerp(found, end, step / 7)) for step in range(8)]
        common.save_grid(torch.stack([real, *walk, goal], dim=1), folder / f"{name}.png")  # real ones at the ends
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------

# These flags must be positive:
POSITIVE = ("batch_size", "steps", "every", "width", "latent", "sample", "interpolate")
# These flags are not settings of a run:
NOT_SETTINGS = dict(out=None, init_from=None, resume=False, sample=None, interpolate=None, embed=None)


def make_parser() -> argparse.ArgumentParser:
    """Define the flags. Those in NOT_SETTINGS get their defaults from there."""
    path = os.path.expanduser
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", argument_default=argparse.SUPPRESS,
                                     description="Train BEGAN, or use a generator that it has trained.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, default="faces", help=f"{', '.join(common.NAMES)}, or a folder of pictures")
    add("--data-root", type=path, default="data", help="folder for downloads and decoded pictures")
    add("--image-size", type=int, choices=(16, 32, 64, 128, 256), default=32, help="height and width in pixels")
    add("--channels", type=int, choices=(0, 1, 3), default=0, help="1 for grey, 3 for RGB, 0 for what the data are")
    add("--hflip", action=switch, default=False, help="flip half of the real images left to right")
    add("--batch-size", type=int, default=16, help="images in a batch, counting all ranks")
    add("--steps", type=int, default=6000, help="stop at this step")
    add("--lr", type=float, default=4e-4, help="Adam's learning rate at the start")
    add("--lr-min", type=float, default=2e-5, help="the lowest learning rate")
    add("--lr-steps", type=int, default=0, help="steps over which the rate falls to --lr-min; 0 for --steps")
    add("--lr-patience", type=int, default=0,
        help="halve the rate instead, after more than this many rows of metrics.csv without a lower M; 0 for never")
    add("--betas", type=float, nargs=2, default=[0.5, 0.99], metavar="BETA", help="Adam's betas")
    add("--ema", type=float, default=0.999, help="decay of the averaged generator; 0 for no averaging")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto is bf16 where the hardware has it")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--graph", action=switch, default=True, help="on a GPU, replay the step as a CUDA graph")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--every", type=int, default=100, help="steps between rows of metrics.csv, pictures and checkpoints")
    add("--keep", action=switch, default=False, help="keep a numbered copy of every checkpoint, for --init-from")
    add("--gamma", type=float, default=0.5, help="diversity ratio L(G(z)) / L(x); 0.3 to 0.7 in the paper")
    add("--pt-weight", type=float, default=1.0, help="w, the weight of the pull-away term; 0 in the paper")
    add("--lambda-k", type=float, default=0.2, help="learning rate of k_t; 0.001 in the paper")
    add("--eta", type=int, choices=(1, 2), default=2, help="exponent of the reconstruction loss")
    add("--width", type=int, default=32, help="the paper's n, the channels of the first layer")
    add("--latent", type=int, default=64, help="length of z and of D's code")
    add("--skip", action=switch, default=True, help="skip connections in the decoders")
    add("--residual-steps", type=int, default=0, help="steps of vanishing residuals, 16000 in the paper; 0 for none")
    add("--out", type=path, help="folder of the run (default: a new one, or to resume or use, the newest)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--init-from", type=path, metavar="RUN", help="start a new run from the weights of another run or checkpoint")
    add("--resume", action="store_true", default=argparse.SUPPRESS, help="continue a run with its settings")
    add("--sample", type=int, metavar="N", help="write N samples of a trained generator")
    add("--interpolate", type=int, metavar="N", help="write N walks between random z")
    add("--embed", type=path, metavar="FOLDER", help="find the z of a folder's pictures, and walk between them")
    return parser


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the flags. The settings of a run to resume, or of networks to start from, become the defaults."""
    parser, saved = make_parser(), {}
    args = parser.parse_args(argv, argparse.Namespace(**NOT_SETTINGS))
    if WORLD > 1 and (args.sample or args.interpolate or args.embed):
        parser.error("torchrun is for training only")
    if args.resume or args.sample or args.interpolate or args.embed:
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
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = argparse.Namespace(**NOT_SETTINGS)
    try:
        args = read_flags(argv)
        action = sample if args.sample else interpolate if args.interpolate else embed if args.embed else train
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

# `uv run began.py` installs what the script needs.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "pillow>=10.1"]
# ///
