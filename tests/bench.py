"""Times our training steps in fp32 against two plain ways to train the same networks, in alternating rounds.

    python tests/bench.py                               # every script, on the device at hand
    python tests/bench.py wgan_gp --no-stddev           # other flags go to the script
    python tests/bench.py began --precision bf16        # the plain ways stay in fp32
    python tests/bench.py --against ../older            # only against the same step of another checkout

"Textbook" is how the networks are usually trained: NCHW, a DataLoader, PyTorch's plain Adam and .item() in every step.
Unrolled GAN is unrolled by the package higher there, if that is installed. "Good plain" is what an expert would write:
channels last, data on the device, a fused Adam and no .item(), and unrolling over a dict of parameters with one batch.
Both up-sample and then convolve, pass images through D three times, and take separate backward passes.

Ratios are medians over the rounds, with their range. On one CPU thread the time is the process's own, so that other
programs disturb less.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

import began  # noqa: E402
import common  # noqa: E402
import ebgan  # noqa: E402
import unrolled_gan  # noqa: E402
import wgan_gp  # noqa: E402

ROUNDS = 15


def up_and_convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)


class Plain:
    """Networks, data and optimizers of a baseline, either good plain or textbook."""

    def __init__(self, module: ModuleType, args: argparse.Namespace, data: Tensor, good: bool):
        self.args, self.data, self.good, self.k, self.done = args, data.to(args.device), good, 0.0, 0
        self.batches = self.draw()
        if module is unrolled_gan:
            self.generator, self.discriminator = (
                nn.Sequential(nn.Linear(inputs, args.width), nn.ReLU(), nn.Linear(args.width, args.width), nn.ReLU(),
                              nn.Linear(args.width, outputs)) for inputs, outputs in ((args.latent, 2), (2, 1)))
        else:
            kinds = module.Generator, getattr(module, "Critic", None) or module.Discriminator
            with mock.patch.object(wgan_gp, "pixel_norm", lambda x: x / (x.square().mean(1, True) + 1e-8).sqrt()):
                self.generator, self.discriminator = (module.build(kind, vars(args)) for kind in kinds)
        for network in self.generator, self.discriminator:
            for layer in network.modules():
                if "UpConv" in type(layer).__name__:
                    layer.__class__ = type("PlainUpConv", (type(layer),), dict(forward=up_and_convolve))
            network.to(args.device, memory_format=torch.channels_last if good else torch.contiguous_format)
        self.adam_g, self.adam_d = (torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.99), fused=good or None)
                                    for network in (self.generator, self.discriminator))
        self.average = copy.deepcopy(self.generator)

    def draw(self) -> Iterator[Tensor]:
        """Batches of points or of pictures on the device, or of PIL's pictures from a DataLoader."""
        data, count = self.data, self.args.batch_size
        while data.ndim == 2:
            modes = data[torch.randint(len(data), (count,), device=data.device)]
            yield modes + 0.02 * torch.randn_like(modes)
        while self.good:
            yield common.normalise(data[torch.randint(len(data), (count,), device=data.device)])
        from torchvision.transforms import functional

        pictures = [functional.to_pil_image(image) for image in data]
        loader = torch.utils.data.DataLoader(pictures, count, shuffle=True, drop_last=True, collate_fn=lambda batch:
                                             torch.stack([functional.to_tensor(one) * 2 - 1 for one in batch]))
        while True:
            for batch in loader:
                yield batch.to(self.args.device)

    def samples(self) -> Tensor:
        return self.generator(torch.randn(self.args.batch_size, self.args.latent, device=self.args.device))

    def read(self, *values: Tensor) -> list:
        """Read numbers back from the device, unless the baseline is a good one."""
        return list(values) if self.good else [value.item() for value in values]


def descend(adam: torch.optim.Adam, loss: Tensor) -> None:
    """L_G leaves gradients in D too, which zero_grad removes before D's own step."""
    adam.zero_grad()
    loss.backward()
    adam.step()


def began_step(plain: Plain) -> None:
    args, fake = plain.args, plain.samples()

    def losses(images: Tensor) -> tuple[Tensor, Tensor]:
        reconstructions, codes = plain.discriminator(images)
        loss = began.reconstruction_loss(images, reconstructions, args.eta)
        return loss, loss + args.pt_weight * plain.k * began.pull_away_term(codes)

    descend(plain.adam_g, losses(fake)[1])
    (real_loss, _), (fake_loss, loss_g) = losses(next(plain.batches)), losses(fake.detach())
    descend(plain.adam_d, real_loss - plain.k * loss_g)
    [plain.k] = plain.read(began.balance(plain.k, real_loss, fake_loss, args.gamma, args.lambda_k)[0])


