"""Times our training steps against the textbook way to train the same networks, alternately in one process.

    python tests/bench.py                        # every script, on the device at hand
    python tests/bench.py began --json out.json
    python tests/bench.py unrolled               # needs ``pip install higher``, for the other side

Prints, for every script: the milliseconds of our step, of our step without a CUDA graph, and of the textbook step; the
images a second of ours; their ratios (medians over alternating rounds, with the range); the share of the machine's
measured matrix-product rate that our step's floating-point operations reach; and, on a GPU, the peak memory.
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import began
import common
import ebgan
import unrolled_gan
import wgan_gp

ROUNDS = 7


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """The best floating-point operations a second of a square matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        begun = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)


def textbook(network: torch.nn.Module) -> torch.nn.Module:
    """The same network laid out NCHW, with every up-sampling carried out before its convolution."""

    def forward(layer, x):
        y = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
        return layer.activation(y)

    activations = {began: F.elu, ebgan: lambda y: y, wgan_gp: lambda y: F.leaky_relu(y, 0.2)}
    for layer in network.modules():
        for module, activation in activations.items():
            if type(layer) is module.UpConv:
                layer.__class__ = type("PlainUpConv", (module.UpConv,), {"forward": forward})
                layer.activation = activation
    return network.to(memory_format=torch.contiguous_format)


class Pictures(torch.utils.data.Dataset):
    """Pictures in memory, converted one by one as torchvision's examples do."""

    def __init__(self, images):
        from torchvision import transforms

        self.pictures = [transforms.functional.to_pil_image(image) for image in images]
        self.convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.convert(self.pictures[index])


def loader(images, batch_size, device):
    """Batches for ever, from a DataLoader."""
    batches = torch.utils.data.DataLoader(Pictures(images), batch_size, shuffle=True, drop_last=True)
    while True:
        for batch in batches:
            yield batch.to(device)


def built(module, args, device):
    """Generator and discriminator or critic, the textbook way, and an Adam for each."""
    kinds = module.Generator, getattr(module, "Critic", None) or module.Discriminator
    networks = [textbook(module.build(kind, vars(args))).to(device) for kind in kinds]
    rate = 1e-3 if module is wgan_gp else args.lr[0] if module is ebgan else args.lr
    return *networks, *(torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.99)) for network in networks)


def began_textbook(args, images, device):
    """BEGAN as it is usually written: a DataLoader, three passes of D a step, .item() in every step."""
    generator, discriminator, g_adam, d_adam = built(began, args, device)
    batches, k = loader(images, args.batch_size, device), 0.0

    def step():
        nonlocal k
        real, z = next(batches), torch.rand(args.batch_size, args.latent, device=device) * 2 - 1
        fake = generator(z)
        g_adam.zero_grad()
        began.reconstruction_loss(fake, discriminator(fake), args.eta).backward()  # leaves gradients in D as well
        g_adam.step()
        d_adam.zero_grad()
        real_loss = began.reconstruction_loss(real, discriminator(real), args.eta)
        fake_loss = began.reconstruction_loss(fake.detach(), discriminator(fake.detach()), args.eta)
        (real_loss - k * fake_loss).backward()
        d_adam.step()
        k = min(max(k + args.lambda_k * (args.gamma * real_loss.item() - fake_loss.item()), 0), 1)

    return step


def ebgan_textbook(args, images, device, networks=None):
    """EBGAN as it is usually written."""
    generator, discriminator, g_adam, d_adam = networks or built(ebgan, args, device)
    batches = loader(images, args.batch_size, device)

    def step():
        real, z = next(batches), torch.rand(args.batch_size, args.latent, device=device) * 2 - 1
        fake = generator(z)
        g_adam.zero_grad()
        reconstructions, codes = discriminator(fake)
        g_loss = ebgan.generator_loss(ebgan.energy(fake, reconstructions), codes, args.pt_weight)
        g_loss.backward()
        g_adam.step()
        d_adam.zero_grad()
        energies = [ebgan.energy(v, discriminator(v)[0]) for v in (real, fake.detach())]
        d_loss = ebgan.discriminator_loss(*energies, args.margin)
        d_loss.backward()
        d_adam.step()
        return d_loss.item(), g_loss.item()

    return step


