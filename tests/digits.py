"""Scores pictures of digits by a small classifier: how sure it is, how even the classes are, and a Fréchet distance."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common


class Classifier(nn.Module):
    """Images [N, 1, 32, 32] in [-1, 1] to features [N, 64] and logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
        self.last = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.last(F.dropout(features, 0.3, self.training))


def trained(images: Tensor, labels: Tensor, steps: int = 700) -> Classifier:
    """A classifier of these images [N, 1, 32, 32], trained on batches that are shifted by up to two pixels."""
    torch.manual_seed(0)
    classifier = Classifier()
    adam = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        batch = images[index].roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(classifier(batch)[1], labels[index])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return classifier.eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the normals that fit features a and b [N, 64]: |mean|^2 + tr(A + B - 2 (A B)^1/2)."""
    a, b = a.double(), b.double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return (gap + a.T.cov().trace() + b.T.cov().trace() - 2 * roots.sum()).item()


class Judge:
    """Scores samples of a data set of digits, ``mnist`` or the drawn ``digits``."""

    def __init__(self, data: str, root: str):
        images, labels = common.load_images(data, 32, root=root), common.load_labels(data, root=root)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:5000]
        images, labels = common.normalise(images[order]).contiguous(), labels[order]
        fit, held = slice(None, 3000), slice(3000, None)
        self.classifier = trained(images[fit], labels[fit])
        with torch.no_grad():
            self.reference = self.classifier(images[fit])[0]
            features, logits = self.classifier(images[held])
        self.accuracy = (logits.argmax(1) == labels[held]).double().mean().item()
        self.unit = frechet(features, self.reference)  # of 2,000 real digits that the classifier has not seen

    @torch.no_grad()
    def score(self, images: Tensor) -> dict[str, float]:
        """Of samples [N, 1, 32, 32] in [-1, 1]: ``frechet`` is a multiple of the distance of held-out real digits."""
        features, logits = map(torch.cat, zip(*(self.classifier(part) for part in images.split(500))))
        shares = torch.bincount(logits.argmax(1), minlength=10) / len(images)
        return dict(frechet=frechet(features, self.reference) / self.unit, least_class=shares.min().item(),
                    confidence=logits.softmax(1).max(1).values.median().item(),
                    kl=torch.xlogy(shares, 10 * shares).sum().item(), accuracy=self.accuracy)
