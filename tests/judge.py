"""Scores generated images with a small classifier of the dataset that they imitate.

    python tests/judge.py faces runs/began-001               # 2,000 samples of a run. Takes checkpoints and PNGs too
    python tests/judge.py stacked-mnist runs/wgan_gp-001     # 1,000 modes, in 25,600 samples

frechet       Fréchet distance to real images, as a multiple of the distance of held-out real images: 1 is perfect
precision     fraction of the samples that lie among real images: how many of them look right
recall        fraction of the real images that lie among samples: how much of the variety is covered
least_class   fraction of the samples in the class that the classifier finds least often
kl            KL divergence of the samples' class frequencies from the real ones, in nats
modes         of stacked digits: how many of the 1,000 numbers are found. Here kl is the divergence from even shares

Features are the classifier's, whitened (but not with --raw), so that small details count as much as the label does. The
classifier is trained on images that no run sees, or on 4,500 of MNIST's. A point lies among others if it is closer
to one of them than that one's third nearest neighbour (Kynkäänniemi et al., 2019, arXiv:1904.06991).
"""

import argparse
import importlib
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


class Classifier(nn.Module):
    """Images [N, C, size, size] to features [N, 64] and logits [N, classes]."""

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        widths = [min(128, 32 << level) for level in range(size.bit_length() - 3)]  # 32x32 to 4x4: 3 levels
        blocks = []
        for inputs, outputs in zip([channels, *widths], widths):
            blocks += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, 64))
        self.last = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.last(features.relu())


def trained(images: Tensor, labels: Tensor, steps: int) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    adam = torch.optim.Adam(classifier.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        batch = images[index].roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))  # shifted by up to two pixels
        adam.zero_grad()
        F.cross_entropy(classifier(batch)[1], labels[index]).backward()
        adam.step()
        schedule.step()
    return classifier.eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of normals fitted to features a and b [N, D]: |mean|^2 + tr(A + B - 2 (A B)^1/2)."""
    a, b = a.double(), b.double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    return ((a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * roots.sum()).item()


def among(points: Tensor, others: Tensor, neighbours: int = 3) -> float:
    """Fraction of points [N, D] closer to one of the others [M, D] than that one's third nearest neighbour is."""
    radii = torch.cdist(others, others).kthvalue(neighbours + 1).values  # the first is the point itself
    return (torch.cdist(points, others) <= radii).any(1).double().mean().item()


def to_tensor(pictures: list[Image.Image], channels: int) -> Tensor:
    pixels = np.stack([np.asarray(picture).reshape(picture.height, picture.width, channels) for picture in pictures])
    return common.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def drawings(data: str, seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images [count, C, size, size] of a generated dataset, and their labels. Runs are trained on seed 0."""
    draw, channels = common.DRAWN[data]
    images, labels = zip(*(draw(random.Random(f"{seed}-{index}"), size) for index in range(count)))
    return to_tensor(images, channels), torch.tensor(labels)


class Judge:
    """Scores images of a labelled dataset. It is trained in a minute or two, then kept in the folder ``root``/cache."""

    def __init__(self, data: str, root: str = "data", size: int = 32, count: int = 6000, steps: int = 1500, raw=False):
        path = Path(root, f"cache/judge{VERSION}-{data}-{size}-{count}-{steps}.pt")
        with torch.random.fork_rng(devices=[]):
            if not path.exists():
                content = self._train(data, root, size, count, steps)
                with common.atomic_write(path) as file:
                    torch.save(content, file)
            content = torch.load(path, weights_only=True)
            self.classifier = Classifier(*content["shape"]).eval()
        self.classifier.load_state_dict(content["classifier"])
        self.accuracy, self.frequencies = content["accuracy"], content["frequencies"]
        values, vectors = torch.linalg.eigh(content["real"].double().T.cov())
        used = values > 1e-4 * values.max()  # directions in which the features vary
        self.whiten = torch.eye(64) if raw else (vectors[:, used] / values[used].sqrt()).float()
        self.real, self.held_out = content["real"] @ self.whiten, content["held_out"] @ self.whiten
        self.unit = frechet(self.held_out, self.real)

    def _train(self, data: str, root: str, size: int, count: int, steps: int) -> dict:
        """The classifier, and its features of two sets of real images: those to compare with, and those held out."""
        if data in common.DRAWN:
            (seen, labels), (images, classes) = drawings(data, 1, count, size), drawings(data, 2, count, size)
            real, held_out, held_classes = images[count // 3:], images[:count // 3], classes[:count // 3]
        else:
            images = common.load_images(data, size, root=root)
            classes = torch.as_tensor(common._torchvision(data, root).targets)
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
    """How many of the 1,000 numbers are in stacked digits [N, 3, size, size], and KL(shares || 1 / 1,000) in nats."""
    red, green, blue = (digits.look(channel.clamp(-1, 1))[1] for channel in images.split(1, dim=1))
    shares = torch.bincount(100 * red + 10 * green + blue, minlength=1000).double() / len(images)
    return dict(modes=int((shares > 0).sum()), kl=torch.xlogy(shares, 1000 * shares).sum().item())


@torch.no_grad()
def sampled(path: str | Path, count: int = 2000) -> Tensor:
    """Samples [count, C, size, size] of a run's folder or checkpoint, the same at every call."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else path
    script = torch.load(file, map_location="cpu", weights_only=True)["script"]
    generator, settings = importlib.import_module(script).load_generator(path)
    random_numbers, shape = torch.Generator().manual_seed(0), (count, settings["latent"])
    normal, uniform = torch.randn(shape, generator=random_numbers), torch.rand(shape, generator=random_numbers)
    z = normal if script in ("wgan_gp", "unrolled_gan") else 2 * uniform - 1
    return torch.cat([generator(part) for part in z.split(250)])


def read_folder(folder: str | Path, channels: int) -> Tensor:
    pictures = (Image.open(path) for path in sorted(Path(folder).glob("*.png")))
    return to_tensor([picture.convert("L" if channels == 1 else "RGB") for picture in pictures], channels)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=[*common.DRAWN, "mnist", *common.STACKED])
    parser.add_argument("images", type=Path, help="a run's folder, a checkpoint, or a folder of PNGs")
    parser.add_argument("--data-root", default="data", help="folder for MNIST and for the cache of judges")
    parser.add_argument("--raw", action="store_true", help="do not whiten the features, so that the label counts most")
    args = parser.parse_args(argv)
    stacked, data = args.data in common.STACKED, common.STACKED.get(args.data, args.data)
    channels = 3 if stacked or data in ("faces", "fish") else 1
    of_pngs = args.images.is_dir() and not (args.images / "checkpoint.pt").exists()
    images = read_folder(args.images, channels) if of_pngs else sampled(args.images, 25_600 if stacked else 2_000)
    judge = Judge(data, args.data_root, images.shape[-1], raw=args.raw)
    scores = modes(judge, images) if stacked else judge.score(images)
    print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