class TheirGenerator(torch.nn.Sequential):
    """The layers of PyTorch-GAN's ebgan.py, for 32x32 grey."""

    def __init__(self):
        super().__init__(
            torch.nn.Linear(62, 128 * 8 * 8), torch.nn.Unflatten(1, (128, 8, 8)),
            ebgan.UpConv(128, 128), torch.nn.BatchNorm2d(128, 0.8), torch.nn.LeakyReLU(0.2),
            ebgan.UpConv(128, 64), torch.nn.BatchNorm2d(64, 0.8), torch.nn.LeakyReLU(0.2),
            torch.nn.Conv2d(64, 1, 3, 1, 1), torch.nn.Tanh())


class TheirDiscriminator(torch.nn.Module):
    """The layers of PyTorch-GAN's ebgan.py, for 32x32 grey."""

    def __init__(self):
        super().__init__()
        self.code = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(),
                                        torch.nn.Linear(64 * 16 * 16, 32))
        self.wide = torch.nn.Sequential(torch.nn.BatchNorm1d(32, 0.8), torch.nn.ReLU(),
                                        torch.nn.Linear(32, 64 * 16 * 16), torch.nn.BatchNorm1d(64 * 16 * 16),
                                        torch.nn.ReLU(), torch.nn.Unflatten(1, (64, 16, 16)))
        self.up = ebgan.UpConv(64, 1)

    def forward(self, images):
        code = self.code(images)
        return self.up(self.wide(code)), code


def theirs(kind, config):
    """In the place of ``ebgan.build``."""
    network = TheirGenerator() if kind is ebgan.Generator else TheirDiscriminator()
    return network.to(memory_format=torch.channels_last)


def their_script(args, images, device):
    """The step of PyTorch-GAN's ebgan.py: its networks, NCHW, its losses and the calls of its loop."""
    generator, discriminator = (textbook(theirs(kind, {})).to(device)
                                for kind in (ebgan.Generator, ebgan.Discriminator))
    g_adam, d_adam = (torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
                      for network in (generator, discriminator))
    batches, mse = loader(images, args.batch_size, device), torch.nn.MSELoss()

    def step():
        real, z = next(batches), torch.randn(args.batch_size, 62, device=device)
        g_adam.zero_grad()
        fake = generator(z)
        reconstructions, codes = discriminator(fake)
        directions = codes / codes.pow(2).sum(1, keepdim=True).sqrt()
        similarity, n = directions @ directions.T, len(codes)
        g_loss = mse(reconstructions, fake.detach()) + 0.1 * (similarity.sum() - n) / (n * (n - 1))
        g_loss.backward()
        g_adam.step()
        d_adam.zero_grad()
        real_loss = mse(discriminator(real)[0], real)
        fake_loss = mse(discriminator(fake.detach())[0], fake.detach())
        d_loss = real_loss
        if (1 - fake_loss.data).item() > 0:
            d_loss = d_loss + 1 - fake_loss
        d_loss.backward()
        d_adam.step()
        return d_loss.item(), g_loss.item()

    return step


