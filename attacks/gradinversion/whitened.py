"""Descent in coordinates in which the problem is round: one Jacobian, then cheap gradients.

F(z) = Σ_j (f_j(x) − t_j)²/s_j² + Σ_k z_k²/λ_k with x = μ + V·z, for functions of all images together, such as a local
training of several steps, whose Jacobian does not fall apart into those of its images. `curvature` has the coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lbfgs
from .clock import Clock
from .curvature import Curvature, full_curvature, prior_curvature
from .prior import Prior

OUTER = 5
"""Outer iterations of L-BFGS, of 20 steps each, before a new Jacobian is worth its time."""


@dataclass(frozen=True)
class Measured:
    """Measurements of B images, differentiable."""

    function: Callable[[Tensor], Tensor]
    """Images (B, C, H, W) -> (M,), for plain autograd."""
    target: Tensor
    """t (M,)."""
    variance: Tensor
    """s² (M,), infinite on entries to ignore."""
    penalty: Callable[[Tensor], Tensor] | None = None
    """Coordinates (B, K) -> a scalar to add to F."""

    def value(self, prior: Prior, coordinates: Tensor) -> Tensor:
        """F at coordinates (B, K)."""
        difference = self.function(prior.synthesise(coordinates)) - self.target
        total = torch.where(self.variance.isinf(), 0.0, difference**2 / self.variance).sum()
        total = total + (coordinates**2 / prior.variance[: coordinates.shape[1]]).sum()
        return total if self.penalty is None else total + self.penalty(coordinates)


def descend(measured: Measured, prior: Prior, start: Tensor, slopes: Tensor | None, clock: Clock) -> Tensor:
    """Minimise F.

    Args:
        measured: f, t and s.
        prior: N(μ, V·Λ·Vᵀ).
        start: z (B, K).
        slopes: J (M, B·K) near the start; None: the prior's scale alone makes the problem rounder.
        clock: no evaluation but the first starts after it has run out.

    Returns:
        z (B, K) of the lowest F that was evaluated.
    """
    shape = (1, *start.shape)
    curvature = _curvature(measured, prior, start, slopes)
    ended = lbfgs.minimise(
        lambda w: measured.value(prior, curvature.place(w.view(shape))[0]),
        curvature.locate(start.view(shape)).flatten(),
        clock,
        outer=OUTER,
        history=20,
        change=1e-3,
    )
    return curvature.place(ended.point.view(shape))[0].detach()


def _curvature(measured: Measured, prior: Prior, start: Tensor, slopes: Tensor | None) -> Curvature:
    batch, rank = start.shape
    if slopes is None:
        return prior_curvature(prior.variance[:rank], batch)
    rows = (slopes.float() / measured.variance.sqrt()[:, None]).T
    return full_curvature(rows.reshape(batch, rank, -1), prior.variance[:rank])
