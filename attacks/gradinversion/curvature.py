"""Coordinates in which fitting B images at once is a round problem, from the Jacobians of a few images.

F(z) = rᵀ·W·r + Σ_i z_iᵀ·Λ⁻¹·z_i has the Gauss–Newton Hessian A_ik = J_iᵀ·W·J_k + δ_ik·Λ⁻¹, where J_i is what image i
adds to the simulated update. `Shared` replaces it by its expectation over images, which one factor for the mean of the
batch and one for all differences invert; `Full` factors it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RIDGE = 3e-3
"""Share by which diagonals are raised: float32 cannot factor them otherwise."""


class Curvature(Protocol):
    """z = T·w with TᵀAT near the identity; everything for R batches at once, (R, B, K)."""

    def place(self, point: Tensor) -> Tensor:
        """z of w."""

    def locate(self, coordinates: Tensor) -> Tensor:
        """w of z."""

    def pull(self, gradient: Tensor) -> Tensor:
        """∂F/∂w of ∂F/∂z."""


@dataclass(frozen=True)
class Shared:
    """A = 1·1ᵀ ⊗ H₀ + I ⊗ (H₁ + Λ⁻¹): H₀ from the mean of the Jacobians, H₁ from their spread."""

    together: Tensor
    """Cholesky factor of B·H₀ + H₁ + Λ⁻¹, (K, K): the batch moves as one."""
    apart: Tensor
    """Cholesky factor of H₁ + Λ⁻¹, (K, K): the mean of the batch stays."""
    rotation: Tensor
    """(B, B) orthogonal; the first column is constant."""

    def place(self, point: Tensor) -> Tensor:
        """z of w."""
        return self.rotation @ self._each(point, lambda factor, x: _solve(factor.T, x, upper=True))

    def locate(self, coordinates: Tensor) -> Tensor:
        """w of z."""
        return self._each(self.rotation.T @ coordinates, lambda factor, x: x @ factor)

    def pull(self, gradient: Tensor) -> Tensor:
        """∂F/∂w of ∂F/∂z."""
        return self._each(self.rotation.T @ gradient, lambda factor, x: _solve(factor, x, upper=False))

    def _each(self, rows: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        count, batch, rank = rows.shape
        mean = apply(self.together, rows[:, 0])[:, None]
        rest = apply(self.apart, rows[:, 1:].reshape(-1, rank)).view(count, batch - 1, rank)
        return torch.cat([mean, rest], 1)


@dataclass(frozen=True)
class Full:
    """The Hessian itself: for images whose shares of the update differ by much, as behind a trained model."""

    factor: Tensor
    """Cholesky factor of A (B·K, B·K)."""

    def place(self, point: Tensor) -> Tensor:
        """z of w."""
        return _solve(self.factor.T, point.flatten(1), upper=True).view_as(point)

    def locate(self, coordinates: Tensor) -> Tensor:
        """w of z."""
        return (coordinates.flatten(1) @ self.factor).view_as(coordinates)

    def pull(self, gradient: Tensor) -> Tensor:
        """∂F/∂w of ∂F/∂z."""
        return _solve(self.factor, gradient.flatten(1), upper=False).view_as(gradient)


def shared_curvature(slopes: Tensor, variance: Tensor, batch: int) -> Shared:
    """From the whitened Jacobians W^½·J_i of n images, as rows (n, K, P); n ≥ 2 where `batch` ≥ 2.

    `variance` is the prior's, Λ (K,).
    """
    mean = slopes.mean(0)
    common = mean @ mean.T
    spread = sum((s @ s.T for s in slopes), torch.zeros_like(common)) / len(slopes) - common
    spread = spread * (len(slopes) / max(1, len(slopes) - 1)) + (1 / variance).diag()
    start = torch.cat([torch.ones(batch, 1), torch.eye(batch)[:, 1:]], 1).to(slopes)
    return Shared(_factor(batch * common + spread), _factor(spread), torch.linalg.qr(start)[0])


def prior_curvature(variance: Tensor, batch: int) -> Shared:
    """The prior's own, where Jacobians cost too much."""
    factor = (1 / variance).sqrt().diag()
    return Shared(factor, factor, torch.eye(batch).to(variance))


def full_curvature(slopes: Tensor, variance: Tensor) -> Full:
    """From W^½·J_i of all B images, as rows (B, K, P)."""
    rows = slopes.flatten(0, 1)
    matrix = torch.cat([s @ rows.T for s in slopes])
    matrix.diagonal().add_((1 / variance).repeat(len(slopes)))
    return Full(_factor(matrix))


def _factor(matrix: Tensor) -> Tensor:
    for ridge in (RIDGE, 10 * RIDGE, 1.0):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * matrix.diagonal().diag())
        if int(info) == 0:
            return factor
    raise RuntimeError("the Gauss–Newton matrix cannot be factored: its entries are not finite or too far apart")


def _solve(factor: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=upper).T
    return solved
