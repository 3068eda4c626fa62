"""A small network trained on public images: what anybody could look at a reconstruction with.

It gives features for re-identification, and a diagnosis. Images are shrunk to at most 32 pixels, and the number of
training steps is fixed, so that it costs some two CPU seconds whatever the data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsec.metrics.image import pixel_hash

LEAST_IMAGES = 200
"""Public images below which no encoder is trained."""
SIDE = 32
STEPS, BATCH, RATE = 200, 64, 3e-3
_BLOCK = 512


@dataclass(frozen=True)
class PublicEncoder:
    """A trained encoder with its classifier."""

    body: nn.Module
    head: nn.Linear
    centre: Tensor
    """Mean features of the public images: what all images have in common says nothing about a patient."""
    classes: int
    images: int
    """Public images that it was trained on."""
    seconds: float
    """CPU time of the training."""

    def features(self, images: Tensor) -> Tensor:
        """(B, F) float32, about their public mean, of images (B, C, H, W) in [0, 1]."""
        return self._raw(images) - self.centre

    def classify(self, images: Tensor) -> Tensor:
        """(B,) the class that the classifier gives each image."""
        return self.head(self._raw(images)).argmax(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _raw(self, images: Tensor) -> Tensor:
        return torch.cat([self.body(shrink(part)) for part in images.split(_BLOCK)])


_trained: dict[tuple[str, int], PublicEncoder] = {}
"""Of this process: the cells of a run share their public images."""


def train_encoder(images: Tensor, labels: Tensor, seed: int) -> PublicEncoder | None:
    """Train on public images; the same images and seed give the same encoder, trained once a process.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: (N,) classes.
        seed: of the initial weights and the order.

    Returns:
        None with fewer than 200 images, fewer than two classes, or several labels an image.
    """
    if labels.ndim != 1 or len(images) < LEAST_IMAGES or len(labels.unique()) < 2:
        return None
    key = ("".join(pixel_hash(images)) + repr(labels.tolist()), seed)
    if key not in _trained:
        _trained.clear()
        _trained[key] = _train(images.detach().cpu().float(), labels.cpu().long(), seed)
    return _trained[key]


def shrink(images: Tensor) -> Tensor:
    """Float32 images on the CPU of at most 32 x 32 pixels, by averaging."""
    images = images.detach().cpu().float()
    side = min(SIDE, images.shape[2]), min(SIDE, images.shape[3])
    return images if tuple(images.shape[2:]) == side else F.adaptive_avg_pool2d(images, side)


def _train(images: Tensor, labels: Tensor, seed: int) -> PublicEncoder:
    began = time.process_time()
    small, count = shrink(images), int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body, head = _network(small), nn.Linear(32 * 16, count)
    # Classes are drawn equally often: a majority answer is of no use.
    weights = (1 / torch.bincount(labels, minlength=count))[labels]
    model = nn.Sequential(body, head)
    optimizer = torch.optim.Adam(model.parameters(), RATE, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-2, STEPS)
    for _ in range(STEPS):
        rows = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(small[rows]), labels[rows]).backward()
        optimizer.step()
        decay.step()
    model.eval().requires_grad_(False)
    centre = torch.cat([body(part) for part in small.split(_BLOCK)]).mean(0)
    return PublicEncoder(body, head, centre, count, len(images), time.process_time() - began)


def _network(images: Tensor) -> nn.Module:
    level, spread = float(images.mean()), float(images.std().clamp(min=1e-3))
    layers: list[nn.Module] = [_Standardise(level, spread)]
    before = images.shape[1]
    for width, stride in ((16, 2), (32, 2), (32, 1)):
        layers += [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(width // 8, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())


class _Standardise(nn.Module):
    def __init__(self, level: float, spread: float) -> None:
        super().__init__()
        self.level, self.spread = level, spread

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.level) / self.spread
