"""Scores generated images with a small classifier of the dataset that they imitate.

    python tests/judge.py faces runs/began-001/checkpoint.pt     # 2,000 samples from a checkpoint of any image script
    python tests/judge.py mnist runs/ebgan-001/sample-001        # a folder of PNGs
    python tests/judge.py stacked-mnist runs/unrolled_gan-001/checkpoint.pt    # 1,000 modes, in 25,600 samples

frechet       Fréchet distance to real images, as a multiple of the distance of held-out real images: 1 is perfect
precision     fraction of the samples that lie among real images: how many of them look right
recall        fraction of the real images that lie among samples: how much of the variety is covered
least_class   fraction of the samples in the class that the classifier finds least often
kl            KL divergence of the samples' class frequencies from the real ones, in nats
modes         of stacked digits: how many of the 1,000 numbers are found; their kl is from even shares

Distances are between the classifier's features, whitened (but for --raw) so that small details count as much as the
label does. The classifier is trained on images that no run sees; of MNIST it has nine tenths, and the rest is held out.
A point lies among others if it is closer to one of them than that one's third nearest neighbour (Kynkäänniemi et al.,
2019, arXiv:1904.06991). Precision and recall of held-out real images are about 0.8.
"""

import argparse
import importlib
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

VERSION = 1  # increase it when a drawing, or anything else in a judge, changes


def load_labels(source: str, root: str = "data") -> Tensor:
    """The classes of digits, faces, fish, mnist, fashion, cifar10, or stacked digits (0 to 999): int64 [N]."""
    if source in common.DRAWN:
        draw = common.DRAWN[source][0]
        seeds = (f"{common.DRAWN_SEED}-{index}" for index in range(common.DRAWN_COUNT))
        return torch.tensor([draw(random.Random(seed), 8)[1] for seed in seeds])
    if source in common.STACKED:
        digits = load_labels(common.STACKED[source], root)
        return digits[common._stacked(len(digits))] @ torch.tensor([100, 10, 1])
    return torch.as_tensor(common._torchvision(source, root).targets)


