"""Gauss–Newton for maximum a posteriori: the image that explains noisy measurements, given what images look like.

Minimises F(z) = Σ_j w_j·(f_j(x) − t_j)² + Σ_k z_k²/λ_k over x = μ + V·z, with a damped step (Levenberg–Marquardt) from
an explicit Jacobian. With all of f linear, one undamped step is the posterior mean. The method of
Balunović et al. 2021 (2111.04706) in spirit: attack = Bayes-optimal inversion of the defended gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from .clock import Clock
from .prior import Prior

DAMPING = 1e-6
"""At the start, relative to the diagonal: 1e-2 holds directions back that few entries decide, as behind a mask."""
TRIES = 14
CHUNK = 98
"""Columns of the Jacobian that are computed at once, where memory allows."""
AT_ONCE = 12_500_000
"""Entries of them that may be alive at once."""


@dataclass(frozen=True)
class Problem:
    """Measurements of B images."""

    function: Callable[[Tensor], Tensor]
    """Images (B, C, H, W) -> (M,)."""
    target: Tensor
    """t (M,)."""
    variance: Tensor
    """(M,), infinite on entries to ignore."""
    laplace: bool = False
    """Laplace noise of that variance: solved by reweighting."""

    def residual(self, x: Tensor) -> Tensor:
        """f(x) − t in float64, 0 on ignored entries."""
        difference = (self.function(x) - self.target).double()
        return torch.where(self.variance.isinf(), 0.0, difference)

    def weights(self, residual: Tensor, extra: float) -> Tensor:
        """w at noise widened by the variance `extra`; for Laplace noise 1/(b·max(|r|, b/20)), with 2b² the variance."""
        variance = self.variance.double() + extra
        if not self.laplace:
            return 1 / variance
        scale = (variance / 2).sqrt()
        return 1 / (scale * torch.maximum(residual.abs(), scale / 20))


@dataclass(frozen=True)
class Solution:
    """Where Gauss–Newton ended."""

    coordinates: Tensor
    """z (B, K)."""
    value: float
    """F."""
    misfit: float
    """Its part Σ w·(f − t)²."""
    iterations: int
    converged: bool
    """False: the iteration limit or the budget ended it."""


def derivatives(function: Callable[[Tensor], Tensor], images: Tensor, which: Tensor, directions: Tensor) -> Tensor:
    """Slopes of a function of B images (B, C, H, W) -> (M,), one row for each of N directions: (N, M).

    Row n moves image number `which[n]` along `directions[n]` (C, H, W); forward-mode products, some at once.
    """
    images = images.clone()  # forward mode copies the whole storage behind a view

    def row(image: Tensor, direction: Tensor) -> Tensor:
        where = nn.functional.one_hot(image, len(images)).to(direction)
        tangent = where.view(-1, 1, 1, 1) * direction
        slope: Tensor = jvp(function, (images,), (tangent,))[1]
        return slope

    chunk = max(1, min(CHUNK // len(images), AT_ONCE // max(1, len(function(images)))))
    pairs = zip(which.split(chunk), directions.split(chunk), strict=True)
    with warnings.catch_warnings():
        # Forward mode scripts its own decompositions on first use, and warns of it.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        return torch.cat([vmap(row)(i, d) for i, d in pairs])


def jacobian(problem: Problem, prior: Prior, coordinates: Tensor) -> Tensor:
    """∂f/∂z (M, B·K) at x = μ + V·z, z (B, K)."""
    batch, rank = coordinates.shape
    images = prior.synthesise(coordinates)
    directions = prior.basis[:, :rank].T.reshape(rank, *prior.mean.shape)
    which = torch.arange(batch, device=images.device).repeat_interleave(rank)
    return derivatives(problem.function, images, which, directions.repeat(batch, 1, 1, 1)).T.double()


def posterior_variance(information: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What measurements leave of a Gaussian prior with independent coordinates.

    Args:
        information: Λ^½JᵀWJΛ^½ (K, K).
        scale: Λ (K,), the prior variances.

    Returns:
        eigenvalues of the information (K,), not negative; posterior variance of each coordinate (K,).
    """
    values, vectors = torch.linalg.eigh(information)
    values = values.clamp(min=0)
    return values, scale * (vectors**2 @ (1 / (1 + values)))


def minimise(
    problem: Problem,
    prior: Prior,
    start: Tensor,
    clock: Clock,
    *,
    extra: float = 0.0,
    max_iter: int = 40,
    tolerance: float = 1e-4,
) -> Solution:
    """Damped Gauss–Newton from coordinates `start` (B, K).

    Args:
        problem: the measurements.
        prior: N(μ, V·Λ·Vᵀ).
        start: z₀.
        clock: no iteration starts after it has run out.
        extra: variance added to that of every measurement (annealing).
        max_iter: accepted steps; 4–6 usually do, ill-conditioned trained models need up to 15.
        tolerance: stop when F falls by less than this share.
    """
    shape = start.shape
    z = start.double().reshape(-1)
    precision = (1 / prior.variance[: shape[1]].double()).repeat(shape[0])

    def residual_at(point: Tensor) -> Tensor:
        return problem.residual(prior.synthesise(point.to(start.dtype).view(shape)))

    def value(residual: Tensor, weights: Tensor, point: Tensor) -> float:
        return float((weights * residual**2).sum() + (precision * point**2).sum())

    residual = residual_at(z)
    weights = problem.weights(residual, extra)
    current, damping, iterations, converged = value(residual, weights, z), DAMPING, 0, False
    while iterations < max_iter and clock.left > 0 and not converged:
        slopes = jacobian(problem, prior, z.to(start.dtype).view(shape))
        weighted = slopes * weights[:, None]
        matrix = slopes.T @ weighted + precision.diag()
        gradient = weighted.T @ residual + precision * z
        for _ in range(TRIES):
            factor, info = torch.linalg.cholesky_ex(matrix + damping * matrix.diagonal().diag())
            if int(info) == 0:
                trial = z - torch.cholesky_solve(gradient[:, None], factor)[:, 0]
                moved = residual_at(trial)
                # The same weights on both sides: for Laplace noise they change only between steps.
                after = value(moved, weights, trial)
                if after < current:
                    break
            damping *= 5
        else:
            converged = True
            break
        converged = current - after < tolerance * abs(current)
        damping = max(damping / 5, 1e-9)
        z, residual, iterations = trial, moved, iterations + 1
        weights = problem.weights(residual, extra)
        current = value(residual, weights, z)
    misfit = float((weights * residual**2).sum())
    return Solution(z.to(start.dtype).view(shape), current, misfit, iterations, converged)
