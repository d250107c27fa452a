"""BEGAN: Boundary Equilibrium Generative Adversarial Networks (Berthelot, Schumm and Metz, 2017, arXiv:1703.10717).

The discriminator D is an auto-encoder. It learns to reconstruct real images x and not the generated ones G(z); the
generator G learns to make images that D reconstructs well. A number k_t in [0, 1] keeps the two in balance:

    L(v)    = mean |v - D(v)|^eta                                          reconstruction loss of images v
    L_D     = L(x) - k_t L(G(z))           L_G = L(G(z))                   losses of D and of G
    k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1)            holds L(G(z)) / L(x) at gamma
    M       = L(x) + |gamma L(x) - L(G(z))|                                convergence measure, controls the rate

    python began.py --gamma 0.5                                    # procedural faces, 32x32
    python began.py --data photos --image-size 64                  # a folder of your own pictures
    python began.py --resume                                       # continue the newest run
    python began.py --sample 1000; python began.py --interpolate 8 # use the trained generator
    torchrun --nproc_per_node 8 began.py --data celeba --image-size 128 --width 128 --batch-size 128 --lr 1e-4 \\
        --betas 0.9 0.999 --gamma 0.5 --lambda-k 0.001 --lr-patience 2000 --eta 1 --residual-steps 16000 \\
        --steps 200000                                             # the paper's settings, 16 images per GPU

Measured: late in a run the mean of L(G(z)) / L(x) is within 0.02 of gamma (0.3, 0.5, 0.7). The default run took 10.5
minutes on two threads of an AMD EPYC: precision 0.81, recall 0.08 (tests/judge.py), clean faces of few kinds.
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common

SCRIPT = "began"  # checkpoints carry this name, whatever the file is called

# ---- networks -------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """3x3 convolution and ELU. ``carry`` mixes the input back in: carry x + (1 - carry) f(x), section 3.5."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor, carry: Tensor | None = None) -> Tensor:
        y = F.elu(super().forward(x), inplace=True)
        return y if carry is None else torch.lerp(y, x, carry)


class UpConv(nn.Conv2d):
    """Nearest-neighbour 2x up-sampling, 3x3 convolution and ELU, with 2.25 times fewer multiplications."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)
        rows = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # to which of 4 rows each of 3 is added
        self.register_buffer("taps", torch.einsum("hy,wx->hwyx", rows, rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("oihw,hwyx->ioyx", self.weight, self.taps)  # sums weights that meet the same pixel
        y = F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)
        return F.elu(y, inplace=True)


class Generator(nn.Module):
    """Latent [N, latent] to images [N, channels, size, size] in [-2, 2]; also D's decoder.

    A linear layer to h0 [N, width, 8, 8], then two convolutions at every resolution. ``skip`` concatenates h0 at every
    up-sampling (before it: the two commute). ``residual`` gives successive layers of one size a vanishing residual,
    whose weight is the buffer ``carry``. Images end in 2 tanh(x / 2), which the paper leaves open: without a bound D
    may drive the error of the fakes, which it wants large, to any height; and a tanh that reaches black and white only
    at infinity leaves G grey on such data.
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
    """L(v) = mean |v - D(v)|^eta (eq. 1), a scalar. ValueError unless both have one shape, as [N, C, H, W]."""
    if images.shape != reconstructions.shape:
        raise ValueError(f"shapes differ: {tuple(images.shape)} and {tuple(reconstructions.shape)}")
    return (images - reconstructions).abs().pow(eta).mean()


def balance(k: Tensor, real_loss: Tensor, fake_loss: Tensor, gamma: float, lambda_k: float) -> tuple[Tensor, Tensor]:
    """k_{t+1} = clip(k_t + lambda_k (gamma L(x) - L(G(z))), 0, 1) and M = L(x) + |gamma L(x) - L(G(z))|, scalars."""
    gap = gamma * real_loss - fake_loss
    return (k + lambda_k * gap).clamp(0, 1), real_loss + gap.abs()


