"""EBGAN: Energy-Based Generative Adversarial Networks (Zhao, Mathieu and LeCun, 2016, arXiv:1609.03126).

The discriminator D is an auto-encoder, and its reconstruction error is the energy of an image. D learns low energy for
real images x and energy up to a margin m for generated ones G(z); the generator G learns to make images of low energy.
The pull-away term f_PT keeps the codes S = Enc(G(z)) of a batch apart, and so the images varied (EBGAN-PT):

    D(v)    = ||Dec(Enc(v)) - v||                              energy: L2 norm over the pixels, in [-1, 1], per image
    L_D     = D(x) + [m - D(G(z))]^+                           per image, then the mean; tends to m at the equilibrium
    L_G     = D(G(z)) + w f_PT(S)
    f_PT(S) = 1 / (N (N - 1)) sum_i sum_{j != i} cos(S_i, S_j)^2

    python ebgan.py --margin 8                                     # procedural digits, 32x32
    python ebgan.py --data photos --image-size 64                  # a folder of your own pictures
    python ebgan.py --resume                                       # continue the newest run
    python ebgan.py --sample 1000; python ebgan.py --interpolate 8 # use the trained generator
    python ebgan.py --data mnist --margin 16 --d-width 2 --d-steps 5       # a narrow D, updated more often than G
    python ebgan.py --data celeba --image-size 64 --layers paper --g-width 1024 --d-width 64 --latent 100 --margin 20 \\
        --pt-weight 0.1 --lr 2e-4 --betas 0.5 0.999 --steps 200000         # the paper's settings; Adam's are DCGAN's
    torchrun --nproc_per_node 8 ebgan.py --data celeba --image-size 64 --layers paper --g-width 1024 --d-width 64 \\
        --latent 100 --batch-size 512 --steps 50000                        # the paper's networks, 64 images per GPU

Measured: on 5,000 MNIST digits 0.74 times the Frechet distance of 500 held-out ones, precision 0.75, recall 0.76
(tests/judge.py), after the default 5,000 steps, 8.3 minutes on two threads of an AMD EPYC; all 1,000 stacked digits.
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common

SCRIPT = "ebgan"  # checkpoints carry this name, whatever the file is called

# ---- networks -------------------------------------------------------------------------------------------------------


class UpConv(nn.Conv2d):
    """Nearest-neighbour 2x up-sampling and 3x3 convolution, with 2.25 times fewer multiplications."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)
        rows = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # to which of 4 rows each of 3 is added
        self.register_buffer("taps", torch.einsum("hy,wx->hwyx", rows, rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("oihw,hwyx->ioyx", self.weight, self.taps)  # sums weights that meet the same pixel
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def decoder(widths: list[int], channels: int, layers: str, norm: type[nn.Module]) -> nn.Sequential:
    """Feature maps of widths[0] channels to images; every layer doubles the size. No batch norm after the last."""
    if layers not in ("fused", "paper"):
        raise ValueError(f"no such layers: {layers!r}; accepted: fused, paper")
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

    Every layer halves the size and doubles the channels, down to 8x8 (4x4 from 32x32, 2x2 from 16x16); with width 64
    at 64x64 the paper's 64-128-256. The code is linear, or with ``layers`` "paper" the last feature maps.
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
    """D(v) = ||Dec(Enc(v)) - v||, one L2 norm per image: two tensors of one shape [N, ...] to energies [N] (eq. 1)."""
    if images.shape != reconstructions.shape or images.ndim < 2:
        raise ValueError(f"not of one shape [N, ...]: {tuple(images.shape)} and {tuple(reconstructions.shape)}")
    return (reconstructions - images).flatten(1).norm(dim=1)


def discriminator_loss(real_energy: Tensor, fake_energy: Tensor, margin: float) -> Tensor:
    """L_D = D(x) + [m - D(G(z))]^+, the hinge on every energy by itself, then the means: a scalar (eq. 1)."""
    return real_energy.mean() + (margin - fake_energy).relu().mean()


def pull_away_term(codes: Tensor) -> Tensor:
    """f_PT, the mean of cos(S_i, S_j)^2 over the pairs i != j of N > 1 codes [N, ...]: a scalar from 0 to 1 (eq. 4)."""
    if codes.ndim < 2 or len(codes) < 2:
        raise ValueError(f"not codes [N, ...] with N > 1: {tuple(codes.shape)}")
    directions = F.normalize(codes.flatten(1), dim=1)
    squares = (directions @ directions.T).square()
    return (squares.sum() - squares.trace()) / (len(codes) * (len(codes) - 1))


def generator_loss(fake_energy: Tensor, codes: Tensor, pt_weight: float) -> Tensor:
    """L_G = D(G(z)) + w f_PT(S), from energies and codes [N, ...] of generated images: a scalar (eq. 2)."""
    return fake_energy.mean() + pt_weight * pull_away_term(codes)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, updates: Tensor, decay: float) -> None:
    """Move the averaged network: ema <- d ema + (1 - d) network, buffers too, with d = min(decay, t / (t + 9)).

    t is the scalar ``updates``, counted from 0. So d warms up, and the average soon forgets the initial weights.
    """
    weight = (9 / (updates + 9)).clamp(min=1 - decay)
    averages, values = (itertools.chain(n.parameters(), n.buffers()) for n in (ema, network))
    for average, value in zip(averages, values):
        average.lerp_(value, weight) if average.is_floating_point() else average.copy_(value)


def collapse(rows: Sequence[dict[str, float]]) -> str | None:
    """What the rows of metrics.csv, the newest last, show of a failing D, and what may help; or None."""
    *past, row = rows
    begun = row["step"] >= 300 or any(r["energy_fake"] > r["energy_real"] for r in past)  # a run may begin like that
    if begun and row["energy_fake"] < 0.8 * row["energy_real"]:
        return "D reconstructs samples better than real images; try a --margin above D(x) or a lower --lr"
    if past and all(row[name] > 2 * min(r[name] for r in past) for name in ("energy_real", "energy_fake")):
        return "D no longer reconstructs anything, both energies have doubled; try a lower --margin or a lower --lr"
    return None


# ---- training -------------------------------------------------------------------------------------------------------

METRICS = ("energy_real", "energy_fake", "loss_d", "loss_g", "pull_away")  # D(x), D(G(z)), L_D, L_G, f_PT
PANELS = [("energy_real", "energy_fake"), ("loss_d", "loss_g"), ("pull_away",), ("swd", "diversity")]


def uniform(count: int, latent: int, device: torch.device | str = "cpu") -> Tensor:
    """z [count, latent], uniform in [-1, 1]."""
    return torch.rand(count, latent, device=device) * 2 - 1


def build(network: type[nn.Module], config: dict) -> nn.Module:
    """The Generator or Discriminator of these settings, in the memory layout in which convolutions are fastest."""
    vector, width = ("latent", "g_width") if network is Generator else ("code", "d_width")
    shape = (config[vector], config[width], config["image_size"], config["channels"])
    built = network(*shape, config["layers"], nn.BatchNorm2d if config["batch_norm"] else nn.Identity)
    return built.to(memory_format=torch.channels_last)


def gathered(codes: Tensor) -> Tensor:
    """All ranks' codes. Gradients reach this rank's alone, times WORLD, so that the ranks' mean is one process's."""
    if WORLD == 1:
        return codes
    values = codes.detach().flatten(1).contiguous()
    parts = [torch.empty_like(values) for _ in range(WORLD)]
    dist.all_gather(parts, values)
    parts[RANK] = values + WORLD * (codes.flatten(1) - values)
    return torch.cat(parts)


def train(args: argparse.Namespace) -> Path:
    """Train with the ``settings``; returns the run's folder. Raises ValueError, OSError and FloatingPointError."""
    if len(args.lr) > 2:
        raise ValueError(f"argument --lr: {len(args.lr)} rates; accepted: one, or that of G and that of D")
    device = start(args)
    source = args.checkpoint if args.resume else args.init_from
    saved = from_rank_0(parser().load_checkpoint, source)["state"] if source else {}
    images = common.load_images(args.data, args.image_size, args.channels, args.data_root)
    batches = common.Batches(images, args.batch_size, device, args.hflip, RANK, WORLD, per_step=args.d_steps)
    args.channels = images.shape[1]
    args.margin = math.sqrt(images[0].numel()) / 4 if args.margin is None else args.margin
    generator, discriminator = build(Generator, vars(args)).to(device), build(Discriminator, vars(args)).to(device)
    if WORLD > 1 and device.type == "cuda":  # on CPUs, which have no such layer, every rank normalises its own share
        generator, discriminator = map(nn.SyncBatchNorm.convert_sync_batchnorm, (generator, discriminator))
    ema = copy.deepcopy(generator).eval().requires_grad_(False)  # its samples are the ones shown, measured and saved
    g_parameters, d_parameters = list(generator.parameters()), list(discriminator.parameters())
    g_optimizer = common.adam(g_parameters, args.lr[0], args.betas)
    d_optimizer = common.adam(d_parameters, args.lr[-1], args.betas)
    updates = torch.zeros((), device=device)
    fixed_z = uniform(256, args.latent, device)
    shown = common.normalise(common.spread(images, 256).to(device))
    record = common.Record(SCRIPT, vars(args), METRICS, device, images, writes=RANK == 0)
    networks = dict(generator=generator.state_dict(), ema=ema.state_dict(), discriminator=discriminator.state_dict())
    adams = dict(adam_g=g_optimizer.state_dict()["state"], adam_d=d_optimizer.state_dict()["state"])
    state = networks | record.state | adams | dict(updates=updates, fixed_z=fixed_z)

    def update() -> Tensor:
        """One step: --d-steps updates of D and --g-steps of G, all of it work for the device; returns the METRICS."""
        for turn in range(max(args.d_steps, args.g_steps)):
            z = uniform(args.batch_size, args.latent, device).chunk(WORLD)[RANK]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                fake = generator(z).to(z.dtype)  # what follows the networks is computed in fp32
                reconstructions, codes = discriminator(fake)  # one pass of the fakes through D serves both losses
            fake_energy, codes = energy(fake, reconstructions), gathered(codes.to(z.dtype))
            if turn < args.g_steps:
                L_G = generator_loss(fake_energy, codes, args.pt_weight)
                g_optimizer.zero_grad()
                L_G.backward(inputs=g_parameters, retain_graph=True)
                average(parameter.grad for parameter in g_parameters)
                g_optimizer.step()
            if turn < args.d_steps:
                x = batches(turn)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    reconstructions, _ = discriminator(x)
                real_energy = energy(x, reconstructions)
                L_D = discriminator_loss(real_energy, fake_energy, args.margin)
                d_optimizer.zero_grad()
                L_D.backward(inputs=d_parameters)  # does not reach G, which has changed since
                average(parameter.grad for parameter in d_parameters)
                d_optimizer.step()
        update_ema(ema, generator, updates, args.ema)
        updates.add_(1)
        metrics = torch.stack([real_energy.mean(), fake_energy.mean(), L_D, L_G, pull_away_term(codes)]).detach()
        average([metrics])
        return metrics

    @torch.no_grad()
    def pictures() -> dict[str, Tensor]:
        fake, real = ema(fixed_z[:64]), shown[:16]
        discriminator.eval()
        rows = [real, discriminator(real)[0], fake[:16], discriminator(fake[:16])[0]]
        discriminator.train()
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
                record.warn(common.collapse(record.rows) or collapse(record.rows))
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


# ---- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags, each with its check."""
    number, switch = common.number, argparse.BooleanOptionalAction
    parser = common.Parser(SCRIPT, __doc__.split("\n")[0], data="digits", precision="auto")
    add = parser.add_argument_group("EBGAN").add_argument
    add("--batch-size", type=number(int, 2, 1e6), default=64, help="images per batch, over all ranks")
    add("--steps", type=number(int, 1), default=5000, help="steps of the whole run, see --d-steps and --g-steps")
    add("--lr", type=number(float, 1e-9, 1), nargs="+", default=[1e-3], help="Adam's learning rate; or G's and D's")
    add("--betas", type=number(float, 0, 0.99999), nargs=2, default=[0.5, 0.999], metavar="B", help="Adam's betas")
    add("--margin", type=number(float, 0, 1e4), help="m; default: sqrt(C H W) / 4, 8 for 32x32 grey")
    add("--pt-weight", type=number(float, 0, 1e4), default=0.1, help="weight w of the pull-away term; 0: none")
    add("--d-steps", type=number(int, 1, 100), default=1, help="discriminator updates per step")
    add("--g-steps", type=number(int, 1, 100), default=1, help="generator updates per step")
    add("--layers", choices=("fused", "paper"), default="fused", help="paper: transposed convolutions, no linear code")
    add("--g-width", type=number(int, 1, 4096), default=256, help="channels of G's first layer, halved in every next")
    add("--d-width", type=number(int, 1, 4096), default=32, help="channels of D's first layer, doubled in every next")
    add("--latent", type=number(int, 1, 65536), default=64, help="length of z")
    add("--code", type=number(int, 1, 65536), default=32, help="length of D's linear code")
    add("--batch-norm", action=switch, default=True, help="in both networks; synchronised between GPUs, not CPUs")
    add("--ema", type=number(float, 0, 1), default=0.999, help="decay of the averaged generator; 0: no averaging")
    parser.use("--interpolate", type=number(int, 1, 1000), metavar="N", help="skip training and write N walks in z")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    with common.one_line_errors(SCRIPT), ranks():
        args = from_rank_0(parser().settings, argv)
        use = sample if args.sample else interpolate if args.interpolate else train
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