def ebgan_step(plain: Plain) -> None:
    fake = plain.samples()
    reconstructions, codes = plain.discriminator(fake)
    loss_g = ebgan.generator_loss(ebgan.energy(fake, reconstructions), codes, plain.args.pt_weight)
    descend(plain.adam_g, loss_g)
    energies = [ebgan.energy(v, plain.discriminator(v)[0]) for v in (next(plain.batches), fake.detach())]
    loss_d = ebgan.discriminator_loss(*energies, plain.args.margin)
    descend(plain.adam_d, loss_d)
    plain.read(loss_d, loss_g)


def stddev(x: Tensor, _: int) -> Tensor:
    deviation = (x.var(dim=0, correction=0) + 1e-8).sqrt().mean()
    return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], dim=1)


@mock.patch.multiple(wgan_gp, minibatch_stddev=stddev, dropout=F.dropout, leaky_relu=lambda x: F.leaky_relu(x, 0.2))
def wgan_gp_step(plain: Plain) -> None:
    args, critic = plain.args, plain.discriminator
    for _ in range(args.n_critic):
        real = next(plain.batches)
        with torch.no_grad():
            fake = plain.samples()
        epsilon = torch.rand(len(real), 1, 1, 1, device=args.device)
        between = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
        gradient = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0]
        penalty = ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
        loss_c = wgan_gp.critic_loss(critic(real), critic(fake), penalty, args.gp_weight, args.drift)
        descend(plain.adam_d, loss_c)
    loss_g = -critic(plain.samples()).mean()
    descend(plain.adam_g, loss_g)
    for mean, parameter in zip(plain.average.parameters(), plain.generator.parameters()):
        mean.data.lerp_(parameter.data, 1 - args.ema)
    plain.read(loss_c, loss_g)


def unrolled_gan_step(plain: Plain) -> None:
    real, fake, discriminator = next(plain.batches), plain.samples(), plain.discriminator

    def loss(theta: dict[str, Tensor], fake: Tensor = fake) -> Tensor:
        logits = (functional_call(discriminator, theta, (points,)) for points in (real, fake))
        return unrolled_gan.discriminator_loss(*logits)

    now = dict(discriminator.named_parameters())
    theta = plain_unroll(now, plain.adam_d, loss, plain.args.unroll_steps, plain.done)
    losses = F.softplus(-functional_call(discriminator, theta, (fake,))).mean(), loss(now, fake.detach())
    descend(plain.adam_g, losses[0])
    descend(plain.adam_d, losses[1])
    plain.done += 1
    plain.read(*losses)


def plain_unroll(theta: dict[str, Tensor], adam: torch.optim.Adam, loss: Callable, steps: int, done: int) -> dict:
    """Parameters after more ``steps`` of an Adam that has ``done`` some, differentiably."""
    [group] = adam.param_groups
    beta1, beta2 = group["betas"]
    m, v = ([adam.state.get(p, {}).get(name, 0) for p in theta.values()] for name in ("exp_avg", "exp_avg_sq"))
    for t in range(done + 1, done + steps + 1):
        gradients = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
        m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, gradients)]
        v = [beta2 * a + (1 - beta2) * g * g for a, g in zip(v, gradients)]
        roots = [(a.clamp(min=1e-36) / (1 - beta2**t)).sqrt() + group["eps"] for a in v]
        m_hat = [group["lr"] / (1 - beta1**t) * a for a in m]
        theta = {name: p - a / root for (name, p), a, root in zip(theta.items(), m_hat, roots)}
    return theta


def higher_step(plain: Plain) -> None:
    """The calls of the public unroll_gan, with new points in every unrolled step."""
    import higher
    discriminator, adam = plain.discriminator, plain.adam_d

    def losses(network: nn.Module, fake: Tensor) -> list[Tensor]:
        return [-network(next(plain.batches)).sigmoid().log().mean(), -(1 - network(fake).sigmoid()).log().mean()]

    parts = losses(discriminator, plain.samples().detach())
    descend(adam, sum(parts))
    plain.read(*parts)
    adam.zero_grad()
    backup = copy.deepcopy(discriminator)
    with higher.innerloop_ctx(discriminator, adam) as (network, optimizer):
        for _ in range(plain.args.unroll_steps):
            parts = losses(network, plain.samples())
            optimizer.step(sum(parts))
            plain.read(*parts)
        loss_g = -network(plain.samples()).sigmoid().log().mean()
        descend(plain.adam_g, loss_g)
    discriminator.load_state_dict(backup.state_dict())
    plain.read(loss_g)


