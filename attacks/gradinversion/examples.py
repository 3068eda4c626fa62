"""Public images as stand-ins for those of a batch: what would each of them add to the update?

From them an attack learns what a simulation with few components misses, and where to start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from .approximation import ErrorModel, fit_error
from .clock import now
from .observation import Observation
from .prior import Prior

Share = Callable[[Tensor, Tensor], Tensor]
"""Image (1, C, H, W), label (1,) or (1, L) -> (P,): what that image adds to the update."""

COUNT = 480
"""Examples, where time and memory allow."""
LEAST = 64
AT_ONCE = 25_000_000
"""Entries of one set of examples."""
CHUNK = 64
UNEVEN = 3.0
"""Ratio of the 90th to the 10th percentile of their sizes from which shares differ by much."""


def share_of(observation: Observation) -> Share | None:
    """What one image adds to an update of one step, before the whole is clipped; 0 on entries that were not sent.

    None where the images of a batch share their moments. For several local steps, the first stands for all.
    """
    whole = observation.simulation
    norms = nn.modules.batchnorm._BatchNorm
    if observation.batch > 1 and any(isinstance(m, norms) and m.training for m in whole.model.modules()):
        return None
    alone = replace(
        whole, batch=1, steps=1, momentum=0.0, weight_decay=0.0, order=None, update_clip=None, norm=None, eager=False
    )
    weights = observation.weights / (observation.batch if whole.divisor is None else 1)
    return lambda image, label: alone.flat(image, label) * weights


@dataclass(frozen=True)
class Examples:
    """Public images with the labels of the batch, in the batch's proportions."""

    share: Share
    images: Tensor
    """(N, C, H, W)."""
    labels: Tensor
    shares: Tensor
    """(N, P)."""
    seconds: float
    """CPU time that one share cost."""

    @property
    def uneven(self) -> bool:
        """Do the shares differ by much in size?"""
        low, high = self.shares.norm(dim=1).quantile(torch.tensor([0.1, 0.9]).to(self.shares))
        return float(high) > UNEVEN * float(low)

    def error(self, prior: Prior, rank: int, like: Tensor, variance: float) -> ErrorModel:
        """What `rank` components miss of the update of a batch.

        Each example is brought to the size that the shares in rows `like` have: behind a trained model most public
        images add next to nothing, and a few very much.
        """
        restricted = prior.synthesise(prior.coordinates(self.images, rank))
        missed = self.shares - shares_of(self.share, restricted, self.labels)
        norms = self.shares.norm(dim=1, keepdim=True)
        size = norms[like].pow(2).mean().sqrt()
        return fit_error(missed * (size / norms.clamp(min=1e-6 * float(size))), len(like), variance)


def shares_of(share: Share, images: Tensor, labels: Tensor) -> Tensor:
    """(N, P)."""
    pairs = zip(images.split(CHUNK), labels.split(CHUNK), strict=True)
    together = vmap(lambda image, label: share(image[None], label[None]))
    return torch.cat([together(x, y) for x, y in pairs]).detach()


def find_examples(observation: Observation, labels: Tensor, seconds: float) -> Examples | None:
    """Examples whose shares cost no more than so many CPU seconds; None where that would be too few."""
    share = share_of(observation)
    images, named = _alike(observation.prior, labels)
    count = min(COUNT, len(images), AT_ONCE // max(1, observation.simulation.size))
    if share is None or count < LEAST:
        return None
    shares_of(share, images[:8], named[:8])
    began = now()
    shares_of(share, images[:8], named[:8])
    each = (now() - began) / 8
    count = min(count, int(seconds / max(each, 1e-9)))
    if count < LEAST:
        return None
    began = now()
    shares = shares_of(share, images[:count], named[:count])
    return Examples(share, images[:count], named[:count], shares, (now() - began) / count)


def _alike(prior: Prior, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Public images in an order in which the batch's labels follow one another; any images with those labels, where
    one of the classes has too few."""
    if labels.ndim > 1:
        return prior.images, prior.labels
    rows = [(prior.labels == label).nonzero()[:, 0] for label in labels]
    count = min(len(r) // int((labels == label).sum()) for r, label in zip(rows, labels, strict=True))
    if count * len(labels) < LEAST:
        return prior.images, labels.repeat(-(-len(prior.images) // len(labels)))[: len(prior.images)]
    used: dict[int, int] = {}
    chosen = []
    for row, label in zip(rows, labels.tolist(), strict=True):
        first = used.get(label, 0)
        chosen.append(row[first : first + count])
        used[label] = first + count
    order = torch.stack(chosen, 1).flatten()
    return prior.images[order], labels.repeat(count)