def halve_on_stall(m: Tensor, lr: Tensor, smooth: Tensor, best: Tensor, waited: Tensor, patience: int, floor: float):
    """Halve ``lr`` when the running mean ``smooth`` of M has had no new minimum ``best`` for ``patience`` steps.

    All are scalars on the device; lr, smooth, best and waited (start: 0, the largest float, 0) change in place. The
    floor is there because long runs are known to collapse once the rate has decayed away.
    """
    smooth.copy_(torch.where(best == torch.finfo(best.dtype).max, m, torch.lerp(smooth, m, 0.01)))
    waited.copy_(torch.where(smooth < best, 0, waited + 1))
    best.copy_(torch.minimum(smooth, best))
    lr.copy_(torch.where(waited < patience, lr, (lr / 2).clamp(min=floor)))
    waited.copy_(torch.where(waited < patience, waited, 0))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, updates: Tensor, decay: float) -> None:
    """Move the averaged network: ema <- d ema + (1 - d) network, buffers too, with d = min(decay, t / (t + 9)).

    t is the scalar ``updates``, counted from 0. So d warms up, and the average soon forgets the initial weights.
    """
    weight = (9 / (updates + 9)).clamp(min=1 - decay)
    averages, values = (itertools.chain(n.parameters(), n.buffers()) for n in (ema, network))
    for average, value in zip(averages, values):
        average.lerp_(value, weight) if average.is_floating_point() else average.copy_(value)


# ---- training -------------------------------------------------------------------------------------------------------

METRICS = ("loss_d", "loss_real", "loss_fake", "ratio", "k", "m", "lr")  # L_D, L(x), L(G(z)), L(G(z)) / L(x), k_t, M
PANELS = [("loss_real", "loss_fake"), ("ratio",), ("k",), ("m",), ("lr",), ("swd", "diversity")]