def unrolled_textbook(args, images, device):
    """The calls of the public unroll_gan: networks as ours, data and noise by numpy, every unrolled step on new points,
    by the package ``higher`` (to be installed in this program's environment only)."""
    means, _ = unrolled_gan.mixture(args.data)
    relu, linear, adam = torch.nn.ReLU, torch.nn.Linear, torch.optim.Adam
    generator, discriminator = (
        torch.nn.Sequential(linear(inputs, 128), relu(), linear(128, 128), relu(), linear(128, outputs)).to(device)
        for inputs, outputs in ((args.latent, 2), (2, 1)))
    g_adam, d_adam = (adam(network.parameters(), lr=rate, betas=(0.5, 0.999))
                      for network, rate in ((generator, args.lr[0]), (discriminator, args.lr[-1])))
    tensor = lambda array: torch.from_numpy(array.astype("float32")).to(device)
    modes = lambda: means.numpy()[np.random.choice(8, args.batch_size, p=[1 / 8] * 8)]
    real = lambda: tensor(np.random.normal(loc=modes(), scale=0.02))
    noise = lambda: tensor(np.random.normal(size=(args.batch_size, args.latent)))

    def losses(network, fake):
        x, y = torch.sigmoid(network(real())), torch.sigmoid(network(fake))
        return -x.log().mean(), -(1 - y).log().mean()

    def step():
        d_adam.zero_grad()
        with torch.no_grad():
            fake = generator(noise())
        parts = losses(discriminator, fake)
        sum(parts).backward()
        d_adam.step()
        [part.item() for part in parts]
        g_adam.zero_grad()
        d_adam.zero_grad()
        if args.unroll_steps:
            import higher

            backup = copy.deepcopy(discriminator)
            with higher.innerloop_ctx(discriminator, d_adam) as (network, optimizer):
                for _ in range(args.unroll_steps):
                    parts = losses(network, generator(noise()))
                    optimizer.step(sum(parts))
                    [part.item() for part in parts]
                g_loss = -torch.sigmoid(network(generator(noise()))).log().mean()
                g_loss.backward()
            discriminator.load_state_dict(backup.state_dict())
        else:
            g_loss = -torch.sigmoid(discriminator(generator(noise()))).log().mean()
            g_loss.backward()
        g_adam.step()
        return g_loss.item()

    return step


def wgan_textbook(args, images, device):
    """WGAN-GP as it is usually written. Dropout and standard deviation are PyTorch's own."""
    generator, critic, g_adam, c_adam = built(wgan_gp, args, device)
    average = copy.deepcopy(generator)
    batches = loader(images, args.batch_size, device)

    def stddev(x):
        spread = (x.var(dim=0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], dim=1)

    @mock.patch.multiple(wgan_gp, minibatch_stddev=stddev, dropout=F.dropout)
    def step():
        for _ in range(args.n_critic):
            real, z = next(batches), torch.randn(args.batch_size, args.latent, device=device)
            fake = generator(z).detach()
            c_adam.zero_grad()
            real_scores, fake_scores = critic(real), critic(fake)
            epsilon = torch.rand(len(real), 1, 1, 1, device=device)
            between = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
            scores = critic(between)
            gradient = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)[0]
            penalty = ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
            c_loss = wgan_gp.critic_loss(real_scores, fake_scores, penalty, args.gp_weight, args.drift)
            c_loss.backward()
            c_adam.step()
        g_adam.zero_grad()
        g_loss = -critic(generator(torch.randn(args.batch_size, args.latent, device=device))).mean()
        g_loss.backward()  # leaves gradients in the critic as well
        g_adam.step()
        for mean, parameter in zip(average.parameters(), generator.parameters()):
            mean.data.mul_(args.ema).add_(parameter.data, alpha=1 - args.ema)
        return c_loss.item(), g_loss.item()

    return step


BENCHES = {  # name: script, its flags, what it is timed against, what takes the place of its networks
    "began": (began, [], began_textbook, None),
    "ebgan": (ebgan, [], ebgan_textbook, None),
    "ebgan-paper": (ebgan, ["--layers", "paper", "--image-size", "64", "--batch-size", "16"], ebgan_textbook, None),
    "ebgan-pytorch-gan": (ebgan, ["--latent", "62"], their_script, theirs),
    "unrolled": (unrolled_gan, ["--activation", "relu"], unrolled_textbook, None),
    "unrolled-0": (unrolled_gan, ["--activation", "relu", "--unroll-steps", "0"], unrolled_textbook, None),
    "wgan_gp": (wgan_gp, [], wgan_textbook, None),
}


