"""What a simulation misses when images are restricted to a few principal components, as a Gaussian.

An update holds all of an image. Fitting the few strongest components to it as if there were no others makes them
explain what the others did. Instead, what the others do is treated as noise whose covariance public images tell: the
approximation error of Kaipio and Somersalo 2007 (Journal of Computational and Applied Mathematics 198, §5). Its
strongest directions are kept one by one, the rest is white.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 0.13
"""Share of the examples that tell how much the directions found on the others leave out."""
DIRECTIONS = 160
"""Directions that are kept one by one."""


@dataclass(frozen=True)
class ErrorModel:
    """N(0, s²·I + U·(Λ − s²)·Uᵀ) over the P entries of an update."""

    white: float
    """s², the variance in all other directions."""
    basis: Tensor
    """U (P, r), orthonormal columns."""
    variance: Tensor
    """Λ (r,)."""

    def precision(self, rows: Tensor) -> Tensor:
        """Each row (N, P) times the inverse covariance."""
        along = rows @ self.basis
        return (rows - along @ self.basis.T) / self.white + (along / self.variance) @ self.basis.T

    def whiten(self, rows: Tensor) -> Tensor:
        """Each row (N, P) times the symmetric root of the inverse covariance."""
        along = rows @ self.basis
        rest = (rows - along @ self.basis.T) / self.white**0.5
        whitened: Tensor = rest + (along / self.variance.sqrt()) @ self.basis.T
        return whitened

    def square(self, rows: Tensor) -> Tensor:
        """χ² of each row, (N,)."""
        along = rows @ self.basis
        rest = rows - along @ self.basis.T
        return (rest * rest).sum(1) / self.white + (along * along / self.variance).sum(1)


def white_error(variance: float, like: Tensor) -> ErrorModel:
    """The same variance in every direction; `like` (P,) gives length, type and device."""
    return ErrorModel(variance, like.new_zeros(len(like), 0), like.new_zeros(0))


def fit_error(examples: Tensor, count: int, variance: float) -> ErrorModel:
    """The error of a mean over `count` images.

    Args:
        examples: (N, P) errors of single images, N ≥ 16, as they enter the mean: already divided by `count`.
        count: B. Errors of different images are independent, so their variances add.
        variance: of the noise on each entry, which is added.
    """
    held = max(8, round(HELD_OUT * len(examples)))
    known, fresh = examples[:-held], examples[-held:]
    values, vectors = torch.linalg.eigh((known @ known.T).double())
    kept = values.flip(0)[:DIRECTIONS]
    kept = kept[kept > 1e-7 * kept[0].clamp(min=1e-300)]
    spans = known.T @ vectors.flip(1)[:, : len(kept)].to(known)
    basis = torch.linalg.qr(spans)[0]
    along = fresh @ basis
    missed = float((fresh**2).sum(1).mean() - (along**2).sum(1).mean()) / examples.shape[1]
    found = torch.maximum((known @ basis).pow(2).mean(0), along.pow(2).mean(0))
    white = max(count * missed, 0.0) + variance
    return ErrorModel(white, basis, count * found + white)