BENCHES = {  # name: script, its flags, the plain step
    "began": (began, "--precision fp32", began_step),
    "ebgan": (ebgan, "--precision fp32", ebgan_step),
    "unrolled_gan": (unrolled_gan, "--activation relu", unrolled_gan_step),
    "unrolled_gan-0": (unrolled_gan, "--activation relu --unroll-steps 0", unrolled_gan_step),
    "wgan_gp": (wgan_gp, "--precision fp32", wgan_gp_step),
}


class Stop(Exception):
    """Leaves ``train`` with its step in hand."""


def our_step(module: ModuleType, flags: list[str]) -> tuple[Callable, dict]:
    """One turn of the loop in ``train`` (random numbers, batches and ``update``), and the variables of ``train``."""
    found, seed = {}, torch.manual_seed

    def leave(number: int) -> None:
        """In the place of torch.manual_seed: stop before the second step."""
        caller = sys._getframe(1).f_locals
        if caller.get("step") == 1:
            found.update(caller)
            raise Stop
        seed(number)

    args = module.make_parser().parse_args(flags, argparse.Namespace(**module.NOT_SETTINGS))
    with tempfile.TemporaryDirectory() as args.out, contextlib.suppress(Stop), contextlib.redirect_stdout(None), \
            mock.patch.object(torch, "manual_seed", leave):
        module.train(args)
    update, batches = found["update"], found.get("batches")
    step_once = module.cuda_graph(update) if args.graph and args.device == "cuda" else update
    steps = itertools.count()

    def turn() -> None:
        torch.manual_seed(next(steps))  # other batches each time: the time of ELU depends on what D has learnt
        if batches:
            batches.refill()
        step_once()

    for _ in range(5):
        turn()  # records the graph before another contestant changes the stream
    if args.device == "cuda":
        found["peak"] = f", peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return turn, found


def load_from(folder: str, name: str) -> ModuleType:
    """Import a script and its common.py from another folder, beside those already imported."""
    kept = {imported: sys.modules.pop(imported) for imported in ("common", name)}
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
        sys.modules.update(kept)


def time_of(step: Callable, device: str, seconds: float = 0.0) -> float:
    """The mean seconds of a step, over as many steps as fit into ``seconds``."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started, count = clock(), 0
    while count == 0 or clock() - started < seconds:
        step()
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return (clock() - started) / count


def bench(name: str, device: str, seconds: float, against: str | None, extra: list[str]) -> None:
    module, flags, plain_step = BENCHES[name]
    flags = [*flags.split(), "--device", device, *extra]
    ours, found = our_step(module, flags)
    steps, args = dict(ours=ours), found["args"]
    if device == "cuda":
        steps["eager"], _ = our_step(module, [*flags, "--no-graph"])
    if against:
        steps["against"], _ = our_step(load_from(against, module.__name__), flags)
    else:
        data = unrolled_gan.mixture("ring")[0] if module is unrolled_gan else found["images"]
        good, textbook = (Plain(module, args, data, kind) for kind in (True, False))
        steps["good plain"] = lambda: plain_step(good)
        if module is not unrolled_gan or args.unroll_steps == 0:
            steps["textbook"] = lambda: plain_step(textbook)
        elif importlib.util.find_spec("higher"):
            steps["textbook"] = lambda: higher_step(textbook)

    for step in [*steps.values()] * 5:  # to warm up
        step()
    rounds = [{kind: time_of(step, device, seconds / ROUNDS / len(steps)) for kind, step in steps.items()}
              for _ in range(ROUNDS)]
    print(f"{name} ({' '.join(flags)}){found.get('peak', '')}")
    for kind in steps:
        ratios = [times[kind] / times["ours"] for times in rounds]
        milliseconds = 1000 * statistics.median(times[kind] for times in rounds)
        print(f"  {kind}: {milliseconds:.2f} ms, {statistics.median(ratios):.3f} times ours "
              f"({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60, help="time spent on a script")
    parser.add_argument("--against", metavar="FOLDER", help="another checkout of this repository")
    options, extra = parser.parse_known_args()
    if unknown := set(options.names) - BENCHES.keys():
        parser.error(f"there is no {', '.join(unknown)}; name scripts before their flags")
    # In fp32 expm1, and so ELU, takes 13 times as long on some CPUs until a tanh in bf16 has run
    torch.zeros(100_000, dtype=torch.bfloat16).tanh()
    for name in options.names or BENCHES:
        bench(name, options.device, options.seconds, options.against, extra)


if __name__ == "__main__":
    main()