def uniform(count: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
    """z [count, latent], uniform in [-1, 1]."""
    return torch.rand(count, latent, device=device) * 2 - 1


def build(network: type[nn.Module], config: dict) -> nn.Module:
    """The Generator or Discriminator of these settings, in the memory layout in which convolutions are fastest."""
    shape = (config["latent"], config["width"], config["image_size"], config["channels"])
    built = network(*shape, config["skip"], config["residual_steps"] > 0)
    for parameter in built.parameters():  # PyTorch's default shrinks the signal, and with it the influence of z
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
    return built.to(memory_format=torch.channels_last)


def train(args: argparse.Namespace) -> Path:
    """Train with the ``settings``; returns the run's folder. Raises ValueError, OSError and FloatingPointError."""
    if args.lr_min > args.lr:
        raise ValueError(f"argument --lr-min: {args.lr_min} is above --lr {args.lr}")
    device = start(args)
    source = args.checkpoint if args.resume else args.init_from
    saved = from_rank_0(parser().load_checkpoint, source)["state"] if source else {}
    images = common.load_images(args.data, args.image_size, args.channels, args.data_root)
    batches = common.Batches(images, args.batch_size, device, args.hflip, RANK, WORLD)
    args.channels = images.shape[1]
    generator, discriminator = build(Generator, vars(args)).to(device), build(Discriminator, vars(args)).to(device)
    ema = copy.deepcopy(generator).requires_grad_(False)  # its samples are the ones shown, measured and saved
    parameters = [*generator.parameters(), *discriminator.parameters()]
    k, smooth, waited, updates = (torch.zeros((), device=device) for _ in range(4))
    lr, best = torch.full_like(k, args.lr), torch.full_like(k, torch.finfo(k.dtype).max)
    fall = torch.zeros_like(k) if args.lr_patience else (lr - args.lr_min) / args.steps  # of lr in a step
    optimizer = common.adam(parameters, lr, args.betas)
    fixed_z = uniform(256, args.latent, device)
    shown = common.normalise(common.spread(images, 256).to(device))
    record = common.Record(SCRIPT, vars(args), METRICS, device, images, writes=RANK == 0)
    networks = dict(generator=generator.state_dict(), ema=ema.state_dict(), discriminator=discriminator.state_dict())
    state = networks | record.state | dict(
        adam=optimizer.state_dict()["state"], k=k, lr=lr, smooth=smooth, best=best, waited=waited, fall=fall,
        updates=updates, fixed_z=fixed_z)

    def update() -> Tensor:
        """One step of D and G, all of it work for the device; returns the METRICS."""
        z = uniform(args.batch_size, args.latent, device).chunk(WORLD)[RANK]
        x = batches()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            fake = generator(z)
            real_loss = reconstruction_loss(x, discriminator(x), args.eta)
            fake_loss = reconstruction_loss(fake, discriminator(fake), args.eta)
        L_D = real_loss - k * fake_loss
        L_G = fake_loss
        # Both hold L(G(z)): one backward pass through D gives G's gradient and, times -k_t, the fakes' part of D's.
        L_G.backward()
        torch._foreach_mul_([parameter.grad for parameter in discriminator.parameters()], -k)
        real_loss.backward()
        losses = torch.stack([L_D, real_loss, fake_loss]).detach()
        average([losses, *(parameter.grad for parameter in parameters)])
        optimizer.step()

        L_D, real_loss, fake_loss = losses
        k_next, m = balance(k, real_loss, fake_loss, args.gamma, args.lambda_k)
        metrics = torch.stack([L_D, real_loss, fake_loss, fake_loss / real_loss, k, m, lr])
        k.copy_(k_next)
        if args.lr_patience:
            halve_on_stall(m, lr, smooth, best, waited, args.lr_patience, args.lr_min)
        else:
            lr.sub_(fall).clamp_(min=args.lr_min)
        for network in (generator, discriminator, discriminator.decoder) if args.residual_steps else ():
            network.carry.sub_(1 / args.residual_steps).clamp_(min=0)
        update_ema(ema, generator, updates, args.ema)
        updates.add_(1)
        return metrics

    @torch.no_grad()
    def pictures() -> dict[str, Tensor]:
        fake, real = ema(fixed_z[:64]), shown[:16]
        rows = [real, discriminator(real), fake[:16], discriminator(fake[:16])]
        return dict(samples=fake, reconstructions=torch.cat(rows))

    if source:
        common.fill(state if args.resume else networks, saved, source)
    results = repeat(update, args.graph and device.type == "cuda")
    with record, common.stop_requests() as requests:
        if RANK == 0 and record.first == 0:
            record.save(state)
        if RANK == 0 and (record.first % args.sample_every == 0 or record.first == args.steps):
            record.show(pictures(), shown[:64], PANELS)  # on resume too, in case a kill prevented it
        for step in range(record.first + 1, args.steps + 1):
            batches.refill()
            record.add(step, next(results))
            stop, last = told_to_stop(requests), step == args.steps
            if RANK == 0 and (step % args.log_every == 0 or last):
                record.row(common.compare(ema(fixed_z), shown))
                record.warn(common.collapse(record.rows))
            if RANK == 0 and (step % args.save_every == 0 or last or stop):
                record.save(state)
            if RANK == 0 and (step % args.sample_every == 0 or last):
                record.show(pictures(), shown[:64], PANELS)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped at step {step}; to continue: --resume --out {record.folder}")
    return record.folder


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[Generator, dict]:
    """A checkpoint's averaged generator, for z [N, latent], and the run's settings. Raises OSError, ValueError."""
    content = parser().load_checkpoint(path)
    generator = build(Generator, content["config"])
    common.fill({"ema": generator.state_dict()}, content["state"], path)
    return generator.to(device).eval().requires_grad_(False), content["config"]


def open_generator(args: argparse.Namespace, purpose: str) -> tuple[Generator, dict, torch.device, Path]:
    """The generator of --checkpoint, its settings, the device, and a new folder to fill: --out or beside the run."""
    device = start(args)
    generator, config = load_generator(args.checkpoint, device)
    return generator, config, device, Path(args.out or common.next_folder(Path(args.checkpoint).parent / purpose))


def sample(args: argparse.Namespace) -> Path:
    """--sample N: N pictures, numbered, as FID tools want them."""
    generator, config, device, folder = open_generator(args, "sample")
    for first in range(0, args.sample, 256):
        z = uniform(min(256, args.sample - first), config["latent"])
        common.save_pngs(generator(z.to(device)), folder, first)
    return folder


def interpolate(args: argparse.Namespace) -> Path:
    """--interpolate N: N straight walks between two random z, a row each."""
    generator, config, device, folder = open_generator(args, "interpolate")
    begin, end = uniform(2 * args.interpolate, config["latent"]).to(device).chunk(2)
    walk = [generator(torch.lerp(begin, end, step / 11)) for step in range(12)]
    common.save_grid(torch.stack(walk, dim=1), folder / "walks.png")
    return folder


def embed(args: argparse.Namespace) -> Path:
    """--embed FOLDER: the z that minimises |x - G(z)|, for 16 pictures and their mirror images; then walks."""
    generator, config, device, folder = open_generator(args, "embed")
    source = os.path.abspath(args.embed)  # a folder, even where its name is a data set's
    images = common.load_images(source, config["image_size"], config["channels"], args.data_root)[:16]
    real = common.normalise(images.to(device))
    targets = torch.cat([real, real.flip(3)])
    z = torch.zeros(len(targets), config["latent"], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.03)
    for _ in range(500):
        error = (generator(z) - targets).abs().mean()
        (z.grad,) = torch.autograd.grad(error, z)
        optimizer.step()
        z.data.clamp_(-1, 1)
    print(f"mean |x - G(z)| = {error.item():.4f} on pixels in [-1, 1]")
    found, mirrored = z.detach().chunk(2)
    for name, end, goal in ("pairs", found.roll(-1, 0), real.roll(-1, 0)), ("mirrors", mirrored, real.flip(3)):
        walk = [generator(torch.lerp(found, end, step / 7)) for step in range(8)]
        common.save_grid(torch.stack([real, *walk, goal], dim=1), folder / f"{name}.png")  # real ones at the ends
    return folder


# ---- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags, each with its check."""
    number, switch = common.number, argparse.BooleanOptionalAction
    parser = common.Parser(SCRIPT, __doc__.split("\n")[0], data="faces", sizes=(16, 32, 64, 128, 256), precision="auto")
    add = parser.add_argument_group("BEGAN").add_argument
    add("--batch-size", type=number(int, 1, 1e6), default=16, help="images per batch, over all ranks")
    add("--steps", type=number(int, 1), default=6000, help="generator updates of the whole run")
    add("--lr", type=number(float, 1e-9, 1), default=4e-4, help="Adam's initial learning rate, both networks")
    add("--lr-min", type=number(float, 0, 1), default=2e-5, help="lower bound of the learning rate")
    add("--lr-patience", type=number(int, 0), default=0, help="steps without a new least M to halve lr; 0: linear fall")
    add("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.99], metavar="B", help="Adam's betas")
    add("--gamma", type=number(float, 0, 1), default=0.9, help="diversity ratio L(G(z)) / L(x); paper: 0.3 to 0.7")
    add("--lambda-k", type=number(float, 0, 1), default=0.2, help="learning rate of k_t; paper: 0.001, for long runs")
    add("--eta", type=int, choices=(1, 2), default=2, help="exponent of the reconstruction loss")
    add("--width", type=number(int, 1, 4096), default=32, help="the paper's n: channels of the first layer")
    add("--latent", type=number(int, 1, 65536), default=64, help="length of z and of D's code")
    add("--skip", action=switch, default=True, help="skip connections in the decoders")
    add("--residual-steps", type=number(int, 0), default=0, help="steps of vanishing residuals (paper: 16000); 0: none")
    add("--ema", type=number(float, 0, 1), default=0.999, help="decay of the averaged generator; 0: no averaging")
    parser.use("--interpolate", type=number(int, 1, 1000), metavar="N", help="skip training and write N walks in z")
    parser.use("--embed", metavar="FOLDER", help="skip training and find z for its pictures")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    with common.one_line_errors(SCRIPT), ranks():
        args = from_rank_0(parser().settings, argv)
        use = sample if args.sample else interpolate if args.interpolate else embed if args.embed else train
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
