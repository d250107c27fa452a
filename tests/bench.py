"""Times our training steps against the textbook way to train the same networks, alternately in one process.

    python tests/bench.py                        # every script, on the device at hand
    python tests/bench.py began --json out.json

Prints, for every script: images and steps a second of our step, of our step without a CUDA graph, and of the textbook
step; their ratios (medians over alternating rounds, with the range); and the share of the machine's measured
matrix-product rate that our step's floating-point operations reach.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import began

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


class PlainUpConv(began.UpConv):
    """Up-sampling, then the convolution at the full size."""

    def forward(self, x):
        return F.elu(F.conv2d(F.interpolate(x, scale_factor=2), self.weight, self.bias, padding=1))


def textbook(network: torch.nn.Module) -> torch.nn.Module:
    """The same network laid out NCHW, with every up-sampling carried out."""
    for layer in network.modules():
        if type(layer).__name__ == "UpConv":
            layer.__class__ = PlainUpConv
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


def began_textbook(args, images, device):
    """BEGAN as it is usually written: a DataLoader, three passes of D a step, .item() in every step."""
    generator, discriminator = (textbook(began.build(kind, vars(args))).to(device)
                                for kind in (began.Generator, began.Discriminator))
    g_adam, d_adam = (torch.optim.Adam(network.parameters(), lr=args.lr, betas=(0.5, 0.999))
                      for network in (generator, discriminator))
    loader = torch.utils.data.DataLoader(Pictures(images), args.batch_size, shuffle=True, drop_last=True)
    batches, k = iter(loader), 0.0

    def step():
        nonlocal k, batches
        try:
            real = next(batches)
        except StopIteration:
            batches = iter(loader)
            real = next(batches)
        real = real.to(device)
        fake = generator(torch.rand(args.batch_size, args.latent, device=device) * 2 - 1)
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


BENCHES = {"began": (began, began_textbook, [])}


class Stop(Exception):
    """Leaves ``train`` with the step in hand."""


def our_step(module, args, images):
    """The step that ``train`` hands to the loop, for the default settings."""
    taken = {}

    def take(_args, _state, _device, step, refill, *_):
        taken.update(step=step, refill=refill)
        raise Stop

    with mock.patch.object(module, "loop", take), contextlib.suppress(Stop), \
            mock.patch.object(module.common, "load_images", lambda *_, **__: images):
        module.train(args)
    return taken["step"], taken["refill"]


def bench(name: str, device: torch.device, seconds: float, extra: list[str]) -> dict:
    module, make_textbook, flags = BENCHES[name]
    args = module.parse_arguments([*flags, *extra, "--device", device.type])
    images = torch.randint(256, (2048, 3, args.image_size, args.image_size), dtype=torch.uint8)
    step, refill = our_step(module, args, images)
    contestants = {"ours": iter(step, None)} if device.type == "cpu" else {
        "ours": module.replays(step), "eager": iter(our_step(module, args, images)[0], None)}
    contestants["textbook"] = iter(make_textbook(args, images, device), False)
    for run in contestants.values():
        for _ in range(5):
            next(run)
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
              "batch_size": args.batch_size, "image_size": args.image_size, "gflop_per_step": flops / 1e9,
              "matrix_gflop_per_s": rate / 1e9, "share_of_matrix_rate": flops / ours / rate}
    for name_, values in times.items():
        result[f"{name_}_ms"] = 1000 * statistics.median(values)
        ratios = [value / our for value, our in zip(values, times["ours"])]
        result[f"{name_}_over_ours"] = [min(ratios), statistics.median(ratios), max(ratios)]
    result["images_per_s"] = args.batch_size / ours
    if device.type == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return result


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
            print(f"  without a graph {result['eager_ms']:.1f} ms: {result['eager_over_ours'][1]:.2f} times ours")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