class Stop(Exception):
    """Leaves ``train`` with the step in hand."""


def our_step(module, args, images, networks):
    """The ``update`` that ``train`` repeats, and how its batches are refilled."""
    taken = {"refill": lambda: None}

    def repeat(update, _):
        taken.update(update=update)
        raise Stop

    class Batches(common.Batches):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            taken.update(refill=self.refill)

    with tempfile.TemporaryDirectory() as args.out, mock.patch.object(module, "repeat", repeat), \
            mock.patch.object(module, "build", networks or module.build), \
            mock.patch.multiple(common, load_images=lambda *_: images, Batches=Batches), contextlib.suppress(Stop):
        module.train(args)
    return taken["update"], taken["refill"]


def bench(name: str, device: torch.device, seconds: float, extra: list[str]) -> dict:
    module, flags, make_textbook, networks = BENCHES[name]
    args = module.parser().settings([*flags, *extra, "--device", device.type])
    size, channels = 2 if module is unrolled_gan else args.image_size, 1 if module is ebgan else 3
    images = torch.randint(256, (2048, channels, size, size), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step, refill = our_step(module, args, images, networks)
    contestants = {"ours": module.repeat(step, device.type == "cuda")}
    if device.type == "cuda":
        contestants["eager"] = module.repeat(our_step(module, args, images, networks)[0], False)
    contestants["textbook"] = iter(make_textbook(args, images, device), False)
    peaks = {}
    for name_, run in contestants.items():  # ours first: its peak is its own
        for _ in range(5):
            next(run)
        if device.type == "cuda":
            peaks[name_] = torch.cuda.max_memory_allocated(device) / 2**20
    times = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name_, run in contestants.items():
            synchronize(device)
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds / ROUNDS / len(contestants):
                refill()
                next(run)
                synchronize(device)
                count += 1
            times[name_].append((time.perf_counter() - begun) / count)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # its hooks on modules do not work under autograd.grad
    counter.mod_tracker.parents = {"Global"}
    with counter:
        step()
    ours, flops, rate = statistics.median(times["ours"]), counter.get_total_flops(), matrix_rate(device)
    result = {"script": name, "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "batch_size": args.batch_size, "image_size": size, "gflop_per_step": flops / 1e9,
              "matrix_gflop_per_s": rate / 1e9, "share_of_matrix_rate": flops / ours / rate}
    for name_, values in times.items():
        result[f"{name_}_ms"] = 1000 * statistics.median(values)
        ratios = [value / our for value, our in zip(values, times["ours"])]
        result[f"{name_}_over_ours"] = [min(ratios), statistics.median(ratios), max(ratios)]
    result["images_per_s"] = args.batch_size / ours
    return result | ({"peak_mib": peaks["ours"]} if peaks else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(BENCHES), help="which; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=40, help="time spent on a script")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    options, extra = parser.parse_known_args()
    results = [bench(name, torch.device(options.device), options.seconds, extra) for name in options.scripts]
    for result in results:
        low, middle, high = result["textbook_over_ours"]
        print("{script}: {ours_ms:.1f} ms a step, {images_per_s:.0f} images/s; the textbook {textbook_ms:.1f} ms, "
              .format(**result) + f"{middle:.2f} times ours ({low:.2f} to {high:.2f})")
        print("  {gflop_per_step:.1f} GFLOP a step: {share:.0f} % of the {matrix_gflop_per_s:.0f} GFLOP/s of a matrix "
              "product".format(share=100 * result["share_of_matrix_rate"], **result))
        if "eager_ms" in result:
            print(f"  without a graph {result['eager_ms']:.1f} ms: {result['eager_over_ours'][1]:.2f} times ours; "
                  f"peak memory {result['peak_mib']:.0f} MiB")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