class Classifier(nn.Module):
    """Images [N, C, size, size] to features [N, 64] and logits [N, classes]."""

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        widths = [min(128, 32 << level) for level in range(int(math.log2(size // 4)))]
        blocks = []
        for inputs, outputs in zip([channels, *widths], widths):
            blocks += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, 64))
        self.last = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.last(features.relu())


def trained(images: Tensor, labels: Tensor, steps: int) -> Classifier:
    """A classifier trained on images [N, C, size, size], each batch of which is shifted by up to two pixels."""
    torch.manual_seed(0)
    classifier = Classifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    adam = torch.optim.Adam(classifier.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        batch = images[index].roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(classifier(batch)[1], labels[index])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return classifier.eval()


def whitening(features: Tensor) -> Tensor:
    """The matrix [D, d] that gives these features [N, D] unit covariance in the d directions in which they vary."""
    values, vectors = torch.linalg.eigh(features.double().T.cov())
    used = values > 1e-4 * values.max()
    return (vectors[:, used] / values[used].sqrt()).float()


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of normals fitted to features a and b [N, D]: |mean|^2 + tr(A + B - 2 (A B)^1/2)."""
    a, b = a.double(), b.double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + a.T.cov().trace() + b.T.cov().trace() - 2 * roots.sum()).item()


def among(points: Tensor, others: Tensor, neighbours: int = 3) -> float:
    """Fraction of points [N, D] closer to one of the others [M, D] than that one's third nearest neighbour is."""
    radii = torch.cdist(others, others).kthvalue(neighbours + 1).values  # the first is the point itself
    return (torch.cdist(points, others) <= radii).any(1).double().mean().item()


def drawings(data: str, seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images [count, C, size, size] of a generated dataset, and their labels. Runs are trained on seed 0."""
    draw, channels = common.DRAWN[data]
    images, labels = zip(*(draw(random.Random(f"{seed}-{index}"), size) for index in range(count)))
    pixels = np.stack([np.asarray(image).reshape(size, size, channels) for image in images])
    return common.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)), torch.tensor(labels)


class Judge:
    """Scores images of a labelled dataset. It is trained in a minute or two, then kept in the folder ``root``/cache."""

    def __init__(self, data: str, root: str = "data", size: int = 32, count: int = 6000, steps: int = 1500,
                 raw: bool = False):
        path = Path(root, f"cache/judge{VERSION}-{data}-{size}-{count}-{steps}.pt")
        with torch.random.fork_rng(devices=[]):
            if not path.exists():
                content = self._train(data, root, size, count, steps)
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(content, path)
            content = torch.load(path, weights_only=True)
            self.classifier = Classifier(*content["shape"]).eval()
        self.classifier.load_state_dict(content["classifier"])
        self.accuracy, self.frequencies = content["accuracy"], content["frequencies"]
        self.whiten = torch.eye(64) if raw else whitening(content["real"])
        self.real, self.held_out = content["real"] @ self.whiten, content["held_out"] @ self.whiten
        self.unit = frechet(self.held_out, self.real)

    def _train(self, data: str, root: str, size: int, count: int, steps: int) -> dict:
        """The classifier, and its features of two sets of real images: those to compare with, and those held out."""
        if data in common.DRAWN:
            seen, labels = drawings(data, 1, count, size)
            images, classes = drawings(data, 2, count, size)
            real, held_out, held_classes = images[count // 3:], images[:count // 3], classes[:count // 3]
        else:
            images, classes = common.load_images(data, size, root=root), load_labels(data, root)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:5000]
            images, classes = common.normalise(images[order]), classes[order]
            seen, labels, held_out, held_classes = images[500:], classes[500:], images[:500], classes[:500]
            real = seen
        self.classifier = trained(seen, labels, steps)
        held_features, predicted = self.look(held_out)
        return dict(shape=[seen.shape[1], size, int(labels.max()) + 1], classifier=self.classifier.state_dict(),
                    real=self.look(real)[0], held_out=held_features, frequencies=torch.bincount(labels) / len(labels),
                    accuracy=(predicted == held_classes).double().mean().item())

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 64], not whitened, and classes [N] of images in [-1, 1]."""
        features, logits = map(torch.cat, zip(*(self.classifier(part) for part in images.split(500))))
        return features, logits.argmax(1)

    def score(self, images: Tensor) -> dict[str, float]:
        """All measures of images [N, C, size, size]; values outside [-1, 1] are clipped, as in a picture."""
        features, classes = self.look(images.clamp(-1, 1))
        features = features @ self.whiten
        count = min(len(features), len(self.real), 2000)
        samples, real = features[:count], self.real[:count]
        found = torch.bincount(classes, minlength=len(self.frequencies)) / len(classes)
        return dict(frechet=frechet(features, self.real) / self.unit, precision=among(samples, real),
                    recall=among(real, samples), least_class=found.min().item(),
                    kl=torch.xlogy(found, found / self.frequencies).sum().item())


def modes(digits: Judge, images: Tensor) -> dict[str, float]:
    """Of stacked digits [N, 3, size, size]: how many of the 1,000 numbers ``digits`` reads in them, and their KL.

    KL(h || 1 / 1,000) in nats, where h are the shares of the numbers (Metz et al., 2016, table 1).
    """
    red, green, blue = (digits.look(images[:, channel:channel + 1].clamp(-1, 1))[1] for channel in range(3))
    shares = torch.bincount(100 * red + 10 * green + blue, minlength=1000).double() / len(images)
    return dict(modes=int((shares > 0).sum()), kl=torch.xlogy(shares, 1000 * shares).sum().item())


@torch.no_grad()
def sampled(path: str | Path, count: int = 2000) -> Tensor:
    """Samples [count, C, size, size] from a checkpoint of any image script, the same at every call."""
    script = torch.load(path, map_location="cpu", weights_only=True)["script"]
    generator, config = importlib.import_module(script).load_generator(path)
    random_numbers, shape = torch.Generator().manual_seed(0), (count, config["latent"])
    normal, uniform = torch.randn(shape, generator=random_numbers), torch.rand(shape, generator=random_numbers)
    z = normal if script in ("wgan_gp", "unrolled_gan") else 2 * uniform - 1
    return torch.cat([generator(part) for part in z.split(250)])


def read_folder(folder: str | Path, channels: int) -> Tensor:
    """The PNGs in a folder as images [N, channels, size, size]."""
    paths = sorted(Path(folder).glob("*.png"))
    pictures = [Image.open(path).convert("L" if channels == 1 else "RGB") for path in paths]
    pixels = np.stack([np.asarray(picture).reshape(*picture.size, channels) for picture in pictures])
    return common.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=[*common.DRAWN, "mnist", *common.STACKED])
    parser.add_argument("images", type=Path, help="a checkpoint, or a folder of PNGs")
    parser.add_argument("--data-root", default="data", help="folder for MNIST and for the cache of judges")
    parser.add_argument("--raw", action="store_true", help="features as they are, not whitened: the label counts most")
    args = parser.parse_args(argv)
    stacked, data = args.data in common.STACKED, common.STACKED.get(args.data, args.data)
    channels = 3 if stacked else 1 if data == "mnist" else common.DRAWN[data][1]
    count = 25_600 if stacked else 2_000
    images = read_folder(args.images, channels) if args.images.is_dir() else sampled(args.images, count)
    judge = Judge(data, args.data_root, images.shape[-1], raw=args.raw)
    scores = modes(judge, images) if stacked else judge.score(images)
    print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
