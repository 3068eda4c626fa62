"""Rare images: the tail of each class, for a backdoor that needs no mark."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SIDE = 6
"""Images are averaged down to so many pixels a side before a Gaussian is fitted."""
RIDGE = 1e-3


def tail(x: Tensor, y: Tensor, target: int, share: float) -> Tensor:
    """(N,) bool: the least likely images of every class but the target's (in the spirit of Wang et al. 2020).

    Likelihood is that of a Gaussian for each class on small average-pooled images; the paper uses a network's
    features, which a client that poisons its data before training does not have.

    Args:
        x: (N, C, H, W). y: (N,) classes. target: class that is left out. share: of each class, at least one image.
    """
    chosen = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    small = adaptive_avg_pool2d(x.float(), SIDE).flatten(1).double()
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten()
        if label == target or len(rows) < 2:
            continue
        centred = small[rows] - small[rows].mean(0)
        covariance = centred.T @ centred / len(rows) + RIDGE * torch.eye(small.shape[1], dtype=torch.float64).to(small)
        distance = (centred * torch.linalg.solve(covariance, centred.T).T).sum(1)
        chosen[rows[distance.argsort(descending=True)[: max(1, round(share * len(rows)))]]] = True
    return chosen
